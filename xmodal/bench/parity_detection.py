"""Small randomised detectors of transformers (PyTorch) to compare ours with.

Imports torch and transformers only when a case is made.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from xmodal.bench.parity_vision import randomise


@dataclasses.dataclass(frozen=True)
class Case:
  """One configuration of a DETR, and pictures for it.

  Attributes:
    description: what is unusual about it.
    backbone: arguments of transformers' ResNetConfig.
    config: arguments of its DetrConfig, except the backbone.
    sizes: (height, width) of the pictures, which share a batch.
    scale: scale of the noise added to the parameters.
    family: config.json's model_type.
    fields: fields of our module that differ from the checkpoint's.
  """

  description: str
  backbone: Mapping[str, Any]
  config: Mapping[str, Any]
  sizes: tuple[tuple[int, int], ...]
  scale: float = 0.5
  family: str = 'detr'
  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def make(self):
    """The torch model in eval mode, with all parameters and statistics random."""
    import torch
    import transformers
    torch.manual_seed(0)
    config = transformers.DetrConfig(
        backbone_config=transformers.ResNetConfig(**self.backbone), **self.config)
    model = randomise(transformers.DetrForObjectDetection(config), self.scale)
    with torch.no_grad():
      # Otherwise queries are nearly equal, and boxes as large as the picture.
      model.model.query_position_embeddings.weight.normal_(std=2)
      for parameter in model.bbox_predictor.layers[-1].parameters():
        parameter *= 0.2
    return model

  def inputs(self) -> tuple[np.ndarray, np.ndarray | None]:
    """Noise float32 [B, H, W, 3], and a mask bool [B, H, W], or None without padding."""
    height, width = np.max(self.sizes, axis=0)
    mask = np.zeros((len(self.sizes), height, width), bool)
    for i, (rows, columns) in enumerate(self.sizes):
      mask[i, :rows, :columns] = True
    images = np.random.default_rng(0).normal(size=(*mask.shape, 3)) * mask[..., None]
    return images.astype(np.float32), None if mask.all() else mask

  def run(self, model, images, mask) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, Q, C + 1] and boxes [B, Q, 4] of a torch model."""
    import torch
    with torch.no_grad():
      output = model(torch.tensor(images.transpose(0, 3, 1, 2)),
                     pixel_mask=None if mask is None else torch.tensor(mask).long())
    return output.logits.numpy(), output.pred_boxes.numpy()

  def load(self, folder: str):
    """Reads the torch model, in eval mode, from a folder that ours was exported to."""
    import transformers
    return transformers.DetrForObjectDetection.from_pretrained(folder).eval()


_BACKBONE = dict(embedding_size=8, hidden_sizes=[8, 16, 32], depths=[1, 2, 1],
                 out_features=['stage3'])
_CONFIG = dict(
    d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=24, decoder_layers=3,
    decoder_attention_heads=4, decoder_ffn_dim=20, num_queries=5, num_labels=7)
_PADDED = ((97, 70), (60, 70), (45, 33))

CASES = (
    Case('basic blocks', {**_BACKBONE, 'layer_type': 'basic'}, _CONFIG, ((97, 70),) * 2),
    Case('basic blocks, padded', {**_BACKBONE, 'layer_type': 'basic'}, _CONFIG, _PADDED),
    Case('bottleneck blocks (v1.5), padded', {**_BACKBONE, 'layer_type': 'bottleneck'}, _CONFIG,
         _PADDED),
    Case('bottleneck blocks (v1), GELU, 3 heads, 1 layer, 1 class, padded',
         {**_BACKBONE, 'layer_type': 'bottleneck', 'downsample_in_bottleneck': True,
          'out_features': ['stage1', 'stage3']},
         {**_CONFIG, 'd_model': 12, 'encoder_attention_heads': 3, 'encoder_layers': 1,
          'decoder_layers': 1, 'activation_function': 'gelu', 'num_labels': 1},
         ((64, 160), (32, 31))))
PUBLISHED = (
    # Noise as large as in the small cases would dominate sums over two thousand values.
    Case('ResNet-50, 100 queries, 91 classes, padded', dict(out_features=['stage4']),
         dict(num_labels=91), ((320, 416), (240, 320)), scale=0.05),)
