"""Converts public checkpoints (HuggingFace safetensors) to Flax towers and back.

    from xmodal import pretrained
    module, variables = pretrained.load('google/vit-base-patch16-224')
"""

from xmodal.pretrained.checkpoint import Checkpoint, LoadReport, load
from xmodal.pretrained.families import FAMILIES
