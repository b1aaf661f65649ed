"""A guide that reads the gradient of log p(x, z) and refines its proposal by it before it draws."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmppl.distributions.conditioned_text import ConditionedText
from llmppl.distributions.factorised_text import FactorisedText
from llmppl.distributions.parameter_store import register_module
from llmppl.distributions.process_text import ProcessText
from llmppl.guides.direct import DirectGuide
from llmppl.guides.text_guide import Others, Prompt, TextGuide
from llmppl.language_model import LM
from llmppl.masked_lm import MaskedLM
from llmppl.network.unmasking import check_count
from llmppl.objectives.variational import LeaveOneOutELBO
from llmppl.programs.observation_keys import key
from llmppl.programs.observations import Observed
from llmppl.programs.plates import in_data_plate
from llmppl.programs.relaxation import Sensitivity, sensitivity
from llmppl.programs.structure import Program, is_dry, plate_nesting, structure
from llmppl.text.declared import declared

CELLS = 2**23
"""Entries of the update network's hidden layer that exist at one time."""

_numbers = itertools.count()


class SemiAmortizedGuide(DirectGuide):
    r"""Iterative amortized inference [1, 2] over the logits :math:`\lambda` of independent tokens.

    .. math:: \lambda_0 = \text{one pass of the network}, \qquad
              \lambda_{k+1} = \lambda_k + f_\psi(\lambda_k, \nabla_k), \qquad z \sim q_{\lambda_K}

    where :math:`\nabla_k` is the gradient of the program's :math:`\log p(x, z)` with respect to the one-hot code
    of each latent token (:func:`~llmppl.programs.relaxation.sensitivity`), averaged over ``num_draws`` texts of
    :math:`q_{\lambda_k}`, and :math:`f_\psi` a small network that acts on every place and token alike, whatever the
    vocabulary. Untrained it changes nothing, and the guide is its :class:`DirectGuide`.

    Those texts are for the gradient only. What the guide proposes is drawn afresh from the last :math:`\lambda`,
    so that given :math:`\lambda` the weights are exact: exactness ``"conditional"``. (A text whose own gradient
    has moved the law that it is weighted by has a wrong weight.) :math:`\lambda` is made once for each ``x`` in
    every run, and shared by all particles of the run, so that objectives compare particles of one law; standard
    errors of an evidence are therefore those given :math:`\lambda` as far as one block of particles goes.

    The gradient knows what reads a text through ``lm(...)`` of this model. Factors, choices and numbers computed
    from a text have none, and steer the guide through training alone.

    :param refinements: K, the number of updates. One training serves other numbers: ``guide.refinements = 4``.
    :param num_draws: texts that each gradient is averaged over.
    :param hidden: width of :math:`f_\psi`.

    Other parameters as in :class:`DirectGuide`. All are trained by any objective, by gradients through
    :math:`\lambda_K`; the gradients :math:`\nabla_k` themselves are taken as given, as in [1].

    References

    [1] Marino, Yue, Mandt (2018), `Iterative amortized inference`.
    [2] Kim, Wiseman, Miller, Sontag, Rush (2018), `Semi-amortized variational autoencoders`.
    """

    exactness = "conditional"
    transient = ("_start", "_refined")

    @declared
    def __init__(
        self,
        model: Program,
        lm: LM,
        refinements: int = 2,
        num_draws: int = 4,
        hidden: int = 16,
        prompt: Mapping[str, Prompt] | None = None,
        others: Others | None = None,
        network: MaskedLM | None = None,
        max_tokens: int = 32,
        rank: int = 16,
        alpha: float | None = None,
        target_modules: list[str] | None = None,
        adapter: str | None = None,
        seed: int | None = None,
    ) -> None:
        for name, number, least in (
            ("refinements", refinements, 0),
            ("num_draws", num_draws, 1),
            ("hidden", hidden, 1),
        ):
            check_count(name, number, least)
        super().__init__(model, lm, prompt, others, network, max_tokens, rank, alpha, target_modules, adapter, seed)
        self.refinements, self.num_draws = refinements, num_draws
        dtype = torch.promote_types(lm.dtype, torch.float32)
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.update = Update(hidden).to(device=lm.device, dtype=dtype)
        self._start: dict[str, FactorisedText] | None = None
        self._refined: dict[str, Tensor] | None = None

    def forward(self, *args: Any, observations: Mapping[str, Tensor] | None = None, **kwargs: Any) -> dict[str, Any]:
        self._refined = None if is_dry() else self.logits(*args, observations=observations, **kwargs)
        return super().forward(*args, observations=observations, **kwargs)

    def logits(self, *args: Any, observations: Mapping[str, Tensor] | None = None, **kwargs: Any) -> dict[str, Tensor]:
        r""":math:`\lambda_K` of each latent text, ``batch_shape + (max_tokens, V)``. Random, as the texts that the
        gradients are taken at are.

        :param args: of the program.
        :param observations: values that stand in for the program's own observations, by site.
        """
        program = self.model

        def observed(*args: Any, **kwargs: Any) -> Any:
            with Observed(dict(observations or {})):
                return program(*args, **kwargs)

        self._start = {}
        try:
            with poutine.block():
                values = super().forward(*args, observations=observations, **kwargs)
                nesting = plate_nesting(structure(program, args, kwargs))
            start = self._start
        finally:
            self._start = None
        vocabulary = self.lm.vocabulary
        tables = {name: fn.logits[..., :vocabulary] for name, fn in start.items()}
        given = {name: value for name, value in values.items() if name not in tables}
        nesting = max([nesting, *(len(fn.batch_shape) for fn in start.values())])
        for _ in range(self.refinements):
            laws = {
                name: FactorisedText(self.lm, fn.context, fn.law, tables[name].detach()) for name, fn in start.items()
            }
            texts = {name: _with_dims(law.sample((self.num_draws,)), nesting) for name, law in laws.items()}
            found = sensitivity(self.lm, observed, args, kwargs, texts, given)
            for name, table in tables.items():
                log_q = laws[name].log_probs
                tables[name] = table + self.update(log_q, found[name]).reshape(table.shape)
        return tables

    def fill(self, name: str, prior: ConditionedText, left: Tensor, right: Tensor) -> FactorisedText:
        start = super().fill(name, prior, left, right)
        if self._start is not None:
            self._start[name] = start
            return start
        if self._refined is None:
            return FactorisedText(self.lm, start.context, start.law, _not_in_a_dry_run)
        return FactorisedText(
            self.lm, prior.context, start.law, self._refined[name], validate_args=start._validate_args
        )

    def fine_tune(
        self,
        *args: Any,
        steps: int = 100,
        num_particles: int = 16,
        learning_rate: float = 0.1,
        vectorize_data: bool = False,
        **kwargs: Any,
    ) -> InstanceGuide:
        r"""The limit of refinement: :math:`\lambda` itself is fitted to one ``x``, from :math:`\lambda_K` on, by Adam
        and the gradient of :class:`~llmppl.objectives.LeaveOneOutELBO`. The guide's own parameters stay.

        What is left of the gap then is what independent tokens cannot express, and what the steps were too few for.

        :param args: of the program.
        :param num_particles: texts of each step, drawn afresh.
        :param vectorize_data: ``args`` are lists, one entry an observation, as in :func:`~llmppl.importance`.
        :returns: a guide for this ``x`` alone, with the same ``vectorize_data``.
        """
        if steps < 0 or not learning_rate > 0:
            raise ValueError(f"steps={steps} must not be negative, and learning_rate={learning_rate} must be positive.")
        program: Program = in_data_plate(self.model) if vectorize_data else self.model
        with torch.no_grad(), poutine.block():
            (in_data_plate(self) if vectorize_data else self)(*args, **kwargs)
        assert self._refined is not None
        tuned = InstanceGuide(self.model, self.lm, args, kwargs, self._refined, self.others)
        proposal: Program = in_data_plate(tuned) if vectorize_data else tuned
        objective = LeaveOneOutELBO(num_particles)
        optimizer = torch.optim.Adam(tuned.tables.parameters(), lr=learning_rate)
        for _ in range(steps):
            optimizer.zero_grad()
            with poutine.block():
                objective.loss_and_grads(program, proposal, *args, **kwargs)
            optimizer.step()
            tuned.elbos.append(objective.diagnostics["elbo"])
        return tuned

    def register(self) -> None:
        super().register()
        register_module(f"{self._name}_update", self.update)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.update.reset_parameters()

    def settings(self) -> dict[str, object]:
        """What a checkpoint must agree with, beside the model. The number of refinements and draws may differ."""
        return {**super().settings(), "hidden": self.update.hidden}

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), **{f"update.{k}": p for k, p in self.update.named_parameters()}}

    def _described(self) -> list[str]:
        count = sum(p.numel() for p in self.update.parameters())
        return [f"refinements={self.refinements}", f"num_draws={self.num_draws}", f"{count} of updates"]


