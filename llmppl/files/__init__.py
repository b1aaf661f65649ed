"""What lies on a disk whatever framework reads it: the packaged model, the files of guides. No torch, no jax."""
