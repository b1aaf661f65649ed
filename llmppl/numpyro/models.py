"""Ready generative programs for NumPyro: those of :mod:`llmppl.models`, made by a :class:`llmppl.numpyro.LM`."""

from llmppl.models import *  # noqa: F403 - one list for both frameworks
from llmppl.models import __all__ as __all__
