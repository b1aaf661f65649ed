"""A guide by prompt tuning: learned embeddings in front of what the frozen transformer reads."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmppl.distributions.conditioned_text import ConditionedText
from llmppl.guides.adapter_guide import AdapterGuide
from llmppl.guides.text_guide import Others, Prompt
from llmppl.language_model import LM
from llmppl.network.text_tensors import lengths
from llmppl.programs.structure import Program
from llmppl.text import PAD
from llmppl.text.declared import declared
from llmppl.text.prompts import check_virtual_tokens, initial_ids


class SoftPromptGuide(AdapterGuide):
    r"""Prompt tuning: the frozen language model behind virtual tokens with learned embeddings :math:`v`,

    .. math:: q(z|x) = \prod_t p(z_t \mid v_1, \dots, v_n, \text{prompt}, z_{<t})

    (Lester, Al-Rfou, Constant 2021, `The power of scale for parameter-efficient prompt tuning`). The embeddings,
    ``n`` times the network's width, are the only parameters. The virtual tokens stand before the context of every
    latent text, behind the token that begins a text, where the model has one. The law of a text (stop tokens,
    lengths, temperature, vocabulary, grammar) is the prior's.

    Embeddings need a larger ``learning_rate=`` than LoRA layers, of :func:`~llmppl.fit` and
    :func:`~llmppl.gap_report` alike, e.g. ``1e-2``.

    :param num_virtual_tokens: ``n``. They take room in the model's context.
    :param initial_text: a text whose tokens' embeddings to start from, repeated or cut to ``n`` tokens. By default
        they are those of tokens drawn at random from the vocabulary, which the paper finds better than random numbers.
    :param adapter: name of the virtual tokens on the model; made up by default.
    :param seed: of the initial embeddings; drawn from torch's generator by default.
    :raises TypeError, ValueError: fewer than one virtual token, more than the model can read, or an
        ``initial_text`` without tokens.

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
        super().__init__(model, lm, prompt, others)
        check_virtual_tokens(num_virtual_tokens, lm.max_length)
        self.num_virtual_tokens = num_virtual_tokens
        self._initial_ids = (
            None if initial_text is None else initial_ids(initial_text, partial(lm.spelling.ids, first=True))
        )
        self._adapt(adapter, seed, self._add)

    def _add(self, name: str) -> None:
        self._virtual_ids = list(self.lm.adapters.add_virtual_tokens(name, self._initial_embeddings()))

    def distribution(self, name: str, prior: ConditionedText, context: Tensor) -> ConditionedText:
        try:
            return super().distribution(name, prior, self._behind_virtual_tokens(context))
        except ValueError as error:  # too long
            raise ValueError(
                f"site {name!r}: {error} {self.num_virtual_tokens} tokens of the prompt are virtual; "
                "num_virtual_tokens may be lower, too."
            ) from None

    def _behind_virtual_tokens(self, context: Tensor) -> Tensor:
        """A context ``batch_shape + (L,)`` with the virtual tokens before all but a token that begins a text."""
        codec = self.lm.codec
        start, rest = context.split([len(codec.start), context.shape[-1] - len(codec.start)], -1)
        if codec.bos is not None and not codec.start:
            # The context of no text is one such token, which LM.context() puts there.
            begins = (rest == codec.bos) & (lengths(rest) == 1)[..., None]
            if bool(begins.any()):
                start, rest = rest.where(begins, PAD), rest.masked_fill(begins, PAD)
        virtual = torch.tensor(self._virtual_ids, device=context.device)
        return torch.cat([start, virtual.expand(context.shape[:-1] + virtual.shape), rest], -1)

    def reset_parameters(self) -> None:
        """Start anew: at ``initial_text``, or at other tokens by torch's generator. Parameters of ``others`` stay."""
        with torch.no_grad():
            self.weights["virtual_tokens"].copy_(self._initial_embeddings())

    @torch.no_grad()
    def _initial_embeddings(self) -> Tensor:
        """``(n, width)``, in single precision at least: they train."""
        from peft import PromptTuningConfig, PromptTuningInit
        from peft.tuners.prompt_tuning import PromptEmbedding

        words = self.lm.transformer.get_input_embeddings()
        if self._initial_ids is None:
            config: Any = PromptTuningConfig(
                prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
                num_virtual_tokens=self.num_virtual_tokens,
                token_dim=words.weight.shape[-1],
                num_transformer_submodules=1,
            )
            found = PromptEmbedding(config, words).embedding.weight
        else:
            # peft would load the tokenizer by its name; a language model's need have none.
            repeated = self._initial_ids * -(-self.num_virtual_tokens // len(self._initial_ids))
            found = words(torch.tensor(repeated[: self.num_virtual_tokens], device=self.lm.device))
        return found.to(self.lm.device, torch.promote_types(self.lm.dtype, torch.float32))

    def settings(self) -> dict[str, object]:
        return {**super().settings(), "num_virtual_tokens": self.num_virtual_tokens}

    def _adaptation(self) -> str:
        return f"{self.num_virtual_tokens} virtual tokens"
