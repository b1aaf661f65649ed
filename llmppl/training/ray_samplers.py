"""Samplers: processes of their own that draw for a training run, as actors of Ray."""

from __future__ import annotations

import hashlib
import importlib
import math
import os
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from llmppl.inference.gathering import NoWeightError
from llmppl.inference.importance import importance
from llmppl.inference.smc import smc
from llmppl.network.pickling import packed, put_back, set_apart, unpacked
from llmppl.objectives.replay_buffer import ReplayBuffer
from llmppl.posterior.posterior import Posterior
from llmppl.programs.observation_keys import key
from llmppl.programs.plates import in_data_plate
from llmppl.programs.structure import Program
from llmppl.text.arguments import check_count
from llmppl.text.declared import check_fields
from llmppl.training.collation import collate
from llmppl.training.minibatches import Minibatches
from llmppl.training.optimization import trained_parameters

Draws = Callable[[Program, Program], Callable[..., Posterior]]

KINDS = ("guide", "prior")

DEATHS = 3
"""Samplers that may die one after another before any has drawn something."""

MOST_AHEAD = 32
"""Tasks that one sampler may have before it."""

INTAKE = 0.1
"""Share of the learner's time that it spends on taking in what was drawn: samplers beyond what it can use wait."""


@dataclass(frozen=True)
class RaySamplers:
    """Processes that draw and score latents beside a training run, and fill its objective's replay buffer.

    Balance objectives take particles from anywhere, so that the learner need not draw: with ``Behaviour(replayed=1.0)``
    it scores what samplers have drawn, and draws itself only what they have not come to yet. Each sampler has the
    program and the guide, whose weights of ``refresh_every`` steps it is sent; the language model's frozen weights lie
    once in memory that all on a machine share. The rows that the learner takes next are drawn for first::

        behaviour = Behaviour(replayed=1.0)
        fit(program, guide, rows, TrajectoryBalance(16, behaviour=behaviour), 500, samplers=RaySamplers(4))

    A run with samplers depends on how fast they are, so that a seed does not repeat it. A sampler that dies is
    replaced. Their number is no part of a run: a checkpoint goes on with another, or with none. Ray is started, on this
    machine, where the program that trains has not done so (``ray.init("auto")`` for a cluster), and stopped afterwards.
    It starts its processes at raised niceness unless ``RAY_worker_niceness`` says otherwise; here that is 0 by default.

    :param num: samplers; without any nothing changes.
    :param refresh_every: steps between weights. They are an adapter's, some MB.
    :param max_staleness: steps after which a draw is replayed no more, counted from those of the weights that drew it.
    :param num_samples: draws for each row at a time.
    :param draws: ``"guide"``; ``"prior"``, the program's own latents; or a function of program and guide that returns
        an inference function, for a search: ``lambda program, guide: smc(program, guide, 32, progress=False)``.
        With ``vectorize_data`` that function gets the program in a data plate.
    :param threads: of torch, in each.
    :raises ImportError: Ray is not installed.
    """

    num: int = 1
    refresh_every: int = 8
    max_staleness: int = 64
    num_samples: int = 16
    draws: str | Draws = "guide"
    threads: int = 1

    def __post_init__(self) -> None:
        check_fields(self)
        check_count(refresh_every=self.refresh_every, num_samples=self.num_samples, threads=self.threads)
        check_count(least=0, num=self.num, max_staleness=self.max_staleness)
        if not callable(self.draws) and self.draws not in KINDS:
            raise ValueError(f"draws={self.draws!r} must be one of {KINDS}, or a function of program and guide.")
        if self.num:
            _ray()

    @contextmanager
    def drawing(
        self,
        model: Program,
        guide: Program,
        trained: Mapping[str, Tensor],
        learned: Collection[str],
        batches: Any,
        objective: Any,
        vectorize_data: bool,
        seed: int,
    ) -> Iterator[Callable[[int], int]]:
        """What ``fit`` calls before every step, with the step: it takes in what has been drawn, and says how much.

        :param trained: parameters by name.
        :param learned: which of them are the program's.
        :raises ValueError: an objective without a replay buffer; simulated data.
        """
        if not self.num:
            yield lambda step: 0
            return
        buffer = getattr(getattr(objective, "behaviour", None), "buffer", None)
        if buffer is None:
            raise ValueError(
                f"samplers={self!r} fill a replay buffer, and objective={type(objective).__name__} has none. Pass a "
                "balance objective with behaviour=Behaviour(replayed=1.0)."
            )
        if not isinstance(batches, Minibatches):
            raise ValueError("samplers= draw for rows that come again, and data= is a stream. Pass a list of rows.")
        before, buffer.max_staleness = buffer.max_staleness, self.max_staleness
        team = _Team(self, model, guide, trained, learned, batches, buffer, vectorize_data, seed)
        try:
            yield team.exchange
        finally:
            team.stop()
            buffer.max_staleness = before


