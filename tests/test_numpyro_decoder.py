"""The native JAX decoder against transformers: logits, padding, caches, gradients; what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import llmppl
from llmppl.demo.infilling import shipped_adapter
from llmppl.guides import AutoregressiveGuide
from llmppl.models import ending_first, infilling
from llmppl.numpyro import LM, TorchLikelihood, guides, models
from llmppl.numpyro.network import decoder
from llmppl.numpyro.network.adapters import from_tensors, initial, scaled
from llmppl.numpyro.network.architecture import Architecture
from llmppl.numpyro.network.folder_tokenizer import FolderTokenizer
from llmppl.numpyro.network.folder_weights import read_config, read_weights
from llmppl.numpyro.network.reading import Reader
from llmppl.numpyro.testing import tiny_lm as numpyro_tiny_lm
from llmppl.testing import tiny_lm
from llmppl.text import PAD

SIZES: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Wide, so that no part is too small to be missed; eps as large as the states' squares.
    "initializer_range": 0.3,
    "rms_norm_eps": 0.03,
}
ROPE = {
    "theta": {"rope_type": "default", "rope_theta": 77.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16},
}
GPT2: dict[str, Any] = {"vocab_size": 30, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": ROPE["theta"]}),
    "llama tied, linear": ("llama", {"tie_word_embeddings": True, "rope_parameters": ROPE["linear"]}),
    "llama biases, llama3": ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": ROPE["llama3"]}),
    "llama wide heads, yarn": ("llama", {"head_dim": 16, "rope_parameters": ROPE["yarn"]}),
    "mistral": ("mistral", {"sliding_window": None, "hidden_act": "gelu", "rope_parameters": ROPE["theta"]}),
    "qwen2": ("qwen2", {"rope_parameters": ROPE["yarn"]}),
    "qwen3": ("qwen3", {"head_dim": 16, "rope_parameters": ROPE["theta"]}),
    "qwen3 biases, tied": ("qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {**GPT2, "initializer_range": 0.3, "layer_norm_epsilon": 0.03}),
    "gpt2 untied": ("gpt2", {**GPT2, "initializer_range": 0.3, "tie_word_embeddings": False}),
}


def made(family: str, changes: dict[str, Any], folder: Path) -> Any:
    """A random model, biases and norms random too, saved."""
    sizes = {} if family == "gpt2" else SIZES
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**sizes, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif "lm_head" in name or "embed" in name or "wte" in name:
                parameter.mul_(0.3)  # logits of a few units, whose fifth digit single precision has
    model.save_pretrained(folder)
    return model


def logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    architecture = Architecture.of(read_config(folder))
    reader = Reader(architecture, read_weights(folder, architecture, jnp.float32))
    return np.asarray(jax.jit(lambda t: reader.logits(reader.stretch(t, []).states))(tokens))


TOKENS = np.random.default_rng(0).integers(0, 30, (2, 40)).astype(np.int32)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    """5e-6 where the logits have a standard deviation of one or so: a few roundings of single precision. The yardstick
    has double precision, since roundings of its own, which differ by processor, would count as ours."""
    model = made(*CASES[case], tmp_path).double()
    with torch.no_grad():
        expected = model(torch.from_numpy(TOKENS).long()).logits.numpy()
    assert 0.3 < expected.std() < 4
    np.testing.assert_allclose(logits(tmp_path, TOKENS), expected, rtol=0, atol=5e-6 * max(1.0, expected.std()))


@pytest.mark.parametrize("kind", ["theta", "llama3"])
def test_a_configuration_of_the_old_style_is_read_alike(kind: str, tmp_path: Path) -> None:
    made("llama", {"rope_parameters": ROPE[kind]}, tmp_path)
    new = Architecture.of(read_config(tmp_path))
    config = read_config(tmp_path)
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if kind == "theta" else {"type": rope.pop("rope_type"), **rope}
    assert Architecture.of(config) == new
    assert Architecture.of({**config, "rope_theta": 10000.0}) != new


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_what_a_configuration_leaves_out_is_as_in_transformers(family: str) -> None:
    own = AutoConfig.for_model(family)
    left_out = {"model_type": family, **({"max_position_embeddings": 4096} if family == "mistral" else {})}
    found = Architecture.of(left_out)
    assert found.num_layers == own.num_hidden_layers
    assert (found.hidden, found.heads, found.vocabulary) == (own.hidden_size, own.num_attention_heads, own.vocab_size)
    assert found.kv_heads == (getattr(own, "num_key_value_heads", None) or own.num_attention_heads)
    assert found.head_dim == (getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads)
    assert found.eps == (own.layer_norm_epsilon if family == "gpt2" else own.rms_norm_eps)
    assert found.activation == (own.activation_function if family == "gpt2" else own.hidden_act)
    assert found.tied == own.tie_word_embeddings
    if family != "mistral":
        assert found.max_length == own.max_position_embeddings
    assert found == Architecture.of({**own.to_dict(), **left_out})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[llmppl.LM, LM]:
    """One model in torch and in JAX."""
    folder = tmp_path_factory.mktemp("tiny")
    theirs = tiny_lm(vocabulary=6)
    theirs.transformer.save_pretrained(folder)
    theirs.tokenizer.save_pretrained(folder)
    return theirs, LM.from_pretrained(folder)


def test_padding_anywhere_changes_nothing(tiny: tuple[llmppl.LM, LM]) -> None:
    theirs, ours = tiny
    text = [1, 3, 2, 5, 4, 1]
    right, left, holes = [*text, PAD, PAD, PAD], [PAD, PAD, PAD, *text], [1, PAD, 3, 2, PAD, 5, 4, PAD, 1]
    reader = Reader(ours.architecture, ours.weights)
    rows = jnp.array([right, left, holes])
    reading = jax.jit(lambda t: (lambda r: (reader.logits(r.states), r.last, r.tokens))(reader.stretch(t, [])))(rows)
    with torch.no_grad():
        expected = theirs.transformer(torch.tensor([text])).logits[0].numpy()
    for row, tokens in enumerate((right, left, holes)):
        found = np.asarray(reading[0][row])[np.array(tokens) != PAD]
        np.testing.assert_allclose(found, expected, atol=5e-6)
        np.testing.assert_allclose(reader.logits(reading[1][row]), expected[-1], atol=5e-6)
    assert reading[2].tolist() == [6, 6, 6]


def test_a_row_without_a_token_has_numbers_in_half_precision() -> None:
    """What may not be seen is beyond float16."""
    half, full = (numpyro_tiny_lm(dtype=dtype)(["a", ""], "b", max_tokens=2) for dtype in (jnp.float16, jnp.float32))
    np.testing.assert_allclose(half.log_prob(jnp.array([1, 2])), full.log_prob(jnp.array([1, 2])), atol=0.02)


def test_single_steps_with_a_cache_are_the_whole_pass(tiny: tuple[llmppl.LM, LM]) -> None:
    _, ours = tiny
    reader = Reader(ours.architecture, ours.weights)
    tokens = jnp.array([[1, 3, 2, 5], [2, 2, 4, 1]])
    whole = reader.stretch(tokens, []).states
    readings: list[Any] = []
    for n in range(tokens.shape[-1]):
        readings.append(reader.stretch(tokens[:, n : n + 1], readings))
        np.testing.assert_allclose(readings[-1].states[:, 0], whole[:, n], atol=5e-6)


def test_gradients_of_adapters_are_those_of_peft(tiny: tuple[llmppl.LM, LM]) -> None:
    """1e-5 of the largest entry of each gradient."""
    _, ours = tiny
    theirs = tiny_lm(vocabulary=6)
    guide = AutoregressiveGuide(infilling(theirs), theirs, rank=3, alpha=7)
    name = theirs.adapters.names[0]
    found = {key: value for key, value in theirs.adapters.parameters(name).items()}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    text = [1, 3, 2, 5, 4, 1]
    with theirs.adapters.active(name):
        scores = theirs.transformer(torch.tensor([text[:-1]])).logits.log_softmax(-1)
        total = scores[0].gather(-1, torch.tensor(text[1:])[:, None]).sum()
        expected = dict(zip(found, torch.autograd.grad(total, list(found.values())), strict=True))

    names = list(ours.weights["layers"])
    names = [n for n in names if "norm" not in n]
    empty = initial(ours.weights, names, 3, jax.random.key(0), jnp.float32)
    tensors = {key: value.detach().numpy() for key, value in found.items()}
    adapter = from_tensors(tensors, empty, ours.architecture)
    tokens = jnp.array(text)

    def score(lora: Any) -> Any:
        reader = Reader(ours.architecture, ours.weights, scaled(lora, 7 / 3, jnp.float32))
        log_probs = jax.nn.log_softmax(reader.logits(reader.stretch(tokens[:-1], []).states))
        return jnp.take_along_axis(log_probs, tokens[1:, None], -1).sum()

    value, gradient = jax.jit(jax.value_and_grad(score))(adapter)
    assert float(value) == pytest.approx(total.item(), abs=1e-5)
    due = from_tensors({key: value.numpy() for key, value in expected.items()}, empty, ours.architecture)
    for layer, sides in due.items():
        for side, matrix in sides.items():
            scale = float(jnp.abs(matrix).max())
            np.testing.assert_allclose(gradient[layer][side], matrix, rtol=0, atol=1e-5 * scale)
    assert guide is not None


def test_texts_of_smollm2_have_the_log_probabilities_of_torch(smollm2: llmppl.LM) -> None:
    ours = LM.from_pretrained("smollm2-135m")
    texts = [" He ran home.", " The old dog slept by the fire, and nobody came.", " Why?"]
    context = "Tom lost his key."
    with torch.no_grad():
        expected = smollm2(context).log_prob(smollm2.encode(texts)).numpy()
    np.testing.assert_allclose(ours(context).log_prob(ours.encode(texts)), expected, rtol=0, atol=1e-3)

    # A guide that was trained in torch, the one that the package ships, has the same log q here.
    middles, ending = [" He looked under the mat.", " It was gone."], " The door was locked."
    value = np.asarray(ours.encode(middles, width=16))
    theirs = AutoregressiveGuide(infilling(smollm2), smollm2, rank=4)
    theirs.load(shipped_adapter())
    pieces = ending_first(context, ending)
    with torch.no_grad():
        law = smollm2(*pieces, max_tokens=16, stop=".")
        expected = law.with_context(law.context, theirs.adapter).log_prob(torch.tensor(value).long()).numpy()
        plain = law.log_prob(torch.tensor(value).long()).numpy()
    guide = guides.AutoregressiveGuide(models.infilling(ours), ours, rank=4)
    guide.load(shipped_adapter())
    text = ours(*pieces, max_tokens=16, stop=".")
    found = text.with_context(text.context, guide._lora()).log_prob(value)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    assert abs(expected - plain).max() > 0.1


# --- what is refused -----------------------------------------------------------------------------------

LLAMA = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 9}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "opt": ({"model_type": "opt", "architectures": ["OPTForCausalLM"]}, "'opt' .OPTForCausalLM.*TorchLikelihood"),
    "gemma": ({"model_type": "gemma"}, "'gemma'.*llama, mistral"),
    "dynamic": ({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'.*llmppl.LM"),
    "longrope": ({**LLAMA, "rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope'"),
    "mistral window": ({**LLAMA, "model_type": "mistral"}, "window of 4096 tokens.*set sliding_window to null"),
    "qwen2 window": (
        {**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "window of 8 tokens",
    ),
    "activation": ({**LLAMA, "hidden_act": "quick_gelu"}, "activation 'quick_gelu'.*silu"),
    "partial": ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "partial, new": ({**LLAMA, "rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor=0.25"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_built_is_refused_by_name(case: str) -> None:
    config, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        Architecture.of(config)


def changed(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**read_config(folder), **changes}))


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no configuration": (_without("config.json"), "no config.json.*save_pretrained"),
    "no tokenizer": (_without("tokenizer.json"), "no tokenizer.json.*AutoTokenizer"),
    "no safetensors": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin") and None, "as safetensors"),  # type: ignore[func-returns-value]
    "more layers": (lambda f: changed(f, num_hidden_layers=3), "no tensor 'layers.2.*save_pretrained"),
    "other heads": (lambda f: changed(f, num_key_value_heads=4), "config.json asks for 32"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_an_incomplete_folder_is_named_with_the_mend(case: str, tmp_path: Path) -> None:
    theirs = tiny_lm(vocabulary=6)
    theirs.transformer.save_pretrained(tmp_path)
    theirs.tokenizer.save_pretrained(tmp_path)
    spoil, message = FOLDERS[case]
    spoil(tmp_path)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        LM.from_pretrained(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("eos", ["c", {"content": "c", "lstrip": False}])
def test_end_tokens_are_found_however_they_are_given(eos: Any, file: str, tmp_path: Path) -> None:
    tiny_lm(vocabulary=6).tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / file).write_text(json.dumps({"eos_token": eos}))
    tokenizer = FolderTokenizer(tmp_path)
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (3, None)


# --- the last resort -----------------------------------------------------------------------------------


def test_a_torch_likelihood_is_the_native_one(tiny: tuple[llmppl.LM, LM]) -> None:
    theirs, ours = tiny
    middles = jnp.array([[1, 2, PAD], [3, 0, PAD], [4, 4, 5]])
    value = ours.encode("cd")
    expected = ours("ab", middles).log_prob(value)

    def likelihood(middle: Any) -> Any:
        return TorchLikelihood(theirs, "ab", middle).log_prob(value)

    np.testing.assert_allclose(likelihood(middles), expected, atol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.vmap(likelihood))(middles), expected, atol=1e-5)
    twice = jax.vmap(jax.vmap(likelihood))(jnp.stack([middles, middles[::-1]]))
    np.testing.assert_allclose(twice, jnp.stack([expected, expected[::-1]]), atol=1e-5)
    rows = TorchLikelihood(theirs, ["ab", "ba"], middles[0])
    assert rows.batch_shape == (2,)
    np.testing.assert_allclose(rows.log_prob(value), ours(["ab", "ba"], middles[0]).log_prob(value), atol=1e-5)
    leaves, tree = jax.tree.flatten(rows)
    again = jax.tree.unflatten(tree, leaves)
    np.testing.assert_allclose(again.log_prob(value), rows.log_prob(value))


def test_a_torch_likelihood_has_no_gradient_and_no_samples(tiny: tuple[llmppl.LM, LM]) -> None:
    theirs, ours = tiny
    key = jax.random.key(0)

    def loss(heat: Any) -> Any:
        middle = ours("ab", max_tokens=3, temperature=heat)
        text = middle.sample(key)
        return middle.log_prob(text) + TorchLikelihood(theirs, "ab", text).log_prob(ours.encode("cd"))

    def without(heat: Any) -> Any:
        middle = ours("ab", max_tokens=3, temperature=heat)
        return middle.log_prob(middle.sample(key))

    assert float(jax.jit(jax.grad(loss))(1.3)) == pytest.approx(float(jax.jit(jax.grad(without))(1.3)), rel=1e-4)
    with pytest.raises(ValueError, match="observed texts.*obs="):
        TorchLikelihood(theirs, "ab").sample(key)
    with pytest.raises(TypeError, match="must be a torch language model"):
        TorchLikelihood("smollm2", "ab")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="piece 0 must be a string"):
        TorchLikelihood(theirs, 3)


def test_the_three_functions_are_all_there_is_to_a_backend() -> None:
    assert all(callable(getattr(decoder, name)) for name in ("embed", "forward", "logits"))
