"""The source tfds, judged by what TFDS decodes. Builders are TFDS's own, with made examples."""

import ast
import concurrent.futures
import importlib
import io
import pickle
import re
import shlex
import sys

import numpy as np
from PIL import Image
import pytest
from test_every_source import assert_packed
from test_overview import facts
from test_pipeline import Number, assert_equal, maker
from test_workers import BATCH, started

from xmodal import config as configs
from xmodal.data import check, pipeline
from xmodal.data.example import Object
from xmodal.data.open import check_flags, open_source
from xmodal.data.overview import overview_of
from xmodal.data.pictures import images
from xmodal.data.sources import packages
from xmodal.data.sources.tfds import read_tfds
from xmodal.errors import UserError

tfds = pytest.importorskip('tensorflow_datasets', reason="needs TFDS: '.[tfds]'")


def _file(number, size=(48, 64), kind='JPEG', **options):
  pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, kind, **options)
  return io.BytesIO(file.getvalue())


@pytest.fixture
def prepare(tmp_path, monkeypatch):
  """A function that prepares a builder of TFDS with examples of a split, in tmp_path."""
  gcs = importlib.import_module('tensorflow_datasets.core.utils.gcs_utils')
  monkeypatch.setattr(gcs, '_is_gcs_disabled', True)  # no network

  def make(name, file_format='array_record', **splits):
    builder = tfds.builder(name, data_dir=str(tmp_path), file_format=file_format)
    monkeypatch.setattr(type(builder), '_split_generators', lambda self, downloads: {
        split: iter(enumerate(examples)) for split, examples in splits.items()})
    builder.download_and_prepare()
    return builder

  return make


def _box(*edges):
  return tfds.features.BBox(*map(float, edges))


def _coco(number):
  return {'image': _file(number, (40 + number, 64)), 'image/filename': f'{number}.jpg',
          'image/id': 100 + number,
          'objects': [{'id': n, 'area': 5, 'bbox': _box(.1 * n, .2, .5 + .1 * n, .9), 'label': n,
                       'is_crowd': n == 2} for n in range(number % 4)],
          'captions': [{'id': n, 'text': f'caption {n} of größe {number}'}
                       for n in range(number % 3)]}


def test_coco_captions_are_as_tfds_decodes_them(tmp_path, prepare):
  builder = prepare('coco_captions', train=map(_coco, range(12)), val=map(_coco, range(3)))
  theirs = builder.as_data_source('train')
  source = read_tfds(str(tmp_path), 'train', 'coco_captions')
  assert len(source) == len(theirs) == 12
  names = builder.info.features['objects']['label'].int2str
  for ours, record in zip(source, theirs):
    height, width = record['image'].shape[:2]
    assert Image.open(io.BytesIO(ours.image.read())).size == (width, height)
    assert ours.image_id == record['image/id'] and ours.question == '' and ours.answers == ()
    assert ours.captions == tuple(text.decode() for text in record['captions']['text'])
    found = record['objects']
    assert [thing.name for thing in ours.objects] == [names(n) for n in found['label']]
    assert [thing.ignore for thing in ours.objects] == list(map(bool, found['is_crowd']))
    y0, x0, y1, x1 = np.reshape(found['bbox'], (-1, 4)).T
    expected = np.stack([x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height], 1)
    np.testing.assert_allclose(np.reshape([thing.box for thing in ours.objects], (-1, 4)),
                               expected, atol=1e-3)
  assert any(thing.ignore for example in source for thing in example.objects)


def test_a_label_answers_the_question_and_pixels_are_theirs(tmp_path, prepare):
  builder = prepare('cifar10', test=[
      {'id': str(n), 'image': _file(n, (32, 32), 'PNG'), 'label': n} for n in range(10)])
  names = builder.info.features['label'].names
  for ours, record in zip(read_tfds(str(tmp_path), 'test', 'cifar10', question='what?'),
                          builder.as_data_source('test')):
    assert (ours.question, ours.answers) == ('what?', (names[record['label']],))
    assert ours.objects is None
    np.testing.assert_array_equal(images.decode(ours.image, (32, 32)).pixels, record['image'])


