"""What prompts are told where observations are simulated, in NumPyro."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array

from llmppl.numpyro import LM

Program = Callable[..., Any]


def texts(lm: LM) -> Program:
    """Program (a): the argument ``e`` is observed at a site of another name."""

    def story(b: Any, e: Any) -> None:
        z = numpyro.sample("z", lm(b, max_tokens=3, stop="."))
        numpyro.sample("ending", lm(b, z, max_tokens=3, stop="."), obs=lm.encode(e))

    return story


def counts(lm: LM) -> Program:
    """Program (b): what is observed is a number, about how often token 3 stands in the text."""

    def story(x: Any, k: Any) -> None:
        z = numpyro.sample("z", lm(x, max_tokens=3, stop="."))
        numpyro.sample("k", dist.Normal((z == 3).sum(-1), 0.3), obs=k)

    return story


def written(k: Any) -> Array:
    """A text for each of any batch of numbers, in half steps."""
    number = jnp.round(2 * jnp.asarray(k)).clip(0, 6).astype(jnp.int32)
    return jnp.stack([1 + number // 3, 1 + number % 3], -1)


def prompts(seen: list[Any]) -> dict[str, Any]:
    """By program its prompt, which notes what it is told."""

    def ending_first(b: Any, e: Any) -> list[Any]:
        seen.append(e)
        return [e, b]

    def count_first(x: Any, k: Any) -> list[Any]:
        seen.append(k)
        return [written(k), x]

    return {"texts": ending_first, "counts": count_first}
