"""A guide that writes latent texts in one forward pass, every token independently of the others."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from llmppl.checkpoint import load_adapter, save_adapter
from llmppl.distributions.conditioned import ConditionedText
from llmppl.distributions.factorised import FactorisedText
from llmppl.distributions.process import ProcessText
from llmppl.guides.base import Prompt, TextGuide, register_module
from llmppl.language_model import LM
from llmppl.masked_lm import MaskedLM
from llmppl.scoring import check_length
from llmppl.tracing import Program


class DirectGuide(TextGuide):
    r"""One forward pass for a whole text: :math:`q(z|x) = \prod_t q_t(z_t|x)`.

    The network reads both sides of a latent text and a canvas of ``max_tokens`` masks between them, and gives
    a law of the token at each place. A stop token ends the text, as in the prior; what the law allows is the
    prior's, so both have one support. Sampling costs one pass for each distinct context, be it for one particle
    or a thousand. Of several latent texts each is told those before it by its prior's context.

    Independent tokens cannot follow one another's lead, and which compromise a training looks for matters: the
    reverse KL of :class:`~llmppl.objectives.LeaveOneOutELBO` and :class:`~llmppl.objectives.TrajectoryBalance`
    settles on texts that hold together, the forward KL of ``WakeSleep(insomnia=0)`` spreads over all marginals
    and proposes mixtures of texts that are none.

    By default a latent text is told its prior's own context and the observed texts before it on the left, and
    the observed texts behind it on the right. ``prompt={"middle": lambda beginning, ending: [beginning, ...,
    ending]}`` replaces it.

    :param network: a :class:`~llmppl.masked_lm.MaskedLM`; the language model's own transformer with an adapter
        by default.
    :param max_tokens: the longest latent text, of the default network; so are the next parameters.
    :param rank, alpha, target_modules, adapter, seed: as of :class:`AutoregressiveGuide`.

    Other parameters as in :class:`TextGuide`.
    """

    two_sided = True

    def __init__(
        self,
        model: Program,
        lm: LM,
        prompt: Mapping[str, Prompt] | None = None,
        others: Program | None = None,
        network: MaskedLM | None = None,
        max_tokens: int = 32,
        rank: int = 16,
        alpha: float | None = None,
        target_modules: list[str] | None = None,
        adapter: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(model, lm, prompt, others)
        if network is None:
            network = MaskedLM.adapted(lm, max_tokens, rank, alpha, target_modules, adapter, seed)
        elif network.lm is not lm:
            raise ValueError("network= belongs to another language model. Make it with the lm of this guide.")
        self.network = network

    def fill(self, name: str, prior: ConditionedText, left: Tensor, right: Tensor) -> FactorisedText:
        if not isinstance(prior, ProcessText):
            raise ValueError(
                f"site {name!r} is a {type(prior).__name__}, which is not filled token by token. Pass a guide for it "
                "as others=, or use AutoregressiveGuide."
            )
        law, network = prior.law, self.network
        if law.grammar is not None:
            raise ValueError(
                f"site {name!r} has a grammar, which makes a token depend on those before it, and this guide's are "
                "independent. Use AutoregressiveGuide, or leave grammar= out and state the condition by pyro.factor."
            )
        if law.max_tokens is None or law.max_tokens > network.max_tokens:
            raise ValueError(
                f"site {name!r} has max_tokens={law.max_tokens}, and the network knows gaps of 1 to "
                f"{network.max_tokens} tokens. Lower it, or make the guide with max_tokens={law.max_tokens}."
            )
        before, width = left.shape[-1], law.max_tokens
        shape = torch.broadcast_shapes(left.shape[:-1], right.shape[:-1])
        contexts = torch.cat([side.expand(*shape, -1) for side in (left, right)], -1)
        check_length(contexts, network.max_tokens + 1, self.lm.max_length)

        def logits(rows: Tensor) -> Tensor:
            count = torch.full((len(rows),), width, dtype=torch.long, device=rows.device)
            reading = network.read(rows[:, :before], rows[:, before:])
            canvas = torch.full((len(rows), width), network.mask, dtype=torch.long, device=rows.device)
            states = network.states(reading, canvas, count)
            return network.logits(states.flatten(0, 1)).unflatten(0, (len(rows), width))

        return FactorisedText(self.lm, contexts, law, logits, network.version, prior._validate_args)

    def register(self) -> None:
        register_module(self._name, self.network)

    @property
    def _name(self) -> str:
        return f"direct_{self.network.adapter or id(self.network)}"

    def reset_parameters(self) -> None:
        """Start anew, with other random numbers from torch's generator. Parameters of ``others`` stay."""
        self.network.reset_parameters()

    def settings(self) -> dict[str, object]:
        """What a checkpoint must agree with, beside the model."""
        return {"guide": type(self).__name__, **self.network.settings()}

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors, by name."""
        return {key.replace("/", "."): tensor for key, tensor in self.network.named_parameters()}

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
        """Write the trained tensors to a safetensors file, whole or not at all.

        :param dtype: ``torch.float16`` halves the file.
        """
        save_adapter(path, self.tensors(), self.lm.fingerprint(), self.settings(), dtype)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read what :meth:`save` has written. Nothing changes if it does not fit.

        :raises FileNotFoundError: no such file.
        :raises ValueError: damaged, or of another model, guide or network; names the difference.
        """
        loaded = load_adapter(path, self.tensors(), self.lm.fingerprint(), self.settings())
        with torch.no_grad():
            for key, tensor in self.tensors().items():
                tensor.copy_(loaded[key])

    def _described(self) -> list[str]:
        """What a ``repr`` says."""
        name = getattr(self.model, "__name__", type(self.model).__name__)
        prompts = [f"prompt for {sorted(self.prompt)}"] if self.prompt else []
        return [name, repr(self.network), *prompts]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._described())})"
