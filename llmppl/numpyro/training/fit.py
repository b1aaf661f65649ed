"""fit(): the training loop for guides, one compiled step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from jax import Array, random
from numpyro import handlers
from numpyro.distributions import biject_to, constraints
from numpyro.infer.elbo import ELBO
from tqdm.auto import tqdm

from llmppl.numpyro.network.lifting import jit
from llmppl.numpyro.objectives.optimizers import optimizer
from llmppl.numpyro.objectives.particle_objective import ParticleObjective
from llmppl.numpyro.programs.particles import layout, run_particle
from llmppl.numpyro.programs.tracing import DummyTexts, Program, in_data_plate
from llmppl.numpyro.training.data_columns import Columns
from llmppl.text.arguments import check_count, check_programs
from llmppl.text.declared import declared
from llmppl.training.history import HARD, History
from llmppl.training.minibatches import Minibatches, Rows, checked

SCHEDULES = ("constant", "cosine")


@declared
def fit(
    model: Program,
    guide: Any,
    data: Rows,
    objective: ELBO,
    steps: int,
    batch_size: int = 1,
    vectorize_data: bool = False,
    learning_rate: float = 3e-4,
    log_partition_learning_rate: float = 1e-1,
    warmup_steps: int = 10,
    weight_decay: float = 0.01,
    clip_norm: float = 1.0,
    seed: int = 0,
    progress: bool = True,
    callback: Callable[[int, History], None] | None = None,
    schedule: str = "constant",
    target_temperature: Callable[[int], float] | float = 1.0,
) -> History:
    """Train a guide on minibatches of data with AdamW, as :func:`llmppl.fit` does.

    A step is compiled once: strings are encoded, and every text of an argument is padded to one width. The guide takes
    the trained parameters over (``guide.update``), those of ``others`` too; ``guide.params`` has what is not its own.

    :param guide: a :class:`~llmppl.numpyro.guides.TextGuide`; with others use NumPyro's ``SVI``.
    :param data: the program's argument tuples: strings, numbers and arrays; anything else must be the same in all. Each
        is drawn once before any is drawn again.
    :param objective: any NumPyro ``ELBO``.
    :param batch_size: tuples a minibatch; their gradients are averaged.
    :param vectorize_data: call the program once for a whole minibatch, inside a plate, for programs that treat rows
        alike; otherwise it runs once for each tuple, under ``vmap``.
    :param learning_rate: after ``warmup_steps`` steps of linear warm-up.
    :param log_partition_learning_rate: for a guide's learned log-partition.
    :param weight_decay: of AdamW, on all but a learned log-partition.
    :param clip_norm: the global gradient norm is clipped at this.
    :param seed: of every random number of the run.
    :param callback: called as ``callback(step, history)`` after each step.
    :param schedule: of the learning rate after warm-up, ``"constant"`` or ``"cosine"``, which falls to zero at
        ``steps``.
    :param target_temperature: of :class:`TrajectoryBalance`, a number, or a function of the step, from 0.
    :returns: the history.
    :raises TypeError, ValueError: malformed data or numbers; a loss that is not finite, with the sites that make it so.
    """
    check_programs(model=model, guide=guide)
    data = checked(data, program=model)
    check_count(steps=steps, batch_size=batch_size)
    if not isinstance(objective, ELBO):
        raise TypeError(
            f"objective must be an ELBO of NumPyro such as TrajectoryBalance(num_particles=16), got {objective!r}."
        )
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} must be one of {SCHEDULES}.")
    if not hasattr(guide, "update"):
        raise TypeError(
            f"guide is a {type(guide).__name__} without update(params), which would take the trained parameters over. "
            "Pass a guide of llmppl.numpyro.guides, or use numpyro.infer.SVI."
        )
    tempered = callable(target_temperature) or target_temperature != 1.0
    if tempered and not hasattr(objective, "behaviour"):
        raise TypeError(
            f"target_temperature= is for objectives that can temper their target, and {type(objective).__name__} "
            "cannot. Leave it out, or use TrajectoryBalance."
        )
    batches = Minibatches(list(range(len(data))), batch_size, seed)  # type: ignore[arg-type]
    columns = Columns(data, getattr(guide, "lm", None))
    program, proposal = (in_data_plate(model), in_data_plate(guide)) if vectorize_data else (model, guide)
    key, start_key = random.split(random.key(seed))
    example = columns.rows(batches.upcoming())  # type: ignore[arg-type]
    example = example if vectorize_data else jax.tree.map(lambda leaf: leaf[0], example)
    params, constrain = _parameters(program, proposal, columns.arguments(example), start_key)
    rates = [_rate(rate, schedule, warmup_steps, steps) for rate in (learning_rate, log_partition_learning_rate)]
    optim = optax.chain(optax.clip_by_global_norm(clip_norm), optimizer(rates[0], rates[1], weight_decay))
    state = optim.init(params)

    def one(key: Array, params: dict[str, Any], rows: dict[int, Any], heat: Any) -> tuple[Array, dict[str, Array]]:
        args = columns.arguments(rows)
        if isinstance(objective, ParticleObjective):
            kwargs = {"target_temperature": heat} if tempered else {}
            with handlers.block():
                return objective.loss_and_report(key, constrain(params), program, proposal, *args, **kwargs)
        return objective.loss(key, constrain(params), program, proposal, *args), {}

    def average(params: dict[str, Any], key: Array, rows: dict[int, Any], heat: Any) -> tuple[Array, dict[str, Array]]:
        if vectorize_data:
            loss, said = one(key, params, rows, heat)
            return loss / batches.batch_size, said
        keys = random.split(key, batches.batch_size)
        losses, said = jax.vmap(lambda k, r: one(k, params, r, heat))(keys, rows)
        return losses.mean(), {n: leaf.sum() if n in HARD else leaf.mean() for n, leaf in said.items()}

    def update(params: dict[str, Any], state: Any, key: Array, rows: dict[int, Any], heat: Any) -> tuple[Any, ...]:
        (loss, said), gradient = jax.value_and_grad(average, has_aux=True)(params, key, rows, heat)
        norm = jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(gradient)))
        updates, state = optim.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss, said, norm

    compiled = jit(update)
    history, start = History(), time.monotonic()
    with tqdm(total=steps, desc=f"fit {type(objective).__name__}", disable=not progress) as bar:
        for step in range(steps):
            heat = float(target_temperature(step) if callable(target_temperature) else target_temperature)
            if not 0 < heat < math.inf:
                raise ValueError(f"target_temperature must be positive, got {heat} at step {step}.")
            key, own = random.split(key)
            chosen = batches.draw()
            rows = columns.rows(chosen)  # type: ignore[arg-type]
            new, state, loss, said, norm = compiled(params, state, own, rows, heat)
            if not math.isfinite(float(loss)):
                sites = _guilty(program, proposal, constrain(params), columns, rows, own, vectorize_data)
                raise ValueError(
                    f"the loss is {float(loss)} at step {step + 1}, on {[data[n] for n in chosen]!r}{sites}. "  # type: ignore[call-overload]
                    "Lower learning_rate, or check the program's factors: a hard condition has no gradient. "
                    "TrajectoryBalance takes floor=, nats that stand for it, e.g. floor=-100.0; WakeSleep's wake phase "
                    "takes it as weight zero."
                )
            params = new
            history.append(
                loss=float(loss),
                elbo=float(said.get("elbo", -loss)),
                ess=float(said.get("ess", math.nan)),
                gradient_norm=float(norm),
                learning_rate=float(rates[0](step)),
                seconds=time.monotonic() - start,
                **{name: float(said.get(name, 0)) for name in HARD},
            )
            bar.set_postfix({"loss": f"{history.loss[-1]:.2f}"}, refresh=False)
            bar.update()
            if callback is not None:
                guide.update(constrain(params))
                callback(step + 1, history)
    guide.update(constrain(params))
    return history


def _parameters(
    model: Program, guide: Program, args: tuple[Any, ...], key: Array
) -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]:
    """The unconstrained parameters of guide and model by name, and what constrains them, by a run that costs no forward
    pass of the language model.

    :raises ValueError: there are none.
    """
    params, transforms = {}, {}
    for program, own in zip((model, guide), random.split(key), strict=True):
        with handlers.block(), handlers.trace() as trace, DummyTexts(), handlers.seed(rng_seed=own):
            program(*args)
        for name, site in trace.items():
            if site["type"] == "param":
                transforms[name] = biject_to(site["kwargs"].get("constraint", constraints.real))
                params[name] = jax.tree.map(jnp.asarray, transforms[name].inv(site["value"]))
    if not params:
        raise ValueError(
            "nothing to train: neither model nor guide has parameters. PromptGuide has none; use AutoregressiveGuide."
        )
    return params, lambda unconstrained: {name: transforms[name](value) for name, value in unconstrained.items()}


def _rate(rate: float, schedule: str, warmup_steps: int, steps: int) -> Callable[[Any], Array]:
    """Linear warm-up, then a constant rate or half a cosine that ends at zero after the last step."""

    def at(step: Any) -> Array:
        warm = jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))
        if schedule == "constant":
            return rate * warm
        share = (step - warmup_steps) / max(steps - warmup_steps, 1)
        return rate * jnp.where(step < warmup_steps, warm, 0.5 * (1 + jnp.cos(jnp.pi * share)))

    return at


def _guilty(
    model: Program,
    guide: Program,
    params: dict[str, Any],
    columns: Columns,
    rows: dict[int, Any],
    key: Array,
    vectorize_data: bool,
) -> str:
    """Which sites have no finite log-density, among some particles drawn anew: for an error message."""
    for n in range(1 if vectorize_data else len(jax.tree.leaves(rows)[0])):
        own = rows if vectorize_data else jax.tree.map(lambda leaf, n=n: leaf[n], rows)
        args = columns.arguments(own)
        where = layout(model, guide, args, {})
        for draw in random.split(key, 8):
            particle = run_particle(where, model, guide, params, args, {}, draw, gradients=True)
            for of, terms in (("the guide's", particle.proposed), ("the program's", particle.terms)):
                for name, term in terms.items():
                    bad = [number for number in np.ravel(term).tolist() if not math.isfinite(number)]
                    if bad:
                        return f": {of} site {name!r} has log-probability {bad[0]}"
    return ""