def test_voc_difficult_objects_are_ignored(tmp_path, prepare):
  prepare('voc/2007', train=[{
      'image': _file(0), 'image/filename': '7.jpg', 'labels': [8], 'labels_no_difficult': [],
      'objects': [{'label': 8, 'bbox': _box(0, .25, .5, .75), 'pose': 0, 'is_truncated': False,
                   'is_difficult': True}]}])
  [example] = read_tfds(str(tmp_path), 'train', 'voc/2007')
  assert example.image_id == '7.jpg'
  assert example.objects == (Object('chair', (16, 0, 32, 24), ignore=True),)


def _scene(number, questions):
  return {'image': _file(number, kind='PNG'), 'file_name': f'{number}.png', 'objects': [],
          'question_answer': [{'question': f'how many {n}?', 'answer': str(number)}
                              for n in range(questions)]}


def test_each_question_of_clevr_is_an_example(tmp_path, prepare):
  builder = prepare('clevr', train=[_scene(n, q) for n, q in enumerate((2, 0, 3))])
  source = read_tfds(str(tmp_path), 'train', 'clevr')
  expected = [(record['file_name'].decode(), q.decode(), (a.decode(),))
              for record in builder.as_data_source('train')
              for q, a in zip(*map(record['question_answer'].get, ('question', 'answer')))]
  assert [(e.image_id, e.question, e.answers) for e in source] == expected
  assert len(source) == 5 and len(set(expected)) == 5
  with pytest.raises(IndexError):
    source[5]


def _referred(number, name):
  """A record of a builder of expressions: the n-th of its objects has n."""
  box = {'id': 1, 'area': 9, 'bbox': _box(0, 0, .5, .5), 'label': 3}
  own, of_text, of_record = {}, {}, {}
  if name == 'gref':
    own, of_text = {'label_name': 3}, {'tokens': ['thing', 'said'], 'referent': 'thing'}
  else:
    own = {'gt_box_index': 0, 'mask': np.zeros((48, 64, 3), np.uint8)}
    of_record = {'coco_annotations': [box]}
  things = [{**box, **own, 'bbox': _box(0, 0, .5, .25 * (n + 1)), 'refexp': [
      {'refexp_id': k, 'raw': f' thing {n} said  {k} ', **of_text} for k in range(n)]}
            for n in range(number)]
  return {'image': _file(number), 'image/id': number, 'objects': things, **of_record}


@pytest.mark.parametrize('name', ['ref_coco/refcoco_unc', 'gref'])
def test_each_expression_is_an_example(tmp_path, prepare, name):
  builder = prepare(name, train=[_referred(number, name) for number in (3, 1, 2)])
  source = read_tfds(str(tmp_path), 'train', name)
  expected = [(record['image/id'], ' '.join(text.decode().split()), round(float(box[3] * 64), 3))
              for record in builder.as_data_source('train')
              for box, texts in zip(record['objects']['bbox'], record['objects']['refexp']['raw'])
              for text in texts]
  assert [(e.image_id, e.expression.name, e.expression.box[2]) for e in source] == expected
  assert len(expected) == 4 and all(e.objects is None for e in source)


_PACKAGE = '''
import numpy as np
import tensorflow_datasets as tfds


class OurLab(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({
        'photo': tfds.features.Image(), 'cells': tfds.features.Sequence({
            'where': tfds.features.BBoxFeature(), 'what': tfds.features.Text(),
            'sure': np.float32}),
        'report': tfds.features.Text(), 'sound': tfds.features.Audio(),
        'asked': tfds.features.Text(), 'said': tfds.features.Sequence(tfds.features.Text()),
        'count': np.float32}))

  def _split_generators(self, downloads):
    return {}

  def _generate_examples(self):
    pass
'''
_FIELDS = (('image', 'photo'), ('box', 'cells/where'), ('name', 'cells/what'),
           ('caption', 'report'), ('question', 'asked'), ('answers', 'said'), ('number', 'count'))


