"""Objectives for guides over latent text: each an ELBO of NumPyro's."""
