"""Markov chain Monte Carlo over latent texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from llmppl.distributions.autoregressive_text import AutoregressiveText
from llmppl.inference.blocks import block_size
from llmppl.inference.gathering import Gathering, check_unscaled, of_observations
from llmppl.inference.importance import importance
from llmppl.inference.rewriting import alternatives, propose
from llmppl.inference.stages import Stages, Values, latents_of
from llmppl.network.drawing import choose
from llmppl.network.random_states import randomness_kept
from llmppl.network.text_tensors import lengths
from llmppl.posterior.exactness import check_weights
from llmppl.posterior.posterior import Array, Posterior
from llmppl.programs.particles import Particles, compute_log_prob, run_particles
from llmppl.programs.plates import in_data_plate
from llmppl.programs.structure import Program, is_latent
from llmppl.text.arguments import check_programs
from llmppl.text.declared import declared

KERNELS = ("independence", "suffix", "block", "gibbs")

BLOCK = 4
"""Tokens that a move of the ``"block"`` kernel rewrites by default."""

GIBBS_TOKENS = 64
"""Most tokens of a vocabulary whose every alternative is scored."""

ATTEMPTS = 100
"""Draws of a start before a chain gives up."""


@declared
def mcmc(
    model: Program,
    guide: Program | None = None,
    kernel: str = "independence",
    num_samples: int = 200,
    num_chains: int = 4,
    warmup: int = 50,
    block: int | None = None,
    vectorize_data: bool = False,
    seed: int | None = None,
    progress: bool = True,
) -> Callable[..., Posterior]:
    r"""Metropolis-Hastings chains: a function of the program's arguments that returns a :class:`Posterior`.

    Rows of plates that contain every site are observations of their own, each with chains of its own. All
    chains and rows move together, in one pass of the network. Kernels, all with the posterior as their
    stationary law:

    - ``"independence"`` [1]: all latents anew from the guide, accepted with probability
      :math:`\min(1, w'/w)`, :math:`w = p(x,z)/q(z|x)`;
    - ``"suffix"``: a place of the text, each with probability :math:`1/n`, and all tokens from there on
      anew. With the prior as proposal it is accepted with :math:`\min(1, \frac{n\,p(x|z')}{n'\,p(x|z)})`;
    - ``"block"``: as before, but ``block`` tokens, the rest of the text being kept;
    - ``"gibbs"`` [2]: a token from its exact conditional, given all others; and then a suffix, for lengths
      to change. For vocabularies of up to 64 tokens.

    The last three take the latent sites in turn, once each in a step, and of a plate that does not contain
    every site one entry at a time; tokens are proposed by the guide, or by the program's prior where
    there is none. Latents that are not texts of tokens move by independence Metropolis-Hastings, drawn from
    the guide (the prior) given the latents before them.

    Chains start at draws of the guide, drawn anew where the posterior is zero. They say nothing of the
    evidence; :attr:`Posterior.rhat` and :attr:`Posterior.ess` say how well they mix, of the modes that
    they have found.

    :param guide: a guide with an exact density; by default the program's own prior.
    :param kernel: one of the above.
    :param num_samples: draws of each chain that are kept, at least 4.
    :param num_chains: chains of each observation.
    :param warmup: steps of each chain before that.
    :param block: tokens of a block, at least 2, with ``kernel="block"``; 4 by default.
    :param vectorize_data: as for :func:`~llmppl.importance`.
    :param seed: of the chains' random numbers; by default they go on from the present state.
    :param progress: show a progress bar if it takes more than a few seconds.
    :returns: ``num_chains * num_samples`` samples, chain after chain. ``acceptance`` is the share of accepted
        Metropolis-Hastings moves after the warmup.
    :raises ValueError: malformed numbers, no start of positive probability, a guide without exact density or
        with sites that are not the model's, a scaled site.

    References

    [1] Hastings (1970), `Monte Carlo sampling methods using Markov chains and their applications`.
    [2] Geman and Geman (1984), `Stochastic relaxation, Gibbs distributions, and the Bayesian restoration of images`.
    """
    check_programs(model=model)
    if guide is not None:
        check_programs(guide=guide)
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r} must be one of {KERNELS}.")
    for name, value, least in (("num_samples", num_samples, 4), ("num_chains", num_chains, 1), ("warmup", warmup, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    if block is not None and kernel != "block":
        raise ValueError(f"block= is for kernel='block', and kernel={kernel!r} has none. Leave it out.")
    if block is not None and block < 2:
        raise ValueError(
            f"block must be at least 2 tokens, got {block}: single tokens cannot change a text's length. Use "
            "kernel='gibbs' for moves of one token."
        )
    exactness = check_weights(guide)
    if exactness != "marginal" and kernel != "independence":
        raise ValueError(
            f"kernel={kernel!r} needs the guide's exact density, and {type(guide).__name__} has exactness "
            f"{exactness!r}. Use another guide, or none: the program's prior then proposes."
        )
    if vectorize_data:
        model, guide = in_data_plate(model), None if guide is None else in_data_plate(guide)

    def run(*args: Any, **kwargs: Any) -> Posterior:
        with torch.no_grad(), nullcontext() if seed is None else randomness_kept(seed):
            if kernel == "independence":
                found = _independence(model, guide, args, kwargs, num_samples, num_chains, warmup, progress)
                return of_observations(found, model, args, kwargs, vectorize_data)
            chains = _Chains(model, guide, args, kwargs, num_chains, kernel, block or BLOCK)
            steps = tqdm(range(warmup + num_samples), desc="mcmc", disable=not progress, delay=5, leave=False)
            kept = [chains.copy() for n in steps if chains.step(counts=n >= warmup) and n >= warmup]
            return of_observations(chains.posterior(kept), model, args, kwargs, vectorize_data)

    return run


# --- independence Metropolis-Hastings: the proposals do not depend on the chains ------------------


def _independence(
    model: Program,
    guide: Program | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_samples: int,
    num_chains: int,
    warmup: int,
    progress: bool,
) -> Posterior:
    steps = warmup + num_samples
    run = importance(model, guide or latents_of(model), num_chains * (1 + steps), progress=progress)
    proposals = run(*args, **kwargs)
    log_weights = proposals.log_weights.reshape(num_chains, 1 + steps, *proposals.batch_shape)
    heights = torch.rand(log_weights.shape, dtype=torch.float64).numpy()
    index, accepted = independence_chain(log_weights, heights)
    if np.isneginf(np.take_along_axis(log_weights, index[:, warmup : warmup + 1], 1)).any():
        raise ValueError(
            f"a chain found no start of positive probability in {warmup + 1} draws: a factor or an allowed= of the "
            "program excludes them. Raise warmup, or use a guide that satisfies the condition."
        )
    first = np.arange(num_chains).reshape(-1, 1, *[1] * len(proposals.batch_shape)) * (1 + steps)
    chosen = (index[:, 1 + warmup :] + first).reshape(num_chains * num_samples, *proposals.batch_shape)
    taken = proposals.taken(chosen)
    return replace(
        taken,
        log_weights=np.zeros_like(taken.log_joint),
        method="mcmc",
        num_chains=num_chains,
        acceptance=accepted[:, 1 + warmup :].mean(1),
    )


def independence_chain(log_weights: Array, heights: Array) -> tuple[Array, Array]:
    """The proposal at which each chain stands after each step, and whether it was accepted.

    :param log_weights: of the proposals, ``(chains, 1 + steps) + batch_shape``; the first is the start.
    :param heights: uniform numbers of the same shape.
    """
    index = np.zeros(log_weights.shape, dtype=np.int64)
    accepted = np.zeros(log_weights.shape, dtype=bool)
    now = log_weights[:, 0]
    for step in range(1, log_weights.shape[1]):
        new = log_weights[:, step]
        # Of a start with probability zero every step that has one leads away.
        with np.errstate(invalid="ignore", divide="ignore"):
            accepts = np.log(heights[:, step]) < new - now
        accepted[:, step] = accepts
        index[:, step] = np.where(accepts, step, index[:, step - 1])
        now = np.where(accepts, new, now)
    return index, accepted


# --- one site at a time ---------------------------------------------------------------------------


class _Chains:
    """The state of all chains and rows, and one step of each."""

    def __init__(
        self,
        model: Program,
        guide: Program | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        num_chains: int,
        kernel: str,
        block: int,
    ) -> None:
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        self.kernel, self.block = kernel, block
        self.stages = Stages(model, guide, args, kwargs, num_chains)
        self.values, self.log_p = self._start()
        shape = self.stages.shape
        self.accepted, self.moves = torch.zeros(shape, dtype=torch.float64), 0
        self._checks()

    def _start(self) -> tuple[Values, Tensor]:
        """Draws of the guide, drawn anew until each has positive probability."""
        stages = self.stages
        values: Values = {}
        log_p = torch.full(stages.shape, -torch.inf, dtype=torch.float64)
        for _ in range(ATTEMPTS):
            particles = run_particles(self.model, stages.guide, self.args, self.kwargs, stages.count)
            check_unscaled(particles)
            drawn = {
                name: stages.whole(site["value"], site["fn"].event_dim).clone()
                for name, site in particles.model_trace.nodes.items()
                if is_latent(site)
            }
            fresh = torch.isneginf(log_p)
            values = {name: self._where(fresh, drawn[name], values.get(name, drawn[name])) for name in drawn}
            log_p = torch.where(fresh, particles.log_p.double().cpu().expand(stages.shape), log_p)
            if not bool(torch.isneginf(log_p).any()):
                return values, log_p
        raise ValueError(
            f"a chain found no start of positive probability in {ATTEMPTS} draws: a factor or an allowed= of the "
            "program excludes them. Use a guide that satisfies the condition."
        )

    def _checks(self) -> None:
        trace = self.stages.run(self.stages.guide, self.values)
        for name, site in trace.nodes.items():
            if not is_latent(site):
                continue
            if name not in self.values or isinstance(site["fn"], dist.Delta):
                raise ValueError(
                    f"the guide draws site {name!r} together with others, by an auxiliary site or a Delta, so it "
                    "cannot be moved alone. Use kernel='independence', or a guide with a distribution for each site."
                )
            if self.kernel == "gibbs" and isinstance(site["fn"], AutoregressiveText):
                vocabulary = site["fn"].law.vocabulary
                if vocabulary > GIBBS_TOKENS:
                    raise ValueError(
                        f"kernel='gibbs' scores every token of the vocabulary at a place: {vocabulary} of them; the "
                        f"most is {GIBBS_TOKENS}. Use kernel='block' or 'suffix'."
                    )

    def step(self, counts: bool) -> bool:
        """One move of each site.

        :param counts: whether acceptance is noted.
        """
        for name in self.values:
            fn = self.stages.run(self.stages.guide, self.values).nodes[name]["fn"]
            if isinstance(fn, AutoregressiveText) and self.kernel == "gibbs":
                self._resample_token(name, fn)
            accepted = self._move(name, fn)
            if counts:
                self.accepted += accepted
                self.moves += 1
        return True

    def _move(self, name: str, fn: Any) -> Tensor:
        """A Metropolis-Hastings move of one site, ``(K,) + batch_shape`` of whether it was accepted."""
        value, event_dim = self.values[name], fn.event_dim
        front = value.shape[: value.dim() - event_dim]
        fn = fn.expand(front)
        moved = self._one_entry(front)
        if isinstance(fn, AutoregressiveText):
            length = value.shape[-1] if self.kernel != "block" else self.block
            new = value.clone()
            new[moved], ratios = propose(fn.rows(moved), value[moved], length)
            ratio = torch.zeros(front, dtype=torch.float64, device=value.device)
            ratio[moved] = ratios
        else:
            over = moved.reshape(moved.shape + (1,) * event_dim)
            new = torch.where(over, fn.sample().to(value.device), value)
            ratio = (fn.log_prob(value) - fn.log_prob(new)).double().where(moved, 0.0)
        log_p = self._log_joint({**self.values, name: new}, self.stages)
        ratio = self.stages.summed(ratio.cpu())
        height = torch.rand(self.stages.shape, dtype=torch.float64)
        accepted = height.log() < log_p - self.log_p + ratio
        self.values[name] = self._where(accepted, new, value)
        self.log_p = torch.where(accepted, log_p, self.log_p)
        return accepted.double()

    def _resample_token(self, name: str, fn: AutoregressiveText) -> None:
        """A token of one text from its exact conditional given everything else."""
        value, count, size = self.values[name], self.stages.count, fn.law.vocabulary
        moved = self._one_entry(value.shape[:-1])
        start = (torch.rand(value.shape[:-1], dtype=torch.float64, device=value.device) * lengths(value)).long()
        permitted = alternatives(fn.law, value.flatten(0, -2), start.flatten()).reshape(*start.shape, size)
        permitted = (permitted & moved[..., None]).movedim(-1, 0)  # (V, K, plates)
        tokens = torch.arange(size, device=value.device).reshape(-1, *[1] * value.dim())
        here = (torch.arange(value.shape[-1], device=value.device) == start[..., None]) & permitted[..., None]
        texts = torch.where(here, tokens, value)  # (V, K, plates, T)
        everywhere = Stages(self.model, self.guide, self.args, self.kwargs, count * size)
        others = {n: v.repeat(size, *[1] * (v.dim() - 1)) for n, v in self.values.items()}
        log_p = self._log_joint({**others, name: texts.flatten(0, 1)}, everywhere).unflatten(0, (size, count))
        open_ = torch.stack([self.stages.summed(p.double().cpu()) for p in permitted]) > 0
        log_p = log_p.masked_fill(~open_, -torch.inf)
        token = choose(log_p.reshape(size, -1).T).reshape(self.stages.shape)
        chosen = self.stages.laid_out(token).to(value.device)
        index = chosen.expand(value.shape[:-1])[None, ..., None].expand(1, *value.shape)
        self.values[name] = texts.gather(0, index)[0]
        self.log_p = log_p.gather(0, token[None])[0]

    def _one_entry(self, front: torch.Size) -> Tensor:
        """One entry of the plates that do not contain every site, at random for each chain and row."""
        inner = [dim for dim in range(-self.stages.nesting, 0) if dim not in self.stages.axes and front[dim] > 1]
        scores = torch.rand(front)
        return scores == (scores.amax(inner, keepdim=True) if inner else scores)

    def _log_joint(self, values: Values, stages: Stages) -> Tensor:
        return stages.log_prob(stages.run(self.model, values))

    def _where(self, rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
        """A site's values, new ones in some chains and rows."""
        full = self.stages.laid_out(rows).to(new.device)
        return torch.where(full.reshape(full.shape + (1,) * (new.dim() - full.dim())), new, old)

    def copy(self) -> Values:
        return {name: value.cpu().clone() for name, value in self.values.items()}

    def posterior(self, kept: list[Values]) -> Posterior:
        """Everything that was kept, chain after chain, scored anew site by site and token by token."""
        gathering = Gathering()
        whole = {name: torch.stack([values[name] for values in kept], 1).flatten(0, 1) for name in kept[0]}
        for particles in self._blocks(whole):
            gathering.add(particles)
        return replace(
            gathering.posterior("mcmc", "marginal"),
            num_chains=self.stages.count,
            acceptance=(self.accepted / max(self.moves, 1)).numpy(),
        )

    def _blocks(self, whole: Values) -> Iterator[Particles]:
        count = len(next(iter(whole.values())))
        size = block_size(self.model, self.args, self.kwargs)
        for start in range(0, count, size):
            stages = Stages(self.model, self.guide, self.args, self.kwargs, min(size, count - start))
            device = {name: value.device for name, value in self.values.items()}
            values = {name: value[start : start + size].to(device[name]) for name, value in whole.items()}
            trace, told = stages.run(self.model, values), poutine.Trace()
            log_p = stages.log_prob(trace)
            if self.guide is not None:
                told = stages.run(self.guide, values)
                compute_log_prob(told)
            yield Particles(log_p, torch.zeros_like(log_p), trace, told, stages.axes, stages.nesting)
