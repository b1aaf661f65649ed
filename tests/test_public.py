"""What importing does and does not do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import llmppl


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_importing_loads_no_model_no_torch_and_starts_no_threads() -> None:
    code = (
        "import sys, threading, llmppl; print('torch' in sys.modules, 'jax' in sys.modules, threading.active_count())"
    )
    assert python(code) == "False False 1"


def test_importing_everything_adds_little_to_torch_transformers_and_pyro() -> None:
    code = (
        "import torch, transformers, pyro, pyro.infer, time; "
        "from transformers import AutoModelForCausalLM; start = time.process_time(); "
        "import llmppl.guides, llmppl.objectives; from llmppl import LM, importance, fit, exact_posterior; "
        "print(time.process_time() - start)"
    )
    # CPU seconds, so that a busy machine does not count.
    assert float(python(code)) < 2.0


def test_posteriors_need_numpy_only() -> None:
    code = (
        "import sys, llmppl.posterior.posterior, llmppl.display.arviz_data, llmppl.display.plots, llmppl.display; "
        "print([name for name in ('torch', 'pyro', 'matplotlib', 'arviz') if name in sys.modules])"
    )
    assert python(code) == "[]"


@pytest.mark.parametrize("name", llmppl.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(llmppl, name) is not None
    assert name in dir(llmppl)


def test_unknown_names_raise() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = llmppl.nothing


def test_text_files_display_and_posterior_need_no_framework() -> None:
    """What both twins use is imported without either's framework; ``import-linter`` sees the code, this sees it run."""
    folder = Path(llmppl.__file__).parent
    storeys = ("text", "files", "display", "posterior")
    names = [
        f"llmppl.{storey}.{path.stem}" for storey in storeys for path in sorted((folder / storey).glob("[a-z]*.py"))
    ]
    assert len(names) > 25
    code = (
        "import importlib, sys\n"
        f"for name in {names}:\n"
        "    importlib.import_module(name)\n"
        "print([name for name in ('torch', 'pyro', 'jax', 'numpyro') if name in sys.modules])"
    )
    assert python(code) == "[]"
