"""Inference: each function returns a :class:`~llmppl.posterior.posterior.Posterior`."""