@pytest.fixture
def our_lab(tmp_path, prepare, monkeypatch):
  """The folder of a prepared data set of a person's own builder."""
  folder = tmp_path / 'code' / 'our_package'
  folder.mkdir(parents=True)
  (folder / '__init__.py').write_text('')
  (folder / 'our_lab.py').write_text(_PACKAGE)
  monkeypatch.syspath_prepend(str(tmp_path / 'code'))
  if 'our_package.our_lab' not in sys.modules:  # TFDS registers a name once
    importlib.import_module('our_package.our_lab')
  return prepare('our_lab', train=[{
      'photo': _file(n), 'cells': [{'where': _box(0, 0, .5, .5), 'what': 'red  cell', 'sure': 1.}],
      'report': f'report {n}', 'sound': np.zeros(3, np.int64), 'asked': 'why?',
      'said': ['a', 'b', ''], 'count': n / 2} for n in range(6)])


def _config(root, **values):
  c = configs.base()
  c.data.update({'source': 'tfds', 'root': str(root), **values})
  return c


def test_any_builder_is_read_by_the_fields_of_the_config(tmp_path, our_lab):
  c = _config(tmp_path, name='our_lab', fields=_FIELDS)
  configs.check(c)
  configs.save(c, str(tmp_path / 'config.json'))
  c = configs.load(str(tmp_path / 'config.json'))
  records = our_lab.as_data_source('train[50%:]')
  source = open_source(c, 'train[50%:]', train=True)
  assert [(e.captions, e.number) for e in source] == [
      ((record['report'].decode(),), record['count']) for record in records]
  assert (source[0].question, source[0].answers) == ('why?', ('a', 'b'))
  assert source[0].objects == (Object('red cell', (0, 0, 32, 24)),)
  flags = check_flags(c, 'train[50%:]')
  assert check.main(shlex.split(flags)) == 0
  folder = our_lab.data_path  # without a name, the folder of one version
  assert len(open_source(_config(folder, fields=_FIELDS), 'train', train=True)) == 6


@pytest.mark.parametrize('changes, said', [
    ({'name': ''}, "no column 'cells/were' for 'box' (did you mean 'cells/where'?)"),
    ({'box': 'cells/sure'},
     "'cells/sure', Tensor(shape=(), dtype=float32) in a list, cannot be 'box', wanted a box"),
    ({'caption': 'sound'}, "column 'sound', Audio("),
    ({'bax': 'cells/where'}, "no field 'bax' (did you mean 'box'?)"),
    ({'image': ''}, 'no column of pictures found among'),
    ({'name': ''}, "has boxes, and no column their names; set config.data.fields=(('name', "),
    ({'question': 'said', 'answers': 'asked'}, "wanted one entry for each question")])
def test_fields_that_cannot_be_used_are_said_in_one_line(tmp_path, our_lab, changes, said):
  fields = dict(_FIELDS) | changes
  if 'were' in said:
    fields['box'] = 'cells/were'
  with pytest.raises(UserError) as error:
    read_tfds(str(tmp_path), 'train', 'our_lab', tuple(fields.items()))
  assert said in str(error.value) and '\n' not in str(error.value)


def test_splits_and_data_sets_that_are_not_there(tmp_path, prepare, our_lab, capsys):
  with pytest.raises(UserError, match=r"no split 'val'; splits: train$"):
    read_tfds(str(tmp_path), 'val', 'our_lab', _FIELDS)
  with pytest.raises(UserError, match=r"no split 'train\[:9x\]'; splits: train \("):
    read_tfds(str(tmp_path), 'train[:9x]', 'our_lab', _FIELDS)
  with pytest.raises(UserError, match="'our_lob': no such data set.*; folders in .*our_lab"):
    read_tfds(str(tmp_path), 'train', 'our_lob')
  with pytest.raises(UserError, match="not prepared; run: .*'mnist'.*'array_record'"):
    read_tfds(str(tmp_path), 'train', 'mnist')
  with pytest.raises(UserError, match='is not a version of a data set of TFDS'):
    read_tfds(str(tmp_path), 'train', '')


