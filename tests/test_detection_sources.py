"""Boxes in the usual formats, and messages about invalid ones."""

import collections
import json
import pathlib
import xml.etree.ElementTree as ET

import numpy as np
from PIL import Image
from pycocotools.coco import COCO
import pytest
import tiny

from xmodal.data import check
from xmodal.data.example import Example, Object
from xmodal.data.faults import Examples, usable_box
from xmodal.data.open import open_source
from xmodal.data.pipeline import BatchMaker
from xmodal.data.sources import visual_genome
from xmodal.data.sources.coco import read_coco
from xmodal.data.sources.visual_genome import read_visual_genome
from xmodal.data.sources.voc import read_voc
from xmodal.errors import UserError
from xmodal.tasks.objects import make_name_list
from xmodal.train.plan import Plan

_BCCD = pathlib.Path(__file__).parents[2] / 'shared' / 'data' / 'bccd'
needs_bccd = pytest.mark.skipif(
    not _BCCD.is_dir(), reason=f'the published BCCD files are not at {_BCCD}')


def _picture(path, width=60, height=40):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(path)
  return str(path)


def _write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(content if isinstance(content, str) else json.dumps(content))
  return str(path)


# COCO


def _image(image_id, **more):
  return {'id': image_id, 'file_name': f'{image_id}.jpg', 'width': 60, 'height': 40, **more}


def _annotation(number, box=(1, 2, 3, 4), **more):
  return {'id': number, 'image_id': 7, 'category_id': 1, 'bbox': box, 'area': 9.5, 'iscrowd': 0,
          'segmentation': [[1, 2, 4, 2, 4, 6]], **more}


def _coco(root, annotations, images=(_image(7),), file='annotations/instances_val2017.json',
          folder='val2017', **more):
  """A folder in COCO's format: its path, and that of the annotations."""
  content = {'images': images, 'categories': [{'id': 1, 'name': 'cat'}, {'id': 3, 'name': 'dog'}],
             'annotations': annotations, **more}
  for image in images:
    _picture(root / folder / image['file_name'])
  return str(root), _write(root / file, {k: v for k, v in content.items() if v is not None})


def test_coco_is_read_as_pycocotools_reads_it(tmp_path):
  rng = np.random.default_rng(0)
  images = [_image(int(n), width=640, height=480) for n in rng.permutation(1000)[:20]]
  annotations = []
  for number in rng.permutation(5000)[:200].tolist():
    x, y, w, h = (rng.random(4) * [400, 300, 239, 179] + [0, 0, 1, 1]).round(2).tolist()
    annotations.append({
        'id': number, 'image_id': images[rng.integers(18)]['id'], 'bbox': [x, y, w, h],
        'category_id': int(rng.choice([1, 3])), 'area': round(w * h * 0.6, 4),
        'iscrowd': int(rng.random() < 0.1),
        'segmentation': {'counts': [5, 5], 'size': [2, 5]} if rng.random() < 0.1 else [[x] * 6]})
  root, path = _coco(tmp_path, annotations, images)
  theirs = COCO(path)
  names = {category['id']: category['name'] for category in theirs.loadCats(theirs.getCatIds())}
  expected = {
      image_id: [(a['bbox'], bool(a['iscrowd']), a['area'], a['category_id'],
                  names[a['category_id']]) for a in theirs.imgToAnns[image_id]]
      for image_id in theirs.getImgIds()}
  examples = read_coco(root, 'val')
  found = {e.image_id: [(list(o.box), o.ignore, o.area, o.category_id, o.name) for o in e.objects]
           for e in examples}
  assert found == expected and len(examples) == 20
  assert sum(map(len, found.values())) == 200 and [] in found.values()
  assert all(pathlib.Path(e.image).name == f'{e.image_id}.jpg' for e in examples)
  assert examples.faults == ()


@pytest.mark.parametrize('split, file, folder', [
    ('train', 'annotations/instances_train2017.json', 'train2017'),
    ('val', 'annotations/instances_val2014.json', 'val2014'),
    ('val2014', 'annotations/instances_val2014.json', 'val2014'),
    ('train', 'annotations/instances_train2017.json', 'train'),
    ('train', 'train.json', ''), ('val', 'annotations/val.json', 'images'),
    ('train', 'annotations/instances_train.json', 'images/train'), ('test', 'test.json', 'test'),
    ('val', 'valid/_annotations.coco.json', 'valid')])
