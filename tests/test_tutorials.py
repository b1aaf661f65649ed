"""The tutorials run from top to bottom, at reduced size; the README's code runs as printed."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
# Cells that show on a real model what cells before them show on a tiny one: other tests use that model in this way.
REAL_MODEL = "real-model"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# The kernel's sockets live in another process; their clean-up is not ours.
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPPL_SMOKE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=300,
        skip_cells_with_tag=REAL_MODEL,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    run = [
        cell for cell in notebook.cells if cell.cell_type == "code" and REAL_MODEL not in cell.metadata.get("tags", ())
    ]
    assert all(cell.get("execution_count") for cell in run)


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
