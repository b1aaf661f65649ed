"""Distributions over text."""

from llmppl.distributions.autoregressive_text import AutoregressiveText
from llmppl.distributions.choice import Choice
from llmppl.distributions.content_word import ContentWord
from llmppl.distributions.echoed_text import EchoedText
from llmppl.distributions.factorised_text import FactorisedText
from llmppl.distributions.masked_text import MaskedText
from llmppl.distributions.twisted_text import TwistedText

__all__ = ["AutoregressiveText", "Choice", "ContentWord", "EchoedText", "FactorisedText", "MaskedText", "TwistedText"]
