"""The main job on a real language model, as the command line runs it."""

from llmppl.demo.infilling import stories

__all__ = ["stories"]
