"""Ready generative programs for NumPyro: those of :mod:`llmppl.models`, made by a :class:`llmppl.numpyro.LM`."""

from llmppl.models import (
    arithmetic,
    calculate,
    completion,
    continuation,
    ending_first,
    evaluate,
    formula,
    infilling,
    keyword,
    plan,
    rationale,
    run,
    shortest_plans,
    walk,
)

__all__ = [
    "arithmetic",
    "calculate",
    "completion",
    "continuation",
    "ending_first",
    "evaluate",
    "formula",
    "infilling",
    "keyword",
    "plan",
    "rationale",
    "run",
    "shortest_plans",
    "walk",
]
