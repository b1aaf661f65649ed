"""The number that stands behind the end of a text, on every backend."""

PAD = -1
