"""Ready generative programs with latent text."""

from llmppl.models.arithmetic import arithmetic
from llmppl.models.calculator import calculate
from llmppl.models.captioned import captioned
from llmppl.models.completion import completion
from llmppl.models.continuation import continuation
from llmppl.models.described_series import described, described_series, descriptions
from llmppl.models.dialogue import dialogue
from llmppl.models.formula import evaluate, formula
from llmppl.models.infilling import ending_first, infilling
from llmppl.models.interpreter import run
from llmppl.models.keyword import keyword
from llmppl.models.plan import plan, shortest_plans, walk
from llmppl.models.rationale import rationale
from llmppl.models.record import record

__all__ = [
    "arithmetic",
    "calculate",
    "captioned",
    "completion",
    "continuation",
    "described",
    "described_series",
    "descriptions",
    "dialogue",
    "ending_first",
    "evaluate",
    "formula",
    "infilling",
    "keyword",
    "plan",
    "rationale",
    "record",
    "run",
    "shortest_plans",
    "walk",
]
