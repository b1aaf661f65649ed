"""Checkpoints of images and text: pictures as pieces, against a plain pass of the whole model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)

from llmppl import LM, fit, importance
from llmppl.guides import AutoregressiveGuide
from llmppl.objectives import TrajectoryBalance

IMAGE = "<image>"
AROUND = ("<fake_token_around_image>", "<global-img>")
LETTERS = [*(".", "a", "b", "c", "d", "e"), "Ġ"]


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE({letter: n for n, letter in enumerate(LETTERS)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=".")
    found.add_special_tokens({"additional_special_tokens": [IMAGE, *AROUND]})
    return found


def checkpoint(kind: str, folder: Path) -> Any:
    """A tiny model of random weights in double precision, saved as such checkpoints are."""
    names = tokenizer()
    torch.manual_seed(0)
    text = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(names), "initializer_range": 0.3,
            "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}  # fmt: skip
    seen = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 16, "initializer_range": 0.3, "initializer_factor": 20.0}  # fmt: skip
    number = names.convert_tokens_to_ids(IMAGE)
    if kind == "llava":
        vision = {**seen, "model_type": "clip_vision_model", "patch_size": 8, "projection_dim": 16}
        model: Any = LlavaForConditionalGeneration(
            LlavaConfig(text_config=text, vision_config=vision, image_token_index=number)
        )
        processor: Any = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    else:
        model = SmolVLMForConditionalGeneration(
            SmolVLMConfig(
                text_config=text, vision_config={**seen, "patch_size": 4}, image_token_id=number, scale_factor=2
            )
        )
        processor = SmolVLMImageProcessorPil(size={"longest_edge": 16}, max_image_size={"longest_edge": 16})
    model.double().eval().save_pretrained(folder)
    names.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


KINDS = ["llava", "smolvlm"]


@pytest.fixture(params=KINDS)
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any, Any, LM]:
    model, processor = checkpoint(request.param, tmp_path)
    return request.param, model, processor, LM.from_pretrained(tmp_path, dtype=torch.float64)


def plain(kind: str, model: Any, processor: Any, image: Any, behind: str, text: torch.Tensor) -> torch.Tensor:
    """Log-probability of each token by a plain pass of the whole model on pixels."""
    names = tokenizer()
    options = {} if kind == "llava" else {"do_image_splitting": False}
    pixels = processor(images=[image], return_tensors="pt", **options)["pixel_values"].double()
    count = model.get_image_features(pixel_values=pixels).pooler_output[0].shape[0]
    before, after = ("", "") if kind == "llava" else ("".join(AROUND), AROUND[0])
    prompt = names(before + IMAGE * count + after + behind, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*prompt, *text.tolist()]])
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits[0]
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, text[:, None])[:, 0]


def test_log_probabilities_are_those_of_the_whole_model(loaded: tuple[str, Any, Any, LM]) -> None:
    kind, model, processor, lm = loaded
    pictures = [picture(n) for n in range(3)]
    texts = lm.encode(["abc", "eed", "b"])
    found = lm(*lm.image(pictures), "a b").token_log_prob(texts)
    for row, (image, text) in enumerate(zip(pictures, texts, strict=True)):
        own = text[text >= 0]
        expected = plain(kind, model, processor, image, "a b", own)
        torch.testing.assert_close(found[row, : len(own)], expected, rtol=1e-5, atol=1e-5)
    assert float((found[0, 0] - lm(*lm.image(picture(7)), "a b").token_log_prob(texts)[0, 0]).abs()) > 1e-3
    # An array is a picture, too.
    array = np.asarray(pictures[0])
    torch.testing.assert_close(lm(*lm.image(array), "a b").token_log_prob(texts[0]), found[0])


@pytest.mark.long
def test_a_guide_told_a_picture_trains_and_has_exact_weights(loaded: tuple[str, Any, Any, LM]) -> None:
    _, _, _, lm = loaded
    shown = picture(1)

    def program(word: str) -> None:
        caption = pyro.sample("caption", lm(*lm.image(shown), max_tokens=2, stop="."))
        pyro.sample("word", lm(caption), obs=lm.encode(word))

    guide = AutoregressiveGuide(program, lm, prompt={"caption": lambda word: [*lm.image(shown), word]}, rank=2, seed=0)
    fit(program, guide, [("ab",)], TrajectoryBalance(4), 3, seed=0, progress=False)
    law = lm(*lm.image(shown), max_tokens=2, stop=".")
    texts = law.enumerate_support()
    with torch.no_grad():
        exact = float((law.log_prob(texts) + lm(texts).log_prob(lm.encode("ab"))).logsumexp(0))
    # An untrained guide is a poor proposal here, with 9 effective samples of 3000: half of them are the prior's.
    found = importance(program, guide, 3000, progress=False, defensive=0.5)("ab")
    assert float(found.log_evidence) == pytest.approx(exact, abs=0.15)
    assert not any(p.requires_grad for p in lm.vision.tower.parameters())


def test_copies_see_the_same(loaded: tuple[str, Any, Any, LM]) -> None:
    _, _, _, lm = loaded
    text = lm.encode("abc")
    expected = lm(*lm.image(picture(0))).log_prob(text)
    twin = copy.deepcopy(lm)
    torch.testing.assert_close(twin(*twin.image(picture(0))).log_prob(text), expected)
    with pytest.raises(pickle.PicklingError, match="does not pickle.* Load it in each process"):
        pickle.dumps(lm)


def test_what_cannot_be_seen_is_named(loaded: tuple[str, Any, Any, LM], lm: LM, tmp_path: Path) -> None:
    _, _, _, sees = loaded
    with pytest.raises(ValueError, match="this checkpoint reads text alone, and was given an image"):
        lm.image(picture(0))
    for wrong in ("a.png", [], [picture(0), "b.png"]):
        with pytest.raises(TypeError, match="must be pictures: PIL images, or arrays"):
            sees.image(wrong)
    with pytest.raises(ValueError, match="refuses the images"):
        sees.image(np.zeros((2, 2, 2, 2, 2)))
    Qwen2VLConfig().save_pretrained(tmp_path / "qwen")
    with pytest.raises(ValueError, match="is a qwen2_vl checkpoint.*positions in three dimensions"):
        LM.from_pretrained(tmp_path / "qwen")
