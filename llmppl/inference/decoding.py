"""Classical decoding of a posterior: point answers with their joint log-probability, and no weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from tqdm.auto import tqdm

from llmppl.distributions.autoregressive_text import AutoregressiveText
from llmppl.inference.blocks import block_size
from llmppl.inference.gathering import Gathering, check_unscaled, of_observations
from llmppl.inference.stages import Stages, Values
from llmppl.network.drawing import Stream, choose
from llmppl.network.random_states import randomness_kept
from llmppl.network.text_tensors import unpad_rows
from llmppl.posterior.posterior import Posterior
from llmppl.programs.particles import Particles, compute_log_prob
from llmppl.programs.plates import in_data_plate, in_particles
from llmppl.programs.structure import Program, Site, is_latent
from llmppl.text import PAD
from llmppl.text.arguments import check_programs
from llmppl.text.declared import declared

OPTIONS: dict[str, tuple[str, ...]] = {
    "greedy": (),
    "temperature": ("num_samples", "temperature"),
    "top-k": ("num_samples", "temperature", "top_k"),
    "nucleus": ("num_samples", "temperature", "top_p"),
    "beam": ("num_beams",),
    "best-of-n": ("num_samples", "temperature"),
}
"""What each method may be told."""

NEEDED = {"temperature": "temperature", "top-k": "top_k", "nucleus": "top_p", "beam": "num_beams"}


@declared
def decode(
    model: Program,
    guide: Program | None = None,
    method: str = "greedy",
    num_samples: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int | None = None,
    vectorize_data: bool = False,
    seed: int | None = None,
    progress: bool = True,
) -> Callable[..., Posterior]:
    r"""Point answers for the latent texts: a function of the program's arguments that returns a :class:`Posterior`.

    Its samples are answers, ``log_joint`` their :math:`\log p(x, z)`; log-weights are NaN. The
    guide writes, latent after latent in program order, within each text's own law (stop, lengths, vocabulary,
    grammar, temperature). Methods, and what they may be told:

    - ``"greedy"``: the most probable token each time; one answer.
    - ``"temperature"``: ``num_samples`` draws with logits divided by ``temperature``, beside the law's own.
    - ``"top-k"`` [1]: from the ``top_k`` most probable tokens alone; ``temperature`` comes first.
    - ``"nucleus"`` [2]: from the fewest tokens that hold ``top_p`` of the mass; ``temperature`` comes first.
    - ``"beam"``: the ``num_beams`` most probable beginnings under the guide are kept, over all latents;
      the answers are ranked by their joint. Where there are fewer answers the best is repeated.
    - ``"best-of-n"``: of ``num_samples`` draws (16 by default) the one with the largest joint; one answer.

    Latents of few values (choices, discrete sites) are decoded by the same rule over their values; others are
    drawn, and refused where a method draws nothing.

    :param guide: what writes; by default the program's own prior, which has not seen the observations.
    :param num_samples: answers; 1 by default. No more than one is needed of a method that draws nothing.
    :param vectorize_data: as for :func:`~llmppl.importance`.
    :param seed: of the draws; by default they go on from the present state.
    :raises ValueError: an option that the method does not have, or needs and has not; malformed numbers; a latent
        that the method cannot decode.

    References

    [1] Fan, Lewis, Dauphin (2018), `Hierarchical neural story generation`.
    [2] Holtzman, Buys, Du, Forbes, Choi (2020), `The curious case of neural text degeneration`.
    """
    check_programs(model=model)
    if guide is not None:
        check_programs(guide=guide)
    if method not in OPTIONS:
        raise ValueError(f"method={method!r} must be one of {tuple(OPTIONS)}.")
    given = {
        "num_samples": num_samples,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "num_beams": num_beams,
    }
    _check_options(method, given)
    draws = num_samples or (16 if method == "best-of-n" else 1)
    rule = _Rule(method == "greedy", temperature or 1.0, top_k, top_p)
    if vectorize_data:
        model, guide = in_data_plate(model), None if guide is None else in_data_plate(guide)

    def run(*args: Any, **kwargs: Any) -> Posterior:
        gathering = Gathering()
        with torch.no_grad(), nullcontext() if seed is None else randomness_kept(seed):
            if num_beams is not None:
                gathering.add(_beam_search(Stages(model, guide, args, kwargs, num_beams)))
            else:
                size = block_size(model, args, kwargs)
                with tqdm(total=draws, desc="decoding", disable=not progress, delay=5, leave=False) as bar:
                    for start in range(0, draws, size):
                        count = min(size, draws - start)
                        gathering.add(_written(Stages(model, guide, args, kwargs, count), rule))
                        bar.update(count)
        posterior = of_observations(gathering.posterior("decoding", "marginal"), model, args, kwargs, vectorize_data)
        if method not in ("beam", "best-of-n"):
            return posterior
        ranked = np.argsort(-posterior.log_joint, axis=0, kind="stable")
        chosen = posterior.taken(ranked if method == "beam" else ranked[:1])
        return replace(chosen, log_weights=np.full_like(chosen.log_joint, np.nan))

    return run


def _check_options(method: str, given: dict[str, Any]) -> None:
    own = OPTIONS[method]
    for name, value in given.items():
        if value is not None and name not in own:
            takes = f"takes {', '.join(own)}" if own else "takes no options"
            raise ValueError(f"{name}={value!r} means nothing to method={method!r}, which {takes}. Leave it out.")
    if method in NEEDED and given[NEEDED[method]] is None:
        raise ValueError(f"method={method!r} needs {NEEDED[method]}=.")
    for name in ("num_samples", "top_k", "num_beams"):
        value = given[name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
    temperature, top_p = given["temperature"], given["top_p"]
    if temperature is not None and not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}. At zero it is method='greedy'.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is a share of the mass: above 0 and at most 1, got {top_p}.")


# --- methods that write one text after another ----------------------------------------------------


@dataclass(frozen=True)
class _Rule:
    """Which of the values of each row is taken."""

    greedy: bool
    temperature: float
    top_k: int | None
    top_p: float | None

    def __call__(self, log_probs: Tensor) -> Tensor:
        """``(N,)`` of ``(N, V)``."""
        if self.greedy:
            return log_probs.argmax(-1)
        logits = (log_probs / self.temperature).log_softmax(-1)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kept = logits.topk(self.top_k, -1).indices
            logits = torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))
        if self.top_p is not None:
            ordered, index = logits.sort(-1, descending=True)
            before = ordered.exp().cumsum(-1) - ordered.exp()  # the mass of more probable tokens
            logits = torch.full_like(logits, -torch.inf).scatter(
                -1, index, ordered.masked_fill(before >= self.top_p, -torch.inf)
            )
        return choose(logits)


class _Writer(Messenger):
    """Puts what a rule takes in the place of the guide's draws."""

    def __init__(self, rule: _Rule) -> None:
        super().__init__()
        self.rule = rule

    def _pyro_sample(self, msg: Site) -> None:
        if not is_latent(msg) or msg["done"]:
            return
        fn = msg["fn"]
        if isinstance(fn, AutoregressiveText):
            rows = fn.context.reshape(-1, fn.context.shape[-1])
            value = _write(fn, rows, self.rule).reshape(fn.batch_shape + fn.event_shape)
        elif fn.has_enumerate_support:
            support, log_probs = _values(fn, msg["name"])
            taken = self.rule(log_probs.movedim(0, -1).reshape(-1, len(support)))
            value = support[taken].reshape(fn.batch_shape + fn.event_shape)
        elif self.rule.greedy:
            raise _undecodable(msg["name"], fn, "greedy")
        else:
            value = fn.sample()
        msg["value"], msg["done"] = value, True


