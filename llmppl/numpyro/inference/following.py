"""Particles under ``vmap`` that become copies of one another: what each has goes along, what all share stays shared."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap

from llmppl.numpyro.programs.particles import Layout


class Follow:
    """Gives one particle what another has; use it inside ``vmap`` over the particles.

    A value that does not differ between particles (a prompt that was read once for all) is left alone, and not copied
    for each.

    :param index: which particle to go on from, of shape ``where.rows``.
    """

    def __init__(self, where: Layout, index: Array) -> None:
        self.where, self.index = where, index

    def __call__(self, value: Array, trailing: int, leading: int = 0) -> Array:
        """The value of the particle that this one goes on from.

        :param value: one particle's, ``leading`` dimensions, those of the plates, ``trailing`` dimensions.
        """
        plates = value.ndim - trailing - leading
        sizes = dict(zip(self.where.axes, self.where.rows, strict=True))
        laid_out = (1,) * leading + tuple(sizes.get(dim, 1) for dim in range(-plates, 0)) + (1,) * trailing
        fits = all(-dim <= plates and value.shape[dim - trailing] == size for dim, size in sizes.items())

        @custom_vmap
        def go_on(index: Array, value: Array) -> Array:
            return value

        @go_on.def_vmap
        def among_particles(count: int, batched: Any, index: Array, value: Array) -> tuple[Array, bool]:
            if not batched[1]:
                return value, False
            if not fits:
                raise ValueError(
                    f"a value of shape {value.shape[1:]} depends on a latent, but has not the {self.where.rows} rows "
                    "that the latent has. Keep the dimensions of the plates in what the program makes of its latents."
                )
            index = jnp.broadcast_to(index, (count, *self.where.rows)).reshape(count, *laid_out)
            return jnp.take_along_axis(value, index, 0), True

        return go_on(self.index, jnp.asarray(value))
