"""The tutorials run from top to bottom, at reduced size; the README's code runs as printed."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

import matplotlib
import nbformat
import pytest
from matplotlib import pyplot as plt

from llmppl import LM

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
LONG = ["04_numpyro", "05_reasoning", "06_tools", "07_formats_and_code", "08_plans", "10_pictures"]
# Cells that show on a real model what cells before them show on a tiny one: other tests use that model in this way.
REAL_MODEL = "real-model"


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.long if path.stem in LONG else (), id=path.stem) for path in NOTEBOOKS],
)
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch, smollm2: LM) -> None:
    """In this process, and with the model that is loaded already: a kernel of its own would import everything anew."""
    monkeypatch.setattr(LM, "from_pretrained", lambda name: smollm2)
    monkeypatch.setenv("LLMPPL_SMOKE", "1")
    monkeypatch.chdir(path.parent)
    matplotlib.use("agg")
    names: dict[str, Any] = {"__name__": "__notebook__", "display": shown}
    run = 0
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code" and REAL_MODEL not in cell.metadata.get("tags", ()):
            execute(cell.source, f"{path.name}, cell {run}", names)
            run += 1
    plt.close("all")
    assert run > 3


def execute(source: str, place: str, names: dict[str, Any]) -> None:
    """A cell, whose last expression is shown."""
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), place, "exec"), names)
    if isinstance(last, ast.Expr) and not source.rstrip().endswith(";"):
        shown(eval(compile(ast.Expression(last.value), place, "eval"), names))
    elif isinstance(last, ast.Expr):
        eval(compile(ast.Expression(last.value), place, "eval"), names)


def shown(*values: Any) -> None:
    """What a notebook asks of a value."""
    for value in values:
        repr(value)
        if hasattr(value, "_repr_html_"):
            value._repr_html_()


def test_the_notebooks_are_committed_with_their_output() -> None:
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        assert any(cell.get("outputs") for cell in notebook.cells if cell.cell_type == "code"), path


def test_the_readmes_snippet_runs() -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    # The same program and calls, with fewer particles and steps.
    for full, reduced in (
        ("num_particles=16", "num_particles=2"),
        ("steps=300", "steps=1"),
        ("num_samples=256", "num_samples=6"),
    ):
        assert full in code
        code = code.replace(full, reduced)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["posterior"].decode("middle")) == 6
    assert os.environ["HF_HUB_OFFLINE"] == "1", "nothing is downloaded"


@pytest.mark.parametrize("page", ["start.md", "coming_from.md"])
def test_the_sites_code_for_the_tiny_model_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With fewer steps and pairs; other halves, other frameworks and the real model are left out."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
    if page != "start.md":
        ours = [block for block in blocks if "llmppl" in block]
        blocks = [block for block in ours if "numpyro" not in block and "from_pretrained" not in block]
    names: dict[str, Any] = {}
    for block in blocks:
        code = re.sub(r"steps=\d+", "steps=2", re.sub(r"num_pairs=\d+", "num_pairs=64", block))
        code = re.sub(r"simulations=\d+", "simulations=4", code)
        exec(compile(code, page, "exec"), names)
    assert len(blocks) > 3
    assert float(names["exact_posterior"](names["story"])("ab", "cd").log_evidence) == pytest.approx(-9.78, abs=0.005)
