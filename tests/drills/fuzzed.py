"""Fuzzed calls over the public API in both twins: each ends in an answer or in an error of this library that says which
argument was wrong; never in a traceback from within a framework.

    python tests/drills/fuzzed.py [--count 1000] [--seed 0] [--twin torch|numpyro]

Half of the calls go to each twin. A call takes valid arguments, and one or two of them are put out of shape: another
type, out of range, NaN, empty, huge, negative, bytes, non-ASCII, of a wrong shape.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drill import Drill, TooLong, described, is_named, too_long
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

SECONDS = 20.0
"""After which a call counts as honest work: the drill asks for errors, not for patience."""


@dataclass
class Target:
    """A public function with arguments that it takes.

    :param valid: a function that makes them, by name.
    :param places: those that are passed by place, in order.
    :param then: what its result is called with, where that is a function: arguments, of which one may be fuzzed, too.
    :param fixed: arguments that are never put out of shape.
    :param words: other names by which its errors may call an argument.
    """

    function: Callable[..., Any]
    valid: Callable[[], dict[str, Any]]
    places: tuple[str, ...] = ()
    then: tuple[tuple[str, Any], ...] | None = None
    fixed: tuple[str, ...] = ()
    words: dict[str, str] | None = None

    def call(self, changed: dict[str, Any], key: Any = None) -> Any:
        named = self.valid() | {name: value for name, value in changed.items() if not name.startswith("then.")}
        result = self.function(*[named.pop(name) for name in self.places], **named)
        if self.then is None:
            return result
        args = [changed.get(f"then.{name}", value) for name, value in self.then]
        return result(*([] if key is None else [key]), *args)


def torch_targets(folder: Path) -> dict[str, Target]:
    import pyro
    import torch

    import llmppl
    from llmppl import guides, models, objectives, testing

    lm, other = testing.tiny_lm(), testing.tiny_lm()
    for each in (lm, other):
        each.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"

    def program(beginning: Any, ending: Any) -> Any:
        middle = pyro.sample("middle", lm(beginning, max_tokens=2, stop="."))
        pyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))
        return middle

    def questioned(question: Any, answer: Any = None) -> Any:
        thought = pyro.sample("thought", lm(question, max_tokens=2))
        observed = None if answer is None else lm.encode(answer)
        return pyro.sample("answer", lm(question, thought, max_tokens=1), obs=observed)

    guide = guides.AutoregressiveGuide(program, lm, rank=2, seed=0)
    guide.save(folder / "guide.safetensors")
    prompt = guides.PromptGuide(program, lm)
    data = [("a", "b"), ("b", "c")]
    pairs = llmppl.simulate(program, data, 4, progress=False)
    pairs.save(folder / "pairs")
    posterior = llmppl.importance(program, prompt, 8, progress=False)("a", "b")
    story = (("beginning", "a"), ("ending", "b"))
    both: dict[str, Any] = {"model": program, "guide": prompt}
    quiet: dict[str, Any] = {**both, "progress": False}

    def made(kind: Any, **more: Any) -> Target:
        return Target(kind, lambda: {"model": program, "lm": lm, "prompt": None, "others": None, **more})

    adapter: dict[str, Any] = {"rank": 2, "alpha": None, "target_modules": None, "adapter": None, "seed": 0}
    ready: dict[str, Any] = {"max_tokens": 2}
    return {
        "importance": Target(
            llmppl.importance,
            lambda: {**quiet, "num_samples": 4, "vectorize_data": False, "target_error": None, "defensive": 0.0},
            then=story,
        ),
        "bounds": Target(
            llmppl.bounds,
            lambda: {**both, "num_samples": 2, "simulations": 1, "vectorize_data": False, "method": "importance"},
            then=story,
        ),
        "smc": Target(
            llmppl.smc,
            lambda: {
                **quiet,
                "num_samples": 2,
                "targets": None,
                "resampling": None,
                "ess_threshold": 0.5,
                "check_every": None,
                "num_runs": 1,
                "vectorize_data": False,
                "seed": 0,
                "defensive": 0.0,
            },
            then=story,
        ),
        "mcmc": Target(
            llmppl.mcmc,
            lambda: {
                **quiet,
                "kernel": "independence",
                "num_samples": 4,
                "num_chains": 2,
                "warmup": 1,
                "block": None,
                "vectorize_data": False,
                "seed": 0,
            },
            then=story,
        ),
        "decode": Target(
            llmppl.decode,
            lambda: {
                **quiet,
                "method": "temperature",
                "num_samples": 2,
                "temperature": 1.0,
                "top_k": None,
                "top_p": None,
                "num_beams": None,
                "vectorize_data": False,
                "seed": 0,
            },
            then=story,
        ),
        "exact_posterior": Target(llmppl.exact_posterior, lambda: {"model": program}, then=story),
        "predict": Target(
            llmppl.predict,
            lambda: {"model": questioned, "site": "answer", "num_samples": 2, "guide": None, "vectorize_data": False},
            then=(("question", "a"),),
        ),
        "answer": Target(
            llmppl.answer,
            lambda: {
                "model": questioned,
                "site": "answer",
                "options": ["a", "b"],
                "normalise": None,
                "num_samples": 2,
                "guide": None,
                "vectorize_data": False,
            },
            then=(("question", "a"),),
        ),
        "simulate": Target(
            llmppl.simulate,
            lambda: {
                "program": program,
                "data": data,
                "num_pairs": 2,
                "batch_size": 2,
                "seed": 0,
                "folder": None,
                "progress": False,
            },
        ),
        "diagnose": Target(
            llmppl.diagnose,
            lambda: {**quiet, "data": data, "num_samples": 4, "simulations": 2, "seed": 0, "vectorize_data": False},
        ),
        "calibrate": Target(
            llmppl.calibrate,
            lambda: {
                **quiet,
                "num_draws": 3,
                "simulations": 2,
                "functionals": None,
                "sampler": "guide",
                "level": 0.95,
                "seed": 0,
                "vectorize_data": False,
            },
            then=story,
        ),
        "expected_coverage": Target(
            llmppl.expected_coverage,
            lambda: {**quiet, "simulations": 2, "level": 0.95, "seed": 0, "vectorize_data": False},
            then=story,
        ),
        "gap_report": Target(
            llmppl.gap_report,
            lambda: {
                **quiet,
                "guide": guide,
                "data": data,
                "held_out": None,
                "num_samples": 4,
                "steps": 1,
                "restarts": 1,
                "objective": None,
                "learning_rate": 1e-3,
                "references": None,
                "seed": 0,
            },
        ),
        "held_out_gain": Target(
            llmppl.held_out_gain, lambda: {**both, "pairs": pairs, "vectorize_data": True, "log_evidence": None}
        ),
        "fit": Target(
            llmppl.fit,
            lambda: {
                **quiet,
                "guide": guide,
                "data": data,
                "objective": objectives.TrajectoryBalance(2),
                "steps": 1,
                "batch_size": 1,
                "vectorize_data": False,
                "learning_rate": 1e-4,
                "log_partition_learning_rate": 1e-1,
                "model_learning_rate": None,
                "warmup_steps": 1,
                "weight_decay": 0.0,
                "clip_norm": 1.0,
                "seed": 0,
                "callback": None,
                "accumulate": 1,
                "schedule": "constant",
                "target_temperature": 1.0,
                "evaluation": None,
                "folder": None,
                "checkpoint_every": 1,
                "resume": False,
                "regularisation": None,
                "samplers": None,
            },
        ),
        "Evaluation": Target(
            llmppl.Evaluation,
            lambda: {
                "data": data,
                "every": 1,
                "num_samples": 2,
                "patience": None,
                "simulations": 1,
                "references": None,
                "seed": 0,
                "pairs": pairs,
                "pairs_log_evidence": None,
            },
        ),
        "Regularisation": Target(
            llmppl.Regularisation, lambda: {"input_noise": 0.0, "adapter_dropout": 0.0, "simulated": 0.0}
        ),
        "RaySamplers": Target(
            llmppl.RaySamplers,
            lambda: {
                "num": 0,
                "refresh_every": 1,
                "max_staleness": 1,
                "num_samples": 2,
                "draws": "guide",
                "threads": 1,
            },
        ),
        "ReplayBuffer": Target(
            llmppl.ReplayBuffer,
            lambda: {"capacity": 2, "observations": 2, "priority": "uniform", "max_staleness": None},
        ),
        "ReplayBuffer.add": Target(llmppl.ReplayBuffer().add, lambda: {"posterior": posterior}),
        "ReplayBuffer.draw": Target(llmppl.ReplayBuffer().draw, lambda: {"observation": "x", "count": 2}),
        "ReplayBuffer.seed": Target(
            llmppl.ReplayBuffer().seed,
            lambda: {"model": program, "args": ("a", "b"), "middle": ["a.", "b."]},
            words={"middle": "text"},
        ),
        "Behaviour": Target(
            llmppl.Behaviour,
            lambda: {
                "tempered": 0.1,
                "replayed": 0.1,
                "sleep": 0.0,
                "temperatures": (0.5, 1.5),
                "buffer": llmppl.ReplayBuffer(),
            },
        ),
        "TrajectoryBalance": Target(
            objectives.TrajectoryBalance,
            lambda: {"num_particles": 2, "log_partition": "vargrad", "behaviour": None, "floor": None},
        ),
        "SubTrajectoryBalance": Target(
            objectives.SubTrajectoryBalance,
            lambda: {"num_particles": 2, "decay": 1.0, "behaviour": None, "floor": None, "every": 1},
        ),
        "DetailedBalance": Target(
            objectives.DetailedBalance, lambda: {"num_particles": 2, "behaviour": None, "floor": None}
        ),
        "LeaveOneOutELBO": Target(objectives.LeaveOneOutELBO, lambda: {"num_particles": 2}),
        "WakeSleep": Target(objectives.WakeSleep, lambda: {"num_particles": 2, "insomnia": 0.5, "exhaust": ()}),
        "Denoising": Target(objectives.Denoising, lambda: {"num_particles": 2, "num_masks": 1}),
        "tiny_lm": Target(testing.tiny_lm, lambda: {"vocabulary": 6, "seed": 0}),
        "LM": Target(llmppl.LM, lambda: {"model": other.transformer, "tokenizer": other.tokenizer}),
        "LM.from_pretrained": Target(
            llmppl.LM.from_pretrained,
            lambda: {"name_or_folder": str(folder / "none")},
        ),
        "lm.encode": Target(lm.encode, lambda: {"text": "ab", "special": False}),
        "lm.decode": Target(lm.decode, lambda: {"value": lm.encode("ab")}),
        "lm.adapt": Target(lm.adapt, lambda: {"rank": 2, "seed": 0}),
        "lm": Target(
            lm,
            lambda: {
                "piece": "ab",
                "max_tokens": 3,
                "stop": ".",
                "min_tokens": 1,
                "temperature": 1.0,
                "allowed": None,
                "grammar": None,
            },
            places=("piece",),
        ),
        "lm.choice": Target(
            lm.choice, lambda: {"piece": "ab", "options": ["a", "b"], "probs": [1.0, 2.0]}, places=("piece",)
        ),
        "lm.map": Target(
            lm.map,
            lambda: {"function": str, "value": lm.encode("ab"), "max_tokens": 2, "returns": str},
            places=("function", "value"),
            words={"value": "lm.map", "function": "lm.map"},
        ),
        "lm.echo": Target(lm.echo, lambda: {"text": "ab", "mistake": 0.1}, words={"text": "piece"}),
        "lm.content_word": Target(lm.content_word, lambda: {"text": "abc", "shortest": 3}, words={"text": "piece"}),
        "lm.context": Target(lm.context, lambda: {"piece": "ab"}, places=("piece",)),
        "lm.chat": Target(lm.chat, lambda: {"messages": [{"role": "user", "content": "a"}], "answers": True}),
        "lm.image": Target(lm.image, lambda: {"images": None}, words={"images": "image"}),
        "log_prob": Target(lm("ab", max_tokens=3).log_prob, lambda: {"value": lm.encode("aba")}, places=("value",)),
        "Grammar.regex": Target(
            lambda pattern: lm("a", max_tokens=2, grammar=llmppl.Grammar.regex(pattern)),
            lambda: {"pattern": "[ab]*"},
            words={"pattern": "grammar"},
        ),
        "Grammar.json_schema": Target(
            lambda schema: lm("a", max_tokens=2, grammar=llmppl.Grammar.json_schema(schema)),
            lambda: {"schema": {"type": "number"}},
            words={"schema": "grammar"},
        ),
        "Grammar.lark": Target(
            lambda rules: lm("a", max_tokens=2, grammar=llmppl.Grammar.lark(rules)),
            lambda: {"rules": 'start: "a"'},
            words={"rules": "grammar"},
        ),
        "PromptGuide": made(guides.PromptGuide),
        "AutoregressiveGuide": made(guides.AutoregressiveGuide, **adapter, sampling_dtype=None),
        "GFlowNetGuide": made(guides.GFlowNetGuide, **adapter, sampling_dtype=None),
        "DirectGuide": made(guides.DirectGuide, **adapter, network=None, max_tokens=4),
        "RefinementGuide": made(
            guides.RefinementGuide,
            **adapter,
            steps=2,
            order="confidence",
            network=None,
            tokens_per_step=None,
            num_orders=1,
            max_tokens=4,
            refine=None,
            temperatures=2,
            parents=2,
        ),
        "SemiAmortizedGuide": made(
            guides.SemiAmortizedGuide, **adapter, refinements=1, num_draws=2, hidden=2, network=None, max_tokens=4
        ),
        "SoftPromptGuide": made(guides.SoftPromptGuide, num_virtual_tokens=2, initial_text=None, adapter=None, seed=0),
        "SteeredGuide": made(
            guides.SteeredGuide,
            features={"middle": lambda told, text: [1.0]},
            told={"middle": lambda ending: [ending]},
            hidden=2,
            seed=0,
            start=None,
        ),
        "WordGuide": made(guides.WordGuide, word="keyword", hidden=2, seed=0),
        "guide.load": Target(guide.load, lambda: {"path": folder / "guide.safetensors"}),
        "guide.save": Target(guide.save, lambda: {"path": folder / "again.safetensors"}, words={"path": "file"}),
        "SimulatedSet.load": Target(llmppl.SimulatedSet.load, lambda: {"folder": folder / "pairs"}),
        "SimulatedSet.save": Target(pairs.save, lambda: {"folder": folder / "more"}),
        "SimulatedSet": Target(
            llmppl.SimulatedSet,
            lambda: {"args": pairs.args, "latents": pairs.latents, "observations": pairs.observations},
        ),
        "inference_gap": Target(llmppl.inference_gap, lambda: {"posterior": posterior}),
        "posterior.resample": Target(posterior.resample, lambda: {"num_samples": 2, "seed": 0}),
        "posterior.decode": Target(posterior.decode, lambda: {"site": "middle"}),
        "posterior.top": Target(posterior.top, lambda: {"site": "middle", "count": 2}),
        "posterior.distinct_texts": Target(posterior.distinct_texts, lambda: {"site": "middle"}),
        "posterior.to_arviz": Target(posterior.to_arviz, lambda: {"num_samples": None, "seed": 0, "weighted": False}),
        "Posterior": Target(
            llmppl.Posterior,
            lambda: {
                "samples": posterior.samples,
                "log_weights": posterior.log_weights,
                "log_joint": posterior.log_joint,
                "method": "importance",
                "exactness": "marginal",
                "num_chains": 1,
                "complete": False,
            },
        ),
        "Embedded": Target(
            llmppl.Embedded,
            lambda: {"encoder": torch.nn.Linear(2, 32), "array": torch.zeros(2), "event_dim": 1, "name": "encoder"},
        ),
        "SimulatedStream": Target(
            llmppl.SimulatedStream, lambda: {"program": program, "data": data, "batch_size": 2, "seed": 0}
        ),
        "MaskedLM.from_scratch": Target(
            llmppl.MaskedLM.from_scratch,
            lambda: {"lm": lm, "max_tokens": 4, "width": 8, "layers": 1, "heads": 2, "seed": 0},
            fixed=("lm",),
        ),
        "MaskedLM.adapted": Target(
            llmppl.MaskedLM.adapted, lambda: {"lm": lm, "max_tokens": 4, **adapter}, fixed=("lm",)
        ),
        **_models(models, lm, ready),
    }


def numpyro_targets(folder: Path) -> dict[str, Target]:
    import numpyro

    import llmppl.numpyro as twin
    from llmppl.numpyro import guides, models, objectives, testing

    lm = testing.tiny_lm()

    def program(beginning: Any, ending: Any) -> Any:
        middle = numpyro.sample("middle", lm(beginning, max_tokens=2, stop="."))
        numpyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))
        return middle

    guide = guides.AutoregressiveGuide(program, lm, rank=2, seed=0)
    guide.save(folder / "guide.safetensors")
    prompt = guides.PromptGuide(program, lm)
    data = [("a", "b"), ("b", "c")]
    story = (("beginning", "a"), ("ending", "b"))
    both: dict[str, Any] = {"model": program, "guide": prompt}

    def made(kind: Any, **more: Any) -> Target:
        return Target(kind, lambda: {"model": program, "lm": lm, "prompt": None, "others": None, **more})

    adapter: dict[str, Any] = {"rank": 2, "alpha": None, "target_modules": None, "adapter": None, "seed": 0}
    return {
        "importance": Target(
            twin.importance,
            lambda: {
                **both,
                "num_samples": 2,
                "vectorize_data": False,
                "progress": False,
                "target_error": None,
                "params": None,
            },
            then=story,
        ),
        "bounds": Target(
            twin.bounds,
            lambda: {
                **both,
                "num_samples": 2,
                "simulations": 1,
                "vectorize_data": False,
                "method": "importance",
                "params": None,
            },
            then=story,
        ),
        "smc": Target(
            twin.smc,
            lambda: {
                **both,
                "num_samples": 2,
                "targets": None,
                "resampling": None,
                "ess_threshold": 0.5,
                "check_every": None,
                "num_runs": 1,
                "vectorize_data": False,
                "progress": False,
                "params": None,
            },
            then=story,
        ),
        "exact_posterior": Target(twin.exact_posterior, lambda: {"model": program}, then=story),
        "fit": Target(
            twin.fit,
            lambda: {
                **both,
                "guide": guide,
                "data": data,
                "objective": objectives.TrajectoryBalance(2),
                "steps": 1,
                "batch_size": 1,
                "vectorize_data": False,
                "learning_rate": 1e-4,
                "log_partition_learning_rate": 1e-1,
                "warmup_steps": 1,
                "weight_decay": 0.0,
                "clip_norm": 1.0,
                "seed": 0,
                "progress": False,
                "callback": None,
                "schedule": "constant",
                "target_temperature": 1.0,
            },
        ),
        "Behaviour": Target(objectives.Behaviour, lambda: {"tempered": 0.1, "sleep": 0.0, "temperatures": (0.5, 1.5)}),
        "TrajectoryBalance": Target(
            objectives.TrajectoryBalance,
            lambda: {"num_particles": 2, "log_partition": "vargrad", "behaviour": None, "floor": None},
        ),
        "LeaveOneOutELBO": Target(objectives.LeaveOneOutELBO, lambda: {"num_particles": 2}),
        "WakeSleep": Target(objectives.WakeSleep, lambda: {"num_particles": 2, "insomnia": 0.5}),
        "tiny_lm": Target(testing.tiny_lm, lambda: {"vocabulary": 6, "seed": 0}),
        "LM.from_pretrained": Target(twin.LM.from_pretrained, lambda: {"name_or_folder": str(folder / "none")}),
        "lm.encode": Target(lm.encode, lambda: {"text": "ab", "width": None, "special": False}),
        "lm.decode": Target(lm.decode, lambda: {"value": lm.encode("ab")}),
        "lm": Target(
            lm,
            lambda: {
                "piece": "ab",
                "max_tokens": 3,
                "stop": ".",
                "min_tokens": 1,
                "temperature": 1.0,
                "allowed": None,
                "grammar": None,
            },
            places=("piece",),
        ),
        "lm.choice": Target(
            lm.choice, lambda: {"piece": "ab", "options": ["a", "b"], "probs": [1.0, 2.0]}, places=("piece",)
        ),
        "lm.map": Target(
            lm.map,
            lambda: {"function": str, "value": lm.encode("ab"), "max_tokens": 2, "returns": str},
            places=("function", "value"),
            words={"value": "lm.map", "function": "lm.map"},
        ),
        "lm.echo": Target(lm.echo, lambda: {"text": "ab", "mistake": 0.1}, words={"text": "piece"}),
        "lm.content_word": Target(lm.content_word, lambda: {"text": "abc", "shortest": 3}, words={"text": "piece"}),
        "lm.chat": Target(
            lm.chat,
            lambda: {"messages": [{"role": "user", "content": "a"}], "answers": True},
            words=dict.fromkeys(("messages", "answers"), "template"),
        ),
        "log_prob": Target(lm("ab", max_tokens=3).log_prob, lambda: {"value": lm.encode("aba")}, places=("value",)),
        "PromptGuide": made(guides.PromptGuide),
        "AutoregressiveGuide": made(guides.AutoregressiveGuide, **adapter),
        "GFlowNetGuide": made(guides.GFlowNetGuide, **adapter),
        "SoftPromptGuide": made(guides.SoftPromptGuide, num_virtual_tokens=2, initial_text=None, adapter=None, seed=0),
        "guide.load": Target(guide.load, lambda: {"path": folder / "guide.safetensors"}),
        "guide.save": Target(guide.save, lambda: {"path": folder / "again.safetensors"}, words={"path": "file"}),
        **_models(models, lm, {"max_tokens": 2}),
    }


def _models(models: Any, lm: Any, ready: dict[str, Any]) -> dict[str, Target]:
    """The ready programs."""
    fixed = ("lm",)
    return {
        "models.infilling": Target(models.infilling, lambda: {"lm": lm, "stop": ".", **ready}, fixed=fixed),
        "models.keyword": Target(
            models.keyword, lambda: {"lm": lm, "stop": ".", "temperature": 0.7, "shortest": 1, **ready}, fixed=fixed
        ),
        "models.continuation": Target(
            models.continuation, lambda: {"lm": lm, "temperature": 0.7, "stop": ".", **ready}, fixed=fixed
        ),
        "models.dialogue": Target(
            models.dialogue,
            lambda: {"lm": lm, "intents": ["a", "b"], "styles": ["a", "b"], "replies": 1, "stop": ".", **ready},
            fixed=fixed,
        ),
        "models.rationale": Target(
            models.rationale,
            lambda: {"lm": lm, "options": ["a", "b"], "instruction": "", "stop": ".", "examples": (), **ready},
            fixed=fixed,
        ),
        "models.record": Target(
            models.record,
            lambda: {"lm": lm, "schema": {"type": "object"}, "fields": (), "prose_tokens": 0, "masked": False, **ready},
            fixed=fixed,
        ),
        "models.formula": Target(
            models.formula, lambda: {"lm": lm, "prompt": "a", "grammar": None, "noise": 0.3, **ready}, fixed=fixed
        ),
        "models.plan": Target(
            models.plan,
            lambda: {"lm": lm, "size": (2, 2), "max_moves": 2, "max_tokens": None, "nearness": 1.0, "prompt": "a"},
            fixed=fixed,
        ),
        "models.completion": Target(
            models.completion,
            lambda: {"lm": lm, "calls": ["f(1)"], "stop": ".", "mistake": 0.1, "steps": 9, "output_tokens": 2, **ready},
            fixed=fixed,
        ),
        "models.arithmetic": Target(
            models.arithmetic,
            lambda: {"lm": lm, "examples": (), "steps": 1, "tool": str, "result_tokens": 2, **ready},
            fixed=fixed,
        ),
        "models.captioned": Target(
            models.captioned,
            lambda: {"lm": lm, "captions": ["a", "b"], "likelihood": len, "prompt": "a"},
            fixed=fixed,
        ),
        "models.calculate": Target(models.calculate, lambda: {"expression": "1 + 1 ="}),
        "models.run": Target(models.run, lambda: {"source": "def f(x): return x", "call": "f(1)", "steps": 99}),
        "models.evaluate": Target(models.evaluate, lambda: {"formula": "x + 1", "x": 1.0}),
        "models.described": Target(
            models.described, lambda: {"text": " stays flat all year."}, words={"text": "description"}
        ),
        "models.walk": Target(models.walk, lambda: {"maze": "S..", "plan": "right"}),
        "models.shortest_plans": Target(models.shortest_plans, lambda: {"maze": "S..", "goal": 2, "most": 9}),
        "models.described_series": Target(
            models.described_series, lambda: {"lm": lm, "prompt": "a", "noise": 1.0, **ready}, fixed=fixed
        ),
    }


def wrong_values(array: Callable[[Any], Any]) -> st.SearchStrategy[Any]:
    """What users pass by mistake, and what nobody would.

    :param array: makes the framework's arrays of lists.
    """
    import numpy as np

    class Strange:
        def __repr__(self) -> str:
            return "Strange()"

    words = st.text(st.characters(exclude_characters="/"), max_size=8)  # no absolute paths
    # fmt: off
    odd = st.sampled_from(
        [
            None,
            True,
            False,
            0,
            -1,
            1,
            2,
            3,
            -(2**31),
            2**31,
            2**63,
            2**70,
            10**12,
            0.0,
            -0.5,
            0.5,
            1.5,
            1e308,
            float("nan"),
            float("inf"),
            -float("inf"),
            "",
            " ",
            "é",
            "日本語",
            "\0",
            "\ud800",
            "a",
            "ab.",
            "x" * 5000,
            "~nobody/x",
            "../..",
            "[",
            "(",
            "{",
            b"",
            b"ab",
            b"\xff",
            [],
            (),
            {},
            set(),
            {1},
            {"a": 1},
            {1: "a"},
            [1],
            [1.5],
            ["a"],
            ["a", 1],
            [None],
            [[]],
            [["a"]],
            ("a",),
            ("a", "b"),
            [("a",)],
            [("a", "b")],
            [("a",) * 3],
            [{}],
            [{"a": 1}],
            [{"beginning": "a"}],
            object,
            Strange(),
            Strange,
            len,
            1j,
            range(3),
            slice(2),
            Ellipsis,
            NotImplemented,
            Path("/dev/null"),
            Path("/dev/null/x"),
            Path("/proc/1"),
            "/proc/none/x",
            ValueError("x"),
            np.float32("nan"),
            np.int64(-3),
            np.array(1.5),
            np.zeros((2, 3)),
            np.array(["a"]),
            np.array(None),
        ]
    )
    # fmt: on
    arrays = st.sampled_from([0, 1.5, [], [1], [-7], [99], [1.5], [[1, 2], [0, 1]], [[-1, 1]], [[[[1]]]], [True]])
    return st.one_of(
        odd,
        odd,
        arrays.map(array),
        st.integers(),
        st.floats(),
        words,
        st.binary(max_size=4),
        st.lists(st.one_of(st.integers(), words), max_size=3),
        st.dictionaries(words, st.integers(), max_size=2),
    )


def says(error: BaseException, names: list[str], target: Target) -> bool:
    """Whether an error says which argument was wrong."""
    words = {name.removeprefix("then.") for name in names}
    if any(name.startswith("then.") for name in names):
        words |= {"piece", "text", "value", "arguments"}  # what the drill's own program hands on
    words |= {"value", "text"} if "value" in words else set()
    words |= {"arguments"} if "data" in words or "held_out" in words else set()
    words |= {"cannot be written"} if "folder" in words or "path" in words else set()
    words |= {word for name in list(words) for word in ([(target.words or {}).get(name)]) if word}
    text = str(error).lower()
    return any(re.search(rf"\b{re.escape(word.lower())}", text) for word in words)


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Names that are put out of shape are paths, too, and some are written to: here, and nowhere else."""
    before = Path.cwd()
    folder.mkdir(parents=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def fuzz(drill: Drill, targets: dict[str, Target], count: int, number: int, key: Any, array: Any) -> None:
    """Make ``count`` calls and note what came of each."""
    names = sorted(targets)
    signal.signal(signal.SIGALRM, too_long)
    seen: set[str] = set()

    @seeded(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def call(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(names))
        target = targets[name]
        arguments = [n for n in target.valid() if n not in target.fixed] + [f"then.{n}" for n, _ in target.then or ()]
        chosen = data.draw(st.lists(st.sampled_from(arguments), min_size=1, max_size=2, unique=True))
        changed = {n: data.draw(wrong_values(array)) for n in chosen}
        what = f"{name}({', '.join(f'{n}={str(v)[:60]!r}:{type(v).__name__}' for n, v in changed.items())})"
        try:
            with quietly():
                signal.setitimer(signal.ITIMER_REAL, SECONDS)
                try:
                    target.call(changed, key)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            drill.outcomes["answered"] += 1
        except TooLong:
            drill.outcomes["too much work to wait for"] += 1
        except Exception as error:
            if not is_named(error):
                drill.outcomes["raw"] += 1
                if described(error) not in seen:
                    drill.fail(f"raw: {what}: {described(error)}")
                seen.add(described(error))
            elif not says(error, chosen, target):
                drill.outcomes["named without its argument"] += 1
                drill.fail(f"argument not named: {what}: {described(error)}")
            else:
                drill.outcomes["named"] += 1
        drill.progress()

    call()


def run(count: int, number: int, twins: tuple[str, ...] = ("torch", "numpyro")) -> Drill:
    drill = Drill("fuzzed", count)
    with tempfile.TemporaryDirectory() as folder, inside(Path(folder) / "a" / "b" / "c"):
        for n, twin in enumerate(twins):
            own = count // len(twins) + (n < count % len(twins))
            path = Path(folder) / twin
            path.mkdir()
            if twin == "torch":
                import torch

                fuzz(drill, torch_targets(path), own, number, None, torch.tensor)
            else:
                import jax.numpy as jnp
                from jax import random

                fuzz(drill, numpyro_targets(path), own, number, random.key(0), jnp.array)
    return drill


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--twin", choices=["torch", "numpyro"])
    options = parser.parse_args()
    sys.exit(run(options.count, options.seed, (options.twin,) if options.twin else ("torch", "numpyro")).summary())
