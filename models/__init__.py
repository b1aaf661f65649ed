"""Ready generative programs with latent text."""

from llmppl.models.continuation import continuation
from llmppl.models.infilling import ending_first, infilling
from llmppl.models.keyword import keyword

__all__ = ["continuation", "ending_first", "infilling", "keyword"]
