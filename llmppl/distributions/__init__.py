"""Distributions over text."""

from llmppl.distributions.autoregressive import AutoregressiveText
from llmppl.distributions.choice import Choice
from llmppl.distributions.masked import MaskedText

__all__ = ["AutoregressiveText", "Choice", "MaskedText"]
