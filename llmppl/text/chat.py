"""Conversations as pieces of a context, by a tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmppl.text.spelling import Spelling, describe

_MARK = "content-of-message-{}-goes-here"
"""Stands for a content while the template is rendered, so that nothing in the content is read as a part of it."""


def chat_pieces(spelling: Spelling, messages: Sequence[Mapping[str, Any]], answers: bool) -> list[tuple[bool, Any]]:
    """The parts of a rendered conversation in their order: ``(True, token ids)`` of the template's own, control tokens
    among them, and ``(False, content)`` of the messages.

    What a tokenizer puts before every text is left out where the template writes it, too: contexts have it already.

    :param answers: whether the template's beginning of an answer stands at the end.
    :raises TypeError, ValueError: no messages, one without role or content, a tokenizer without a template, or a
        template that does not show every content once; names the message.
    """
    render = spelling.codec.chat_template
    if render is None:
        raise ValueError(
            "this tokenizer has no chat template. Load an instruction-tuned model with its own tokenizer, or write the "
            "turns as pieces: lm.encode(text, special=True) takes control tokens."
        )
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise TypeError(
            'messages must be a list such as [{"role": "user", "content": "Who are you?"}], got '
            f"{describe(messages) if isinstance(messages, str) else repr(messages)}."
        )
    for n, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f'messages[{n}]={message!r} needs "role", a string, and "content", a piece.')
    marked = [{**message, "content": _MARK.format(n)} for n, message in enumerate(messages)]
    try:
        rest = render(marked, answers)
    except Exception as error:  # whatever a template raises, it says why
        raise ValueError(f"the tokenizer's chat template refuses these messages: {error}") from error
    parts: list[tuple[bool, Any]] = []
    for n, message in enumerate(messages):
        before, mark, rest = rest.partition(_MARK.format(n))
        if not mark or _MARK.format(n) in rest:
            raise ValueError(
                f"the chat template does not show the content of messages[{n}] once, in its place. Leave that message "
                "out, or write the turns as pieces with lm.encode(text, special=True)."
            )
        parts += [(True, before), (False, message["content"])]
    own = [
        (True, spelling.ids(part, special=True)) if is_own else (False, part) for is_own, part in [*parts, (True, rest)]
    ]
    start = spelling.codec.start
    if start and own[0][1][: len(start)] == start:
        own[0] = (True, own[0][1][len(start) :])
    return [(is_own, part) for is_own, part in own if not (is_own and not part)]
