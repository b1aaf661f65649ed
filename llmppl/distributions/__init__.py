"""Distributions over text."""

from llmppl.distributions.autoregressive_text import AutoregressiveText
from llmppl.distributions.choice import Choice
from llmppl.distributions.factorised_text import FactorisedText
from llmppl.distributions.masked_text import MaskedText

__all__ = ["AutoregressiveText", "Choice", "FactorisedText", "MaskedText"]
