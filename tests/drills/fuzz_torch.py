"""What the torch twin's public functions take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fuzz_target import Target, model_targets


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
        **model_targets(models, lm, ready),
    }
