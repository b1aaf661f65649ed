"""A masked-diffusion language model: the probabilities of masked tokens given what stands on both sides."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmppl.distributions.masked_text import MaskedText
from llmppl.language_model import LM
from llmppl.network.bidirectional import mean_embedding, probe_bidirectional
from llmppl.network.text_law import TextLaw
from llmppl.network.text_tensors import Piece, left_aligned, lengths
from llmppl.network.transformer import KeysAndValues, Network, attend
from llmppl.network.unmasking import Plan, Reading, check_count
from llmppl.text import PAD
from llmppl.text.declared import declared

if TYPE_CHECKING:
    from types import EllipsisType


class MaskedLM(nn.Module):
    """A transformer that fills a gap, looking at both sides of it.

    The gap is a canvas of known length, some tokens of which are masked, and a token of its own that marks its
    end. All of them attend to both contexts and, in both directions, to the end mark and the tokens that are
    revealed (a 4-D attention mask). The contexts do not see the canvas, so that they are read once for all
    particles and steps; masks are seen by nobody, for they say no more than the end mark does. As in the
    causal model, the state before a position predicts it (Gong et al. 2024; Ye et al. 2025). So a text that is
    revealed from left to right is first predicted as the causal model predicts it. The length of the gap comes
    before its tokens, from a head on the contexts.

    Made by :meth:`adapted`, on the language model's own transformer, or :meth:`from_scratch`. Called, it is a
    distribution over the text in a gap::

        masked = MaskedLM.from_scratch(lm)
        middle = pyro.sample("middle", masked("Tom lost his key.", ..., " He was glad.", max_tokens=8, stop="."))

    References

    Gong et al. (2024), `Scaling diffusion language models via adaptation from autoregressive models`.
    Ye et al. (2025), `Dream 7B: diffusion large language models`.
    """

    def __init__(self, lm: LM, transformer: Any, marks: range, adapter: str | None, max_tokens: int) -> None:
        super().__init__()
        # Not registered as submodules: frozen weights are none of the parameters.
        self._shared = (lm, transformer, Network(transformer))
        self.mask, self.end = marks
        self.adapter, self.max_tokens = adapter, max_tokens
        self.alpha: float | None = None
        self.weights = nn.ParameterDict()
        self.length_head = nn.Linear(
            transformer.config.hidden_size,
            max_tokens,
            device=lm.device,
            dtype=torch.promote_types(lm.dtype, torch.float32),
        )
        nn.init.zeros_(self.length_head.weight)
        nn.init.zeros_(self.length_head.bias)

    @classmethod
    @declared
    def adapted(
        cls,
        lm: LM,
        max_tokens: int = 32,
        rank: int = 16,
        alpha: float | None = None,
        target_modules: list[str] | None = None,
        adapter: str | None = None,
        seed: int | None = None,
    ) -> MaskedLM:
        """The language model's own transformer with a LoRA adapter and a learned mask embedding.

        :param max_tokens: the longest gap.
        :raises ValueError: an architecture whose attention cannot be made bidirectional.
        """
        # Before the adapter is added: a refused call leaves the model as it was.
        check_count("max_tokens", max_tokens)
        check_count("rank", rank)
        name = adapter or lm.adapters.free_name("MaskedLM")
        scale = float(2 * rank if alpha is None else alpha)
        probe_bidirectional(lm.transformer)
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            lm.adapters.add(name, rank, scale, target_modules)
        marks = lm.adapters.add_virtual_tokens(name, mean_embedding(lm.transformer, lm.vocabulary).repeat(2, 1))
        model = cls(lm, lm.transformer, marks, name, max_tokens)
        model.alpha = scale
        model.weights.update({k.replace(".", "/"): p for k, p in lm.adapters.parameters(name).items()})
        return model

    @classmethod
    @declared
    def from_scratch(
        cls,
        lm: LM,
        max_tokens: int = 32,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        seed: int | None = None,
    ) -> MaskedLM:
        """A small transformer of its own over the language model's vocabulary, with random weights.

        Quick where the other is slow: with the default sizes and a vocabulary of 49,152 it has 7.1 million
        parameters, most of them embeddings.
        """
        from transformers import LlamaConfig, LlamaForCausalLM

        for key, count in (("max_tokens", max_tokens), ("width", width), ("layers", layers), ("heads", heads)):
            check_count(key, count)
        if width % heads:
            raise ValueError(f"width={width} must be a multiple of heads={heads}.")
        config = LlamaConfig(
            vocab_size=lm.vocabulary + 2,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=lm.max_length or 4096,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            # Trained as a whole, and half precision is too coarse for an optimizer's steps.
            dtype = torch.promote_types(lm.dtype, torch.float32)
            transformer = LlamaForCausalLM(config).to(device=lm.device, dtype=dtype)
        model = cls(lm, transformer.eval(), range(lm.vocabulary, lm.vocabulary + 2), None, max_tokens)
        model.weights.update({k.replace(".", "/"): p for k, p in transformer.named_parameters()})
        return model

    def reset_parameters(self) -> None:
        """Start anew, with other random numbers from torch's generator."""
        nn.init.zeros_(self.length_head.weight)
        nn.init.zeros_(self.length_head.bias)
        if self.adapter is None:
            fresh = type(self.transformer)(self.transformer.config).state_dict()
        else:
            self.lm.adapters.reset(self.adapter)
            fresh = {"virtual_tokens": mean_embedding(self.lm.transformer, self.lm.vocabulary).repeat(2, 1)}
        with torch.no_grad():
            for key, parameter in self.weights.items():
                if key.replace("/", ".") in fresh:
                    parameter.copy_(fresh[key.replace("/", ".")])

    def rename(self, names: Mapping[str, str]) -> None:
        """Take the adapter of a copy, whose name is another."""
        if self.adapter is not None:
            self.adapter = names.get(self.adapter, self.adapter)

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedLM:
        """An independent network on the same language model: an adapter of its own with the same values, or a
        transformer of its own. In a guide's copy the guide has seen to it."""
        lm, names = self.lm, dict[str, str]()
        if id(lm) not in memo:
            memo.update({id(part): part for part in (lm, lm.transformer, lm.adapters)})
            if self.adapter is not None:
                names[self.adapter] = lm.adapters.duplicate(self.adapter)
                theirs = lm.adapters.parameters(names[self.adapter])
                memo.update({id(p): theirs[key] for key, p in lm.adapters.parameters(self.adapter).items()})
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        twin.rename(names)
        return twin

    def settings(self) -> dict[str, object]:
        """What saved weights must agree with."""
        own: dict[str, object]
        if self.adapter is None:
            # The tensors' shapes say everything but this.
            own = {"heads": self.transformer.config.num_attention_heads}
        else:
            rank = next((p.shape[0] for key, p in self.weights.items() if "lora_A" in key), None)
            own = {"rank": rank, "alpha": self.alpha}
        return {"adapted": self.adapter is not None, "max_tokens": self.max_tokens, **own}

    @property
    def lm(self) -> LM:
        return self._shared[0]

    @property
    def transformer(self) -> Any:
        return self._shared[1]

    def forward(
        self,
        *pieces: Piece | EllipsisType,
        max_tokens: int,
        stop: str | int | Sequence[str] | Sequence[int] | Tensor | None = None,
        min_tokens: int = 0,
        temperature: float = 1.0,
        allowed: Tensor | Sequence[int] | None = None,
        steps: int | None = None,
        tokens_per_step: int | Sequence[int] | None = None,
        order: str = "confidence",
        num_orders: int = 1,
        **unknown: object,
    ) -> MaskedText:
        """The distribution over the text in the gap.

        :param pieces: as of :class:`~llmppl.LM`; ``...`` stands where the gap is, at the end by default.
        :param steps, tokens_per_step, order, num_orders: of a :class:`~llmppl.network.unmasking.Plan`.

        Other parameters as of :class:`~llmppl.LM`.

        :raises TypeError, ValueError: naming the argument and the mend.
        """
        refuse_truncation(unknown)
        plan = Plan(order, steps, tokens_per_step, num_orders)
        left, right = self.lm.both_sides(*pieces)
        law = self.lm.law(max_tokens, stop, min_tokens, temperature, allowed)
        if law.automaton is not None:
            raise ValueError(
                f"stop={stop!r}: a masked law fills tokens in any order, and a stop string that several tokens write "
                "ends it in none. Stop at token ids, or at a string that tokens hold whole, e.g. stop='.'"
            )
        return MaskedText(self, left, right, law, plan)

    # --- the network -------------------------------------------------------------------------------

    def length_log_probs(self, reading: Reading, law: TextLaw) -> Tensor:
        """log q(n | both sides) of ``n`` = 1 to ``law.max_tokens`` tokens, ``(N, law.max_tokens)``, nats."""
        assert law.max_tokens is not None
        row = reading.row
        count = torch.arange(1, law.max_tokens + 1, device=row.device)
        possible = (count >= max(law.min_tokens, 1)) if len(law.stop) else count == law.max_tokens
        if law.free_tokens == 0:
            possible = possible & (count == 1)
        if int(possible.sum()) == 1:
            return torch.where(possible, 0.0, -torch.inf).to(self.length_head.weight.dtype).expand(len(row), -1)
        each = torch.arange(len(reading.last), device=row.device)
        one = torch.ones_like(each)
        states = self.states(reading.of_distinct(each), torch.full_like(one, self.mask)[:, None], one)[:, 0]
        # Scaled by the width, as attention is: the head then learns at one rate for every model.
        logits = self.length_head(states.to(self.length_head.weight.dtype) / math.sqrt(states.shape[-1]))
        return logits[:, : law.max_tokens].masked_fill(~possible, -torch.inf).log_softmax(-1)[row]

    def read(self, left: Tensor, right: Tensor) -> Reading:
        """Read both sides of gaps; equal rows once.

        :param left, right: ``(N, L)``, padding anywhere; each left side has a token.
        """
        sides = [left_aligned(left), left_aligned(right)]
        distinct, row = torch.unique(torch.cat(sides, -1), dim=0, return_inverse=True)
        left, right = distinct.split([side.shape[-1] for side in sides], -1)
        size = lengths(left)
        last = left.gather(-1, (size - 1)[:, None])[:, 0]
        tokens = torch.cat([left.scatter(-1, (size - 1)[:, None], PAD), right], -1)
        place = torch.arange(left.shape[-1], device=left.device).expand_as(left)
        # Behind the longest gap, so that one reading serves gaps of every length.
        behind = torch.arange(right.shape[-1], device=left.device) + (size + self.max_tokens + 1)[:, None]
        places = torch.cat([place, behind], -1)
        order = (tokens == PAD).long().argsort(dim=-1, stable=True)
        width = int((tokens != PAD).sum(-1).max())
        tokens, places = tokens.gather(-1, order)[:, :width], places.gather(-1, order)[:, :width]
        valid = tokens != PAD
        keys: KeysAndValues = []
        if width:
            causal = torch.ones(width, width, dtype=torch.bool, device=left.device).tril()
            _, keys = self._run(tokens.clamp(min=0), places, (causal & valid[:, None])[:, None], [], True)
        return Reading(row, last, size - 1, valid, keys)

    def states(self, reading: Reading, canvas: Tensor, count: Tensor) -> Tensor:
        """The states that predict each canvas position, ``(N, T, H)``.

        :param canvas: ``(N, T)``, masks and tokens; only the first ``count`` of each row are there.
        """
        size, width = canvas.shape
        place = torch.arange(width + 2, device=canvas.device)
        block = torch.cat([reading.last[reading.row, None], canvas, torch.full_like(canvas[:, :1], PAD)], -1)
        ended = place == (count + 1)[:, None]
        block = torch.where(ended, self.end, block)
        seen = ended | ((place <= count[:, None]) & (block != self.mask))  # (N, T + 2)
        own = torch.eye(width + 2, dtype=torch.bool, device=canvas.device)
        within = seen[:, None] | own
        context = reading.valid[reading.row][:, None].expand(size, width + 2, -1)
        visible = torch.cat([context, within], -1)[:, None]
        past = [(k[reading.row], v[reading.row]) for k, v in reading.keys]
        places = reading.start[reading.row, None] + place
        states, _ = self._run(block.clamp(min=0), places, visible, past, False)
        return states[:, :width]

    def logits(self, states: Tensor) -> Tensor:
        """Over the vocabulary, of states ``(M, H)``."""
        return self._shared[2].logits(states)

    def _run(
        self, tokens: Tensor, places: Tensor, visible: Tensor, past: KeysAndValues, caches: bool
    ) -> tuple[Tensor, KeysAndValues]:
        with self.using():
            found, keys = attend(self.transformer.base_model, tokens, places, visible, past, caches)
        return found.last_hidden_state, keys

    def using(self) -> AbstractContextManager[None]:
        return nullcontext() if self.adapter is None else self.lm.using(self.adapter)

    def version(self) -> int:
        """A number that grows whenever a parameter changes in place."""
        return sum(p._version for p in self.parameters())

    @property
    def wants_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        kind = (
            "from scratch" if self.adapter is None else f"adapter={self.adapter!r} on {self.lm.name.rsplit('/', 1)[-1]}"
        )
        return f"MaskedLM({kind}, {count / 1e6:.2f} M parameters, max_tokens={self.max_tokens})"


def refuse_truncation(unknown: dict[str, object]) -> None:
    """Refuse arguments that no exact law has.

    :raises ValueError: ``top_k`` or ``top_p``, which make a density that is not the one scored.
    :raises TypeError: any other.
    """
    for name in unknown:
        if name in ("top_k", "top_p"):
            raise ValueError(
                f"{name}= truncates the law while sampling, and the samples would not have the density that their "
                "weights count. Leave it out; decode(model, guide, method=...) has it for plain answers."
            )
        raise TypeError(f"unknown argument {name}=.")
