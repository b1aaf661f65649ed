"""Objectives that would train silently wrong on a text are refused."""

from __future__ import annotations

import sys
from typing import Any

from numpyro.infer.elbo import ELBO
from numpyro.infer.svi import SVI


def refuse_pathwise(fn: object) -> None:
    """Raise if a latent text is being drawn for an objective that differentiates through its samples.

    NumPyro's ``Trace_ELBO`` and ``RenyiELBO`` drop the score term of a discrete latent and only warn (and ``SVI`` does
    so once, at its start): a text's gradient would be wrong. A distribution is not told what draws it; the frames above
    it, looked at while the program is traced, tell.

    :raises TypeError: naming the objective and those that serve.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        objective = owner.loss if isinstance(owner, SVI) else owner
        if isinstance(objective, ELBO):
            if not objective.can_infer_discrete:
                raise TypeError(
                    f"{type(objective).__name__} differentiates through samples, and a latent text "
                    f"({type(fn).__name__}) is discrete: it would train silently wrong. Use LeaveOneOutELBO or "
                    "TrajectoryBalance of llmppl.numpyro.objectives, or NumPyro's TraceGraph_ELBO."
                )
            return
        frame = frame.f_back


def refuse_enumeration() -> None:
    """Raise if NumPyro's parallel enumeration is the caller's caller: it puts 0, 1, ... where a support has texts.

    :raises TypeError: naming the way that works.
    """
    if sys._getframe(2).f_globals.get("__name__", "").startswith("numpyro.contrib.funsor"):
        raise TypeError(
            "NumPyro enumerates only sites whose values are the numbers 0, 1, ..., and the options of lm.choice are "
            "texts. Enumerate the option's number: choice = lm.choice(...); number = numpyro.sample(name, "
            'dist.Categorical(logits=choice.logits), infer={"enumerate": "parallel"}); text = choice.option(number).'
        )
