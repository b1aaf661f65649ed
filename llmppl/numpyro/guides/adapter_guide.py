"""Guides that adapt the shared transformer: their parameters are those of an adapter."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro

from llmppl.numpyro.guides.saved_guide import SavedGuide
from llmppl.numpyro.guides.text_guide import Context, Others, Prompt, Text, program_name
from llmppl.numpyro.language_model import LM
from llmppl.numpyro.network.adapters import size
from llmppl.numpyro.network.decoder import Weights
from llmppl.numpyro.programs.tracing import Program
from llmppl.text.declared import declared

_numbers = itertools.count()


class AdapterGuide(SavedGuide):
    """A guide whose proposals are the language model's own laws under an adapter.

    Its weights are a pytree at one ``numpyro.param`` site, ``f"{guide.adapter}$params"``. NumPyro has no store of
    parameters: :attr:`weights` is what training starts from, and what the guide runs with where nothing is substituted;
    :meth:`update` takes trained ones over.

    :param adapter: the adapter's name; made up by default.
    :param seed: of its initial weights; 0 by default.
    """

    weights: Weights
    """The current weights."""
    _additions: Weights | None = None

    @declared
    def __init__(
        self,
        model: Program,
        lm: LM,
        prompt: Mapping[str, Prompt] | None,
        others: Others | None,
        adapter: str | None,
        seed: int | None,
    ) -> None:
        super().__init__(model, lm, prompt, others)
        self.adapter = adapter or f"{type(self).__name__}_{next(_numbers)}"
        self._seed = 0 if seed is None else seed

    def distribution(self, name: str, prior: Text, context: Context) -> Text:
        return prior.with_context(context, self._additions)

    def _lora(self) -> Weights:
        """What the current weights add to the decoder."""
        raise NotImplementedError

    def _initial(self, key: jax.Array) -> Weights:
        """Weights to start from."""
        raise NotImplementedError

    def reset_parameters(self, seed: int | None = None) -> None:
        """Start anew, with other random numbers. Parameters of ``others`` stay.

        :param seed: one more than the last by default.
        """
        self._seed = self._seed + 1 if seed is None else seed
        self.weights = self._initial(jax.random.key(self._seed))

    def register(self) -> AdapterGuide:
        registered = copy.copy(self)
        registered.weights = numpyro.param(f"{self.adapter}$params", self.weights)
        # Made once for all sites: readings under the same arrays are shared.
        registered._additions = registered._lora()
        return registered

    def update(self, params: Mapping[str, Any]) -> None:
        """Take over trained parameters, e.g. ``svi_result.params``: those of ``others`` too.

        :raises ValueError: the guide's own are not among them, or have other shapes.
        """
        self.weights = _taken(params, f"{self.adapter}$params", self.weights)
        super().update({name: value for name, value in params.items() if name != f"{self.adapter}$params"})

    @property
    def _precision(self) -> Any:
        """Weights train in single precision at least."""
        return jnp.promote_types(self.lm.dtype, jnp.float32)

    def parameters(self) -> dict[str, Any]:
        """The guide's own parameters by the names of their ``numpyro.param`` sites."""
        return {f"{self.adapter}$params": self.weights}

    def _adaptation(self) -> str:
        """What the adapter is, for a ``repr``."""
        raise NotImplementedError

    def __repr__(self) -> str:
        count = size(self.parameters())
        prompts = f", prompt for {sorted(self.prompt)}" if self.prompt else ""
        return (
            f"{type(self).__name__}({program_name(self.model)}, {self.lm.name.rsplit('/', 1)[-1]}, "
            f"adapter={self.adapter!r}, {self._adaptation()}, {_short(count)} parameters{prompts})"
        )


def _taken(params: Mapping[str, Any], name: str, current: Any) -> Any:
    if name not in params:
        raise ValueError(
            f"the parameters have no {name!r}; they are {sorted(params)}. Pass those that training this guide gave, or "
            "give both guides one adapter= name."
        )
    new = params[name]
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (current, new)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the parameters {name!r} are of another guide: their shapes are {shapes[1]}, not {shapes[0]}."
        )
    return jax.tree.map(lambda old, value: jnp.asarray(value, old.dtype), current, new)


def _short(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 100_000 else f"{count:,}"