def _written(stages: Stages, rule: _Rule) -> Particles:
    with poutine.block(), _Writer(rule):
        program = in_particles(stages.guide, stages.count, stages.nesting)
        trace = poutine.trace(program).get_trace(*stages.args, **stages.kwargs)
    return _particles(stages, {name: site["value"] for name, site in trace.nodes.items() if is_latent(site)})


def _particles(stages: Stages, values: Values) -> Particles:
    """Answers with their joint, and their tokens' scores under the guide."""
    trace, told = stages.run(stages.model, values), stages.run(stages.guide, values)
    log_p = stages.log_prob(trace)
    compute_log_prob(told)
    particles = Particles(log_p, torch.zeros_like(log_p), trace, told, stages.axes, stages.nesting)
    check_unscaled(particles)
    return particles


def _write(fn: AutoregressiveText, contexts: Tensor, rule: _Rule) -> Tensor:
    """Texts after contexts ``(N, L)``, token by token: ``(N, max_tokens)``."""
    law = fn.law
    assert law.max_tokens is not None
    texts = torch.full((len(contexts), law.max_tokens), PAD, dtype=torch.long, device=contexts.device)
    rows = torch.arange(len(contexts), device=contexts.device)
    with fn.lm.using(fn.adapter):
        stream = Stream(fn.lm.transformer, unpad_rows(contexts), law.max_tokens)
        for step in range(law.max_tokens):
            token = rule(fn.next_log_probs(stream.logits, texts[rows, :step], rows))
            kept = (~law.ends(texts[rows, :step], token)).nonzero()[:, 0]
            texts[rows, step] = token
            if step + 1 == law.max_tokens or not len(kept):
                break
            stream.select(kept)
            stream.advance(token[kept])
            rows = rows[kept]
    return texts


def _values(fn: Any, name: str) -> tuple[Tensor, Tensor]:
    """The values of a site, ``(n,) + event_shape``, and their log-probabilities, ``(n,) + batch_shape``."""
    try:
        support = fn.enumerate_support(expand=False)
    except (NotImplementedError, ValueError):
        raise _undecodable(name, fn, "any method") from None
    return support.reshape((-1, *fn.event_shape)), fn.log_prob(support).expand((len(support), *fn.batch_shape))


