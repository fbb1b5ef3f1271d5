"""Boxes in the format of Ultralytics YOLO."""

import numpy as np
from PIL import Image
import pytest
import tiny
import yaml

from xmodal.data import check
from xmodal.data.example import Object
from xmodal.data.open import open_source
from xmodal.data.sources.yolo import read_yolo
from xmodal.errors import UserError


def _picture(path, width=60, height=40, **saving):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path, **saving)


def _folder(root, labels, content=None, folder='images/train'):
  """A folder with a picture for each text (None: without a text file)."""
  for number, text in enumerate(labels):
    _picture(root / folder / f'{number}.jpg')
    if text is not None:
      path = root / folder.replace('images', 'labels') / f'{number}.txt'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)
  (root / 'data.yaml').write_text(yaml.safe_dump(
      content or {'path': 'elsewhere', 'train': 'images/train', 'val': 'images/val',
                  'names': {0: 'cat', 1: 'dog'}}))
  return str(root)


def test_boxes_outlines_and_pictures_without_either(tmp_path):
  root = _folder(tmp_path, [
      '0 0.5 0.5 0.5 0.25\n1 0.25 0.25 0.1 0.1\n', '1 0.1 0.2 0.4 0.2 0.25 0.7\n', '', None])
  examples = read_yolo(root, 'train')
  assert [e.objects for e in examples] == [
      (Object('cat', (15, 15, 30, 10), category_id=0),
       Object('dog', (pytest.approx((12, 8, 6, 4))), category_id=1)),
      (Object('dog', pytest.approx((6, 8, 18, 20)), category_id=1),), (), ()]
  assert examples.categories == {'cat': 0, 'dog': 1} and not examples.faults
  assert [e.image_id for e in examples] == [f'images/train/{n}.jpg' for n in range(4)]


def test_boxes_are_of_the_upright_picture(tmp_path):
  root = _folder(tmp_path, ['0 0.5 0.5 0.5 0.5'])
  exif = Image.Exif()
  exif[0x0112] = 6  # turned by 90 degrees
  _picture(tmp_path / 'images' / 'train' / '0.jpg', exif=exif)
  assert read_yolo(root, 'train')[0].objects[0].box == (10, 15, 20, 30)
  assert not check.check_source(read_yolo(root, 'train'))[0]


@pytest.mark.parametrize('content, folder', [
    ({'train': '../train/images', 'names': ['cat'], 'nc': 1}, 'train/images'),  # Roboflow
    ({'path': '..', 'train': ['images/a', 'images/train'], 'names': ['cat']}, 'images/train'),
    ({'path': '.', 'train': 'train.txt', 'names': ['cat']}, 'images/train'),  # CVAT
    ({'path': '/not/here', 'train': './images/train', 'nc': 1}, 'images/train')])
def test_layouts(tmp_path, content, folder):
  root = tmp_path / 'set'
  (root / 'images' / 'a').mkdir(parents=True)
  (root / 'train.txt').write_text('images/train/0.jpg\n./images/train/0.jpg\n')
  _folder(root, ['0 0.5 0.5 0.5 0.25'], content, folder)
  if content.get('path') == '..':
    content['train'] = ['set/images/a', 'set/images/train']
    (root / 'data.yaml').write_text(yaml.safe_dump(content))
  [example] = read_yolo(str(root), 'train')
  assert example.objects[0].name == ('cat' if 'names' in content else 'class_0')


def test_poses_have_their_boxes(tmp_path):
  root = _folder(tmp_path, ['0 0.5 0.5 0.5 0.25 0.4 0.4 2 -5 9 0'], {
      'train': 'images', 'names': ['person'], 'kpt_shape': [2, 3]})
  assert read_yolo(root, 'train')[0].objects[0].box == (15, 15, 30, 10)


