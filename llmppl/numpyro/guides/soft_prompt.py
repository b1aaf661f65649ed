"""A guide by prompt tuning: learned embeddings in front of what the frozen transformer reads."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from llmppl.numpyro.guides.adapter_guide import AdapterGuide
from llmppl.numpyro.guides.text_guide import Context, Others, Prompt, Text
from llmppl.numpyro.language_model import LM
from llmppl.numpyro.network.decoder import Weights
from llmppl.numpyro.network.reading import VIRTUAL
from llmppl.numpyro.network.text_arrays import is_concrete, lengths
from llmppl.numpyro.programs.tracing import Program
from llmppl.text import PAD
from llmppl.text.declared import declared
from llmppl.text.prompts import check_virtual_tokens, initial_ids


class SoftPromptGuide(AdapterGuide):
    r"""Prompt tuning: the frozen language model behind virtual tokens with learned embeddings :math:`v`,

    .. math:: q(z|x) = \prod_t p(z_t \mid v_1, \dots, v_n, \text{prompt}, z_{<t})

    (Lester, Al-Rfou, Constant 2021, `The power of scale for parameter-efficient prompt tuning`). The embeddings, ``n``
    times the network's width, are the only parameters. The virtual tokens stand before the context of every latent
    text, behind the token that begins a text, where the model has one. The law of a text (stop tokens, lengths,
    temperature, vocabulary) is the prior's.

    Embeddings need a larger learning rate than LoRA layers, e.g. ``1e-2``.

    Files of :meth:`save` are those of :class:`llmppl.guides.SoftPromptGuide`, in both directions.

    :param num_virtual_tokens: ``n``. They take room in the model's context.
    :param initial_text: a text whose tokens' embeddings to start from, repeated or cut to ``n`` tokens. By default they
        are those of tokens drawn at random from the vocabulary, which the paper finds better than random numbers.
    :param adapter: the adapter's name, part of that of its ``numpyro.param`` site; made up by default.
    :param seed: of the initial embeddings; 0 by default.
    :raises TypeError, ValueError: fewer than one virtual token, more than the model can read, or an ``initial_text``
        without tokens.

    Other parameters as in :class:`TextGuide`.
    """

    @declared
    def __init__(
        self,
        model: Program,
        lm: LM,
        prompt: Mapping[str, Prompt] | None = None,
        others: Others | None = None,
        num_virtual_tokens: int = 20,
        initial_text: str | None = None,
        adapter: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(model, lm, prompt, others, adapter, seed)
        check_virtual_tokens(num_virtual_tokens, lm.architecture.max_length)
        self.num_virtual_tokens = num_virtual_tokens
        self._initial_ids = (
            None if initial_text is None else initial_ids(initial_text, partial(lm.spelling.ids, first=True))
        )
        self.weights = self._initial(jax.random.key(self._seed))

    def _initial(self, key: jax.Array) -> Weights:
        words = self.lm.weights["embed"]
        count = self.num_virtual_tokens
        if self._initial_ids is None:
            ids = random.choice(key, len(words), (count,))
        else:
            ids = jnp.asarray((self._initial_ids * -(-count // len(self._initial_ids)))[:count])
        return {VIRTUAL: words[ids].astype(self._precision)}

    def _lora(self) -> Weights:
        return {VIRTUAL: self.weights[VIRTUAL].astype(self.lm.dtype)}

    def distribution(self, name: str, prior: Text, context: Context) -> Text:
        try:
            return super().distribution(name, prior, self._behind_virtual_tokens(context))
        except ValueError as error:  # too long
            raise ValueError(
                f"site {name!r}: {error} {self.num_virtual_tokens} tokens of the prompt are virtual; "
                "num_virtual_tokens may be lower, too."
            ) from None

    def _behind_virtual_tokens(self, context: Context) -> Context:
        """A context with the virtual tokens before all but a token that begins a text."""
        codec = self.lm.codec
        virtual: Any = np.arange(self.num_virtual_tokens, dtype=np.int32) + len(self.lm.weights["embed"])
        first, *rest = context
        if codec.start:
            cut = len(codec.start)
            return (first[..., :cut], virtual, *((first[..., cut:],) if first.shape[-1] > cut else ()), *rest)
        if codec.bos is not None and (is_concrete(first) or first.shape[-1] == 1):
            # The context of no text is one such token, which LM.context() puts there.
            alone: Any = sum(lengths(jnp.asarray(text)) for text in context) == 1
            begins: Any = (first == codec.bos) & alone[..., None]
            if not is_concrete(begins) or bool(begins.any()):
                return (jnp.where(begins, first, PAD), virtual, jnp.where(begins, PAD, first), *rest)
        return (virtual, *context)

    def tensors(self) -> dict[str, np.ndarray]:
        return {VIRTUAL: np.asarray(self.weights[VIRTUAL])}

    def _load(self, tensors: Mapping[str, Any]) -> None:
        self.weights = {VIRTUAL: jnp.asarray(tensors[VIRTUAL], self._precision)}

    def settings(self) -> dict[str, object]:
        return {**super().settings(), "num_virtual_tokens": self.num_virtual_tokens}

    def _adaptation(self) -> str:
        return f"{self.num_virtual_tokens} virtual tokens"