def test_coco_finds_the_files_as_people_have_them(tmp_path, split, file, folder):
  image = _image(7, file_name='COCO_val2014_000000000007.jpg')
  root, _ = _coco(tmp_path, [_annotation(1)], [image], file, folder)
  [example] = read_coco(root, split)
  assert example.image == str(tmp_path / folder / 'COCO_val2014_000000000007.jpg')
  assert example.objects == (Object('cat', (1, 2, 3, 4), area=9.5, category_id=1),)


def test_coco_test_pictures_have_no_objects_and_captions_are_joined(tmp_path):
  root, _ = _coco(tmp_path, None, file='annotations/image_info_test-dev2017.json',
                  folder='test2017')
  assert read_coco(root, 'test') == read_coco(root, 'test-dev') == [
      Example(str(tmp_path / 'test2017' / '7.jpg'), image_id=7, recorded_size=(60, 40))]
  _coco(tmp_path, [], [_image(8), _image(9)])
  captions = _write(tmp_path / 'annotations' / 'captions_val2017.json', {'annotations': [
      {'id': 1, 'image_id': 9, 'caption': 'A cat.\n'}, {'id': 2, 'image_id': 9, 'caption': 'Cat!'},
      {'id': 3, 'image_id': 1, 'caption': 'Lost.'}, {'id': 4, 'image_id': 8, 'caption': ' '}]})
  examples = read_coco(root, 'val')
  assert [(e.captions, e.objects) for e in examples] == [((), ()), (('A cat.', 'Cat!'), ())]
  assert list(examples.faults) == [
      f'{captions}: caption 3: image_id 1 is not listed, left out',
      f"{captions}: caption 4: is ' ', wanted text, not empty, left out"]


# An annotation, its message, and the box that remains.
_WRONG = [
    (_annotation(11, [1, 2, 0, 4]), 'box [1, 2, 0, 4] has no area, left out', None),
    (_annotation(12, [1, 2, 3, -4]), 'box [1, 2, 3, -4] has no area, left out', None),
    (_annotation(13, [60, 2, 3, 4]), 'box [60, 2, 3, 4] is outside the picture, left out', None),
    (_annotation(14, [-9, 2, 9, 4]), 'box [-9, 2, 9, 4] is outside the picture, left out', None),
    (_annotation(15, [-5, 30, 100, 20]),
     'box [-5, 30, 100, 20] reaches out of the picture, clipped to it', (0, 30, 60, 10)),
    (_annotation(16, [1, 2, 3]), 'box [1, 2, 3] is not four finite numbers, left out', None),
    (_annotation(17, None), 'box None is not four finite numbers, left out', None),
    (_annotation(18, [1, 2, 3, '4']), "box [1, 2, 3, '4'] is not four finite numbers, left out",
     None),
    (_annotation(19, [1, 2, float('nan'), 4]),
     'box [1, 2, nan, 4] is not four finite numbers, left out', None),
    (_annotation(20, [1, 2, float('inf'), 4]),
     'box [1, 2, inf, 4] is not four finite numbers, left out', None),
    (_annotation(21, category_id=2), 'category_id 2 has no name, left out', None),
    (_annotation(22, category_id=None), 'category_id None has no name, left out', None),
    (_annotation(23, image_id=8), 'image_id 8 is not listed, left out', None),
    (_annotation(24, image_id=[7]), 'image_id [7] is not listed, left out', None),
    (_annotation(1, [9, 9, 9, 9]), 'has the id of an earlier one, left out', None),
]


def test_coco_annotations_that_are_wrong_are_left_out_and_listed(tmp_path, capsys):
  good = [_annotation(1), _annotation(2, [-0.5, 0, 60.8, 40.25], area=None)]
  root, path = _coco(tmp_path, [*good, *(wrong for wrong, _, _ in _WRONG), 'none'])
  [example] = examples = read_coco(root, 'val')
  # Half a pixel is rounding, so the box stays unchanged.
  assert [o.box for o in example.objects] == [
      (1, 2, 3, 4), (-0.5, 0, 60.8, 40.25), *(left for _, _, left in _WRONG if left)]
  assert [o.area for o in example.objects] == [9.5, None, 9.5]
  said = [*(f'{path}: annotation {wrong["id"]}: {what}' for wrong, what, _ in _WRONG),
          f"{path}: annotation[17]: is 'none', left out"]
  assert list(examples.faults) == said
  assert check.main([root, '--source', 'coco']) == 1
  lines = capsys.readouterr().out.splitlines()
  assert lines == ['train: not there', *said,
                   'val: 1 examples, 1 pictures, 3 boxes (0 to be ignored)',
                   f'  most boxes: 3 in {example.image}; none in 0 pictures', '  cat 3',
                   'test: not there', '16 faults']


