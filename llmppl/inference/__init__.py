"""Inference: each function returns a :class:`~llmppl.inference.posterior.Posterior`."""
