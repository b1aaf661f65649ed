"""Small encoders of arrays, for guides that see them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from llmppl.distributions.parameter_store import register_module
from llmppl.language_model import LM
from llmppl.models.captioned import PROMPT as PICTURE
from llmppl.models.described_series import PROMPT as YEAR
from llmppl.network.embedded import Embedded
from llmppl.text import PAD
from llmppl.text.declared import declared

_numbers = itertools.count()


def image_told(encoder: nn.Module, event_dim: int = 2, prompt: str = PICTURE) -> dict[str, Callable[..., list[Any]]]:
    """What a guide of :func:`llmppl.models.captioned` is told: the image, by an encoder, and the prompt."""
    return {"caption": lambda image: [Embedded(encoder, image, event_dim), prompt]}


def series_told(encoder: nn.Module, prompt: str = YEAR) -> dict[str, Callable[..., list[Any]]]:
    """What a guide of :func:`llmppl.models.described_series` is told: the series, by an encoder, and the prompt."""
    return {"description": lambda y: [Embedded(encoder, y, 1), prompt]}


class SeenChoice(nn.Module):
    r"""The guide of :func:`llmppl.models.captioned` that does not read: the language model's own law of the captions,
    tilted by what a classifier sees.

    .. math:: q(c_i|x) \propto P_{\text{lm}}(c_i)\, e^{f_i(x)}

    The posterior has this form, with :math:`f_i(x) = \log p(x|c_i)` up to what all captions share; so a classifier that
    is wide enough can reach it, which a language model that is told an embedding has to learn to say. For texts that
    cannot be listed there is :func:`image_told`. Trained and weighed like any guide of Pyro's.

    :param classifier: maps images ``(N, ...)`` to :math:`f`, ``(N, captions)``. It can be taught alone first.
    :param lm: the program's.
    :param captions: the program's.
    :param event_dim: dimensions of an image.
    :param prompt: the program's.
    :raises ValueError: while it is called: scores of another number than the captions.
    """

    @declared
    def __init__(
        self, classifier: nn.Module, lm: LM, captions: Sequence[str], event_dim: int = 2, prompt: str = PICTURE
    ) -> None:
        super().__init__()
        self.classifier, self.captions, self.event_dim, self.prompt = classifier, list(captions), event_dim, prompt
        self._number = next(_numbers)
        self._lm = [lm]  # not a module of this one: its weights are not the guide's

    def forward(self, image: Tensor, observations: Mapping[str, Tensor] | None = None) -> Tensor:
        image = (observations or {}).get("image", image)
        if any(parameter.requires_grad for parameter in self.classifier.parameters()):
            register_module(f"seen_choice_{self._number}", self)
        rows = image.shape[: image.dim() - self.event_dim]
        scores = self.classifier(image.reshape(-1, *image.shape[len(rows) :]))
        law = self._lm[0].choice(self.prompt, options=self.captions, tilt=scores.reshape(*rows, -1))
        return pyro.sample("caption", law)

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's store leaves a weak reference on parameters, which does not pickle.
        classifier = copy.deepcopy(self.classifier)
        return {**self.__dict__, "_modules": {**self._modules, "classifier": classifier}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number = next(_numbers)  # a module of its own in Pyro's store

    def __deepcopy__(self, memo: dict[int, Any]) -> SeenChoice:
        """With a classifier of its own, to train alone; the language model is the same."""
        twin = SeenChoice(copy.deepcopy(self.classifier, memo), self._lm[0], self.captions, self.event_dim, self.prompt)
        return twin.train(self.training)


class SmallEye(nn.Module):
    """A small convolutional encoder of images ``(N, height, width)``: one embedding of a language model's width.

    :param width: of the language model, ``lm.transformer.config.hidden_size``.
    :param channels: of its two layers.
    :param scale: of the embeddings to start with; those of tokens are about 0.1.
    :param seed: of the initial weights.
    """

    def __init__(self, width: int, channels: int = 32, scale: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Conv2d(1, channels, 3, padding=1), nn.SiLU(),
                nn.Conv2d(channels, channels, 3, stride=2, padding=1), nn.SiLU(),
                nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, width),
            )  # fmt: skip
            self.norm = nn.LayerNorm(width)
            nn.init.constant_(self.norm.weight, scale)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.layers(images[:, None]))


class SmallEar(nn.Module):
    """A small convolutional encoder of series ``(N, length)``: ``count`` embeddings of a language model's width.

    :param width: of the language model, ``lm.transformer.config.hidden_size``.
    :param unit: what the series are divided by first.
    :param count: embeddings of a series.
    :param channels: of its two layers.
    :param scale: of the embeddings to start with; those of tokens are about 0.1.
    :param seed: of the initial weights.
    """

    def __init__(
        self, width: int, unit: float = 1.0, count: int = 1, channels: int = 32, scale: float = 0.1, seed: int = 0
    ) -> None:
        super().__init__()
        self.unit, self.count = unit, count
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Conv1d(1, channels, 3, padding=1), nn.SiLU(),
                nn.Conv1d(channels, channels, 3, padding=1), nn.SiLU(),
                nn.AdaptiveAvgPool1d(12), nn.Flatten(), nn.Linear(12 * channels, count * width),
            )  # fmt: skip
            self.norm = nn.LayerNorm(width)
            nn.init.constant_(self.norm.weight, scale)

    def forward(self, series: Tensor) -> Tensor:
        return self.norm(self.layers(series[:, None] / self.unit).unflatten(-1, (self.count, -1)))


class SoftSentence(nn.Module):
    """What an array is, said in words: the embeddings of sentences, mixed by how probable a classifier finds each.

    A language model has to learn what the embeddings of another encoder mean; these it can read from the start, and
    repeat. Where the classifier is sure they are those of one sentence as it is written.

    :param classifier: maps arrays to logits ``(N, S)``. It can be taught alone first: its loss needs no language model.
    :param lm: whose embeddings the sentences have.
    :param sentences: ``S`` of them, as they stand in the context.
    :param padding: a token that makes shorter ones as long as the longest.
    :raises TypeError: sentences that are no list of strings.
    :raises ValueError: no sentence, an empty one, padding of more tokens than one; while it is called: logits of
        another number than ``S``.
    """

    said: Tensor

    @declared
    def __init__(self, classifier: nn.Module, lm: LM, sentences: Sequence[str], padding: str = "\n") -> None:
        super().__init__()
        if not len(sentences) or not all(sentences):
            raise ValueError(f"sentences={sentences!r} must be a list of texts, none empty.")
        fill = lm.encode(padding)
        if fill.shape != (1,):
            raise ValueError(f"padding={padding!r} has {len(fill)} tokens. Give a text of one.")
        self.classifier = classifier
        ids = lm.encode(list(sentences))
        with torch.no_grad():
            said = lm.transformer.get_input_embeddings()(torch.where(ids == PAD, fill, ids))
        said = said.to(torch.promote_types(said.dtype, torch.float32))
        self.register_buffer("said", said, persistent=False)  # the language model's own

    def forward(self, arrays: Tensor) -> Tensor:
        logits = self.classifier(arrays)
        if logits.shape != (len(arrays), len(self.said)):
            raise ValueError(
                f"the classifier's logits have shape {tuple(logits.shape)}; {len(arrays)} arrays and {len(self.said)} "
                f"sentences make {(len(arrays), len(self.said))}. Let it end with a linear layer of that width."
            )
        return torch.einsum("ns,stw->ntw", logits.to(self.said.dtype).softmax(-1), self.said)