def test_a_box_without_the_size_of_its_picture_is_only_clipped_where_zero_is(tmp_path):
  root, path = _coco(tmp_path, [_annotation(1, [50, 30, 100, 100]), _annotation(2, [-9, 1, 19, 2])],
                     [{'id': 7, 'file_name': '7.jpg'}])
  [example] = examples = read_coco(root, 'val')
  assert [o.box for o in example.objects] == [(50, 30, 100, 100), (0, 1, 10, 2)]
  assert len(examples.faults) == 1
  # Only the picture itself reveals the first.
  complaints, _ = check.check_source(examples)
  assert complaints == [
      *examples.faults, f'{example.image}: objects 1 has box [50.0, 30.0, 100.0, 100.0] outside '
      'the picture, wanted [x, y, width, height] inside 60 x 40']


def test_coco_mistakes_that_stop_are_reported_in_one_line(tmp_path):
  def stops(name, said, split='val', annotations=(_annotation(1),), **options):
    root, path = _coco(tmp_path / name, annotations, **options)
    with pytest.raises(UserError, match=said) as error:
      read_coco(root, split)
    assert '\n' not in str(error.value)
    return pathlib.Path(path)

  twice = [_image(7), _image(7)]
  root, path = _coco(tmp_path / 'twice', [_annotation(1)], twice)
  examples = read_coco(root, 'val')
  assert len(examples) == 1 and list(examples.faults) == [
      f'{path}: image 7: is listed twice, kept once']
  stops('other', 'image id 7 is that of 7.jpg and of 8.jpg, wanted a unique one for each',
        images=[_image(7), _image(7, file_name='8.jpg')])
  stops('categories', "category id 1 is that of 'cat' and of 'eel'",
        categories=[{'id': 1, 'name': 'cat'}, {'id': 1, 'name': 'eel'}])
  stops('fields', r'record 0 \(from 0\): id is missing, wanted a whole number or text',
        images=[{'file_name': '7.jpg'}])
  stops('none', "wanted a list under 'images' with at least one record", images=[])
  stops('odd', 'annotations are 3, wanted a list', annotations=3)
  stops('split', r"no annotations of 'train', wanted one of annotations/instances_train\.json",
        'train')
  path = stops('cut', "no annotations of 'test'", 'test')
  path.write_text(path.read_text()[:-30])
  with pytest.raises(UserError, match=r'val2017\.json:1: broken JSON .*download complete'):
    read_coco(str(tmp_path / 'cut'), 'val')
  (tmp_path / 'split' / 'val2017' / '7.jpg').unlink()
  with pytest.raises(UserError, match='1 of 1 pictures are not in .*, such as 7.jpg; unpack'):
    read_coco(str(tmp_path / 'split'), 'val')


def test_boxes_in_shares_of_the_picture_are_left_out_and_reported(tmp_path, capsys):
  shares = [[0.1, 0.2, 0.5, 0.3], [0.5, 0.5, 1, 1.0], [0, 0, 0.25, 1]]
  pixels = [[0, 0, 1, 1], [0.5, 0.5, 3, 1], [1, 0, 1, 1]]
  root, path = _coco(tmp_path, [_annotation(n, box) for n, box in enumerate(shares + pixels)])
  [example] = examples = read_coco(root, 'val')
  assert [list(o.box) for o in example.objects] == pixels
  assert list(examples.faults) == [
      f'{path}: annotation {n}: box {box} is in shares of the picture (0..1), wanted pixels, left '
      'out' for n, box in enumerate(shares)]
  _coco(tmp_path, [_annotation(n, box) for n, box in enumerate(shares)])
  with pytest.raises(UserError, match='none of 1 examples .*: 3 x box is in shares of the picture'):
    open_source(_config(root, 'coco'), 'val', train=True)
  lines = [{'image': 'val2017/7.jpg', 'objects': [{'box': box, 'name': 'cat'} for box in shares],
            'expression': {'box': shares[0], 'name': 'the cat'}}]
  path = _write(tmp_path / 'train.jsonl', lines[0])
  assert check.main([root]) == 1
  said = capsys.readouterr().out.splitlines()
  assert said[0] == (f'{path}:1: objects 1: box [0.1, 0.2, 0.5, 0.3] is in shares of the picture '
                     '(0..1), wanted pixels, left out')
  assert said[3].startswith(f'{path}:1: expression: box [0.1')
  examples = open_source(_config(root, 'jsonl'), 'train', train=True)
  assert examples[0].objects == () and examples[0].expression is None
  with pytest.raises(UserError, match=r'has an object \(4 x box is in shares of the picture'):
    make_name_list(examples, 10)


