"""Ready guides for programs with latent text."""

from llmppl.guides.autoregressive import AutoregressiveGuide, PromptGuide
from llmppl.guides.base import TextGuide
from llmppl.guides.gflownet import GFlowNetGuide
from llmppl.guides.refinement import RefinementGuide
from llmppl.guides.soft_prompt import SoftPromptGuide

__all__ = ["AutoregressiveGuide", "GFlowNetGuide", "PromptGuide", "RefinementGuide", "SoftPromptGuide", "TextGuide"]
