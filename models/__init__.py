"""Ready generative programs with latent text."""

from llmppl.models.arithmetic import arithmetic
from llmppl.models.calculator import calculate
from llmppl.models.continuation import continuation
from llmppl.models.infilling import ending_first, infilling
from llmppl.models.keyword import keyword
from llmppl.models.rationale import rationale

__all__ = ["arithmetic", "calculate", "continuation", "ending_first", "infilling", "keyword", "rationale"]