def test_a_picture_of_another_size_than_its_boxes_files_state_is_reported(tmp_path, capsys):
  """As detectron2 refuses it: the boxes were drawn on another picture."""
  images = [_image(n) for n in range(1, 6)]
  boxes = [_annotation(n, image_id=n, iscrowd=n == 4) for n in range(1, 5)]
  root, _ = _coco(tmp_path, boxes, images)
  turned = Image.Exif()
  turned[0x0112] = 6
  paths = [str(tmp_path / 'val2017' / f'{n}.jpg') for n in range(1, 6)]
  Image.new('RGB', (60, 40)).save(paths[1], exif=turned)  # upright: 40 x 60
  Image.new('RGB', (40, 60)).save(paths[2], exif=turned)  # upright: 60 x 40, as stated
  for path in paths[3:]:  # the last has no boxes
    _picture(pathlib.Path(path), 120, 80)
  start = [f'{paths[1]}: is 40 x 60 pixels, turned, as EXIF turns pictures; the files of its box',
           f'{paths[3]}: is 120 x 80 pixels; the files of its boxes state 60 x 40']
  assert check.main([root, '--source', 'coco', '--split', 'val']) == 1
  *said, last = capsys.readouterr().out.splitlines()
  found = [line for line in said if line.startswith(root)]
  assert all(map(str.startswith, found, start)) and len(found) == 2 and last == '2 faults'
  make = BatchMaker(read_coco(root, 'val'), {}, (16, 16), bad=None)
  for _ in range(2):
    make(np.arange(5), np.arange(5))
  assert make.bad_boxes.lines() == found


# Pascal VOC


def _voc(root, name, objects, database='Unknown', split='train', size=(60, 40)):
  """Adds a picture to a VOC folder; objects are lines of XML."""
  _picture(root / 'JPEGImages' / f'{name}.jpg')
  _write(root / 'Annotations' / f'{name}.xml',
         f'<annotation><source><database>{database}</database></source><size><width>{size[0]}'
         f'</width><height>{size[1]}</height></size>{"".join(objects)}</annotation>')
  path = root / 'ImageSets' / 'Main' / f'{split}.txt'
  _write(path, (path.read_text() if path.exists() else '') + f'{name}\n')
  return str(root)


def _xml(x0, y0, x1, y1, name='cat', more=''):
  return (f'<object><name>{name}</name>{more}<bndbox><xmax>{x1}</xmax><xmin>{x0}</xmin>'
          f'<ymax>{y1}</ymax><ymin>{y0}</ymin></bndbox></object>')


@needs_bccd
def test_bccd_is_read_as_a_plain_loop_reads_it():
  counts, flat = collections.Counter(), []
  for split, pictures in [('train', 205), ('val', 87), ('test', 72)]:
    examples = read_voc(str(_BCCD), split)
    listed = (_BCCD / 'ImageSets' / 'Main' / f'{split}.txt').read_text().split()
    assert [e.image_id for e in examples] == listed and len(listed) == pictures
    for example in examples:
      expected = []
      for thing in ET.parse(_BCCD / 'Annotations' / f'{example.image_id}.xml').iter('object'):
        sides = {side.tag: int(side.text) for side in thing.find('bndbox')}
        counts[thing.findtext('name')] += 1
        if sides['xmax'] == sides['xmin']:
          flat.append(example.image_id)
          continue
        expected.append((thing.findtext('name'), (
            sides['xmin'], sides['ymin'], sides['xmax'] - sides['xmin'],
            sides['ymax'] - sides['ymin'])))
      assert [(o.name, o.box) for o in example.objects] == expected
      assert not any(o.ignore for o in example.objects)
  assert counts == {'RBC': 4155, 'WBC': 372, 'Platelets': 361}
  assert sorted(flat) == ['BloodImage_00338', 'BloodImage_00343']
  folder = _BCCD / 'Annotations'
  assert sorted(read_voc(str(_BCCD), 'train+val').faults) == [
      f'{folder}/BloodImage_00338.xml: object 13: box [504, 337, 504, 337] has no area, left out',
      f'{folder}/BloodImage_00343.xml: object 4: box [181, 329, 181, 329] has no area, left out']


