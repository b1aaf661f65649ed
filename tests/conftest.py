"""One tiny language model and one enumerated story serve all tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Where the environment forbids bytecode beside the sources, every worker, notebook and child process would compile the
# libraries anew, most of the time that an import takes: what one has compiled the others read from pytest's own cache.
if sys.dont_write_bytecode:
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).parent.parent / ".pytest_cache" / "d" / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix

# Before torch starts its pools: two threads on two busy cores are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Compiling takes most of a tiny model's time: without optimisation half of it, without fusion emitters a fraction.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
)
# What one worker, notebook or test has compiled, the others read.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "d" / "compiled")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

# The process that only hands out the tests to workers imports this file too, and needs none of these.
if TYPE_CHECKING:
    import pyro
    from torch import Tensor

    from llmppl import LM


# Files of long tests, the longest first: CPU seconds, roughly.
LONG = {
    "test_tutorials.py": 130,
    "test_objectives.py": 60,
    "test_numpyro_inference.py": 45,
    "test_numpyro_smc.py": 40,
    "test_ray_samplers.py": 70,
    "test_embedded.py": 20,
    "test_pictures.py": 25,
    "test_demo.py": 33,
    "test_numpyro_decoder.py": 30,
    "test_numpyro_objectives.py": 30,
    "test_long_runs.py": 25,
    "test_learned_program.py": 22,
    "test_reasoning.py": 20,
    "test_applications.py": 18,
    "test_numpyro_interop.py": 20,
    "test_states.py": 15,
    "test_numpyro_keyword.py": 15,
    "test_gap_report.py": 15,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two workers start with a half of the tests each: long files first in both halves, equal in sum, so that what is
    left in the end, to be shared out, is short."""
    files: dict[str, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path.name, []).append(item)
    halves: tuple[list[pytest.Item], list[pytest.Item]] = ([], [])
    seconds = [0, 0]
    for name in sorted(LONG, key=LONG.__getitem__, reverse=True):
        less = seconds.index(min(seconds))
        halves[less].extend(files.pop(name, []))
        seconds[less] += LONG[name]
    for tests in files.values():
        min(halves, key=len).extend(tests)
    items[:] = halves[0] + halves[1]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from one seed and an empty parameter store, and leaks no global state."""
    import pyro
    import torch

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    before = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    validation = pyro.distributions.distribution.Distribution.__dict__.get("_validate_args")
    yield
    assert (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()) == before
    assert pyro.distributions.distribution.Distribution.__dict__.get("_validate_args") == validation


@pytest.fixture
def lm() -> LM:
    """A six-token model in float64. Fresh for every test: guides add adapters to it."""
    import torch

    from llmppl.testing import tiny_lm

    return tiny_lm(vocabulary=6, seed=0, dtype=torch.float64)


def character_lm(characters: str, end: str | None = None) -> LM:
    """A language model of random weights in float64 over single characters, digits, spaces and newlines among them.

    :param end: the end token, which grammars need.
    """
    import torch

    from llmppl.testing import character_model

    return character_model(characters, end, seed=0, dtype=torch.float64, spread=0.2, length=128)


@pytest.fixture(scope="session")
def smollm2() -> LM:
    from llmppl import LM

    return LM.from_pretrained("smollm2-135m")


@dataclass
class Story:
    """The enumerable twin of story infilling, with its exact posterior."""

    lm: LM
    program: Callable[..., Tensor]
    beginning: str = "ab"
    ending: str = "cd"

    @property
    def args(self) -> tuple[str, str]:
        return self.beginning, self.ending

    def prior(self, beginning: str | None = None) -> pyro.distributions.TorchDistribution:
        return self.lm(beginning or self.beginning, max_tokens=3, stop=".")

    def joint(self, beginning: str | None = None, ending: str | None = None) -> tuple[Tensor, Tensor]:
        """All middles ``(n, 3)`` and their log-joint ``(n,)``, from the distributions directly."""
        prior = self.prior(beginning)
        texts = prior.enumerate_support()
        likelihood = self.lm(beginning or self.beginning, texts)
        return texts, prior.log_prob(texts) + likelihood.log_prob(self.lm.encode(ending or self.ending))


@pytest.fixture
def story(lm: LM) -> Story:
    import pyro

    def program(beginning: str, ending: str) -> Tensor:
        middle = pyro.sample("middle", lm(beginning, max_tokens=3, stop="."))
        pyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))
        return middle

    return Story(lm, program)


def kl(log_q: Tensor, log_p: Tensor) -> float:
    """KL(q‖p) in nats of two enumerated distributions."""
    return float((log_q.exp() * (log_q - log_p)).sum())
