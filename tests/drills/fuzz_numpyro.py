"""What the NumPyro twin's public functions take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fuzz_target import Target, model_targets


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
        **model_targets(models, lm, {"max_tokens": 2}),
    }
