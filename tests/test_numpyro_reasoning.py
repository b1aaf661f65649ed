"""Rationales and tools in NumPyro: the same evidence as torch, and a guide of the same program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest
from conftest import character_lm
from test_reasoning import CHARACTERS

from llmppl import exact_posterior as torch_exact_posterior
from llmppl import models as torch_models
from llmppl.numpyro import LM, exact_posterior, importance
from llmppl.numpyro.guides import PromptGuide
from llmppl.numpyro.models import arithmetic, rationale
from llmppl.testing import tiny_lm

FORM: dict[str, Any] = {"before": "", "between": "", "max_tokens": 2}


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LM]:
    theirs, folder = tiny_lm(vocabulary=5, seed=1), tmp_path_factory.mktemp("model")
    theirs.transformer.save_pretrained(folder)
    theirs.tokenizer.save_pretrained(folder)
    return theirs, LM.from_pretrained(folder)


@pytest.mark.long
def test_rationales_have_the_evidence_of_torch(twins: tuple[Any, LM]) -> None:
    theirs, ours = twins
    for label in ("b", "c"):
        expected = torch_exact_posterior(torch_models.rationale(theirs, ["b", "c"], **FORM))("ab", label).log_evidence
        program = rationale(ours, ["b", "c"], **FORM)
        assert exact_posterior(program)("ab", label).log_evidence == pytest.approx(expected, abs=1e-4)
    found = importance(program, PromptGuide(program, ours), 64)(jax.random.key(0), "ab", "c")
    assert abs(found.log_evidence - expected) < 5 * found.log_evidence_error + 1e-3
    with pytest.raises(ValueError, match="none of the options"):
        program("ab", "d")


@pytest.mark.long
def test_tools_have_the_evidence_of_torch(counting_folder: Path) -> None:
    theirs, ours = _torch(counting_folder), LM.from_pretrained(counting_folder)
    expected = torch_exact_posterior(torch_models.arithmetic(theirs, max_tokens=2))("1 + 1", "2").log_evidence
    found = exact_posterior(arithmetic(ours, max_tokens=2, steps=1))("1 + 1", "2")
    assert found.log_evidence == pytest.approx(expected, abs=1e-3)
    assert " ?," in found.decode("result_1")


def _torch(folder: Path) -> Any:
    from llmppl import LM as Torch

    return Torch.from_pretrained(folder)


@pytest.fixture
def counting_folder(tmp_path: Path) -> Path:
    lm = character_lm(CHARACTERS)
    lm.transformer.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    return tmp_path