def test_voc_boxes_are_pixel_numbers_in_the_official_sets_and_edges_in_others(tmp_path):
  """1 to 60 is the whole picture, officially and in detectron2."""
  for name, database in [('a', 'The VOC2007 Database'), ('b', 'The VOC2012 Database'),
                         ('c', 'Unknown'), ('d', 'roboflow.com')]:
    root = _voc(tmp_path, name, [_xml(1, 1, 60, 40), _xml(5, 6, 5, 6), _xml(5.5, 6, 9, 8.5)],
                database)
  examples = read_voc(root, 'train')
  official = [(0, 0, 60, 40), (4, 5, 1, 1), (4.5, 5, 4.5, 3.5)]
  edges = [(1, 1, 59, 39), (5.5, 6, 3.5, 2.5)]
  assert [[o.box for o in e.objects] for e in examples] == [official, official, edges, edges]
  assert [line.split('/')[-1] for line in examples.faults] == [
      f'{name}.xml: object 2: box [5, 6, 5, 6] has no area, left out' for name in 'cd']


def test_voc_objects_as_the_development_kit_means_them(tmp_path):
  part = '<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>'
  root = _voc(tmp_path, 'a', [_xml(1, 2, 9, 8, 'person', '<difficult>1</difficult>' + part),
                              _xml(1, 2, 9, 8, ' cat ', '<difficult>0</difficult>')])
  _voc(tmp_path, 'b', [], split='val')
  [a, b] = read_voc(root, 'train+val')
  assert a == Example(str(tmp_path / 'JPEGImages' / 'a.jpg'), image_id='a', objects=(
      Object('person', (1, 2, 8, 6), ignore=True), Object('cat', (1, 2, 8, 6))),
      recorded_size=(60, 40))
  assert b.objects == ()


def test_voc_mistakes_are_listed_or_stop_in_one_line(tmp_path):
  kit = tmp_path / 'VOCdevkit' / 'VOC2007'
  folder = kit / 'Annotations'
  _voc(kit, 'a', [_xml(1, 2, 9, 8), _xml(0, 'x', 9, 8), _xml(1, 2, 9, 8, ''), _xml(70, 1, 80, 8),
                  _xml(50, 1, 80, 8)])
  for name in 'bcde':
    _voc(kit, name, [_xml(1, 2, 9, 8)])
  _write(kit / 'ImageSets' / 'Main' / 'train.txt', 'a\nb\nc\nd\ne\na\n')
  _write(folder / 'b.xml', (folder / 'b.xml').read_text()[:-30])
  (folder / 'c.xml').unlink()
  _write(folder / 'd.xml', '<html><object></object></html>')
  for root in (tmp_path, kit.parent, kit):
    examples = read_voc(str(root), 'train')
    assert [(e.image_id, [o.box for o in e.objects]) for e in examples] == [
        ('a', [(1, 2, 8, 6), (50, 1, 10, 7)]), ('e', [(1, 2, 8, 6)])]
    said = [f'{kit}/ImageSets/Main/train.txt: a: is listed twice, kept once',
            f"{folder}/a.xml: object 2: box ['0', 'x', '9', '8'] is not four finite numbers, ",
            f'{folder}/a.xml: object 3: has no name, left out',
            f'{folder}/a.xml: object 4: box [70, 1, 80, 8] is outside the picture, left out',
            f'{folder}/a.xml: object 5: box [50, 1, 80, 8] reaches out of the picture, clipped',
            f'{folder}/b.xml: broken XML (unclosed token: line 1, column ',
            f'{folder}/c.xml: no such file, its picture left out',
            f'{folder}/d.xml: broken XML (<html>, wanted <annotation>), its picture left out']
    assert all(line.startswith(start) for line, start in zip(examples.faults, said, strict=True))
  (kit / 'JPEGImages' / 'e.jpg').unlink()
  with pytest.raises(UserError, match='1 of 5 pictures are not in .*JPEGImages, such as e.jpg'):
    read_voc(str(kit), 'train')
  _write(kit / 'ImageSets' / 'Main' / 'val.txt', 'b\nc\n')
  with pytest.raises(UserError, match='b.xml: broken XML .*; none of the 2 pictures'):
    read_voc(str(kit), 'val')
  with pytest.raises(UserError, match='test.txt: no such file; .*: train.txt, val.txt'):
    read_voc(str(kit), 'test')
  (tmp_path / 'VOCdevkit' / 'VOC2012' / 'Annotations').mkdir(parents=True)
  with pytest.raises(UserError, match='VOC2007 and .*VOC2012, wanted one folder'):
    read_voc(str(tmp_path), 'train')


