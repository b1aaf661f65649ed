"""Ready guides for programs with latent text."""

from llmppl.guides.autoregressive import AutoregressiveGuide, PromptGuide
from llmppl.guides.base import TextGuide
from llmppl.guides.direct import DirectGuide
from llmppl.guides.gflownet import GFlowNetGuide
from llmppl.guides.refinement import RefinementGuide
from llmppl.guides.semi_amortized import InstanceGuide, SemiAmortizedGuide
from llmppl.guides.soft_prompt import SoftPromptGuide

__all__ = [
    "AutoregressiveGuide",
    "DirectGuide",
    "GFlowNetGuide",
    "InstanceGuide",
    "PromptGuide",
    "RefinementGuide",
    "SemiAmortizedGuide",
    "SoftPromptGuide",
    "TextGuide",
]
