"""transformers' DETR in PyTorch, a training step and inference: what we race in detection.

The loss is transformers' own, whose Hungarian matching is scipy's on the
processor. All attention is torch's scaled_dot_product_attention.
"""

from collections.abc import Callable, Mapping
import copy
import tempfile

import numpy as np
import torch
from torch import nn
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

from xmodal import pretrained
from xmodal.bench.torch_training import make_descent, make_optimizer
from xmodal.models.detector.detr import Detr


def make_model(backbone: Mapping, config: Mapping, seed: int = 0) -> DetrForObjectDetection:
  """A DETR of random weights in training mode, its backbone trained but for stem and first stage.

  So it is in the paper (arXiv:2005.12872, section 4). transformers looks for
  timm's names and freezes the whole of a ResNet of its own. Batch norm is
  frozen in both.

  Args:
    backbone: of ResNetConfig; its last stage is what the encoder sees.
    config: of DetrConfig beside the backbone, such as num_labels and dropout.
    seed: of the weights.
  """
  torch.manual_seed(seed)
  resnet = ResNetConfig(**backbone)
  resnet.out_features = resnet.stage_names[-1:]
  model = DetrForObjectDetection(DetrConfig(backbone_config=resnet, **config))
  for name, parameter in model.model.backbone.named_parameters():
    parameter.requires_grad_('encoder.stages.' in name and 'encoder.stages.0.' not in name)
  return model.train()


def make_train_step(model: DetrForObjectDetection, config, *, half: bool = False,
                    compiled: bool = False) -> Callable:
  """A training step: (pixel_values, pixel_mask, labels), as `to_torch` gives them, to two scalars.

  The scalars are the loss and the norm of the gradients before clipping, both on
  the device.

  Args:
    model: is trained, where it is.
    config: config.optimizer, of AdamW and the clipping.
    half: compute in bfloat16; parameters and the loss stay float32.
    compiled: torch.compile the model; the loss stays as it is.
  """
  descend = make_descent(model, make_optimizer(model, config, decays), config.clip_norm)
  forward = torch.compile(model) if compiled else model
  device = model.device

  def train_step(pixel_values, pixel_mask, labels):
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
      found = forward(pixel_values, pixel_mask=pixel_mask)
    loss, *_ = model.loss_function(found.logits.float(), labels, device, found.pred_boxes.float(),
                                   model.config)
    return descend(loss)

  return train_step


def decays(name: str, parameter: nn.Parameter) -> bool:
  """Biases, norms and the queries' positions do not, as in train.optimizer."""
  return parameter.ndim > 1 and 'query_position_embeddings' not in name


def make_infer(model: DetrForObjectDetection, *, half: bool = False,
               compiled: bool = False) -> Callable:
  """Inference: (pixel_values, pixel_mask) to float32 logits [B, Q, C + 1] and boxes [B, Q, 4].

  Of a copy of the model, which is in bfloat16 whole if half; compiled: by
  torch.compile. Boxes are centre x, centre y, width and height, in 0..1.
  """
  dtype = torch.bfloat16 if half else torch.float32
  model = copy.deepcopy(model).eval().to(dtype)
  forward = torch.compile(model) if compiled else model

  @torch.inference_mode()
  def infer(pixel_values, pixel_mask):
    found = forward(pixel_values.to(dtype), pixel_mask=pixel_mask)
    return found.logits.float(), found.pred_boxes.float()

  return infer


def to_torch(images: np.ndarray, mask: np.ndarray, boxes: np.ndarray, names: np.ndarray, device):
  """A batch of ours as transformers takes it.

  Args:
    images: float32 [B, H, W, 3], normalised.
    mask: bool [B, H, W], False for padding.
    boxes: float32 [B, M, 4], corners (left, top, right, bottom) in 0..1 of the picture
      without its padding.
    names: int [B, M], numbers of classes; -1 for no object.
    device: of torch.

  Returns:
    pixel_values float32 [B, 3, H, W], whose colours lie together in memory
    still (channels_last, which makes convolutions faster), pixel_mask int64
    [B, H, W], and labels, a dict a picture: class_labels int64 [n] and boxes
    float32 [n, 4], centre and size.
  """
  first, last = boxes[..., :2], boxes[..., 2:]
  centred = np.concatenate([(first + last) / 2, last - first], axis=-1)
  labels = [{'class_labels': torch.tensor(number[number >= 0], device=device).long(),
             'boxes': torch.tensor(box[number >= 0], device=device)}
            for number, box in zip(names, centred)]
  return (torch.tensor(images, device=device).permute(0, 3, 1, 2),
          torch.tensor(mask, device=device).long(), labels)


def in_jax(model: DetrForObjectDetection) -> tuple[Detr, dict]:
  """Our module of a model, and its variables with the same numbers."""
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    return pretrained.load(folder)