def test_bad_lines_are_faults(tmp_path, capsys):
  root = _folder(tmp_path, ['\n'.join([
      '0 0.5 0.5 0.5 0.25', '0 0.5 0.5 0.5', 'cat 0.5 0.5 0.5 0.25', '2 0.5 0.5 0.5 0.25',
      '0 30 20 10 10', '0 0.5 0.5 0 0.25', '0 0.5 0.5 0.5 0.25', '0 0.9 0.5 0.4 0.25',
      '0 nan 0.5 0.5 0.5', '0 0.5 0.5 0.5 0.25 0.9'])])
  examples = read_yolo(root, 'train')
  assert [thing.box for thing in examples[0].objects] == [
      (15, 15, 30, 10), pytest.approx((42, 15, 18, 10))]
  assert [line.removeprefix(f'{root}/labels/train/0.txt:') for line in examples.faults] == [
      '2: line \'0 0.5 0.5 0.5\' is neither "class x y width height" nor '
      '"class x1 y1 x2 y2 x3 y3 ...", left out',
      '3: line \'cat 0.5 0.5 0.5 0.25\' is neither "class x y width height" nor '
      '"class x1 y1 x2 y2 x3 y3 ...", left out',
      '4: class 2 has no name in data.yaml, left out',
      '5: coordinates [30.0, 20.0, 10.0, 10.0] are not shares of the picture (0..1), left out',
      '6: box [30.0, 15.0, 0.0, 10.0] has no area, left out',
      "7: line '0 0.5 0.5 0.5 0.25' is given twice, kept once",
      '8: box [42.0, 15.0, 24.0, 10.0] reaches out of the picture, clipped to it',
      '9: coordinates [nan, 0.5, 0.5, 0.5] are not shares of the picture (0..1), left out',
      '10: line \'0 0.5 0.5 0.5 0.25 0.9\' is neither "class x y width height" nor '
      '"class x1 y1 x2 y2 x3 y3 ...", left out']
  assert check.main([root, '--source', 'yolo', '--split', 'train']) == 1
  assert 'train: 1 examples, 1 pictures, 2 boxes' in capsys.readouterr().out


def test_training_without_boxes_is_refused(tmp_path):
  config = tiny.changed(data__source='yolo', data__root=_folder(tmp_path, ['2 0.5 0.5 0.5 0.25']))
  with pytest.raises(UserError, match='none of 1 examples to train on has a box .* 1 x class has '
                                      'no name'):
    open_source(config, 'train', train=True)


@pytest.mark.parametrize('content, message', [
    ({'train': 'images/train'}, 'names are None, wanted a list'),
    ({'names': ['cat'], 'nc': 2, 'train': 'images/train'}, 'nc is 2, and there are 1 names'),
    ({'names': ['cat'], 'val': 'images'}, "has no 'train', wanted .*; there: val"),
    ({'names': ['cat'], 'train': 'images/other'}, 'train: .*images/other does not exist'),
    ({'names': ['cat'], 'train': 'list.txt'}, '1 of 1 pictures are not in .*such as images/7.jpg'),
    ({'names': ['cat'], 'train': 7}, 'train is 7, wanted a folder')])
def test_a_wrong_data_yaml_is_one_line(tmp_path, content, message):
  (tmp_path / 'list.txt').write_text('images/7.jpg\n')
  with pytest.raises(UserError, match=message) as raised:
    read_yolo(_folder(tmp_path, [''], content), 'train')
  assert '\n' not in str(raised.value)


def test_broken_yaml_is_one_line(tmp_path):
  (tmp_path / 'data.yaml').write_text('names: [cat\ntrain: x')
  with pytest.raises(UserError, match='data.yaml: broken YAML') as raised:
    read_yolo(str(tmp_path), 'train')
  assert '\n' not in str(raised.value)


def test_an_unreadable_picture_is_left_to_training(tmp_path):
  root = _folder(tmp_path, ['0 0.5 0.5 0.5 0.25'] * 2)
  (tmp_path / 'images' / 'train' / '0.jpg').write_bytes(b'\xff\xd8\xff')
  assert [e.objects and len(e.objects) for e in read_yolo(root, 'train')] == [None, 1]
