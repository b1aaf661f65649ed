"""The last resort: a text's likelihood by a torch model whose architecture has no native JAX decoder."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpyro.distributions import Distribution, constraints

from llmppl.numpyro.network.text_arrays import Piece, TextArgument, check_text
from llmppl.numpyro.network.text_law import TextLaw, _Text


class TorchModel(Protocol):
    """A :class:`llmppl.LM`: what this asks of it."""

    vocabulary: int

    def __call__(self, *pieces: Any) -> Any: ...


class TorchLikelihood(Distribution):
    """The frozen likelihood of an observed text, computed by torch outside of the compiled program.

    Of the same law as ``lm(*pieces)``: the unbounded stream, whose :meth:`log_prob` is the probability that it begins
    with the value. Works under ``jit`` and ``vmap``, each call leaving the compiled program once; has no gradients and
    cannot be sampled. Where :class:`llmppl.numpyro.LM` has the architecture, that is faster and does both.

    :param lm: a :class:`llmppl.LM`, in torch.
    :param pieces: strings, lists of strings (one a batch row) or JAX text arrays; the token ids of both sides must be
        those of the same tokenizer.
    :raises TypeError: ``lm`` is no torch language model, or a piece is no text.

    Example::

        middle = numpyro.sample("middle", lm("Tom lost his key.", max_tokens=16, stop="."))
        numpyro.sample("ending", TorchLikelihood(torch_lm, "Tom lost his key.", middle), obs=lm.encode(" He ran."))
    """

    arg_constraints: dict[str, Any] = {}
    reparametrized_params: list[str] = []
    pytree_data_fields = ("arrays",)
    pytree_aux_fields = ("lm", "strings")

    def __init__(self, lm: TorchModel, *pieces: Piece, validate_args: bool | None = None) -> None:
        if not hasattr(lm, "transformer") or not hasattr(lm, "vocabulary"):
            raise TypeError(
                f"lm must be a torch language model, llmppl.LM.from_pretrained(name), got {type(lm).__name__}. A "
                "llmppl.numpyro.LM is called itself: lm(*pieces)."
            )
        self.lm = lm
        strings: list[Any] = []
        arrays = []
        for number, piece in enumerate(pieces):
            if isinstance(piece, TextArgument):
                piece = piece.verbatim if number else piece.first
            if hasattr(piece, "dtype"):
                arrays.append(check_text(piece, f"piece {number}", lm.vocabulary))
                strings.append(None)
            elif isinstance(piece, str):
                strings.append(piece)
            elif isinstance(piece, (list, tuple)) and piece and all(isinstance(p, str) for p in piece):
                strings.append(tuple(piece))
            else:
                raise TypeError(
                    f"piece {number} must be a string, a non-empty list of strings or a text array, got {piece!r}."
                )
        # Strings stay as they are: torch's side encodes them as it would without us.
        self.arrays, self.strings = tuple(arrays), tuple(strings)
        shapes = [a.shape[:-1] for a in arrays] + [(len(s),) for s in strings if isinstance(s, tuple)]
        super().__init__(tuple(np.broadcast_shapes(*shapes)), (1,), validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:
        return False

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        return _Text(TextLaw(self.lm.vocabulary, None, 0, None))

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Always raises: this is for observed texts.

        :raises ValueError: always.
        """
        raise ValueError(
            "a TorchLikelihood is for observed texts and cannot be sampled. Pass obs=, or draw the text from a "
            "llmppl.numpyro.LM."
        )

    def log_prob(self, value: Array) -> Array:
        """Log-probability in nats, of shape ``broadcast(value.shape[:-1], batch_shape)``; no gradient flows."""
        value = check_text(value, "value", self.lm.vocabulary)
        if self._validate_args:
            self._validate_sample(value)
        shape = np.broadcast_shapes(value.shape[:-1], self.batch_shape)
        # All of one batch shape, so that vmap may put axes before them; torch's side reads equal prefixes once.
        given = [jnp.broadcast_to(text, (*shape, text.shape[-1])) for text in (value, *self.arrays)]
        result = jax.ShapeDtypeStruct(shape, jnp.result_type(float))
        return lax.stop_gradient(jax.pure_callback(self._on_host, result, *given, vmap_method="broadcast_all"))

    def _on_host(self, value: Array, *arrays: Array) -> np.ndarray:
        import torch

        texts = iter(torch.from_numpy(np.array(text, dtype=np.int64)) for text in arrays)
        pieces = [next(texts) if s is None else list(s) if isinstance(s, tuple) else s for s in self.strings]
        with torch.no_grad():
            scores = self.lm(*pieces).log_prob(torch.from_numpy(np.array(value, dtype=np.int64)))
        return scores.numpy(force=True).astype(jnp.result_type(float))

    def __repr__(self) -> str:
        return f"TorchLikelihood({self.lm!r}, batch_shape={self.batch_shape})"
