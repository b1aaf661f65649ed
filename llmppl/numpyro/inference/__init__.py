"""Inference for NumPyro programs with latent text; each method returns a Posterior."""
