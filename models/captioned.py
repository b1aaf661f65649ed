"""Pictures with captions: what a text says decides what a picture looks like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmppl.models.primitives import Maker
from llmppl.text.declared import declared

PROMPT = "A picture of"


@declared
def captioned(
    lm: Maker, captions: Sequence[str], likelihood: Callable[[Any], Any], prompt: str = PROMPT
) -> Callable[[Any], Any]:
    r"""The program in which a caption generates an image:

    .. math:: c \sim \text{lm}(\text{prompt}), \quad x \sim \text{likelihood}(c)

    A generative program: the language model says how probable a caption is before any image is seen, and the image is
    observed. Its posterior is enumerated by as many likelihoods as there are captions; a guide that sees the image
    (:func:`llmppl.models.encoders.image_told`) answers in one pass. Sites: latent ``caption``, a choice of
    ``captions``, and observed ``image``. The program's argument is an image, ``event_shape`` of the likelihood, or in a
    plate one a row.

    :param lm: a :class:`llmppl.LM`.
    :param captions: as they go on after the prompt, ``[" a zero", " a one"]``.
    :param likelihood: a distribution over images for each caption's number, an integer tensor ``batch_shape``; such as
        :class:`llmppl.models.image_mixtures.ImageMixtures`.
    :param prompt: stands before the caption.
    """
    options = list(captions)
    numbers = {caption: float(n) for n, caption in enumerate(options)}
    primitives = lm.primitives

    def show(image: Any) -> Any:
        caption = primitives.sample("caption", lm.choice(prompt, options=options))
        number = lm.map(numbers.__getitem__, caption, returns=float).long()
        primitives.sample("image", likelihood(number), obs=image)
        return caption

    return show
