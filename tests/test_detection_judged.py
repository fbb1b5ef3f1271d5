"""Results of detection, scored by pycocotools against the data set's own annotations.

Nothing is trained: predictions are planted, right and wrong boxes, in coordinates of the model's
input, in which each picture lies at the top left, as large as fits.
"""

import contextlib
import io
import json
import pathlib
from xml.dom import minidom

import numpy as np
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
import pytest
import tiny

from xmodal.train.plan import Plan

_BCCD = pathlib.Path(__file__).parents[2] / 'shared' / 'data' / 'bccd'


def detection(source, root, **values):
  c = tiny.changed(mixer__tasks=('detection',), mixer__weights=(1.0,), data__source=source,
                   data__root=str(root), data__keep_aspect=True, data__eval_split='val',
                   train__samples=0, **values)
  return c


def planted(truth, names, rng):
  """For each picture of a COCO file: names, boxes of the input and scores, equally many."""
  categories = {c['id']: c['name'] for c in truth['categories']}
  pictures = []
  for picture in truth['images']:
    width, height = picture['width'], picture['height']
    found = []
    for thing in truth['annotations']:
      if thing['image_id'] == picture['id'] and rng.random() < 0.9:
        name = categories[thing['category_id']] if rng.random() < 0.9 else rng.choice(names)
        for _ in range(rng.integers(1, 4)):
          x, y, w, h = np.array(thing['bbox']) * rng.normal(1, 0.02, 4)
          found.append((name, (x, y, x + w, y + h), rng.random()))
    for _ in range(3):
      x0, y0 = rng.random(2) * (width, height)
      found.append((rng.choice(names), (x0, y0, *rng.uniform((x0, y0), (width, height))),
                    rng.random()))
    # In the end, as many for each picture.
    found = found[:40] + [(names[0], (0, 0, 1, 1), 1e-6)] * (40 - len(found))
    pictures.append([(name, np.array(box) / max(width, height), score)
                     for name, box, score in found])
  return pictures


def evaluated(config, folder, truth):
  """The scores of a run with the planted predictions, and its results file."""
  run = Plan(config, str(folder))
  names = list(run.evaluation.tasks['detection'].names)
  pictures = planted(truth, names, np.random.default_rng(0))
  placements = []

  def predict_step(_, batch):
    start = sum(map(len, placements))
    placements.append(np.asarray(batch['detection']['placement']))
    # After the last picture come padding examples.
    chosen = [pictures[min(start + i, len(pictures) - 1)] for i in range(len(batch['valid']))]
    return batch['valid'], {'detection': {
        'placement': placements[-1],
        'name': np.array([[names.index(name) for name, _, _ in found] for found in chosen]),
        'boxes': np.array([[box for _, box, _ in found] for found in chosen], np.float32),
        'score': np.array([[score for _, _, score in found] for found in chosen], np.float32)}}

  run.evaluation.predict_step = predict_step
  folder.mkdir()
  return run.evaluation.run({}, 0, run.workdir)['detection'], json.loads(
      (folder / 'detection_val_results.json').read_text())


def judge(truth, results):
  """The twelve numbers of pycocotools for a COCO file and a results file."""
  with contextlib.redirect_stdout(io.StringIO()):
    truth_index = COCO()
    truth_index.dataset = truth
    truth_index.createIndex()
    judge = COCOeval(truth_index, truth_index.loadRes(results), 'bbox')
    judge.evaluate(), judge.accumulate(), judge.summarize()
  return judge.stats


def assert_as_judged(scores, stats):
  assert 0.2 < stats[0] < 0.9
  for name, place in (('mAP', 0), ('mAP50', 1), ('mAP75', 2), ('mAP_small', 3), ('mAP_medium', 4),
                      ('mAP_large', 5), ('recall100', 8)):
    assert scores.get(name, -1) == pytest.approx(stats[place], abs=1e-12), name


