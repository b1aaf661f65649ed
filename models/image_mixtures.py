"""Gaussian mixtures of images, one for each class: a likelihood for captions."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor


class ImageMixtures:
    """A Gaussian mixture of images for each class, with a variance for each pixel.

    Called with classes, an integer tensor ``batch_shape``, it is a distribution over images ``batch_shape`` of event
    shape ``(height, width)``.

    :param logits: ``(classes, components)``, log-weights.
    :param means: ``(classes, components, height, width)``.
    :param scales: standard deviations, of the same shape.
    :raises ValueError: shapes that do not fit; scales that are not positive.
    """

    def __init__(self, logits: Tensor, means: Tensor, scales: Tensor) -> None:
        if means.dim() != 4 or means.shape != scales.shape or logits.shape != means.shape[:2]:
            raise ValueError(
                f"logits of shape {tuple(logits.shape)}, means of {tuple(means.shape)} and scales of "
                f"{tuple(scales.shape)} must be (classes, components) and twice (classes, components, height, width)."
            )
        if not bool((scales > 0).all()):
            raise ValueError("scales must be positive. Raise the smallest variance, reg_covar= of a GaussianMixture.")
        self.logits, self.means, self.scales = logits.log_softmax(-1), means, scales

    @classmethod
    def fitted(
        cls, images: Any, labels: Any, components: int = 4, variance: float = 0.02, seed: int = 0
    ) -> ImageMixtures:
        """Mixtures of scikit-learn, fitted to the images of each class.

        :param images: ``(N, height, width)``.
        :param labels: ``(N,)``, the classes 0, 1, ...
        :param variance: added to each pixel's.
        :raises ImportError: scikit-learn is not installed.
        """
        try:
            from sklearn.mixture import GaussianMixture  # type: ignore[import-untyped]
        except ModuleNotFoundError as error:
            raise ImportError(
                "ImageMixtures.fitted needs scikit-learn: pip install 'pyro-llmppl[pictures]'."
            ) from error
        pixels, classes = torch.as_tensor(images).double(), torch.as_tensor(labels)
        found = []
        for label in range(int(classes.max()) + 1):
            own = pixels[classes == label].flatten(1).numpy()
            if len(own) < components:
                raise ValueError(f"class {label} has {len(own)} images, fewer than components={components}.")
            mixture = GaussianMixture(components, covariance_type="diag", reg_covar=variance, random_state=seed)
            found.append(mixture.fit(own))
        shape = (len(found), components, *pixels.shape[1:])
        return cls(
            torch.stack([torch.as_tensor(m.weights_).log() for m in found]).float(),
            torch.stack([torch.as_tensor(m.means_) for m in found]).reshape(shape).float(),
            torch.stack([torch.as_tensor(m.covariances_).sqrt() for m in found]).reshape(shape).float(),
        )

    def __call__(self, number: Tensor) -> Any:
        chosen = number.to(self.logits.device)
        components = dist.Normal(self.means[chosen], self.scales[chosen]).to_event(2)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits[chosen]), components)

    def log_probs(self, images: Tensor) -> Tensor:
        """Of images ``(N, height, width)`` under every class, ``(N, classes)``, nats."""
        return self(torch.arange(len(self.logits))).log_prob(images[:, None])

    def __repr__(self) -> str:
        classes, components, height, width = self.means.shape
        return f"ImageMixtures({classes} classes of {components} components, images of {height} × {width})"
