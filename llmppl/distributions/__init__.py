"""Distributions over text."""

from llmppl.distributions.autoregressive import AutoregressiveText
from llmppl.distributions.choice import Choice
from llmppl.distributions.factorised import FactorisedText

__all__ = ["AutoregressiveText", "Choice", "FactorisedText"]