def test_a_data_set_in_cocos_layout_is_scored_as_its_own_file_says(tmp_path):
  """Numbers with gaps, crowds, areas of outlines, pictures with nothing, a category never seen."""
  rng = np.random.default_rng(1)
  categories = [{'id': number, 'name': name} for number, name in (
      (90, 'cat'), (3, 'dog'), (17, 'owl'), (5, 'never there'))]
  truth = {'images': [], 'annotations': [], 'categories': categories}
  (tmp_path / 'val').mkdir()
  for number in (42, 7, 1000, 8, 9, 10, 11, 12, 13, 14):
    width, height = (int(side) for side in rng.integers(100, 500, 2))
    Image.new('RGB', (width, height)).save(tmp_path / 'val' / f'{number:06}.png')
    truth['images'].append({'id': number, 'file_name': f'{number:06}.png', 'width': width,
                            'height': height})
    for _ in range(0 if number == 8 else 6):
      x, y = rng.integers(0, (width - 20, height - 20))
      w, h = rng.integers(9, (width - x + 1, height - y + 1))
      box = list(map(float, (x, y, w, h)))
      truth['annotations'].append({
          'id': len(truth['annotations']) + 1, 'image_id': number, 'bbox': box,
          'category_id': int(rng.choice([90, 3, 17])), 'iscrowd': int(rng.random() < 0.2),
          'area': box[2] * box[3] * rng.uniform(0.4, 1)})
  (tmp_path / 'val.json').write_text(json.dumps(truth))
  scores, results = evaluated(
      detection('coco', tmp_path, data__train_split='val'), tmp_path / 'run', truth)
  assert_as_judged(scores, judge(truth, results))
  assert {'AP/cat', 'AP/dog', 'AP/owl'} == {name for name in scores if name.startswith('AP/')}


def voc_as_coco(root, split):
  """Converts a data set in Pascal VOC's layout to COCO's, without boxes of zero area."""
  listed = (root / 'ImageSets' / 'Main' / f'{split}.txt').read_text().split()
  numbers = {}
  truth = {'images': [], 'annotations': []}

  def value(node, tag):
    return node.getElementsByTagName(tag)[0].firstChild.data.strip()

  for name in listed:
    page = minidom.parse(str(root / 'Annotations' / f'{name}.xml'))
    with Image.open(root / 'JPEGImages' / f'{name}.jpg') as picture:
      truth['images'].append({'id': name, 'width': picture.width, 'height': picture.height})
    for thing in page.getElementsByTagName('object'):
      x0, y0, x1, y1 = (float(value(thing, side)) for side in ('xmin', 'ymin', 'xmax', 'ymax'))
      if (x1 - x0) * (y1 - y0) > 0:
        truth['annotations'].append({
            'id': len(truth['annotations']) + 1, 'image_id': name, 'iscrowd': 0,
            'bbox': [x0, y0, x1 - x0, y1 - y0], 'area': (x1 - x0) * (y1 - y0),
            'category_id': numbers.setdefault(value(thing, 'name'), len(numbers) + 1)})
  truth['categories'] = [{'id': number, 'name': name} for name, number in numbers.items()]
  return truth


@pytest.mark.skipif(not _BCCD.exists(), reason=f'wants the BCCD data set in {_BCCD}')
def test_bccd_is_scored_as_its_own_annotations_say(tmp_path):
  truth = voc_as_coco(_BCCD, 'val')
  assert len(truth['images']) == 87 and len(truth['categories']) == 3
  scores, results = evaluated(detection('voc', _BCCD), tmp_path / 'run', truth)
  instances = json.loads((tmp_path / 'run' / 'detection_val_instances.json').read_text())
  theirs = {c['id']: c['name'] for c in instances['categories']}
  ours = {c['name']: c['id'] for c in truth['categories']}  # a number is the reader's own choice
  for line in results:
    line['category_id'] = ours[theirs[line['category_id']]]
  assert_as_judged(scores, judge(truth, results))
