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
from pathlib import Path
from typing import Any

from drill import Drill, TooLong, described, is_named, too_long
from fuzz_numpyro import numpyro_targets
from fuzz_target import Target
from fuzz_torch import torch_targets
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

SECONDS = 20.0
"""After which a call counts as honest work: the drill asks for errors, not for patience."""


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