# Visual Genome


def _region(number, box=(1, 2, 3, 4), phrase='the red cat'):
  return {'region_id': number, 'image_id': 0, 'phrase': phrase,
          **dict(zip(('x', 'y', 'width', 'height'), box))}


def _thing(number, box=(1, 2, 3, 4), names=('cat', 'kitten')):
  return {'object_id': number, 'names': names, 'synsets': ['cat.n.01'], 'merged_object_ids': [],
          **dict(zip('xywh', box))}


def _genome(root, pictures, objects=None, regions=None):
  """objects and regions: image_id -> list."""
  for image_id in pictures:
    _picture(root / ('VG_100K', 'VG_100K_2')[image_id % 2] / f'{image_id}.jpg')
  _write(root / 'image_data.json', [
      {'image_id': image_id, 'width': 60, 'height': 40, 'coco_id': None} for image_id in pictures])
  if objects is not None:
    _write(root / 'objects.json', [
        {'image_id': image_id, 'objects': things} for image_id, things in objects.items()])
  if regions is not None:
    _write(root / 'region_descriptions.json', [
        {'id': image_id, 'regions': found} for image_id, found in regions.items()])
  return str(root)


_ALL = 'train+val+test'


def test_visual_genome_gives_an_example_per_region(tmp_path):
  root = _genome(tmp_path, [5, 2, 9], {2: [_thing(1), _thing(2, (0, 0, 60, 40), ['room'])], 5: []},
                 {5: [_region(1, phrase=' the  end ')], 2: [_region(2), _region(3, (9, 9, 9, 9))]})
  seen = Object('cat', (1, 2, 3, 4)), Object('room', (0, 0, 60, 40))
  source = read_visual_genome(root, _ALL)
  size = dict(recorded_size=(60, 40))
  two = Example(str(tmp_path / 'VG_100K' / '2.jpg'), image_id=2, objects=seen,
                expression=Object('the red cat', (1, 2, 3, 4)), **size)
  assert list(source) == [
      Example(str(tmp_path / 'VG_100K_2' / '5.jpg'), image_id=5, objects=(),
              expression=Object('the end', (1, 2, 3, 4)), **size),
      two, Example(two.image, image_id=2, objects=seen,
                   expression=Object('the red cat', (9, 9, 9, 9)), **size)]
  assert source.faults == () and source[-1] == source[2]
  with pytest.raises(IndexError):
    source[3]
  (tmp_path / 'region_descriptions.json').unlink()
  source = read_visual_genome(root, _ALL)
  assert [(e.image_id, e.objects, e.expression) for e in source] == [
      (5, (), None), (2, seen, None), (9, (), None)]
  _genome(tmp_path, [5], None, {5: [_region(1)]})
  (tmp_path / 'objects.json').unlink()
  assert [e.objects for e in read_visual_genome(root, _ALL)] == [None]


def test_visual_genome_splits_share_no_picture(tmp_path):
  root = _genome(tmp_path, range(1, 401), {n: [_thing(n)] for n in range(1, 402)})
  ids = {split: {e.image_id for e in read_visual_genome(root, split)}
         for split in ('train', 'val', 'test')}
  assert sum(map(len, ids.values())) == len(set.union(*ids.values())) == 400
  # 20 expected; four standard deviations.
  assert all(3 <= len(ids[split]) <= 37 for split in ('val', 'test'))
  # An unlisted picture is reported once, as with one split.
  assert sum(len(read_visual_genome(root, split).faults) for split in ids) == 1