class _Team:
    """The samplers of one run, seen from the learner."""

    def __init__(
        self,
        options: RaySamplers,
        model: Program,
        guide: Program,
        trained: Mapping[str, Tensor],
        learned: Collection[str],
        batches: Minibatches,
        buffer: ReplayBuffer,
        vectorize_data: bool,
        seed: int,
    ) -> None:
        self.options, self.trained, self.batches, self.buffer, self.seed = options, trained, batches, buffer, seed
        self.rows = batches.batch_size if vectorize_data else 1
        ray = self.ray = _ray()
        self.started = not ray.is_initialized()
        if self.started:
            ray.init(
                num_cpus=max(options.num * options.threads, os.cpu_count() or 1),
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
            )
        try:
            cloudpickle: Any = importlib.import_module("ray.cloudpickle")
            whole = (model, guide, batches.data[0], options.draws)
            with set_apart(list(trained.values())) as apart:
                content = packed(whole, by=cloudpickle.CloudPickler)
            shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in apart.items()}
            arrays = {name: _bytes_of(tensor) for name, tensor in apart.items()}
            settings = {
                "num_samples": options.num_samples,
                "vectorize_data": vectorize_data,
                "priority": buffer.priority,
                "keeps_scores": not learned,
                "threads": options.threads,
            }
            self.start = (ray.put(content), ray.put(arrays), shapes, settings)
            self.actor = ray.remote(num_cpus=options.threads, max_restarts=0)(_Sampler)
            self.samplers = [self._new() for _ in range(options.num)]
        except BaseException:
            self.stop()
            raise
        self.depth = [2] * options.num
        self.tasks: dict[Any, tuple[Any, int]] = {}
        """By what will be drawn: the sampler, and the step of its weights."""
        self.asked: dict[str, int] = {}
        """By row, the last task that draws for it."""
        self.number = self.deaths = 0
        self.weights: Any = None
        self.step = 0
        self.before = time.monotonic()

    def _new(self) -> Any:
        return self.actor.remote(*self.start)

    def exchange(self, step: int) -> int:
        """Take what is there, send weights where they are due, and ask for more; how many draws were taken."""
        taken = self._take(step)
        if self.weights is None or step - self.step >= self.options.refresh_every:
            from safetensors.torch import save

            own = {name: tensor.detach().cpu().contiguous() for name, tensor in self.trained.items()}
            self.weights, self.step = self.ray.put(save(own)), step
        busy = [sampler for sampler, _ in self.tasks.values()]
        for n, sampler in enumerate(self.samplers):
            waiting = busy.count(sampler)
            if self.number >= len(self.samplers) and not waiting:  # it has had nothing to do
                self.depth[n] = min(2 * self.depth[n], MOST_AHEAD)
            for _ in range(self.depth[n] - waiting):
                task = sampler.draw.remote(self.step, self.weights, self._next_rows(), self._seed())
                self.tasks[task] = (sampler, self.step)
        return taken

    def _take(self, step: int) -> int:
        if not self.tasks:
            return 0
        done, _ = self.ray.wait(list(self.tasks), num_returns=len(self.tasks), timeout=0)
        start = time.monotonic()
        limit, self.before = INTAKE * (start - self.before), start
        taken = 0
        for task in sorted(done, key=lambda task: -self.tasks[task][1]):  # the newest first
            if taken and time.monotonic() - start > limit:
                break
            sampler, drawn_at = self.tasks.pop(task)
            try:
                found = self.ray.get(task)
            except self.ray.exceptions.RayActorError as error:
                self._replace(sampler, error)
                continue
            self.deaths = 0
            if step - drawn_at <= self.options.max_staleness:
                for observation, entries in found.items():
                    for values, joint, weight, log_p in entries:
                        self.buffer.put(observation, values, joint, weight, log_p, drawn_at)
                        taken += 1
        return taken

    def _replace(self, sampler: Any, error: Exception) -> None:
        if sampler not in self.samplers:
            return  # it has been, for another of its tasks
        if "creation task" in str(error):
            raise RuntimeError(f"a sampler could not start: {error}") from error
        self.deaths += 1
        if self.deaths > DEATHS * len(self.samplers):
            raise RuntimeError(
                f"{self.deaths} samplers have died one after another, and none has drawn anything. The last: {error}"
            )
        self.samplers[self.samplers.index(sampler)] = self._new()

    def _next_rows(self) -> list[tuple[Any, ...]]:
        """Of the rows that the learner takes next, those that were drawn for longest ago."""
        window = 2 * self.rows * (len(self.samplers) + 1) * max(self.depth)
        upcoming = self.batches.ahead(math.ceil(window / self.batches.batch_size))
        rows = {key(row): row for row in upcoming}
        chosen = sorted(rows, key=lambda name: self.asked.get(name, -1))[: self.rows]
        self.asked |= dict.fromkeys(chosen, self.number)
        return [rows[name] for name in chosen]

    def _seed(self) -> int:
        self.number += 1
        digest = hashlib.blake2b(f"{self.seed} sampler {self.number}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "big")

    def stop(self) -> None:
        for sampler in getattr(self, "samplers", []):
            self.ray.kill(sampler)
        if self.started:
            self.ray.shutdown()


class _Sampler:
    """One of them: the actor's class."""

    def __init__(
        self,
        content: bytes,
        arrays: Mapping[str, Any],
        shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        settings: Mapping[str, Any],
    ) -> None:
        torch.set_num_threads(settings["threads"])
        with warnings.catch_warnings():
            # They are read only, and nothing here writes to frozen weights.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensors = {
                name: torch.from_numpy(arrays[name]).view(dtype).reshape(shape)
                for name, (shape, dtype) in shapes.items()
            }
        with put_back(tensors):
            model, self.guide, first, self.draws = unpacked(content)
        self.settings, self.step = settings, -1
        args = first
        self.program, self.proposal = model, self.guide
        if settings["vectorize_data"]:
            args = collate([first])
            self.program, self.proposal = in_data_plate(model), in_data_plate(self.guide)
        self.trained = trained_parameters(self.program, self.proposal, self.guide, args)
        self.infer = self._inference(model)

    def _inference(self, model: Program) -> Callable[..., Posterior]:
        count, rows = self.settings["num_samples"], self.settings["vectorize_data"]
        if callable(self.draws):
            return self.draws(self.program, self.proposal)
        if self.draws == "prior":
            return smc(model, None, count, ess_threshold=0.0, vectorize_data=rows, progress=False)
        return importance(model, self.guide, count, vectorize_data=rows, progress=False)

    def draw(
        self, step: int, weights: bytes, rows: list[tuple[Any, ...]], seed: int
    ) -> dict[str, list[tuple[Any, ...]]]:
        """Draws for the rows, and their scores, by observation."""
        if step != self.step:
            from safetensors.torch import load

            with torch.no_grad():
                for name, value in load(weights).items():
                    self.trained[name].copy_(value)
            self.step = step
        pyro.set_rng_seed(seed)
        try:
            posterior = self.infer(*(collate(rows) if self.settings["vectorize_data"] else rows[0]))
        except NoWeightError:
            return {}
        buffer = ReplayBuffer(len(posterior.log_weights), max(len(rows), 1), self.settings["priority"])
        buffer.add(posterior)
        scored = self.settings["keeps_scores"]
        return {
            observation: [(e[0], e[1], e[2], e[4] if scored else None) for e in entries]
            for observation, entries in buffer.state_dict()["entries"].items()
        }


def _bytes_of(tensor: Tensor) -> Any:
    """A tensor's content as an array, whatever its type."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _ray() -> Any:
    """Ray, told to run its workers at this process's niceness and to report nothing.

    :raises ImportError: it is not installed.
    """
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError as error:
        raise ImportError("RaySamplers need Ray: pip install 'pyro-llmppl[ray]'.") from error
