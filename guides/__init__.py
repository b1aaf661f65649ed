"""Ready guides for programs with latent text."""

from llmppl.guides.adapted import AdapterGuide
from llmppl.guides.autoregressive import AutoregressiveGuide, PromptGuide
from llmppl.guides.base import TextGuide
from llmppl.guides.gflownet import GFlowNetGuide
from llmppl.guides.soft_prompt import SoftPromptGuide

__all__ = ["AdapterGuide", "AutoregressiveGuide", "GFlowNetGuide", "PromptGuide", "SoftPromptGuide", "TextGuide"]
