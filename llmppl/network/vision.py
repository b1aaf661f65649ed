"""Checkpoints that read images: their language model, and what makes an image a piece of its contexts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmppl.network.embedded import Embedded

AROUND: dict[str, tuple[str, str]] = {
    "llava": ("", ""),
    "smolvlm": ("<fake_token_around_image><global-img>", "<fake_token_around_image>"),
    "idefics3": ("<fake_token_around_image><global-img>", "<fake_token_around_image>"),
}
"""Model types that are read, and the control tokens that they were trained with before and behind an image."""

WHY_NOT = {
    "qwen2_vl": "its tokens have positions in three dimensions",
    "qwen2_5_vl": "its tokens have positions in three dimensions",
    "qwen3_vl": "its tokens have positions in three dimensions, and images enter several of its layers",
    "llava_next": "it cuts an image into parts whose number depends on its size",
    "llava_onevision": "it cuts an image into parts whose number depends on its size",
    "mllama": "images enter by layers of their own and not as tokens",
}


@dataclass
class Vision:
    """What a checkpoint makes of images.

    :param tower: a frozen encoder: pixels to embeddings of the language model's width.
    :param processor: the checkpoint's image processor: pictures to pixels.
    :param before, behind: control tokens around an image.
    """

    tower: VisionTower
    processor: Any
    before: str
    behind: str

    def piece(self, images: Any) -> Embedded:
        """An image, or a list of them, one a row, as a piece.

        :raises TypeError, ValueError: what is no image; images of several sizes in pixels.
        """
        one = not isinstance(images, (list, tuple))
        rows = [images] if one else list(images)
        if not rows or any(isinstance(row, str) for row in rows):
            raise TypeError(f"images={images!r} must be pictures: PIL images, or arrays of shape (height, width, 3).")
        options = {"do_image_splitting": False} if self.tower.tiles else {}
        try:
            found = self.processor(images=rows, return_tensors="pt", **options)["pixel_values"]
        except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"the checkpoint's {type(self.processor).__name__} refuses the images: {error}. Pass PIL images, or "
                "arrays of shape (height, width, 3)."
            ) from error
        # A processor of tiles makes all images those of one text.
        found = found.reshape(len(rows), *found.shape[-3:]) if self.tower.tiles else found
        return Embedded(self.tower, found[0] if one else found, 3, "vision")


class VisionTower(nn.Module):
    """The image part of a checkpoint: pixels ``(N, channels, height, width)`` to embeddings ``(N, P, width)``.

    :param model: an image-text-to-text model of ``transformers``; only its image part is run.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        inner = model.model
        parts = ("vision_tower", "multi_modal_projector", "vision_model", "connector")
        self.parts = nn.ModuleList(getattr(inner, name) for name in parts if hasattr(inner, name))
        self.tiles = model.config.model_type != "llava"
        self._features = inner.get_image_features

    def forward(self, pixels: Tensor) -> Tensor:
        found = self._features(pixel_values=pixels[:, None] if self.tiles else pixels).pooler_output
        return torch.stack(list(found))


def reads_images(config: Any) -> bool:
    """Whether a checkpoint is one of images and text. One of another kind that does has no language model alone."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    kind = config.model_type
    return kind in AROUND or (
        kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        and (kind in WHY_NOT or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    )


def load_vision(name: str, config: Any, dtype: torch.dtype) -> tuple[Any, Vision]:
    """The language model of a checkpoint as a causal one, and its vision.

    :raises ValueError: a kind of checkpoint whose images are not read right here, by name.
    """
    from transformers import AutoImageProcessor, AutoModelForImageTextToText

    kind = config.model_type
    if kind not in AROUND:
        reason = WHY_NOT.get(kind, "how it reads images is not known here")
        raise ValueError(
            f"{name!r} is a {kind} checkpoint, and its images cannot stand in a context: {reason}. Those of "
            f"{sorted(AROUND)} can. For text alone load the language model that it was made from."
        )
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, trust_remote_code=False)
    tower = VisionTower(model.eval()).requires_grad_(False)
    processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    return language_model(model, name), Vision(tower, processor, *AROUND[kind])


def language_model(model: Any, name: str = "") -> Any:
    """The language model inside a model of images and text, as a causal one on the same weights."""
    from transformers import AutoModelForCausalLM

    config = model.config.get_text_config()
    config._name_or_path = name or model.config._name_or_path
    with torch.device("meta"):
        causal: Any = AutoModelForCausalLM.from_config(config)
    inner = model.model.language_model if hasattr(model.model, "language_model") else model.model.text_model
    setattr(causal, causal.base_model_prefix, inner)
    causal.set_output_embeddings(model.get_output_embeddings())
    return causal.eval()


def pieces(vision: Vision | None, images: Any, control: Any) -> Sequence[Any]:
    """An image, or one a row, as pieces of a context.

    :param control: encodes control tokens.
    :raises ValueError: a checkpoint of text alone.
    """
    if vision is None:
        raise ValueError(
            "this checkpoint reads text alone, and was given an image. Load one of images and text "
            f"({', '.join(sorted(AROUND))}), or give the image an encoder: Embedded(encoder, image, event_dim=3)."
        )
    before, behind = ([control(text)] if text else [] for text in (vision.before, vision.behind))
    return [*before, vision.piece(images), *behind]
