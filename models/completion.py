"""Code that passes tests: the hole between the beginning and the end of a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmppl.models.interpreter import FAILED, run
from llmppl.models.primitives import Maker, kept
from llmppl.text.declared import declared


@declared
def completion(
    lm: Maker,
    calls: Sequence[str],
    max_tokens: int = 24,
    stop: Any = "\n",
    mistake: float = 1e-3,
    steps: int = 2000,
    output_tokens: int = 32,
) -> Callable[..., Any]:
    r"""The program that writes a hole in a function and runs it:

    .. math:: p(\text{body}|\text{prefix})\; p(\text{suffix}|\text{prefix}, \text{body})\;
              \prod_i p(\text{output}_i\,|\,\text{run}(\text{prefix body suffix}, \text{call}_i))

    where an output is what the interpreter says, and with probability ``mistake`` anything
    (:meth:`llmppl.LM.echo`). So a body that fails a test is improbable and not impossible, how many tests it fails
    tells bodies apart, and whatever is written is right for the outputs that it has, which teaches a guide. What is run
    is a small part of Python (:func:`~llmppl.models.interpreter.run`).

    The program's arguments are prefix, suffix, and an output for each call: strings, or lists of strings inside a
    plate. A suffix that is empty, in all rows, or ``None`` is not observed. Sites: latent ``body``; deterministic
    ``got_1``, ...; observed ``suffix``, ``output_1``, ...

    :param lm: a :class:`llmppl.LM`, or a :class:`llmppl.numpyro.LM`: the program is then one of NumPyro's.
    :param calls: expressions to evaluate, such as ``"add(1, 2)"``.
    :param max_tokens: most tokens of the body.
    :param stop: what the body ends with.
    :param mistake: probability that an output is not what was computed.
    :param steps: of the interpreter for each call.
    :param output_tokens: most tokens of an output; of a longer one the result is ``"error"``.
    :raises ValueError: no calls.
    """
    if isinstance(calls, str) or not calls:
        raise ValueError(f"calls={calls!r} must be a list of expressions, e.g. ['add(1, 2)'].")

    def said(prefix: str, body: str, suffix: str, call: str) -> str:
        output = run(prefix + body + suffix, call, steps)
        return output if len(output) <= output_tokens else FAILED

    def empty(suffix: Any) -> bool:
        if isinstance(suffix, (list, tuple)):
            return not any(suffix)
        return suffix is None or (isinstance(suffix, str) and not suffix)

    def encoded(text: Any) -> Any:
        return lm.encode(text) if isinstance(text, (str, list, tuple)) else text

    def stripped(output: Any) -> Any:
        return lm.map(str.strip, output, max_tokens=output_tokens, returns=str)

    def complete(prefix: Any, suffix: Any, *outputs: Any) -> Any:
        if len(outputs) != len(calls):
            raise ValueError(f"there are {len(outputs)} outputs of {len(calls)} calls. Give one for each.")
        body = lm.primitives.sample("body", lm(prefix, max_tokens=max_tokens, stop=stop))
        if not empty(suffix):
            lm.primitives.sample("suffix", lm(prefix, body), obs=encoded(suffix))
        written = "" if suffix is None else suffix
        for n, (call, output) in enumerate(zip(calls, outputs, strict=True), 1):
            result = lm.map(said, prefix, body, written, call, max_tokens=output_tokens, returns=str)
            got = kept(lm, f"got_{n}", result)
            lm.primitives.sample(f"output_{n}", lm.echo(got, mistake, output_tokens), obs=stripped(output))
        return body

    return complete
