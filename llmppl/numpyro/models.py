"""Ready generative programs for NumPyro: those of :mod:`llmppl.models`, made by a :class:`llmppl.numpyro.LM`."""

from llmppl.models import continuation, ending_first, infilling, keyword

__all__ = ["continuation", "ending_first", "infilling", "keyword"]
