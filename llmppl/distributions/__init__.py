"""Distributions over text."""

from llmppl.distributions.autoregressive import AutoregressiveText
from llmppl.distributions.choice import Choice

__all__ = ["AutoregressiveText", "Choice"]
