"""Guides for latent text, for NumPyro."""
