"""Regularisation of amortized inference: what may keep a guide from learning its training data by heart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor

from llmppl.objectives.particle_objective import ParticleObjective
from llmppl.programs.observations import check_takes_observations, observing
from llmppl.programs.simulation import check_simulable, simulate
from llmppl.programs.structure import Program, Site, is_observation, is_text, signature, structure, text_sites
from llmppl.text import PAD
from llmppl.text.declared import check_fields


@dataclass(frozen=True)
class Regularisation:
    r"""Amortized-inference regularisation, an option of :func:`~llmppl.fit`.

    One network serves every observation x, so that a guide trained on few of them can close the gap of
    those and widen that of others [1, 2]. These are three remedies; the fourth is ``weight_decay`` of
    ``fit``, which pulls an adapter back to the prompt guide. All act on training steps only: evaluation
    and :func:`~llmppl.importance` have the guide as it is. ELBO, ESS and loss in the history are those of
    the step as it was taken, on a noised or simulated x where there is one.

    :param input_noise: probability, for each token of an observed text *as the guide is told it*, to be
        replaced by another token of the vocabulary, uniformly; fresh at each step, the same for all
        particles of an x. The program scores the true x: the denoising objective
        :math:`\mathbb E_{\tilde x|x}\,\mathrm{KL}(q(z|\tilde x)\|p(z|x))` of [1]. It reaches the text wherever
        the guide reads an observed site: the default context, a prompt's parameter that is the site or the
        argument it observes, a latent's own context where the program put the value of the observed
        ``pyro.sample`` there. Program
        arguments that are no observation (a story's beginning), observations that are no text, and the
        guide's learned log-partition get no noise.
    :param adapter_dropout: dropout probability on what the guide's LoRA layers read (``lora_dropout`` of
        ``peft``), in the pass with gradients only. All particles of a pass share one thinned network,
        prefix by prefix, with law :math:`q_m`, but they are drawn from the whole guide q. So no step is
        on-policy any more: the balance objectives fit :math:`q_m` from particles of q, which they may;
        :class:`~llmppl.objectives.LeaveOneOutELBO` has half the gradient of the VarGrad loss of
        :math:`q_m` on them, not that of a reverse KL; the importance weights of wake-φ, the ELBO and ESS
        of the history and the log-weights of a replay buffer are those of q.
    :param simulated: share of the steps that take a fresh x: latents and observations are drawn from the
        program at the data's arguments, :math:`(z', x') \sim p`, and the objective trains on x' as on data.
        ``z'`` is thrown away: ``Behaviour(sleep=)`` draws x' in the same way but has z', an exact draw
        from its posterior, among the particles, and is of the balance objectives alone. A replay buffer
        neither gives nor takes particles of such a step. A program that is not the law of the data
        trains the guide on its own x, not on theirs.
    :raises ValueError: ``input_noise`` or ``adapter_dropout`` outside [0, 1), ``simulated`` outside [0, 1].

    References

    [1] Shu, Bui, Zhao, Kochenderfer, Ermon (2018), `Amortized inference regularization`.
    [2] Cremer, Li, Duvenaud (2018), `Inference suboptimality in variational autoencoders`.
    """

    input_noise: float = 0.0
    adapter_dropout: float = 0.0
    simulated: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("input_noise", "adapter_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is a probability below 1: pass e.g. {name}=0.1.")
        if not 0 <= self.simulated <= 1:
            raise ValueError(f"simulated={self.simulated} is a share of the steps: it must lie between 0 and 1.")

    def settings(self) -> dict[str, float]:
        """What a resumed run must agree with: those that are on."""
        return {name: float(value) for name, value in asdict(self).items() if value}


class Regularised:
    """A program and its guide as the steps of a run see them.

    :param regularisation: ``None`` changes nothing and draws no random number.
    :param module: the guide itself, where ``guide`` runs it inside a plate.
    :param args: of one call, on which is checked what can be.
    :raises TypeError, ValueError: a regulariser that this program, guide or objective cannot have.
    """

    def __init__(
        self,
        regularisation: Regularisation | None,
        model: Program,
        guide: Program,
        module: Program,
        objective: ELBO,
        args: tuple[Any, ...],
    ) -> None:
        if regularisation is not None and not isinstance(regularisation, Regularisation):
            raise TypeError(f"regularisation must be an llmppl.Regularisation, got {regularisation!r}.")
        self.options = regularisation or Regularisation()
        self.model, self.guide, self.module = model, guide, module
        if self.options.adapter_dropout:
            self._check_adapter(objective)
        if self.options.input_noise or self.options.simulated:
            self._check_observations(args)

    def simulates(self) -> bool:
        """Whether this step takes a simulated observation."""
        return self.options.simulated > 0 and torch.rand(()).item() < self.options.simulated

    @contextmanager
    def call(self, args: tuple[Any, ...], simulates: bool) -> Iterator[tuple[Program, Program]]:
        """The program and the guide of one call of the objective, which is made inside the block."""
        model, guide = self.model, self.guide
        if simulates:
            model, guide = observing(model, guide, simulate(model, args, {})[1])
        if self.options.input_noise:
            guide = noised(model, guide, self.options.input_noise)
        dropout = self.options.adapter_dropout
        module: Any = self.module
        with module.lm.adapters.dropping(module.adapter, dropout) if dropout else nullcontext():
            yield model, guide

    def _check_adapter(self, objective: ELBO) -> None:
        probability, module = self.options.adapter_dropout, self.module
        adapter, lm = getattr(module, "adapter", None), getattr(module, "lm", None)
        if adapter is None or lm is None or not lm.adapters.lora_layers(adapter):
            raise TypeError(
                f"adapter_dropout={probability} is dropout on a guide's LoRA layers, and {type(module).__name__} has "
                "none of its own. Use a guide such as AutoregressiveGuide, or leave adapter_dropout out."
            )
        if not isinstance(objective, ParticleObjective):
            raise TypeError(
                f"adapter_dropout={probability} makes log q of the pass with gradients another law than the one that "
                f"drew, and {type(objective).__name__} takes its weights from there. Use an objective of "
                "llmppl.objectives, or leave adapter_dropout out."
            )

    def _check_observations(self, args: tuple[Any, ...]) -> None:
        options = self.options
        check_takes_observations(self.guide)
        sites = structure(self.model, args, {})
        observed = observed_sites(sites)
        if options.simulated:
            check_simulable(sites)
            if not observed:
                raise ValueError(
                    f"simulated={options.simulated}: the program observes nothing that could be simulated. Leave "
                    "simulated out, or observe x by pyro.sample(name, ..., obs=x)."
                )
        texts = {name: site for name, site in observed.items() if is_text(site)}
        if options.input_noise and not texts:
            raise ValueError(
                f"input_noise={options.input_noise}: the program observes no text. Leave input_noise out, or observe x "
                "by pyro.sample(name, lm(...), obs=x)."
            )
        # Observations that are no text cannot be moved on like tokens: a guide told those alone is taken at its word.
        if texts and getattr(self.module, "prompt", None) and (options.input_noise or len(texts) == len(observed)):
            self._check_prompts(args, texts)

    def _check_prompts(self, args: tuple[Any, ...], texts: dict[str, Site]) -> None:
        """Refuse prompts that no other observation would reach.

        :raises ValueError: naming the sites.
        """
        others = {name: _moved(site["value"], 1, site) for name, site in texts.items()}
        told, retold = (
            text_sites(structure(self.guide, args, {"observations": values}))
            for values in ({name: site["value"] for name, site in texts.items()}, others)
        )
        if all(torch.equal(told[name]["fn"].context, retold[name]["fn"].context) for name in told):
            raise ValueError(
                f"no prompt of the guide tells an observed text, so that {self.options} would not reach it. Let a "
                f"prompt take a parameter of an observed site's name, of {sorted(texts)}."
            )


def noised(model: Program, guide: Program, probability: float) -> Program:
    """The guide, told the program's observed texts with noise.

    The noise is drawn here, once: all calls for the same observations get the same.

    :param probability: of each token to be replaced by another, uniformly.
    """
    seed = int(torch.randint(2**62, ()))

    def told(*args: Any, observations: Mapping[str, Tensor] | None = None, **kwargs: Any) -> Any:
        generator = torch.Generator().manual_seed(seed)
        given = dict(observations or {})
        for name, site in observed_sites(structure(model, args, kwargs)).items():
            value = given.setdefault(name, site["value"])
            if is_text(site):
                replaced = torch.rand(value.shape, generator=generator) < probability
                shift = torch.randint(1, site["fn"].lm.vocabulary, value.shape, generator=generator)
                given[name] = _moved(value, (shift * replaced).to(value.device), site)
        return guide(*args, observations=given, **kwargs)

    if hasattr(guide, "log_partition"):
        told.log_partition = guide.log_partition  # type: ignore[attr-defined]
    told.exactness = getattr(guide, "exactness", "marginal")  # type: ignore[attr-defined]
    told.__signature__ = signature(guide)  # type: ignore[attr-defined]
    return told


def observed_sites(trace: poutine.Trace) -> dict[str, Site]:
    """The observed sites of a program, factors left out."""
    return {name: site for name, site in trace.nodes.items() if is_observation(site)}


def _moved(value: Tensor, shift: Tensor | int, site: Site) -> Tensor:
    """A text with its token ids moved on around the vocabulary."""
    return torch.where(value == PAD, value, (value + shift) % site["fn"].lm.vocabulary)
