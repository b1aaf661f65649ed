"""The language model itself as a guide, told the observations."""

from __future__ import annotations

from llmppl.numpyro.guides.text_guide import Context, Text, TextGuide


class PromptGuide(TextGuide):
    """The language model itself, told the observations: zero-shot, nothing to train.

    The baseline that every report shows. Parameters as in :class:`TextGuide`.
    """

    def distribution(self, name: str, prior: Text, context: Context) -> Text:
        return prior.with_context(context, None)
