"""Ready guides for programs with latent text."""

from llmppl.guides.autoregressive import AutoregressiveGuide, PromptGuide
from llmppl.guides.direct import DirectGuide
from llmppl.guides.gflownet import GFlowNetGuide
from llmppl.guides.refinement import RefinementGuide
from llmppl.guides.semi_amortized import InstanceGuide, SemiAmortizedGuide
from llmppl.guides.soft_prompt import SoftPromptGuide
from llmppl.guides.steered_guide import SteeredGuide
from llmppl.guides.text_guide import TextGuide
from llmppl.guides.word_guide import WordGuide

__all__ = [
    "AutoregressiveGuide",
    "DirectGuide",
    "GFlowNetGuide",
    "InstanceGuide",
    "PromptGuide",
    "RefinementGuide",
    "SemiAmortizedGuide",
    "SoftPromptGuide",
    "SteeredGuide",
    "TextGuide",
    "WordGuide",
]
