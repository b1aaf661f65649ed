"""The training loop in JAX."""
