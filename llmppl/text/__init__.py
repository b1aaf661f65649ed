"""Text as both frameworks have it: token ids and strings, stop rules, grammars, prefix tries. No torch, no jax."""

from llmppl.text.padding import PAD

__all__ = ["PAD"]