class Update(nn.Module):
    r""":math:`f_\psi`: the change of every logit, from what is known of its place and token.

    A linear map plus a hidden layer of the same inputs: the logit's log-probability, the two parts of the gradient,
    all less their mean under :math:`q`, the probability, the place in the text. Places that no draw reached do not
    change. It starts at zero.

    :param hidden: width of the hidden layer.
    """

    FEATURES = 7

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.straight = nn.Linear(self.FEATURES, 1)
        self.inward = nn.Linear(self.FEATURES, hidden)
        self.outward = nn.Linear(hidden, 1, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.inward.reset_parameters()
        for layer in (self.straight, self.outward):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(self, log_q: Tensor, found: Sensitivity) -> Tensor:
        """The change, ``(P, V)`` for all places in order.

        :param log_q: of every token, ``(..., T, V)``, −inf where the law forbids it.
        """
        width, size = log_q.shape[-2:]
        place = torch.arange(width, device=log_q.device) / width
        columns = (
            log_q.reshape(-1, size),
            found.own.reshape(-1, size),
            found.others.reshape(-1, size),
            place.expand(log_q.shape[:-1]).reshape(-1),
            found.reached.reshape(-1),
        )
        block = max(CELLS // (size * self.hidden), 1)
        parts = []
        for first in range(0, len(columns[0]), block):
            part = [column[first : first + block] for column in columns]
            if torch.is_grad_enabled():
                # The hidden layer of a whole vocabulary is made again in the backward pass, not kept for it.
                parts.append(checkpoint(self._change, *part, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(self._change(*part))
        return torch.cat(parts)

    def _change(self, log_q: Tensor, own: Tensor, others: Tensor, place: Tensor, reached: Tensor) -> Tensor:
        possible = log_q > -torch.inf
        q = log_q.exp()

        def centred(values: Tensor) -> Tensor:
            values = values.masked_fill(~possible, 0.0)
            return (values - (q * values).sum(-1, keepdim=True)).masked_fill(~possible, 0.0)

        others = centred(others)
        # Of order one: log-probabilities of a large vocabulary differ by ten nats.
        features = [
            centred(log_q) / 5,
            centred(own) / 5,
            others.clamp(-50, 50) / 5,
            others.asinh(),
            q,
            place[:, None].expand_as(q),
            reached[:, None].expand_as(q),
        ]
        x = torch.stack(features, -1).to(self.straight.weight.dtype)  # (P, V, features)
        change = self.straight(x) + self.outward(torch.nn.functional.silu(self.inward(x)))
        return (change[..., 0] * reached[:, None]).masked_fill(~possible, 0.0)


class InstanceGuide(TextGuide):
    r"""Independent tokens with logits :math:`\lambda` of their own, for one observation.

    Made by :meth:`SemiAmortizedGuide.fine_tune`. :func:`~llmppl.importance`, objectives and the like take it for the
    ``x`` it was made for, and no other.

    :param args, kwargs: of the program.
    :param logits: by latent text, as of :class:`~llmppl.distributions.FactorisedText`.
    """

    @declared
    def __init__(
        self,
        model: Program,
        lm: LM,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        logits: Mapping[str, Tensor],
        others: Others | None = None,
    ) -> None:
        super().__init__(model, lm, others=others)
        self._observation = _observation(args, kwargs)
        self._number = next(_numbers)
        self.sites = list(logits)
        self.tables = nn.ParameterList([nn.Parameter(table.detach().clone()) for table in logits.values()])
        self.elbos: list[float] = []
        """Of every step of the fine-tuning, from its particles, nats."""

    def forward(self, *args: Any, observations: Mapping[str, Tensor] | None = None, **kwargs: Any) -> dict[str, Any]:
        if observations or _observation(args, kwargs) != self._observation:
            told = "other observations" if observations else f"({_observation(args, kwargs)})"
            raise ValueError(
                f"this guide was fitted to the one observation ({self._observation}) and knows nothing of {told}. Use "
                "the guide that it was made from, or its fine_tune()."
            )
        return super().forward(*args, **kwargs)

    def became_a_copy(self, names: Mapping[str, str]) -> None:
        self._number = next(_numbers)

    def distribution(self, name: str, prior: ConditionedText, context: Tensor) -> FactorisedText:
        assert isinstance(prior, ProcessText)
        table = self.tables[self.sites.index(name)]
        return FactorisedText(self.lm, prior.context, prior.law, table, validate_args=prior._validate_args)

    def register(self) -> None:
        register_module(f"instance_{self._number}", self.tables)

    def __repr__(self) -> str:
        count = sum(table.numel() for table in self.tables)
        name = getattr(self.model, "__name__", type(self.model).__name__)
        elbo = f", ELBO {self.elbos[-1]:.2f} after {len(self.elbos)} steps" if self.elbos else ""
        return f"InstanceGuide({name}, for {self._observation}, {count} logits{elbo})"


def _observation(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return key((*args, *(part for name in sorted(kwargs) for part in (name, kwargs[name]))))


def _with_dims(texts: Tensor, nesting: int) -> Tensor:
    """Draws of a text, ``(draws, ..., T)``, with ``nesting`` batch dimensions between."""
    missing = nesting + 2 - texts.dim()
    return texts.reshape(texts.shape[:1] + (1,) * missing + texts.shape[1:])


def _not_in_a_dry_run(contexts: Tensor) -> Tensor:
    raise RuntimeError(
        "this proposal comes from a run that asks no network (programs.structure), and its logits need one. "
        "Trace the guide itself."
    )
