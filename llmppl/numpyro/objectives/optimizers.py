"""An optimizer with a learning rate of its own for a learned log-partition."""

from __future__ import annotations

from typing import Any

import optax  # type: ignore[import-untyped]

LOG_PARTITION = "_log_partition$params"
"""How the name of a guide's log-partition parameters ends."""


def optimizer(
    learning_rate: Any, log_partition_learning_rate: Any = 1e-1, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """AdamW for ``SVI``, with a learning rate of its own for the head of a learned log-partition.

    :param learning_rate: of all other parameters; a number or an optax schedule.
    :param log_partition_learning_rate: of a guide's learned log-partition.
    :param weight_decay: of AdamW, on all other parameters.
    """
    return optax.multi_transform(
        {
            "policy": optax.adamw(learning_rate, weight_decay=weight_decay),
            "log_partition": optax.adamw(log_partition_learning_rate, weight_decay=0.0),
        },
        lambda params: {name: "log_partition" if name.endswith(LOG_PARTITION) else "policy" for name in params},
    )