def test_visual_genome_mistakes_are_listed_or_stop_in_one_line(tmp_path):
  root = _genome(
      tmp_path, [5, 5], {5: [_thing(1), _thing(1, (9, 9, 9, 9)), _thing(2, names=[]), 'x']},
      {5: [_region(1, (1, 2, 0, 4)), _region(2, (50, 2, 20, 4)), _region(3, phrase=''),
           _region(4, (1, 2))], 6: [_region(5)], 8: [_region(6)]})
  [example] = source = read_visual_genome(root, _ALL)
  assert example.expression == Object('the red cat', (50, 2, 10, 4))
  assert example.objects == (Object('cat', (1, 2, 3, 4)),)
  regions, objects = tmp_path / 'region_descriptions.json', tmp_path / 'objects.json'
  assert list(source.faults) == [
      f'{tmp_path}/image_data.json: image_id 5: is listed twice, kept once',
      f'{objects}: object 1: has the id of an earlier one, left out',
      f'{objects}: object 2: has no name, left out',
      f"{objects}: one of objects: is 'x', left out",
      f'{regions}: region 1: box [1, 2, 0, 4] has no area, left out',
      f'{regions}: region 2: box [50, 2, 20, 4] reaches out of the picture, clipped to it',
      f'{regions}: region 3: has no name, left out',
      f'{regions}: region 4: box [1, 2, None, None] is not four finite numbers, left out',
      f"{regions}: image_id 6 is not in image_data.json, left out",
      f"{regions}: image_id 8 is not in image_data.json, left out"]
  with pytest.raises(UserError, match='no split .*train, val, test'):
    read_visual_genome(root, 'dev')
  regions.write_text(regions.read_text()[:-9])
  with pytest.raises(UserError, match=r'region_descriptions\.json:1: broken JSON'):
    read_visual_genome(root, _ALL)
  _genome(tmp_path, [5], None, {5: []})
  with pytest.raises(UserError, match='has no region of'):
    read_visual_genome(root, _ALL)
  for wrong in ({}, [{'image_id': 5}]):
    _write(regions, wrong)
    with pytest.raises(UserError, match='wanted a list of pictures with regions'):
      read_visual_genome(root, _ALL)
  (tmp_path / 'VG_100K_2' / '5.jpg').unlink()
  with pytest.raises(UserError, match='1 of 1 pictures are not in .*such as 5.jpg'):
    read_visual_genome(root, _ALL)
  _picture(tmp_path / 'VG_100K' / '5.jpg')
  for path in (regions, objects):
    path.unlink()
  with pytest.raises(UserError, match='neither objects.json nor region_descriptions.json'):
    read_visual_genome(root, _ALL)


@pytest.mark.parametrize('change', [
    {'x': -1}, {'x': 1.5}, {'x': True}, {'x': None}, {'x': '1'}, {'x': 10**30}, {'x': 58},
    {'y': 37}, {'w': 0}, {'h': 0}, {'w': 2**31}, {'h': 1e400}, {'names': []}, {'names': 'cat'},
    {'names': None}, {'names': [None]}, {'names': ['']}, {'names': [' cat']}, {'names': ['a  cat']},
    {'names': ['cat ']}, {'names': ['a\tcat']}, {'names': ['a\u00a0cat']},
    {'names': ['K\u00e4tzchen']}, {'object_id': 1}, {'object_id': None}, {'object_id': 'two'}, {},
    'object', 'none'])
def test_visual_genome_is_read_alike_picture_by_picture_and_object_by_object(
    tmp_path, monkeypatch, change):
  things = [_thing(1), _thing(2), _thing(3)]
  if change == 'object':
    things[1] = 'a cat'
  elif change == 'none':
    things = []
  else:
    things[1] |= change
  regions = [{'region_id': thing['object_id'], 'phrase': (thing['names'] or ['x'])[0],
              'x': thing['x'], 'y': thing['y'], 'width': thing['w'], 'height': thing['h']}
             if isinstance(thing, dict) else thing for thing in things]
  root = _genome(tmp_path, [5, 6], {5: things, 6: [_thing(7, names=['dog'])]},
                 {5: regions, 6: [_region(8)]})
  as_a_whole = read_visual_genome(root, _ALL)
  monkeypatch.setattr(visual_genome, '_plain', lambda *args: None)
  one_by_one = read_visual_genome(root, _ALL)
  assert as_a_whole.faults == one_by_one.faults
  assert list(as_a_whole) == list(one_by_one)


# In a run


def _config(root, source, **values):
  return tiny.changed(data__source=source, data__root=root, mixer__tasks=('objects',),
                      mixer__weights=(1.0,), **values)


def test_a_run_says_how_many_faults_there_are_and_the_first(tmp_path):
  wrong = [_annotation(n, [1, 2, 3, 0]) for n in range(2, 9)]
  root, path = _coco(tmp_path, [_annotation(1), *wrong, _annotation(9, [1, 2, 99, 2])])
  _coco(tmp_path, [_annotation(1)], file='annotations/instances_train2017.json', folder='train')
  shrunk = _picture(tmp_path / 'train' / '7.jpg', 30, 20)
  notes = Plan(_config(root, 'coco'), str(tmp_path / 'run')).notes
  assert notes[0] == ('train: 1 of 1 pictures checked differ in size from the files of their '
                      'boxes:')
  assert notes[1].startswith(f'  {shrunk}: is 30 x 20 pixels; the files of its boxes state 60 x')
  assert notes[2] == (
      f'  all of them: xmodal check {root} --source coco --split train')
  assert notes[3:10] == [
      'eval: 7 x box has no area, left out; 1 x box reaches out of the picture, clipped to it',
      *(f'  {path}: annotation {n}: box [1, 2, 3, 0] has no area, left out' for n in range(2, 7)),
      f'  all of them: xmodal check {root} --source coco --split val']
  assert not any(note.startswith('train:') and 'left out' in note for note in notes)


