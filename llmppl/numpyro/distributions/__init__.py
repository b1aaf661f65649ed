"""Distributions over text for NumPyro."""
