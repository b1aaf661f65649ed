"""Public functions with arguments that they take, and the ready programs of both twins as such."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


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


def model_targets(models: Any, lm: Any, ready: dict[str, Any]) -> dict[str, Target]:
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
