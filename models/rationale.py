"""A label with its rationale: why a text has the label that it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmppl.models.primitives import Maker
from llmppl.text.declared import declared


@declared
def rationale(
    lm: Maker,
    options: Sequence[str],
    instruction: str = "",
    before: str = "\nThis sentence",
    between: str = " So it is",
    max_tokens: int = 12,
    stop: Any = ".",
    examples: Sequence[tuple[str, str, str]] = (),
) -> Callable[..., Any]:
    r"""The program p(rationale | text) p(label | text, rationale): a classifier that says why.

    .. math:: p(y|x) = \sum_z p(z|x)\, p(y|x, z)

    Averaged over the rationales that the language model writes of itself it answers (:func:`predict` is that average);
    the posterior over rationales, given the label, explains. Learned with :meth:`llmppl.LM.adapt` it is a classifier
    trained through its own reasons (Hu et al. 2024, sec. 4.4; Phan et al. 2023).

    Text and label are strings, or lists of strings inside a plate. Without a label it is drawn, too.

    :param lm: a :class:`llmppl.LM`, or a :class:`llmppl.numpyro.LM`: the program is then one of NumPyro's.
    :param options: the labels, each with the space before it: ``[" objective", " subjective"]``.
    :param instruction: stands before everything.
    :param before: between the text and its rationale.
    :param between: between the rationale and the label.
    :param max_tokens: most tokens of the rationale.
    :param stop: what the rationale ends with.
    :param examples: worked ones that stand before the text: text, rationale, label.
    :raises ValueError: options that differ only by the space around them.
    """
    named = _checked(options)
    width = lm.encode(list(options)).shape[-1]
    shown = instruction + "".join(f"{t}{before}{z}{between}{named(y)}.\n\n" for t, z, y in examples)

    def classify(text: Any, label: Any = None) -> Any:
        observed = _observed(lm, label, named, width)
        written = [shown, text, before]
        reason = lm.primitives.sample("rationale", lm(*written, max_tokens=max_tokens, stop=stop))
        lm.primitives.sample("label", lm.choice(*written, reason, between, options=options), obs=observed)
        return reason

    return classify


def _checked(options: Sequence[str]) -> Callable[[str], str]:
    """From a label, with or without the space before it, to the option that it is."""
    if isinstance(options, str):
        raise TypeError(f"options={options!r} is a string. Give a list of labels.")
    by_name: dict[str, str] = {}
    for option in options:
        other = by_name.setdefault(option.strip(), option)
        if other != option:
            raise ValueError(
                f"options {other!r} and {option!r} differ only by the space around them, by which labels are not told "
                "apart. Keep one of the two, or reword it."
            )

    def named(label: str) -> str:
        if not isinstance(label, str) or label.strip() not in by_name:
            raise ValueError(f"label={label!r} is none of the options {list(options)}. Give one of them.")
        return by_name[label.strip()]

    return named


def _observed(lm: Maker, label: Any, named: Callable[[str], str], width: int) -> Any:
    if label is None:
        return None
    if isinstance(label, str):
        return lm.encode(named(label))
    if isinstance(label, (list, tuple)):
        return lm.encode([named(one) for one in label])
    return lm.map(named, label, max_tokens=width, returns=str)  # token ids already, as in a compiled program