def _undecodable(name: str, fn: Any, method: str) -> ValueError:
    return ValueError(
        f"latent site {name!r} ({type(fn).__name__}) has no finite list of values to decode with {method}. Use "
        "method='best-of-n', which draws it, or condition on it."
    )


# --- beam search ----------------------------------------------------------------------------------


def _beam_search(stages: Stages) -> Particles:
    """The beams' latents, site after site; each site's beams begin where those of the sites before it ended."""
    values: Values = {}
    score = torch.full(stages.shape, -torch.inf, dtype=torch.float64)  # (B,) + batch_shape
    score[0] = 0.0
    proposed = stages.run(stages.guide, {})
    for name in [name for name, site in proposed.nodes.items() if is_latent(site)]:
        fn = stages.run(stages.guide, values).nodes[name]["fn"]
        front = stages.laid_out(score).shape
        if torch.broadcast_shapes(front, fn.batch_shape) != front:
            raise ValueError(
                f"latent site {name!r} stands in a plate that does not contain every site, and beam search takes "
                "one text after another. Use another method, or write the plate as sites of their own."
            )
        fn = fn.expand(front)
        flat = score.reshape(stages.count, -1).T  # (rows, B)
        if isinstance(fn, AutoregressiveText):
            contexts = fn.context.reshape(stages.count, -1, fn.context.shape[-1]).movedim(0, 1)
            found, flat, source = _beams(fn, contexts, flat)
        elif fn.has_enumerate_support:
            support, log_probs = _values(fn, name)
            steps = log_probs.reshape(len(support), stages.count, -1).movedim(0, -1).movedim(0, 1).double().cpu()
            flat, source, taken = _best(flat[..., None] + steps)
            found = support[taken.to(support.device)]
        else:
            raise _undecodable(name, fn, "beam search")
        # Where there are fewer answers than beams, the best stands in.
        missing = torch.isneginf(flat)
        best = torch.where(missing, flat.argmax(-1, keepdim=True), torch.arange(stages.count))
        source = source.gather(-1, best)
        found = found.gather(1, best.to(found.device).reshape(best.shape + (1,) * (found.dim() - 2)).expand_as(found))
        index = source.T.reshape(stages.shape)
        values = {n: stages.take(index.to(v.device), v) for n, v in values.items()}
        values[name] = found.movedim(1, 0).reshape(front + fn.event_shape)
        score = flat.T.reshape(stages.shape)
    return _particles(stages, values)


def _best(candidates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ``B`` best of ``(rows, B, V)``: their scores, their beams and what they take, ``(rows, B)`` each."""
    beams, size = candidates.shape[1:]
    score, index = candidates.flatten(1).topk(beams, -1)
    return score, index // size, index % size


def _beams(fn: AutoregressiveText, contexts: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Beam search over one text for each row; an ended text competes with its score as it is.

    :param contexts: of each beam, ``(rows, B, L)``.
    :param score: log-probability of what stands before, ``(rows, B)``; −inf for a beam that is none.
    :returns: texts ``(rows, B, T)``, their scores, and the beams that they began as, ``(rows, B)``.
    """
    law, (count, beams) = fn.law, score.shape
    assert law.max_tokens is not None
    texts = torch.full((count, beams, law.max_tokens), PAD, dtype=torch.long)
    source = torch.arange(beams).expand(count, beams)
    numbers = torch.arange(beams * count).reshape(beams, count).T  # of the beams in the flattened batch
    is_open = score.isfinite()
    with fn.lm.using(fn.adapter):
        stream = Stream(fn.lm.transformer, unpad_rows(contexts[is_open.to(contexts.device)]), law.max_tokens)
        for step in range(law.max_tokens):
            place = torch.full((count, beams), -1)
            place[is_open] = torch.arange(int(is_open.sum()))
            begun, rows = texts[is_open][:, :step].to(contexts.device), numbers.gather(1, source)[is_open]
            log_probs = fn.next_log_probs(stream.logits, begun, rows.to(contexts.device)).double().cpu()
            candidates = torch.full((count, beams, log_probs.shape[-1]), -torch.inf, dtype=torch.float64)
            candidates[..., 0] = score
            candidates[is_open] = score[is_open][:, None] + log_probs
            score, beam, token = _best(candidates)
            texts = texts.gather(1, beam[..., None].expand_as(texts))
            source, place = source.gather(1, beam), place.gather(1, beam)
            grows = is_open.gather(1, beam) & score.isfinite()
            flat = [x.reshape(count * beams, -1).to(law.stop.device) for x in (texts[..., :step], token)]
            is_open = grows & ~law.ends(flat[0], flat[1][:, 0]).reshape(grows.shape).cpu()
            texts[..., step] = torch.where(grows, token, PAD)
            if step + 1 == law.max_tokens or not bool(is_open.any()):
                break
            stream.select(place[is_open].to(contexts.device))
            stream.advance(token[is_open].to(contexts.device))
    return texts.to(contexts.device), score, source
