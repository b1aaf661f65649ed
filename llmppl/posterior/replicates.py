"""What a program says of data that it could have seen. Needs numpy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(repr=False)
class Replicates:
    """Draws of a program's observed sites, and the latents that they follow from.

    :param latents: by site, ``(K,) + batch_shape + event_shape``; those computed from others are among them.
    :param observations: by observed site, likewise.
    :param of_posterior: whether the latents are a posterior's, and not the program's own.
    :param batch_shape: of the rows.
    :param decoders: by text site, from one text's ids to a string.
    :param plates: names of the plates that the rows are.
    :param dims: by site, names of the plates behind the rows.
    """

    latents: Mapping[str, Array]
    observations: Mapping[str, Array]
    of_posterior: bool
    batch_shape: tuple[int, ...] = ()
    decoders: Mapping[str, Callable[[Array], str]] = field(default_factory=dict)
    plates: tuple[str, ...] = ()
    dims: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        return len(next(iter({**self.latents, **self.observations}.values())))

    def decode(self, site: str) -> Any:
        """The texts of a site as strings, ``K`` of them, nested by row.

        :raises KeyError: no such text site.
        """
        values = {**self.latents, **self.observations}
        if site not in values or site not in self.decoders:
            texts = sorted(set(values) & set(self.decoders))
            raise KeyError(f"no text site {site!r}; the texts are {texts}.")
        return decoded(values[site], self.decoders[site])

    def __repr__(self) -> str:
        sites = ", ".join(f"{name}{list(value.shape[1:])}" for name, value in self.observations.items())
        return f"Replicates({self.num_samples} draws of {sites}, {'posterior' if self.of_posterior else 'prior'})"


def decoded(values: Array, decoder: Callable[[Array], str]) -> Any:
    return decoder(np.asarray(values)) if values.ndim == 1 else [decoded(value, decoder) for value in values]
