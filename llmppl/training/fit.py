"""fit(): the training loop for guides, and for programs that learn."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import ELBO
from torch import nn
from tqdm.auto import tqdm

from llmppl.network.random_states import randomness_kept
from llmppl.programs.observations import observing
from llmppl.programs.plates import in_data_plate
from llmppl.programs.simulated_pair import SimulatedPair, with_pair
from llmppl.programs.structure import Program
from llmppl.text.arguments import check_count, check_programs
from llmppl.text.declared import declared
from llmppl.training.collation import collate
from llmppl.training.evaluation import Evaluation, HeldOut
from llmppl.training.history import COLUMNS, HARD, REPLAYED, History
from llmppl.training.interruption import Interruption
from llmppl.training.memory import warn_where_memory_is_short
from llmppl.training.minibatches import Minibatches, Rows, checked
from llmppl.training.optimization import SCHEDULES, make_optimizer, make_scheduler, of_program, trained_parameters
from llmppl.training.processes import Processes
from llmppl.training.ray_samplers import RaySamplers
from llmppl.training.regularisation import Regularisation, Regularised
from llmppl.training.resumable import Resumable
from llmppl.training.run_identity import run_identity
from llmppl.training.simulated_set import SimulatedSet
from llmppl.training.simulated_stream import FreshMinibatches, SimulatedStream

__all__ = ["History", "fit"]


@declared
def fit(
    model: Program,
    guide: Program,
    data: Rows | SimulatedStream,
    objective: ELBO,
    steps: int,
    batch_size: int = 1,
    vectorize_data: bool = False,
    learning_rate: float = 3e-4,
    log_partition_learning_rate: float = 1e-1,
    model_learning_rate: float | None = None,
    warmup_steps: int = 10,
    weight_decay: float = 0.01,
    clip_norm: float = 1.0,
    seed: int | None = None,
    progress: bool = True,
    callback: Callable[[int, History], None] | None = None,
    accumulate: int = 1,
    schedule: str = "constant",
    target_temperature: Callable[[int], float] | float = 1.0,
    evaluation: Evaluation | None = None,
    folder: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    resume: bool = False,
    regularisation: Regularisation | None = None,
    samplers: RaySamplers | None = None,
) -> History:
    """Train a guide, and the program where it has parameters, on minibatches of data with AdamW.

    With a ``folder`` the run can be resumed: called again with ``resume=True`` and otherwise as before it
    goes on from its newest whole checkpoint, bit for bit as if it had not stopped. Killed at any moment it
    loses the steps since that checkpoint; stopped by Ctrl-C it ends its step and writes one more, and loses none. The
    same call with ``resume=True`` starts a run, too, so that
    one command can be repeated until it is through.

    Under ``torchrun``, in a script that has started the group (``torch.distributed.init_process_group()``, or
    ``accelerate.PartialState()``), every process takes its share of a step's minibatches: ``accumulate`` a process.
    Gradients are added up, the history is that of all, the first process writes. A run is the same with as many
    minibatches a step in any number of processes, and may be resumed so.

    :param data: the program's arguments, as tuples or as mappings by name (rows of a ``datasets.Dataset``), each drawn
        once before any is drawn again; or simulated pairs, a set or a stream of :func:`~llmppl.simulate`.
    :param objective: any pyro ``ELBO``. One with ``state_dict()`` and ``load_state_dict(state)``, of
        tensors, numbers, strings, lists and dicts, has its state in the checkpoints.
    :param batch_size: tuples a minibatch; their gradients are averaged.
    :param vectorize_data: call the program once for a whole minibatch, with a list in place of each
        string argument (tensors are stacked, text tensors padded first), inside a plate: faster, for
        programs that treat rows alike.
    :param learning_rate: after ``warmup_steps`` steps of linear warm-up.
    :param log_partition_learning_rate: for a guide's learned log-partition.
    :param model_learning_rate: for the program's own parameters (:meth:`llmppl.LM.adapt`, ``pyro.param``); by default
        ``learning_rate``. They take the M-step of EM while the guide takes the E-step, and both start at once: let the
        guide learn first by ``lm.requires_grad_(False)`` in a run before. Without such parameters it does nothing.
    :param weight_decay: of AdamW: each step multiplies the guide's weights (not those of a learned
        log-partition) by one minus this times the learning rate, which pulls an adapter back to the prompt
        guide. It regularises, as what ``regularisation`` holds does.
    :param clip_norm: the global gradient norm is clipped at this, the guide's and the program's each on its own.
    :param seed: of every random number of the run; by default Pyro's current state is used.
    :param callback: called as ``callback(step, history)`` after each step.
    :param accumulate: minibatches a step, and a process, one after another in memory; all gradients are averaged.
    :param schedule: of the learning rate after warm-up, ``"constant"`` or ``"cosine"``, which falls to zero
        at ``steps``.
    :param target_temperature: of objectives that can temper the posterior they aim at; a number, or a
        function of the step, from 0. Evaluations are at temperature 1.
    :param evaluation: what is measured on held-out data; with ``patience`` it ends the training early.
    :param folder: keeps the newest two checkpoints, ``metrics.jsonl`` with a line a step, and TensorBoard's
        events where ``tensorboard`` is installed. Made if it does not exist.
    :param checkpoint_every: steps between checkpoints; the last step has one in any case.
    :param resume: go on from the folder's newest checkpoint, where it has one. ``steps`` may grow under the
        constant schedule.
    :param regularisation: input noise, adapter dropout and simulated observations against overfitting, see
        :class:`~llmppl.Regularisation`; none by default.
    :param samplers: processes that fill the objective's replay buffer, see :class:`~llmppl.RaySamplers`; none by
        default.
    :returns: the history, of the resumed run from its first step.
    :raises TypeError, ValueError: malformed data or numbers; a loss that is not finite; a folder with
        checkpoints without ``resume``, of another run, or with damaged ones only; a regularisation that the
        program, the guide or the objective cannot have; a stream or a replay buffer in several processes; simulated
        data, or references and pairs of an evaluation, for a program that learns and is soon another.
    :raises KeyboardInterrupt: by Ctrl-C; of a run with a folder, in one process, behind the end of the step and its
        checkpoint. A second Ctrl-C does not wait.
    """
    check_programs(model=model, guide=guide)
    check_count(steps=steps, batch_size=batch_size, accumulate=accumulate, checkpoint_every=checkpoint_every)
    processes = Processes(torch.initial_seed() if seed is None else seed)
    processes.check(objective, data)
    stream = data if isinstance(data, SimulatedStream) else None
    minibatches = accumulate * processes.size
    readings = steps * batch_size * minibatches / len(data) if isinstance(data, SimulatedSet) else math.nan
    data = data.described() if isinstance(data, SimulatedStream) else checked(data, program=model)
    if not isinstance(objective, ELBO):
        raise TypeError(f"objective must be an ELBO such as TrajectoryBalance(num_particles=16), got {objective!r}.")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} must be one of {SCHEDULES}.")
    if resume and folder is None:
        raise ValueError("resume=True needs folder=, where the run's checkpoints are.")
    if seed is not None:
        pyro.set_rng_seed(processes.seed)
    batches = (
        Minibatches(data, batch_size, processes.seed % 2**32 if seed is None else processes.seed)
        if stream is None
        else FreshMinibatches(stream, batch_size)
    )
    if readings > 2 and (evaluation is None or evaluation.pairs is None):
        warnings.warn(
            f"each of the {len(data)} stored pairs is read {readings:.1f} times, and pairs that are read more than "
            "twice can be learned by heart. Watch the held-out gain, evaluation=Evaluation(pairs=simulate(...)), or "
            "train on a stream of fresh pairs, simulate(program, data).",
            stacklevel=2,
        )
    program, proposal = (in_data_plate(model), in_data_plate(guide)) if vectorize_data else (model, guide)
    # What an earlier run or backward pass left behind is none of this one's gradient.
    for _, parameter in pyro.get_param_store().named_parameters():
        parameter.grad = None
    if isinstance(guide, nn.Module):
        guide.zero_grad()

    first = collate(batches.upcoming()) if vectorize_data else batches.upcoming()[0]
    with randomness_kept():
        parameters = trained_parameters(program, proposal, guide, first)
        learned = of_program(parameters, program, guide, first)
        warn_where_memory_is_short(
            program, getattr(guide, "lm", None), first, int(getattr(objective, "num_particles", 1))
        )
        regularised = Regularised(regularisation, program, proposal, guide, objective, first)
    if learned:
        _check_learned(data, evaluation, regularised.options)
    model_rate = learning_rate if model_learning_rate is None else model_learning_rate
    processes.same_start(parameters.values())
    optimizer = make_optimizer(
        parameters, guide, learned, learning_rate, log_partition_learning_rate, model_rate, weight_decay
    )
    scheduler = make_scheduler(optimizer, schedule, warmup_steps, steps)
    history = History(readings=readings, learned=tuple(learned))
    held_out = (
        None
        if evaluation is None
        else HeldOut(evaluation, model, guide, parameters, vectorize_data, history.evaluations, bool(learned))
    )
    parts: dict[str, Any] = {"batches": batches, "optimizer": optimizer, "scheduler": scheduler, "history": history}
    parts |= {} if held_out is None else {"held_out": held_out}
    parts |= {"objective": objective} if hasattr(objective, "state_dict") else {}
    identity = run_identity(
        guide,
        parameters,
        objective,
        data,
        batch_size=batches.batch_size,
        accumulate=minibatches,
        vectorize_data=vectorize_data,
        schedule=schedule,
        steps="any" if schedule == "constant" else steps,
        learning_rate=learning_rate,
        log_partition_learning_rate=log_partition_learning_rate,
        **({"model_learning_rate": model_rate} if learned else {}),
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        target_temperature="a function" if callable(target_temperature) else float(target_temperature),
        evaluation=None if evaluation is None else evaluation.settings(),
        **{f"regularisation's {name}": value for name, value in regularised.options.settings().items()},
    )
    run = Resumable(identity, parameters, guide, parts, folder, processes.writes)
    step = begun = run.open(resume)
    buffer = getattr(getattr(objective, "behaviour", None), "buffer", None)
    sampling = (samplers or RaySamplers(0)).drawing(
        model, guide, parameters, learned, batches, objective, vectorize_data, processes.seed
    )
    start = time.monotonic() - (history.seconds[-1] if history.seconds else 0.0)

    def evaluate(step: int) -> None:
        if held_out is not None and held_out.due(step):
            result = held_out.measure(step, time.monotonic() - start)
            run.record("evaluation", step, asdict(result))
            if history.parted is None and (reason := held_out.parted(step, history.loss)):
                history.parted = step
                if held_out.evaluation.patience is None:
                    warnings.warn(reason, stacklevel=3)

    with (
        _tempering(objective, target_temperature) as temper,
        run,
        Interruption(waits=folder is not None and processes.size == 1) as interruption,
        sampling as exchange,
        tqdm(
            total=steps,
            initial=min(step, steps),
            desc=f"fit {type(objective).__name__}",
            disable=not (progress and processes.writes),
        ) as bar,
    ):
        if step == 0:
            _forget_draws(guide)
            evaluate(0)
        while step < steps and not interruption.asked and not (held_out is not None and held_out.exhausted()):
            _forget_draws(guide)
            temper(step)
            if buffer is not None:
                buffer.step = step
            sampled = exchange(step)
            optimizer.zero_grad()
            try:
                loss, reports = _accumulated(
                    objective, regularised, batches, accumulate, vectorize_data, step, processes
                )
            except ValueError as error:
                # A program's own NaN, of one row or one step, is none of the learning rate's.
                if step == begun or "the network's log-probabilities are NaN" not in str(error):
                    raise
                raise _too_fast(run, step, str(error), optimizer) from error
            processes.sum_gradients(parameters.values())
            for parameter in parameters.values():
                if parameter.grad is not None:
                    parameter.grad /= minibatches * batches.batch_size
            norm = nn.utils.clip_grad_norm_([p for n, p in parameters.items() if n not in learned], clip_norm)
            nn.utils.clip_grad_norm_([parameters[name] for name in learned], clip_norm)
            rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            wrong = [name for name, parameter in parameters.items() if not bool(parameter.isfinite().all())]
            if wrong:
                raise _too_fast(run, step, f"{wrong[0]!r} is not finite any more.", optimizer)
            scheduler.step()
            step += 1
            history.append(
                loss=loss,
                elbo=_mean(reports, "elbo"),
                log_evidence=_mean(reports, "log_evidence"),
                ess=_mean(reports, "ess"),
                gradient_norm=float(norm),
                learning_rate=rate,
                staleness=_mean([report for report in reports if report.get("staleness", math.nan) >= 0], "staleness"),
                sampled=sampled,
                seconds=time.monotonic() - start,
                **{name: sum(report.get(name, 0) for report in reports) for name in HARD},
            )
            columns = COLUMNS if buffer is None else (*COLUMNS, *REPLAYED)
            run.record("step", step, {name: getattr(history, name)[-1] for name in columns})
            evaluate(step)
            stopped = held_out is not None and held_out.exhausted()
            saved = step % checkpoint_every == 0 or step == steps or stopped
            if saved:
                run.save(step)
            shown = {"loss": f"{history.loss[-1]:.2f}"}
            if learned and not math.isnan(history.log_evidence[-1]):
                shown |= {"log p": f"{history.log_evidence[-1]:.2f}"}
            if not math.isnan(history.elbo[-1]):  # simulated pairs have none
                shown |= {"ELBO": f"{history.elbo[-1]:.2f}", "ESS": f"{history.ess[-1]:.1f}"}
            if history.evaluations:
                last = history.evaluations[-1]
                shown |= {"gap": f"{last.gap:.2f}"} if math.isnan(last.gain) else {"gain": f"{last.gain:.2f}"}
            bar.set_postfix(shown, refresh=False)
            bar.update()
            try:
                if callback is not None:
                    callback(step, history)
            except KeyboardInterrupt:
                interruption.asked = True
            if interruption.asked and not saved:
                run.save(step)
        if held_out is not None and held_out.exhausted():
            held_out.restore()
            history.restored = held_out.best_step
            bar.set_postfix_str(f"stopped early, back to step {held_out.best_step}")
    if interruption.asked:
        raise KeyboardInterrupt(run.stopped(step))
    return history


def _forget_draws(guide: Program) -> None:
    """Leave no score of a text drawn before to be recalled: recalled and scored anew they differ in the last bit, and a
    resumed run, in another process, has drawn nothing before."""
    lm = getattr(guide, "lm", None)
    if lm is not None:
        lm.base.drawn.clear()


def _too_fast(run: Resumable, step: int, what: str, optimizer: torch.optim.Optimizer) -> ValueError:
    """Weights that training has made useless: at which step, by which learning rate, and what is left."""
    rates = ", ".join(sorted({f"{group['lr']:.3g}" for group in optimizer.param_groups}))
    return ValueError(
        f"step {step + 1}: the learning rate ({rates} at this step) is too high, for the weights were finite when "
        f"training began: {what.splitlines()[0]} Lower learning_rate, or clip_norm. {run.last_good()}"
    )


def _accumulated(
    objective: ELBO,
    regularised: Regularised,
    batches: Minibatches | FreshMinibatches,
    accumulate: int,
    vectorize_data: bool,
    step: int,
    processes: Processes,
) -> tuple[float, list[dict[str, float]]]:
    """The loss of a step, for one observation, and what the objective reported at each of its calls; the
    summed gradients are left in the parameters.

    :raises ValueError: a loss that is not finite.
    """
    found = []
    processes.seed_minibatch(step, -1)
    simulates = regularised.simulates()
    for n, own in processes.own(accumulate):
        batch = batches.draw()
        if not own:
            continue
        losses, reports = [], []
        processes.seed_minibatch(step, n)
        for args in [collate(batch)] if vectorize_data else batch:
            with _data_noted(step, args), regularised.call(args, simulates) as (model, guide):
                if isinstance(args, SimulatedPair):
                    model, guide = _on_pair(model, guide, args, objective)
                # Some of Pyro's objectives have no differentiable loss, and some return several.
                loss = float(np.sum(objective.loss_and_grads(model, guide, *args)))
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss is {loss} at step {step + 1}, on {args!r}. Lower learning_rate, or check the "
                    "program's factors."
                )
            losses.append((loss, len(batch)))
            rows = len(batch) if vectorize_data else 1
            reports.append(getattr(objective, "diagnostics", None) or {"elbo": -loss / rows})
        found.append((n, (losses, reports)))
    everything = processes.gathered(found)
    total = 0.0
    for losses, _ in everything:
        for loss, rows in losses:
            total += loss / (len(everything) * rows)
    return total, [report for _, reports in everything for report in reports]


@contextmanager
def _data_noted(step: int, args: tuple[Any, ...]) -> Iterator[None]:
    """Has an error say at which step it was raised, and on which data."""
    try:
        yield
    except Exception as error:
        error.add_note(f"Raised at step {step + 1} of fit, on {repr(tuple(args))[:300]}.")
        raise


def _on_pair(model: Program, guide: Program, pair: SimulatedPair, objective: ELBO) -> tuple[Program, Program]:
    """Program and guide for a stored pair: the sleep phase takes it as it is, others train on its observations."""
    if getattr(objective, "insomnia", 1) == 0:
        return with_pair(model, pair), guide
    return observing(model, guide, dict(pair.observations))


@contextmanager
def _tempering(objective: Any, temperature: Callable[[int], float] | float) -> Iterator[Callable[[int], None]]:
    """Sets the objective's temperature before a step, and 1 in the end."""
    if not callable(temperature) and temperature == 1.0:
        yield lambda step: None
        return
    if not hasattr(objective, "target_temperature"):
        raise TypeError(
            f"target_temperature= is for objectives that can temper their target, and {type(objective).__name__} "
            "cannot. Leave it out, or use an off-policy objective such as TrajectoryBalance."
        )

    def temper(step: int) -> None:
        value = float(temperature(step) if callable(temperature) else temperature)
        if not 0 < value < math.inf:
            raise ValueError(f"target_temperature must be positive, got {value} at step {step}.")
        objective.target_temperature = value

    try:
        yield temper
    finally:
        objective.target_temperature = 1.0


def _check_learned(data: Any, evaluation: Evaluation | None, regularisation: Regularisation) -> None:
    """Refuse what belongs to a program as it is, where it is to become another."""
    mend = "Freeze the program, lm.requires_grad_(False), or"
    if any(isinstance(row, SimulatedPair) for row in data[:1]):
        raise ValueError(
            f"data= are simulated pairs, the program's own texts, and teach it nothing. {mend} pass observed data."
        )
    for name in ("references", "pairs"):
        if evaluation is not None and getattr(evaluation, name) is not None:
            raise ValueError(
                f"Evaluation({name}=) belongs to the program as it is, and this one learns. {mend} leave it out."
            )
    if regularisation.simulated or regularisation.input_noise:
        raise ValueError(
            "Regularisation(simulated=, input_noise=) puts other observations in place of the data, and this program "
            f"learns from them. {mend} leave them out; Behaviour(sleep=) simulates for the guide alone."
        )


def _mean(reports: list[dict[str, float]], key: str) -> float:
    return float(np.mean([report.get(key, math.nan) for report in reports] or [math.nan]))
