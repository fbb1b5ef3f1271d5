"""Prepares pictures for a detector, and decodes its detections.

    module, variables = pretrained.load('facebook/detr-resnet-50')
    images, mask = pad_pictures(pictures)
    logits, boxes = jax.jit(module.apply)(variables, images, mask)
    found = detections(logits, boxes, [p.shape[:2] for p in pictures], module.class_names)
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from xmodal.errors import UserError
from xmodal.pretrained.preprocessing import IMAGENET_MEAN, IMAGENET_STD


def pad_pictures(pictures: Sequence[np.ndarray], size: tuple[int, int] | None = None, *,
                 mean: Sequence[float] = IMAGENET_MEAN,
                 std: Sequence[float] = IMAGENET_STD) -> tuple[np.ndarray, np.ndarray]:
  """Normalises pictures of any sizes, and pads them on the right and below to one size.

  Does not resize them: the published DETRs were trained on pictures with a shorter
  side of 800 pixels, or a longer side of 1333 if that makes them smaller.

  Args:
    pictures: uint8 [H, W, 3] each.
    size: (height, width) of the batch in pixels; default: the smallest that holds
      all. With the same size for all batches the model compiles once.
    mean, std: of each colour channel, for pixels in 0..1.

  Returns:
    Images float32 [B, height, width, 3], 0 in the padding, and a mask bool
    [B, height, width], False in the padding.

  Raises:
    UserError: a picture is larger than the size.
  """
  height, width = size or np.max([picture.shape[:2] for picture in pictures], axis=0)
  images = np.zeros((len(pictures), height, width, 3), np.float32)
  mask = np.zeros((len(pictures), height, width), bool)
  for i, picture in enumerate(pictures):
    rows, columns = picture.shape[:2]
    if rows > height or columns > width:
      raise UserError(f'picture {i} is {rows} x {columns} pixels, wanted {height} x {width} '
                      'or less; resize it, or leave out the size')
    images[i, :rows, :columns] = (picture / 255 - mean) / np.asarray(std)
    mask[i, :rows, :columns] = True
  return images, mask


class DetectedObject(NamedTuple):
  """An object in a picture.

  Attributes:
    name: name of its class.
    score: probability of that class, 0..1.
    box: left, top, right, bottom in pixels; may extend beyond the picture.
  """

  name: str
  score: float
  box: tuple[float, float, float, float]


def detections(logits, boxes, image_sizes: Sequence[tuple[int, int]], class_names: Sequence[str],
               threshold: float = 0.5) -> list[list[DetectedObject]]:
  """Decodes a Detr's outputs: the most probable class of each query, if above a threshold.

  Args:
    logits: [B, Q, C + 1], the last for "no object".
    boxes: [B, Q, 4], centre x, centre y, width and height in 0..1.
    image_sizes: (height, width) of each picture without padding, in pixels; the unit of the
      returned boxes.
    class_names: the C names.
    threshold: a detection's probability, with "no object" as a class, must be above it.

  Returns:
    One list for each picture, the highest score first.
  """
  logits, boxes = np.asarray(logits, np.float32), np.asarray(boxes, np.float32)
  odds = np.exp(logits - logits.max(-1, keepdims=True))
  scores = (odds / odds.sum(-1, keepdims=True))[..., :-1]
  sides = np.array([(width, height) for height, width in image_sizes])[:, None]
  centres, halves = boxes[..., :2] * sides, boxes[..., 2:] * sides / 2
  corners = np.concatenate([centres - halves, centres + halves], axis=-1)
  best, labels = scores.max(-1), scores.argmax(-1)
  return [[DetectedObject(class_names[label[i]], float(score[i]), tuple(map(float, box[i])))
           for i in np.argsort(-score, kind='stable') if score[i] > threshold]
          for score, label, box in zip(best, labels, corners)]
