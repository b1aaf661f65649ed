"""Ready generative programs with latent text."""

from llmppl.models.continuation import continuation
from llmppl.models.infilling import ending_first, infilling

__all__ = ["continuation", "ending_first", "infilling"]
