"""transformers' DETR in PyTorch, its training step and inference: the reference for detection.

The loss is transformers' own, with scipy's Hungarian matching on the CPU. All
attention is torch's scaled_dot_product_attention.
"""

from collections.abc import Callable, Mapping
import copy
import tempfile

import numpy as np
import torch
from torch import nn
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

from xmodal import pretrained
from xmodal.bench.torch_optimizer import make_descent, make_optimizer
from xmodal.models.detector.detr import Detr


def make_model(backbone: Mapping, config: Mapping, seed: int = 0) -> DetrForObjectDetection:
  """A DETR with random weights in training mode; the backbone's stem and first stage are frozen.

  As in the paper (arXiv:2005.12872, section 4). transformers looks for timm's
  names, so it would freeze all of its own ResNet. Batch norm is frozen in both.

  Args:
    backbone: arguments of ResNetConfig; its last stage is the encoder's input.
    config: arguments of DetrConfig besides the backbone, such as num_labels and dropout.
    seed: seed of the weights.
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
  """A training step: (pixel_values, pixel_mask, labels) -> (loss, gradient norm); see `to_torch`.

  The norm is taken before clipping; both scalars stay on the device.

  Args:
    model: trained in place, on its device.
    config: config.optimizer, for AdamW and clipping.
    half: compute in bfloat16; parameters and the loss stay float32.
    compiled: torch.compile the model, but not the loss.
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
  """Whether weight decay applies: not to biases, norms and query positions, as for ours."""
  return parameter.ndim > 1 and 'query_position_embeddings' not in name


def make_infer(model: DetrForObjectDetection, *, half: bool = False,
               compiled: bool = False) -> Callable:
  """Inference: (pixel_values, pixel_mask) -> float32 logits [B, Q, C + 1] and boxes [B, Q, 4].

  Uses a copy of the model, all in bfloat16 if `half`, under torch.compile if
  `compiled`. Boxes are centre x, centre y, width and height, in 0..1.
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
  """Converts our batch to the inputs of transformers.

  Args:
    images: float32 [B, H, W, 3], normalised.
    mask: bool [B, H, W], False for padding.
    boxes: float32 [B, M, 4], corners (left, top, right, bottom) in 0..1 of the picture
      without its padding.
    names: int [B, M], class ids; -1 for no object.
    device: torch's device.

  Returns:
    pixel_values float32 [B, 3, H, W] in channels_last memory format (which makes
    convolutions faster), pixel_mask int64 [B, H, W], and labels, one dict per
    picture: class_labels int64 [n] and boxes float32 [n, 4], centre and size.
  """
  first, last = boxes[..., :2], boxes[..., 2:]
  centred = np.concatenate([(first + last) / 2, last - first], axis=-1)
  labels = [{'class_labels': torch.tensor(number[number >= 0], device=device).long(),
             'boxes': torch.tensor(box[number >= 0], device=device)}
            for number, box in zip(names, centred)]
  return (torch.tensor(images, device=device).permute(0, 3, 1, 2),
          torch.tensor(mask, device=device).long(), labels)


def in_jax(model: DetrForObjectDetection) -> tuple[Detr, dict]:
  """Our module for a torch model, and its variables with the same weights."""
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    return pretrained.load(folder)
