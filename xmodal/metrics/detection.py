"""COCO's average precision by pycocotools, COCO's files, and the accuracy of referring expressions.

Boxes are (x, y, width, height) in pixels of the picture as stored, x to the right, y downwards.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import io
import itertools
import os

import numpy as np

from xmodal.data.example import Example
from xmodal.data.overview import overview_of


@dataclasses.dataclass(frozen=True)
class DetectedBox:
  """A detected object.

  Attributes:
    name: what it is, or the expression that it matches.
    box: (x, y, width, height) in pixels of the picture as stored, see xmodal.data.example.Object.
    score: confidence, 0..1.
  """

  name: str
  box: tuple[float, float, float, float]
  score: float


def number_categories(names: Sequence[str], examples: Sequence[Example],
                      known: Mapping[str, int | str] | None = None
                      ) -> dict[str, int | str | None]:
  """Assigns category numbers to names, for files about these examples.

  Categories of different files are matched by name, never by number, because val may
  use other numbers than train.

  Args:
    names: names of the categories.
    examples: the examples of one split; their attribute `categories`, if present, has the
      numbers of all names listed in its files (xmodal.data.faults.Examples).
    known: numbers from elsewhere (another split), for examples without any.

  Returns:
    The examples' own numbers if every name that occurs in them has one and no two share
    one, with None for a name that they neither have nor list. Otherwise the known
    numbers, and new ones after them, from 1.
  """
  own, there = _own_numbers(examples), overview_of(examples).names.keys()
  if own and own.keys() >= there & set(names):
    return {name: own.get(name) for name in names}
  known = known or {}
  if not all(isinstance(number, int) for number in known.values()):
    known = {}
  fresh = itertools.count(max([0, *known.values()]) + 1)
  return {name: known[name] if name in known else next(fresh) for name in names}


def _own_numbers(examples):
  """name -> number, as the files have them; {} if two names share one or their types differ."""
  counts = overview_of(examples).categories
  # A file may list a name under two numbers: the one that most of its objects have counts.
  own = dict(getattr(examples, 'categories', {})) | {
      name: numbers.most_common(1)[0][0] for name, numbers in counts.items()}
  if len(set(own.values())) < len(own) or len(set(map(type, own.values()))) > 1:
    return {}
  return own


def coco_files(examples: Sequence[Example], predictions: Sequence[Sequence[DetectedBox]],
               category_ids: Mapping[str, int | str | None]) -> tuple[dict, list[dict]]:
  """Ground truth and predictions in COCO's formats (cocodataset.org, format-data, format-results).

  Pictures without annotations (objects None) are in neither, because detections there may
  be right. If no picture has annotations, as in a test set, all are in both, so that
  the results can be submitted for evaluation. Names without a number are ignored in both.
  Detections with a box or score that is not finite are left out: pycocotools would match
  them with any ground truth.

  Args:
    examples: N pictures. They keep their image_id if each has one, all different and of one
      type; otherwise the id is the index in `examples`, from 0.
    predictions: the detections in each picture, in any order.
    category_ids: name -> number of each category to evaluate, None for others.

  Returns:
    instances: images, annotations (iscrowd is 1 for an object to be ignored) and categories.
    results: one dict of image_id, category_id, bbox (to 0.01 pixel) and score for each DetectedBox.

  Raises:
    ValueError: the numbers of examples and predictions differ.
  """
  if len(examples) != len(predictions):
    raise ValueError(f'wanted predictions for each of {len(examples)} examples, found '
                     f'{len(predictions)}')
  category_ids = {name: number for name, number in category_ids.items() if number is not None}
  looked = [i for i, e in enumerate(examples) if e.objects is not None] or range(len(examples))
  ids = [examples[i].image_id for i in looked]
  if None in ids or len(set(ids)) < len(ids) or len(set(map(type, ids))) > 1:
    ids = list(looked)
  images, annotations, results = [], [], []
  for image_id, i in zip(ids, looked):
    images.append({'id': image_id} | _known_of_file(examples[i]))
    for thing in examples[i].objects or ():
      if thing.name in category_ids:
        box = [float(side) for side in thing.box]
        annotations.append({
            # From 1: pycocotools treats a match with id 0 as no match.
            'id': len(annotations) + 1, 'image_id': image_id,
            'category_id': category_ids[thing.name], 'bbox': box,
            'area': box[2] * box[3] if thing.area is None else float(thing.area),
            'iscrowd': int(thing.ignore)})
    results.extend({
        'image_id': image_id, 'category_id': category_ids[found.name],
        'bbox': [round(float(side), 2) for side in found.box], 'score': float(found.score)}
                   for found in predictions[i] if found.name in category_ids
                   and np.isfinite([*found.box, found.score]).all())
  categories = [{'id': number, 'name': name} for name, number in category_ids.items()]
  return {'info': {}, 'images': images, 'annotations': annotations,
          'categories': categories}, results


def _known_of_file(example):
  if isinstance(example.image, np.ndarray):
    return {'height': example.image.shape[0], 'width': example.image.shape[1]}
  return {'file_name': os.path.basename(example.file_name)}


def coco_scores(instances: Mapping, results: Sequence[Mapping],
                names: Sequence[str] | None = None) -> dict[str, float]:
  """Average precision as COCO defines it, computed by pycocotools.

  Args:
    instances, results: from coco_files; not modified.
    names: names of the categories to evaluate; None for all.

  Returns:
    mAP (mean over categories and over IoU .50, .55, ... .95), mAP50, mAP75, mAP_small,
    mAP_medium and mAP_large (areas up to 32 x 32, up to 96 x 96, and above),
    recall100 (mean over the same IoUs, for at most 100 boxes per category and picture), and
    AP/name and AP50/name for each category; all 0..1. Scores without any ground truth are
    left out: {} if there is none at all.
  """
  from pycocotools.cocoeval import COCOeval  # Needed only to score boxes.

  categories = [c for c in instances['categories'] if names is None or c['name'] in names]
  # loadRes of pycocotools adds the same two fields, but fails if there are no detections.
  found = [{**result, 'id': i, 'area': result['bbox'][2] * result['bbox'][3]}
           for i, result in enumerate(results, 1)]
  with contextlib.redirect_stdout(io.StringIO()):
    judge = COCOeval(_index(instances, instances['annotations']), _index(instances, found), 'bbox')
    judge.params.catIds = [category['id'] for category in categories]
    judge.params.maxDets = [100]
    judge.evaluate()
    judge.accumulate()
  # [10 IoUs, 101 recalls, categories, 4 areas, 1] and [10 IoUs, categories, 4 areas, 1]; a
  # category without ground truth has -1. evaluate() sorts the categories by number.
  precision, recall = judge.eval['precision'][..., 0], judge.eval['recall'][..., 0]
  parts = {'mAP': precision[..., 0], 'mAP50': precision[0, ..., 0], 'mAP75': precision[5, ..., 0],
           'mAP_small': precision[..., 1], 'mAP_medium': precision[..., 2],
           'mAP_large': precision[..., 3], 'recall100': recall[..., 0]}
  for i, category in enumerate(sorted(categories, key=lambda c: c['id'])):
    parts |= {f'AP/{category["name"]}': precision[:, :, i, 0],
              f'AP50/{category["name"]}': precision[0, :, i, 0]}
  return {name: float(part[part > -1].mean()) for name, part in parts.items() if (part > -1).any()}


def _index(instances, annotations):
  """A pycocotools index of copies of the annotations, which pycocotools modifies."""
  from pycocotools.coco import COCO
  coco = COCO()
  coco.dataset = {**instances, 'annotations': [dict(a) for a in annotations]}
  coco.createIndex()
  return coco


def referring_accuracy(boxes: Sequence, truths: Sequence, threshold: float = 0.5) -> list[float]:
  """Per-example accuracy on referring expressions: RefCOCO counts a box with IoU 0.5 or more.

  Args:
    boxes: N boxes, the best one for each expression.
    truths: N boxes of the targets.
    threshold: the least IoU.

  Returns:
    N values, 1.0 or 0.0; their mean is the accuracy.
  """
  return (iou(boxes, truths) >= threshold).astype(float).tolist()


def iou(a: Sequence, b: Sequence) -> np.ndarray:
  """Intersection over union of N pairs of boxes, float64 [N]; 0 if both have no area.

  Raises:
    ValueError: the numbers of boxes differ.
  """
  a, b = (np.asarray(boxes, np.float64).reshape(-1, 4) for boxes in (a, b))
  if len(a) != len(b):
    raise ValueError(f'wanted pairs of boxes, found {len(a)} and {len(b)}')
  low = np.maximum(a[:, :2], b[:, :2])
  high = np.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:])
  shared = np.maximum(high - low, 0).prod(-1)
  union = a[:, 2:].prod(-1) + b[:, 2:].prod(-1) - shared
  return np.divide(shared, union, out=np.zeros(len(a)), where=union > 0)
