"""What inference returns: weighted samples, their doubts, brackets and gaps. No torch, no jax."""