def test_files_without_random_access_name_the_command_that_converts_them(tmp_path, prepare):
  prepare('cifar10', 'tfrecord', train=[
      {'id': '0', 'image': _file(0, (32, 32), 'PNG'), 'label': 1}])
  with pytest.raises(UserError) as error:
    read_tfds(str(tmp_path), 'train', 'cifar10')
  root, _, command = str(error.value).partition('data.root=')[2].partition(' after running: ')
  python, option, line = shlex.split(command)
  assert (python, option) == ('python', '-c')
  exec(line)
  assert len(read_tfds(ast.literal_eval(root), 'train', 'cifar10')) == 1


def test_threads_read_at_once(tmp_path, prepare):
  prepare('coco_captions', train=map(_coco, range(12)))
  one_by_one = list(read_tfds(str(tmp_path), 'train', 'coco_captions'))
  source = read_tfds(str(tmp_path), 'train', 'coco_captions')
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert list(pool.map(source.__getitem__, [*range(12)] * 20)) == one_by_one * 20


def test_processes_make_the_batches_of_threads(tmp_path, prepare):
  prepare('clevr', train=[_scene(n, q) for n, q in enumerate((2, 0, 3))])
  source = read_tfds(str(tmp_path), 'train', 'clevr')
  assert len(pickle.dumps(source)) < 5_000
  assert [source[i] for i in range(5)] == list(source)
  assert source[4].image.name.endswith("'train': record 2")
  make = maker(source, Number())
  expected = list(pipeline.eval_batches(make, BATCH))
  with started(make) as many:
    for a, b in zip(expected, pipeline.eval_batches(many, BATCH), strict=True):
      assert_equal(a, b)


def test_all_classes_are_learned_as_from_a_pack(tmp_path, prepare, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setattr(pipeline.sample, '__defaults__', (3,))  # as if it were larger than 4,096
  prepare('cifar10', train=[
      {'id': str(n), 'image': _file(n, (32, 32), 'PNG'), 'label': n} for n in range(10)])
  source = read_tfds(str(tmp_path), 'train', 'cifar10')
  assert sorted(overview_of(pipeline.sample(source)).answers) == sorted(
      tfds.builder('cifar10', data_dir=str(tmp_path)).info.features['label'].names)
  assert_packed(source, tmp_path, 'train', str(tmp_path), '--source', 'tfds',
                '--config.data.name=cifar10')
  # A later run reads what was kept.
  again = read_tfds(str(tmp_path), 'train', 'cifar10')
  monkeypatch.setattr(type(again), '__iter__', None)
  assert facts(again.overview) == facts(source.overview)


def test_check_names_pictures_and_boxes_that_are_broken(tmp_path, prepare, capsys):
  bad = {**_coco(1), 'image': io.BytesIO(b'\xff\xd8\xff no picture'), 'image/id': 7}
  flat = {**_coco(1), 'image/id': 8}
  flat['objects'][0]['bbox'] = _box(.5, .5, .5, .9)
  prepare('coco', train=[{k: v for k, v in record.items() if k != 'captions'}
                         for record in (_coco(2), bad, flat)])
  assert check.main([str(tmp_path), '--source', 'tfds', '--config.data.name=coco']) == 1
  out = capsys.readouterr().out
  assert re.search(r'record \d: not a picture \(14 bytes', out)
  assert re.search(r'record \d: objects 1 has box \[.*\] without area in the picture', out)
  assert 'train: 3 examples, 3 pictures' in out
  assert check.main([str(tmp_path), '--source', 'tfds', '--config.data.nome=coco']) == 2
  assert "--config.data.nome=coco: not understood" in capsys.readouterr().err


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
  monkeypatch.setattr(packages.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"needs tensorflow_datasets, .*pip install 'xmodal\[tfds\]'"):
    read_tfds(str(tmp_path), 'train', 'coco')
