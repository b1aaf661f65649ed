"""``llmppl report``: from a saved guide and stories to a page that says how far it is from the posterior."""

from __future__ import annotations

import datetime
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmppl.demo import keyword as keyword_demo
from llmppl.demo.infilling import make_guide, split, stories, threads
from llmppl.diagnostics.verdict import Diagnosis, diagnose
from llmppl.display import report_page
from llmppl.files.folders import written_whole
from llmppl.guides import WordGuide
from llmppl.language_model import LM
from llmppl.models import infilling, keyword
from llmppl.programs.structure import Program

HELD_OUT = 4
"""Shipped stories to report on where the user gives none."""

PROGRAMS = {
    "keyword": "p(sentence | beginning) p(keyword | sentence), the sentence of at most 20 tokens up to a full stop, "
    "the keyword any of its content words",
    "infilling": "p(middle | beginning) p(ending | beginning, middle), the middle of at most 16 tokens up to a full "
    "stop",
}
OBSERVED = {"keyword": "keyword", "infilling": "ending"}
"""What a line of data has beside its beginning."""

MODEL = "smollm2-135m"


def report(
    program: str,
    adapter: Path,
    data: Path | None,
    out: Path,
    num_samples: int,
    simulations: int,
    seed: int,
    threads_used: int,
) -> Diagnosis:
    """Diagnose a saved guide and write the page.

    :param program: that of the guide, one of :data:`PROGRAMS`.
    :param data: a file for :func:`read_stories`; held-out stories by default.
    :raises FileNotFoundError: no adapter, no stories, or no folder to write to.
    :raises ValueError: stories that cannot be read, or an adapter that does not fit.
    """
    read = _held_out(program) if data is None else read_stories(data, OBSERVED[program])
    # Before the work, not after it.
    if not out.resolve().parent.is_dir():
        raise FileNotFoundError(f"no folder {out.resolve().parent} to write {out.name} to. Make it first.")
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder. Name a file in it, e.g. {out / 'report.html'}.")
    with threads(threads_used):
        lm = LM.from_pretrained(MODEL)
        story: Program = keyword(lm) if program == "keyword" else infilling(lm)
        guide = WordGuide(story, lm) if program == "keyword" else make_guide(story, lm)
        guide.load(adapter)
        diagnosis = diagnose(
            story, guide, read, num_samples=num_samples, simulations=simulations, seed=seed, vectorize_data=True
        )
    about = {
        "model": MODEL,
        "program": PROGRAMS[program],
        "guide": f"{type(guide).__name__}, {adapter.name}",
        "stories": "held-out ones of the demo" if data is None else data.name,
        "samples of each story": num_samples,
        "simulated stories": simulations,
        "seed": seed,
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }
    observations = [{"beginning": beginning, OBSERVED[program]: seen.strip()} for beginning, seen in read]
    page = report_page(diagnosis, observations=observations, about=about)
    written_whole(out, lambda temporary: Path(temporary).write_text(page, encoding="utf-8"))
    return diagnosis


def _held_out(program: str) -> list[tuple[str, str]]:
    if program == "infilling":
        return split(stories(), HELD_OUT)[1]
    known = [pair for pair in keyword_demo.held_out_pairs() if pair.hit_rate > keyword_demo.RAREST]
    step = (len(known) - 1) // (HELD_OUT - 1)
    return [(pair.beginning, pair.keyword) for pair in known[::step][:HELD_OUT]]


def read_stories(path: Path, observed: str = "ending") -> list[tuple[str, str]]:
    """Stories of a file of JSON lines, each ``{"beginning": ..., "ending": ...}``, as the program takes them.

    :param observed: the other name, ``"ending"`` or ``"keyword"``.
    :raises FileNotFoundError: no such file.
    :raises ValueError: naming the line that is wrong, or a file without stories.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} with stories.")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not at U+2028, which JSON may hold
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text in UTF-8. Save it as JSON lines.") from None
    found = [_story(f"{path}, line {n}", line, observed) for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ValueError(f'{path} has no stories. Write one a line: {{"beginning": "...", "{observed}": "..."}}.')
    return found


def _story(where: str, line: str, observed: str) -> tuple[str, str]:
    try:
        item: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: no JSON ({error.msg}). Write one object a line.") from None
    for name in ("beginning", observed):
        if not isinstance(item, dict) or not isinstance(item.get(name), str) or not item[name].strip():
            raise ValueError(f'{where}: no text under "{name}". Write {{"beginning": "...", "{observed}": "..."}}.')
    seen = item[observed].strip()
    # As `llmppl infill` takes them: an ending brings its own space.
    return item["beginning"].strip(), " " + seen if observed == "ending" else seen


def versions() -> str:
    """Of the packages that the numbers come from."""
    others = ", ".join(f"{name} {version(name)}" for name in ("torch", "pyro-ppl", "transformers", "numpy"))
    return f"llmppl {version('pyro-llmppl')}, {others}"
