"""The number that stands behind the end of a text, on every backend."""

PAD = -1
"""Stands behind the end of a text: outside every vocabulary, of probability one there and zero before."""
