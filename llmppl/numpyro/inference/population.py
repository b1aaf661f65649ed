"""The particles of sequential Monte Carlo: written, weighed, resampled, as compiled code.

All of this is one particle's, under ``vmap`` with the axis :data:`PARTICLES`; particles meet where they are weighed
against one another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from llmppl.numpyro.distributions.autoregressive_text import choose
from llmppl.numpyro.inference.following import Follow
from llmppl.numpyro.inference.resampling import compete, effective_size
from llmppl.numpyro.inference.stages import Stages, Walk
from llmppl.numpyro.inference.writing import Stream, Writer, check_same_length, followed_law
from llmppl.numpyro.network.reading import sharing
from llmppl.numpyro.network.text_law import TextLaw
from llmppl.numpyro.programs.particles import Layout
from llmppl.numpyro.programs.tracing import Values
from llmppl.posterior.smc_runs import FLOWS_EVERY
from llmppl.text import PAD

PARTICLES = "particles"


class Settings(NamedTuple):
    """How particles compete; as of :func:`llmppl.numpyro.smc`."""

    particles: int
    targets: str | None
    resampling: str
    ess_threshold: float
    check_every: int | None


class Outcome(NamedTuple):
    """What a run ends with; all but the last two fields get a first dimension ``K``.

    :param log_weight: such that the mean weight estimates Z, of shape ``rows``, nats.
    :param log_joint: same shape.
    :param ancestor: the first-generation particle, same shape.
    :param values: by latent site.
    :param token_log_p: by latent text, nats.
    :param token_log_q: by text written token by token, recorded while writing.
    :param log_likelihood: by observed site, of shape ``rows``.
    :param computed: by deterministic site.
    :param ess: effective sample size at each look, ``(looks,) + rows``.
    :param looked: which of the looks took place, ``(looks,)``: none where every text had ended.
    """

    log_weight: Array
    log_joint: Array
    ancestor: Array
    values: Values
    token_log_p: Values
    token_log_q: Values
    log_likelihood: Values
    computed: Values
    ess: Array
    looked: Array


class _State(NamedTuple):
    """A particle on its way.

    :param pending: log q of what is written but not weighed.
    """

    values: Values
    recorded: Values
    log_weight: Array
    log_target: Array
    pending: Array
    ancestor: Array

    def weighed(self, log_target: Array, counts: Array | bool = True) -> _State:
        """Weigh what was written since the last time against a new target, of shape ``rows``, where it counts."""
        grown = log_target - self.log_target - self.pending
        # A particle of weight zero stays one, whatever its targets.
        dead = jnp.isneginf(self.log_weight) | jnp.isneginf(log_target)
        weight = jnp.where(dead, -jnp.inf, self.log_weight + grown)
        return self._replace(
            log_weight=jnp.where(counts, weight, self.log_weight),
            log_target=jnp.where(counts, log_target, self.log_target),
            pending=jnp.where(counts, 0.0, self.pending),
        )


class _Text(NamedTuple):
    """A text under way: its tokens and their log q, ``batch_shape + (T,)``; whether it has ended, ``batch_shape``; what
    the guide's and the program's network have read; the program's law."""

    tokens: Array
    log_q: Array
    ended: Array
    stream: Stream
    prior: Stream | None
    law: TextLaw


def run_population(
    settings: Settings,
    stages: Stages,
    params: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    key: Array,
) -> Outcome:
    """``K`` particles of a program for each observation, from nothing to their joint."""
    own_key, common_key = random.split(key)

    def particle(own_key: Array) -> Outcome:
        with sharing():
            walk = Walk(stages, params, args, kwargs)
            return _Population(settings, walk, event_dims(stages)).run(own_key, common_key)

    outcome = jax.vmap(particle, axis_name=PARTICLES)(random.split(own_key, settings.particles))
    return outcome._replace(ess=outcome.ess[0], looked=outcome.looked[0])


def event_dims(stages: Stages) -> dict[str, int]:
    """Event dimensions of each latent."""
    return {name: stages.proposed[name]["fn"].event_dim for names in stages.segments for name in names}


def targets_of(name: str, law: Any, targets: str | None, guided: bool) -> str:
    """The intermediate targets of a text.

    :raises ValueError: flows of a text that cannot end at every prefix.
    """
    alone = law.automaton is not None and not law.automaton.everywhere
    if law.stop is not None and not alone:
        return targets or ("flows" if guided else "prefixes")
    if targets == "flows":
        what = f"ends with {law.described_stop()} alone" if alone else "has no stop token"
        raise ValueError(
            f"targets='flows': latent site {name!r} {what}, so it cannot end at every prefix. Use "
            "targets='prefixes', or pass stop= there."
        )
    return "prefixes"


