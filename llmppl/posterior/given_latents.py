"""A posterior's latents, as the program that it is of would have them. Needs numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from llmppl.posterior.posterior import Array, Posterior
from llmppl.text.arguments import check_count

DRAWS = 100
"""Of the prior, where nobody says how many."""


def number_of_draws(posterior: Posterior | None, num_samples: int | None) -> int:
    """As many as are asked for, else as the posterior has samples.

    :raises ValueError: no such number.
    """
    count = num_samples if num_samples is not None else DRAWS if posterior is None else posterior.num_samples
    check_count(num_samples=count)
    return count


def given_latents(
    posterior: Posterior | None,
    latent: Mapping[str, Mapping[str, int]],
    axes: Sequence[int],
    rows: Sequence[int],
    nesting: int,
    count: int,
) -> dict[str, Array]:
    """Equally weighted draws of a program's latents, by site ``(count,)``, a dimension for each of the ``nesting`` that
    the plates take, and the event; nothing without a posterior.

    :param latent: by latent site of the program, the plates around it with their (negative) dimensions.
    :param axes: the dimensions of the rows ...
    :param rows: ... and their sizes.
    :raises ValueError: a posterior of other sites or rows.
    """
    if posterior is None:
        return {}
    missing = sorted(set(latent) - set(posterior.samples))
    if missing:
        raise ValueError(
            f"the posterior has no {missing}, latent sites of the program; it has {sorted(posterior.samples)}. Pass "
            "the program that it is of."
        )
    if posterior.batch_shape != tuple(rows):
        raise ValueError(
            f"the posterior has rows {posterior.batch_shape}, and the program with these arguments {tuple(rows)}. Pass "
            "the arguments that it is of, and vectorize_data= alike."
        )
    drawn = posterior.resample(count)
    return {
        name: placed(drawn.samples[name], [*axes, *(plates[p] for p in drawn.dims.get(name, ()))], nesting)
        for name, plates in latent.items()
    }


def placed(values: Array, dims: Sequence[int], nesting: int) -> Array:
    """Values ``(K,) + batch_shape + inner plates + event_shape`` as a program has them: ``(K,)``, one dimension for
    each of the ``nesting`` that its plates take, and the event.

    :param dims: of the values' dimensions behind ``K`` that are plates, the plates' own (negative) dimensions.
    """
    order = np.argsort(dims).astype(int)
    shape = [1] * nesting
    for place in order:
        shape[dims[place]] = values.shape[1 + place]
    sorted_values = values.transpose([0, *(1 + order), *range(1 + len(dims), values.ndim)])
    return sorted_values.reshape((len(values), *shape, *values.shape[1 + len(dims) :]))
