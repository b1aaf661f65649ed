"""Ready generative programs for NumPyro: those of :mod:`llmppl.models`, made by a :class:`llmppl.numpyro.LM`."""

from llmppl.models import arithmetic, calculate, continuation, ending_first, infilling, keyword, rationale

__all__ = ["arithmetic", "calculate", "continuation", "ending_first", "infilling", "keyword", "rationale"]
