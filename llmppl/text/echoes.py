"""What may be said in place of a text that is said again, on every backend."""

MISTAKE = 1e-3
"""Probability of any other text, where a program does not say."""

LONGEST_MISTAKE = 64
"""Most tokens of another text, where a program does not say."""


def check_echo(mistake: float, max_tokens: int) -> None:
    """Refuse mistakes that are no law.

    :raises ValueError: naming the argument and its range.
    """
    if not 0 < mistake < 1:
        raise ValueError(f"mistake={mistake} must lie between 0 and 1.")
    if max_tokens < 0:
        raise ValueError(f"max_tokens={max_tokens} must not be negative: it is the most tokens of a mistake.")