def test_nothing_left_to_train_on_stops_in_one_line(tmp_path):
  root, _ = _coco(tmp_path, [_annotation(1), _annotation(2)], categories=None)
  with pytest.raises(UserError, match=r"none of 1 examples .*: 2 x category_id has no name, left "
                                      r'out; all: xmodal check .* --split val$'):
    open_source(_config(root, 'coco'), 'val', train=True)
  assert [e.objects for e in open_source(_config(root, 'coco'), 'val', train=False)] == [()]
  root = _voc(tmp_path / 'voc', 'a', [])
  with pytest.raises(UserError, match='has a box that can be used$'):
    open_source(_config(root, 'voc'), 'train', train=True)


def test_check_reads_every_source_and_looks_at_the_pictures(tmp_path, capsys):
  root = _voc(tmp_path / 'voc', 'a', [_xml(1, 2, 50, 30), _xml(1, 2, 9, 8, 'dog')])
  _voc(tmp_path / 'voc', 'b', [_xml(1, 2, 9, 8, more='<difficult>1</difficult>')])
  _voc(tmp_path / 'voc', 'c', [_xml(1, 2, 9, 8)], split='val')
  assert check.main([root, '--source', 'voc']) == 0
  assert capsys.readouterr().out.splitlines() == [
      'train: 2 examples, 2 pictures, 3 boxes (1 to be ignored)',
      f'  most boxes: 2 in {root}/JPEGImages/a.jpg; none in 0 pictures', '  cat 2, dog 1',
      'val: 1 examples, 1 pictures, 1 boxes (0 to be ignored)',
      f'  most boxes: 1 in {root}/JPEGImages/c.jpg; none in 0 pictures', '  cat 1',
      'test: not there', 'all good']
  # The annotations say 60 x 40; one picture is smaller, and one file is not a picture.
  _picture(tmp_path / 'voc' / 'JPEGImages' / 'a.jpg', 40, 40)
  (tmp_path / 'voc' / 'JPEGImages' / 'b.jpg').write_text('not a picture')
  assert check.main([root, '--source', 'voc', '--split', 'train']) == 1
  lines = capsys.readouterr().out.splitlines()
  assert 'b.jpg' in lines[0] and lines[-1] == '3 faults' and len(lines) == 7
  assert lines[1] == (
      f'{root}/JPEGImages/a.jpg: is 40 x 40 pixels; the files of its boxes state 60 x 40, so they '
      'may not fit: correct the files, or restore the picture on which the boxes were drawn')
  assert lines[2] == (
      f'{root}/JPEGImages/a.jpg: objects 1 has box [1.0, 2.0, 49.0, 28.0] outside the picture, '
      'wanted [x, y, width, height] inside 40 x 40')
  assert check.main([root, '--source', 'voc', '--split', 'test']) == 2
  assert capsys.readouterr().err.startswith('error: ')
  root = _genome(tmp_path / 'vg', [5], {5: [_thing(1)]}, {5: [_region(1), _region(2)]})
  assert check.main([root, '--source', 'visual_genome', '--split', _ALL]) == 0
  assert capsys.readouterr().out.splitlines()[0] == (
      f'{_ALL}: 2 examples, 1 pictures, 1 boxes (0 to be ignored)')


def test_a_list_of_examples_with_faults_is_a_list(tmp_path):
  """Vocabularies use all of a list, but only the first records of other sources."""
  root, _ = _coco(tmp_path, [_annotation(1)])
  assert isinstance(read_coco(root, 'val'), list) and isinstance(Examples([], []), list)


@pytest.mark.parametrize('box', [(1, 2, 3), 'abcd', {'x': 1}, 5, [True, None, 1, 1],
                                 [10**400, 1, 1, 1], [1, 2, 3, 4, 5], ['1', '2', '3', '4']])
def test_no_box_whatever_it_is_breaks_the_reading(box):
  assert usable_box(box, (60, 40)) == (None, 'box {} is not four finite numbers, left out')
