"""Dialogue: what somebody wants, and what to answer, given what was said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmppl.models.primitives import Maker
from llmppl.text.declared import declared

STYLES = (" brief", " warm", " thorough")
"""How an answer may be: the default personas."""


@declared
def dialogue(
    lm: Maker,
    intents: Sequence[str],
    styles: Sequence[str] = STYLES,
    replies: int = 1,
    max_tokens: int = 24,
    stop: Any = (".", "!", "?"),
    user: str = "You are a customer of a shop. What you want:{}. Speak as the customer, in a sentence.",
    agent: str = "You answer customers of a shop. Your answers are{}, and one sentence long.",
    opening: str = "How can I help you?",
) -> Callable[..., Any]:
    r"""The program of a conversation, in which the language model plays both sides:

    .. math:: i \sim \text{intents}, \quad s \sim \text{styles}, \quad
              \text{message} \sim \text{user}(i), \quad \text{reply}_k \sim \text{agent}(s, \text{message}), \quad
              \text{next}_k \sim \text{user}(i, \text{message}, \text{reply}_k)

    Given a message its posterior over intents is a classifier that was told nothing but their names (a noisy channel:
    who wants what would say this?). Given also what the user shall say next, "Thanks, that is just what I wanted.", the
    posterior over replies is of those that lead there. Intents and styles are equally probable before. The agent sees
    the message and not the intent.

    Message and next turn are strings of any form, or lists of strings inside a plate; ``None`` is drawn, and so is not
    observed.
    Sites: latent ``intent``; ``message``; latent ``style``; in a plate ``replies``, ``reply`` and ``next``.

    :param lm: a :class:`llmppl.LM`, or a :class:`llmppl.numpyro.LM`, whose tokenizer has a chat template.
    :param intents: each with the space before it: ``[" to send something back", ...]``.
    :param styles: of answers, likewise.
    :param replies: candidates, drawn independently of each other given the rest. Without any the program ends with the
        message: the classifier alone, whose posterior :func:`llmppl.exact_posterior` enumerates.
    :param max_tokens: most tokens of what is said and not given.
    :param stop: what it ends with.
    :param user: who the user is; ``{}`` is the intent.
    :param agent: who answers; ``{}`` is the style.
    :param opening: what the agent has said before the message.
    :raises ValueError: ``user`` or ``agent`` without ``{}``; a next turn behind no reply.
    """
    for name, words in (("user", user), ("agent", agent)):
        if words.count("{}") != 1:
            raise ValueError(f"{name}={words!r} must hold {{}} once, where the words of the site go.")
    if replies < 0:
        raise ValueError(f"replies={replies} must not be negative.")
    sample, law = lm.primitives.sample, {"max_tokens": max_tokens, "stop": stop}
    # What a guide reads by default; the program's own choices are between equals.
    wants = [{"role": "user", "content": "What does the user want?"}]
    ways = [{"role": "user", "content": "How do you answer?"}]

    def alike(options: Sequence[str]) -> list[float]:
        return [1.0] * len(options)

    def filled(words: str, value: Any, options: Sequence[str]) -> Any:
        widest = lm.encode([words.format(option) for option in options]).shape[-1]
        return lm.map(words.format, value, returns=str, max_tokens=widest)

    def turn(name: str, context: list[Any], words: Any) -> Any:
        if words is None:
            return sample(name, lm(*context, **law))
        return sample(name, lm(*context), obs=lm.encode(words) if isinstance(words, (str, list, tuple)) else words)

    def talk(message: Any = None, following: Any = None) -> Any:
        if following is not None and not replies:
            raise ValueError("there is no reply before the next turn. Set replies to 1 or more.")
        intent = sample("intent", lm.choice(*lm.chat(wants), "The user wants", options=intents, probs=alike(intents)))
        # The user is played as the one who answers, so that the model has written what the user says.
        told = [
            {"role": "system", "content": filled(user, intent, intents)},
            {"role": "user", "content": opening},
        ]
        said = turn("message", lm.chat(told), message)
        if not replies:
            return intent
        style = sample("style", lm.choice(*lm.chat(ways), "My answers are", options=styles, probs=alike(styles)))
        agents = {"role": "system", "content": filled(agent, style, styles)}
        with lm.primitives.plate("replies", replies):
            context = lm.chat([agents, {"role": "user", "content": said}])
            reply = sample("reply", lm(*context, **law))
            told += [{"role": "assistant", "content": said}, {"role": "user", "content": reply}]
            turn("next", lm.chat(told), following)
        return reply

    return talk
