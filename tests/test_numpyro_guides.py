"""NumPyro guides: files that torch reads and writes, the same log q on both sides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pyro
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import llmppl
import llmppl.guides as torch_guides
from llmppl import numpyro as in_jax
from llmppl.numpyro import guides as jax_guides
from llmppl.numpyro.testing import tiny_lm as jax_tiny_lm
from llmppl.testing import tiny_lm

KINDS: dict[str, dict[str, Any]] = {
    "AutoregressiveGuide": {"rank": 3, "alpha": 5.0},
    "GFlowNetGuide": {"rank": 2, "target_modules": None},
    "SoftPromptGuide": {"num_virtual_tokens": 4},
}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """One model in both worlds."""
    folder = tmp_path_factory.mktemp(request.param)
    lm = tiny_lm(vocabulary=6, seed=1)
    network: Any = lm.transformer
    if request.param == "gpt2":
        torch.manual_seed(0)
        network = GPT2LMHeadModel(
            GPT2Config(vocab_size=6, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
        )
    network.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return llmppl.LM.from_pretrained(str(folder)), in_jax.LM.from_pretrained(folder)


def programs(torch_lm: Any, jax_lm: Any) -> tuple[Callable[..., None], Callable[..., None]]:
    def torch_story(beginning: str, ending: str) -> None:
        middle = pyro.sample("middle", torch_lm(beginning, max_tokens=3, stop="."))
        pyro.sample("ending", torch_lm(beginning, middle), obs=torch_lm.encode(ending))

    def jax_story(beginning: str, ending: str) -> None:
        middle = numpyro.sample("middle", jax_lm(beginning, max_tokens=3, stop="."))
        numpyro.sample("ending", jax_lm(beginning, middle), obs=jax_lm.encode(ending))

    return torch_story, jax_story


TEXTS = np.array([[0, -1, -1], [1, 0, -1], [3, 2, 5], [4, 4, 0]])


def torch_scores(guide: Any) -> np.ndarray:
    trace = pyro.poutine.trace(guide).get_trace("ab", "cd")
    with torch.no_grad():
        return trace.nodes["middle"]["fn"].log_prob(torch.tensor(TEXTS)).numpy()


def jax_scores(guide: Any) -> np.ndarray:
    @jax.jit
    def scores() -> jax.Array:
        data = {"middle": jnp.asarray(TEXTS[0])}
        run = numpyro.handlers.substitute(numpyro.handlers.seed(guide, jax.random.key(0)), data=data)
        return numpyro.handlers.trace(run).get_trace("ab", "cd")["middle"]["fn"].log_prob(jnp.asarray(TEXTS))

    return np.asarray(scores())


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # of peft, on gpt2
@pytest.mark.parametrize("kind", list(KINDS))
def test_one_file_is_one_guide_in_torch_and_jax(kind: str, twins: tuple[Any, Any], tmp_path: Path) -> None:
    """The same log q to 1e-4 nats either way; random weights change log q by more than 0.1."""
    torch_lm, jax_lm = twins
    assert torch_lm.fingerprint() == jax_lm.fingerprint()
    torch_story, jax_story = programs(torch_lm, jax_lm)
    settings = KINDS[kind]
    name = f"{kind}_{tmp_path.name.replace('.', '_')}"
    ours = getattr(torch_guides, kind)(torch_story, torch_lm, adapter=name, seed=1, **settings)
    twin = getattr(jax_guides, kind)(jax_story, jax_lm, seed=2, **settings)
    before = jax_scores(twin)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    ours.save(tmp_path / "torch.safetensors")
    twin.load(tmp_path / "torch.safetensors")
    assert np.abs(jax_scores(twin) - before).max() > 0.1
    np.testing.assert_allclose(jax_scores(twin), torch_scores(ours), atol=1e-4)
    if kind == "GFlowNetGuide":
        log_z = float(ours.log_partition("ab", "cd").detach())
        assert abs(log_z) > 0.05
        assert float(twin.log_partition("ab", "cd")) == pytest.approx(log_z, abs=1e-4)

    rng = np.random.default_rng(0)
    twin.update(jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.3, a.shape), a.dtype), twin.parameters()))
    twin.save(tmp_path / "jax.safetensors")
    ours.load(tmp_path / "jax.safetensors")
    np.testing.assert_allclose(torch_scores(ours), jax_scores(twin), atol=1e-4)


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Callable[..., None]]:
    lm = jax_tiny_lm()
    return lm, programs(None, lm)[1]


def test_another_guides_file_is_refused(plain: tuple[Any, Any], tmp_path: Path) -> None:
    lm, story = plain
    guide = jax_guides.AutoregressiveGuide(story, lm, rank=2)
    path = tmp_path / "guide.safetensors"
    guide.save(path)
    before = jax.tree.leaves(guide.weights)
    with pytest.raises(ValueError, match="belongs to another guide: its rank is 2, this one's is 3"):
        jax_guides.AutoregressiveGuide(story, lm, rank=3).load(path)
    with pytest.raises(ValueError, match="'model.layers.0.self_attn.k_proj.lora_A.weight' is on one side only"):
        jax_guides.AutoregressiveGuide(
            story, lm, rank=2, target_modules=["q_proj", "o_proj", "v_proj", "mlp.up_proj", "gate_proj", "down_proj"]
        ).load(path)
    with pytest.raises(ValueError, match="belongs to another language model: its vocab_size is 6, this one's is 5"):
        jax_guides.AutoregressiveGuide(story, jax_tiny_lm(5), rank=2).load(path)
    with pytest.raises(ValueError, match="belongs to another guide"):
        jax_guides.SoftPromptGuide(story, lm, num_virtual_tokens=2).load(path)
    with pytest.raises(FileNotFoundError, match="no adapter file"):
        guide.load(tmp_path / "none.safetensors")
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        guide.load(path)
    assert all(a is b for a, b in zip(before, jax.tree.leaves(guide.weights), strict=True))


def test_settings_and_bad_arguments(plain: tuple[Any, Any]) -> None:
    lm, story = plain
    guide = jax_guides.AutoregressiveGuide(story, lm, rank=2, adapter="mine")
    assert repr(guide) == "AutoregressiveGuide(story, tiny-6, adapter='mine', rank=2, 2,048 parameters)".replace(
        "story", "jax_story"
    )
    first = guide.weights["q"]["A"]
    assert float(jnp.abs(first).max()) <= 32**-0.5
    assert not guide.weights["q"]["B"].any()
    guide.reset_parameters()
    assert not jnp.array_equal(first, guide.weights["q"]["A"])
    with pytest.raises(ValueError, match=r"no 'mine\$params'"):
        guide.update({})
    with pytest.raises(ValueError, match="of another guide"):
        guide.update({"mine$params": jax_guides.AutoregressiveGuide(story, lm, rank=3).weights})
    with pytest.raises(ValueError, match="rank must be at least 1"):
        jax_guides.AutoregressiveGuide(story, lm, rank=0)
    with pytest.raises(ValueError, match="end of no linear layer"):
        jax_guides.AutoregressiveGuide(story, lm, target_modules=["query"])
    with pytest.raises(ValueError, match="num_virtual_tokens=63 leaves no room"):
        jax_guides.SoftPromptGuide(story, lm, num_virtual_tokens=63)
    with pytest.raises(ValueError, match="has no tokens to start from"):
        jax_guides.SoftPromptGuide(story, lm, initial_text="")
    tokens = jax_guides.SoftPromptGuide(story, lm, num_virtual_tokens=3, initial_text="ab").weights["virtual_tokens"]
    np.testing.assert_array_equal(tokens, lm.weights["embed"][jnp.asarray([1, 2, 1])])