class _Population:
    def __init__(self, settings: Settings, walk: Walk, event_dims: dict[str, int]) -> None:
        self.settings, self.walk, self.event_dims = settings, walk, event_dims
        self.where: Layout = walk.stages.where

    def run(self, own_key: Array, common_key: Array) -> Outcome:
        """Walk through the program."""
        rows, segments = self.where.rows, self.walk.stages.segments
        zero = jnp.zeros(rows)
        ancestor = jnp.broadcast_to(lax.axis_index(PARTICLES), rows)
        state = _State({}, {}, zero, zero, zero, ancestor)
        looks = []
        for number, names in enumerate(segments):
            own, common, after = (
                random.fold_in(k, number) for k in (own_key, common_key, random.fold_in(common_key, 0))
            )
            if names[0] in self.walk.stages.texts:
                state, seen = self._write(state, names[0], own, common)
                looks.append(seen)
            else:
                values, log_q = self.walk.propose(state.values, names, own)
                state = state._replace(values={**state.values, **values}, pending=state.pending + log_q)
            scored = self.walk.score(state.values)
            state = state.weighed(scored.log_p)
            looks.append((self._effective(state)[None], jnp.ones(1, bool)))
            if number < len(segments) - 1:
                state, _ = self._resampled(state, jnp.ones(rows, bool), after)
        return Outcome(
            state.log_weight,
            state.log_target,
            state.ancestor,
            state.values,
            scored.token_log_p,
            state.recorded,
            scored.log_likelihood,
            scored.computed,
            jnp.concatenate([ess for ess, _ in looks]),
            jnp.concatenate([looked for _, looked in looks]),
        )

    # --- proposing ---------------------------------------------------------------------------------

    def _write(self, state: _State, name: str, own: Array, common: Array) -> tuple[_State, tuple[Array, Array]]:
        """One text, token by token; and the looks on the way."""
        walk, settings, where = self.walk, self.settings, self.where
        q = walk.law(walk.stages.guide, state.values, name)
        p = walk.law(walk.stages.model, state.values, name)
        check_same_length(q, p)
        targets = targets_of(name, q.law, settings.targets, walk.stages.guided)
        every = settings.check_every or (FLOWS_EVERY if targets == "flows" else 1)
        length = q.event_shape[0]
        first = max(q.law.min_tokens, p.law.min_tokens) - 1 if targets == "flows" else 0
        looking = [n % every == 0 and first <= n < length for n in range(1, length + 1)]
        writer = Writer(q)
        # Proposed from the program itself, one network reads for both.
        prior = Writer(p) if targets == "prefixes" and walk.stages.guided else None
        shape = q.batch_shape
        text = _Text(
            jnp.full((*shape, length), PAD, jnp.int32),
            jnp.zeros((*shape, length), jnp.promote_types(q.lm.dtype, jnp.float32)),
            jnp.zeros(shape, bool),
            writer.start(),
            None if prior is None else prior.start(),
            p.law,
        )

        def advance(carry: tuple[_State, _Text], at: tuple[Array, ...]) -> tuple[tuple[_State, _Text], Any]:
            state, text = carry
            number, looks, token_key, look_key = at
            log_probs = writer.next(text.stream, number, text.tokens)
            token = choose(token_key, log_probs)
            score = jnp.where(text.ended, 0.0, _chosen(log_probs, token))
            state = state._replace(pending=state.pending + where.sum_rows(score))
            if targets == "prefixes":
                # Weighed by the model's own law of the prefix; what the text brings about comes at its end.
                log_p = score
                if prior is not None:
                    assert text.prior is not None
                    log_p = jnp.where(text.ended, 0.0, _chosen(prior.next(text.prior, number, text.tokens), token))
                state = state.weighed(state.log_target + where.sum_rows(log_p))
            token = jnp.where(text.ended, PAD, token)
            text = _Text(
                lax.dynamic_update_slice_in_dim(text.tokens, token[..., None], number, -1),
                lax.dynamic_update_slice_in_dim(text.log_q, score[..., None], number, -1),
                text.ended | text.stream.law.ends(text.tokens, token),
                writer.read(text.stream, token, number),
                None if prior is None or text.prior is None else prior.read(text.prior, token, number),
                text.law,
            )
            looks = looks & _anyone(~text.ended)
            carry, ess = lax.cond(looks, look, unseen, (state, text), number + 1, look_key)
            return carry, (ess, looks)

        def look(carry: tuple[_State, _Text], number: Array, key: Array) -> tuple[tuple[_State, _Text], Array]:
            state, text = carry
            if targets == "flows":
                with sharing():
                    state = self._weighed_by_flows(state, text, name, writer, number)
            ess = self._effective(state)
            is_open = where.sum_rows(jnp.where(text.ended, 0.0, 1.0)) > 0
            # A prefix and a text that has ended have made different numbers of choices.
            group = is_open if targets == "prefixes" else jnp.ones_like(is_open)
            state, text = self._resampled(state, group, key, text)
            return (state, text), ess

        def unseen(carry: tuple[_State, _Text], number: Array, key: Array) -> tuple[tuple[_State, _Text], Array]:
            return carry, jnp.zeros(where.rows)

        def step(carry: tuple[_State, _Text], at: tuple[Array, ...]) -> tuple[tuple[_State, _Text], Any]:
            def rest(carry: tuple[_State, _Text], at: tuple[Array, ...]) -> tuple[tuple[_State, _Text], Any]:
                return carry, (jnp.zeros(where.rows), jnp.zeros((), bool))

            return lax.cond(_anyone(~carry[1].ended), advance, rest, carry, at)

        steps = (jnp.arange(length), jnp.array(looking), random.split(own, length), random.split(common, length))
        (state, text), looks = lax.scan(step, (state, text), steps)
        values, recorded = {**state.values, name: text.tokens}, {**state.recorded, name: text.log_q}
        kept = [n for n, looked in enumerate(looking) if looked]
        return state._replace(values=values, recorded=recorded), (
            looks[0][jnp.array(kept, int)],
            looks[1][jnp.array(kept, int)],
        )

    # --- weighing ----------------------------------------------------------------------------------

    def _weighed_by_flows(self, state: _State, text: _Text, name: str, writer: Writer, number: Array) -> _State:
        """Weigh against the joint with the text ended here, over the guide's probability of ending it."""
        stop = jnp.argmax(_may_end(text.stream.law) & _may_end(text.law), -1)
        closing = jnp.where(text.ended, 0.0, writer.next(text.stream, number, text.tokens)[..., stop])
        at_end = (jnp.arange(text.tokens.shape[-1]) == number) & ~text.ended[..., None]
        closed = jnp.where(at_end, stop.astype(jnp.int32), text.tokens)
        joint = self.walk.score({**state.values, name: closed}).log_p
        closing = self.where.sum_rows(closing)
        # Where the text cannot end here there is no flow, but there may be texts that go on.
        is_open = self.where.sum_rows(jnp.where(text.ended, 0.0, 1.0)) > 0
        return state.weighed(joint - closing, ~is_open | ~(jnp.isneginf(joint) | jnp.isneginf(closing)))

    def _effective(self, state: _State) -> Array:
        return effective_size(lax.all_gather(state.log_weight, PARTICLES))

    # --- resampling --------------------------------------------------------------------------------

    def _resampled(self, state: _State, group: Array, key: Array, text: _Text | None = None) -> tuple[_State, Any]:
        """Each observation's particles of a group, resampled where their effective sample size is low."""
        settings, rows = self.settings, self.where.rows
        weights, members = (
            lax.all_gather(x, PARTICLES).reshape(settings.particles, -1) for x in (state.log_weight, group)
        )
        index, weights, changed = jax.vmap(
            lambda k, w, m: compete(k, w, m, settings.resampling, settings.ess_threshold), (0, 1, 1), (1, 1, 0)
        )(random.split(key, weights.shape[1]), weights, members)
        place = lax.axis_index(PARTICLES)
        follow = Follow(self.where, index.reshape(-1, *rows)[place])
        fresh = weights.reshape(-1, *rows)[place]

        def reorder(state: _State, text: _Text | None) -> tuple[_State, _Text | None]:
            return self._followed(state, follow)._replace(log_weight=fresh), _followed_text(text, follow)

        return lax.cond(changed.any(), reorder, lambda state, text: (state, text), state, text)

    def _followed(self, state: _State, follow: Follow) -> _State:
        return _State(
            {name: follow(value, self.event_dims[name]) for name, value in state.values.items()},
            {name: follow(value, 1) for name, value in state.recorded.items()},
            *(follow(x, 0) for x in (state.log_weight, state.log_target, state.pending, state.ancestor)),
        )


def _followed_text(text: _Text | None, follow: Follow) -> _Text | None:
    if text is None:
        return None
    return _Text(
        follow(text.tokens, 1),
        follow(text.log_q, 1),
        follow(text.ended, 0),
        text.stream.following(follow),
        None if text.prior is None else text.prior.following(follow),
        followed_law(text.law, follow),
    )


def _chosen(log_probs: Array, token: Array) -> Array:
    return jnp.take_along_axis(log_probs, token[..., None], -1)[..., 0]


def _anyone(mine: Array) -> Array:
    """Whether it is true of any text of any particle."""
    return lax.pmax(mine.any().astype(jnp.int32), PARTICLES) > 0


def _may_end(law: Any) -> Array:
    return law.stop if law.allowed is None else law.stop & law.allowed
