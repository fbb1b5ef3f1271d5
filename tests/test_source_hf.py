"""The source hf, judged by what `datasets` itself decodes."""

import concurrent.futures
import pickle
import shlex

import numpy as np
from PIL import Image
import pytest

from xmodal import config as configs
from xmodal.data import check, pipeline
from xmodal.data.example import Object
from xmodal.data.open import check_flags, open_source
from xmodal.data.pack import pack
from xmodal.data.pictures import images
from xmodal.data.sources import packages
from xmodal.data.sources.hf import read_hf
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError

datasets = pytest.importorskip('datasets', reason="needs the package datasets: '.[hf]'")
Value, List, ClassLabel = datasets.Value, datasets.List, datasets.ClassLabel
# The columns of lmms-lab/VQAv2.
_VQA = {'question_type': Value('string'), 'multiple_choice_answer': Value('string'),
        'answers': [{'answer': Value('string'), 'answer_confidence': Value('string'),
                     'answer_id': Value('int64')}], 'image_id': Value('int64'),
        'question_id': Value('int64'), 'question': Value('string'), 'image': datasets.Image()}
# Those of cppe-5; objects as a list of dicts are of the same content.
_CATEGORIES = ClassLabel(names=['Coverall', 'Face_Shield'])
_BOXES = {'image_id': Value('int64'), 'image': datasets.Image(), 'width': Value('int32'),
          'objects': {'id': List(Value('int64')), 'area': List(Value('int64')),
                      'bbox': List(List(Value('float32'), length=4)),
                      'category': List(_CATEGORIES)}}
_LISTED = {**_BOXES, 'objects': [{'bbox': List(Value('float64')), 'category': _CATEGORIES}]}


def _picture(number, size=(40, 60)):
  return Image.fromarray(
      np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8))


def _rows(make, count, features):
  return datasets.Dataset.from_list([make(n) for n in range(count)],
                                    features=datasets.Features(features))


def _vqa(number):
  return {'question_type': 'what', 'multiple_choice_answer': 'x', 'image': _picture(number),
          'answers': [{'answer': f'a{n}', 'answer_confidence': 'yes', 'answer_id': n}
                      for n in range(number % 4)],
          'image_id': number // 2, 'question_id': number, 'question': f' größe {number}? '}


def _save(folder, **splits):
  datasets.DatasetDict(splits).save_to_disk(str(folder))
  return str(folder)


def _read(root, split='train', **options):
  return read_hf(root, split, **options)


def test_questions_are_as_datasets_decodes_them(tmp_path):
  root = _save(tmp_path, train=_rows(_vqa, 9, _VQA), validation=_rows(_vqa, 4, _VQA))
  theirs = datasets.load_from_disk(root)['train']
  source = _read(root)
  assert len(source) == 9
  for ours, row in zip(source, theirs):
    assert ours.question == row['question'].strip() and ours.objects is None
    assert ours.answers == tuple(answer['answer'] for answer in row['answers'])
    assert (ours.image_id, ours.question_id) == (row['image_id'], row['question_id'])
    assert ours.question_type == 'what'
    np.testing.assert_array_equal(images.decode(ours.image, (40, 60)).pixels, row['image'])
  with pytest.raises(IndexError):
    source[9]


@pytest.mark.parametrize('split', ['train[:50%]', 'train[-3:]+validation', 'validation[1:3]'])
def test_parts_of_splits_are_those_of_datasets(tmp_path, split):
  repository = tmp_path / 'repository'  # as on the hub
  repository.mkdir()
  for name, count in (('train', 9), ('validation', 4)):
    _rows(_vqa, count, _VQA).to_parquet(repository / f'{name}.parquet')
  cache = str(tmp_path / 'cache')
  theirs = datasets.load_dataset(str(repository), cache_dir=cache, split=split)
  found = [example.question_id for example in _read(cache, split, name=str(repository))]
  assert found == theirs['question_id'] and found


@pytest.mark.parametrize('features', [_BOXES, _LISTED])
def test_objects_are_in_pixels(tmp_path, features):
  box, category = [[1, 2, 30.5, 20], [0, 0, 60, 40]], [1, 0]
  objects = {'id': [1, 2], 'area': [3, 4], 'bbox': box, 'category': category}
  if features is _LISTED:
    objects = [{'bbox': b, 'category': c} for b, c in zip(box, category)]
  record = {'image_id': 5, 'image': _picture(0), 'width': 60, 'objects': objects}
  root = _save(tmp_path, train=_rows(lambda _: record, 1, features))
  [example] = _read(root)
  assert example.objects == (Object('Face_Shield', (1, 2, 30.5, 20)),
                             Object('Coverall', (0, 0, 60, 40)))
  [example] = _read(root, corners=True)
  assert example.objects[0].box == (1, 2, 29.5, 18)


def test_numbers_in_lists_are_no_boxes(tmp_path):
  features = {'image': datasets.Image(), 'labels': List(Value('int64')), 'objects': {
      'bbox': List(List(Value('float32'), length=4)), 'category': List(Value('int64')),
      'iscrowd': List(Value('int64'))}}
  record = {'image': _picture(0), 'labels': [7, 3, 5, 2], 'objects': {
      'bbox': [[1, 2, 30, 20], [0, 0, 60, 40]], 'category': [4, 9], 'iscrowd': [0, 1]}}
  source = _read(_save(tmp_path / 'a', train=_rows(lambda _: record, 1, features)))
  assert source[0].objects == (Object('4', (1, 2, 30, 20)),
                               Object('9', (0, 0, 60, 40), ignore=True))
  assert source[0].answers == ('7', '3', '5', '2') and not source.faults
  features['objects']['kind'] = features['objects'].pop('category')
  record['objects']['kind'] = record['objects'].pop('category')
  root = _save(tmp_path / 'b', train=_rows(lambda _: record, 1, features))
  source = _read(root)
  assert source[0].objects is None
  assert "column 'objects/bbox', " in source.faults[0] and 'set config.data.fields=' in (
      source.faults[0])
  assert not _read(root, fields=(('box', ''),)).faults
  given = _read(root, fields=(('box', 'objects/bbox'), ('name', 'objects/kind')))
  assert len(given[0].objects) == 2 and not given.faults


def test_a_box_in_shares_of_the_picture_is_refused(tmp_path):
  record = {'image_id': 5, 'image': _picture(0), 'width': 60,
            'objects': [{'bbox': [.1, .2, .3, .4], 'category': 0}]}
  source = _read(_save(tmp_path, train=_rows(lambda _: record, 1, _LISTED)))
  with pytest.raises(UserError, match='record 0 has box .* in shares of the picture'):
    source[0]


def test_a_label_answers_the_question_and_an_unknown_one_does_not(tmp_path):
  features = {'img': datasets.Image(), 'label': ClassLabel(names=['cat', 'dog'])}
  root = _save(tmp_path, test=_rows(lambda n: {'img': _picture(n), 'label': [1, -1][n]}, 2,
                                    features))
  one, other = _read(root, 'test', question='which?')
  assert (one.question, one.answers) == ('which?', ('dog',))
  assert (other.question, other.answers) == ('', ())


def test_texts_are_captions_and_missing_values_are_empty(tmp_path):
  features = {'image': datasets.Image(), 'text': Value('string')}
  rows = _rows(lambda n: {'image': [_picture(n), None][n], 'text': [' a cat ', None][n]}, 2,
               features)
  one, other = _read(_save(tmp_path, train=rows))
  assert (one.captions, other.captions) == (('a cat',), ())
  with pytest.raises(UserError, match="'train': record 1 has no picture"):
    images.decode(other.image, (8, 8))


def test_each_of_several_questions_is_an_example(tmp_path):
  features = {'image': datasets.Image(),
              'qa': [{'user': Value('string'), 'assistant': Value('string')}]}
  rows = _rows(lambda n: {'image': _picture(n), 'qa': [
      {'user': f'{n} {k}?', 'assistant': str(k)} for k in range(n)]}, 4, features)
  found = _read(_save(tmp_path, train=rows), fields=(('question', 'qa/user'),
                                                     ('answers', 'qa/assistant')))
  assert [(e.question, e.answers) for e in found] == [
      (f'{n} {k}?', (str(k),)) for n in range(4) for k in range(n)]


def test_a_config_reads_a_folder_of_one_split_and_check_finds_its_faults(tmp_path, capsys):
  def record(number):
    box = [[1, 2, 30, 20], [50, 30, 60, 40]][number]
    return {'photo': _picture(number), 'where': [box], 'what': ['red cell']}
  features = {'photo': datasets.Image(), 'where': List(List(Value('float32'), length=4)),
              'what': List(Value('string'))}
  _rows(record, 2, features).save_to_disk(str(tmp_path / 'one'))
  c = configs.base()
  c.data.update({'source': 'hf', 'root': str(tmp_path / 'one'),
                 'fields': (('image', 'photo'), ('box', 'where'), ('name', 'what'))})
  configs.check(c)
  source = open_source(c, 'train', train=True)
  assert source[0].objects == (Object('red cell', (1, 2, 30, 20)),)
  assert check.main(shlex.split(check_flags(c, 'train'))) == 1
  out = capsys.readouterr().out
  assert 'record 1: objects 1 has box [50.0, 30.0, 60.0, 40.0] outside the picture' in out
  assert 'train: 2 examples, 2 pictures, 2 boxes' in out and 'record 0; none in 0 pictures' in out


def test_check_and_pack_read_all_splits_of_the_data_set(tmp_path, capsys):
  root = _save(tmp_path / 'data', train=_rows(_vqa, 3, _VQA), validation=_rows(_vqa, 2, _VQA))
  assert check.main([root, '--source', 'hf']) == 0
  out = capsys.readouterr().out
  assert 'train: 3 examples, 3 pictures' in out and 'validation: 2 examples, 2 pictures' in out
  output = str(tmp_path / 'pack')
  assert pack.main([root, '--source', 'hf', '--output', output]) == 0
  packed, source = SOURCES['pack'].make(output, 'validation'), _read(root, 'validation')
  assert [(e.question, e.image.read()) for e in packed] == [
      (e.question, e.image.read()) for e in source]


@pytest.mark.parametrize('field, column, said', [
    ('question', 'qestion', "no column 'qestion' for 'question' (did you mean 'question'?)"),
    ('caption', 'image_id', "'image_id', Value('int64') once a record, cannot be 'caption'"),
    ('image', '', "no column of pictures found among 'question_type', Value('string')"),
    ('colour', 'image', "config.data.fields: no field 'colour'"),
    ('name', 'answers/answer', "column 'answers/answer' is 'name', which needs boxes")])
def test_fields_that_cannot_be_used_are_said_in_one_line(tmp_path, field, column, said):
  root = _save(tmp_path, train=_rows(_vqa, 1, _VQA))
  with pytest.raises(UserError) as error:
    _read(root, fields=((field, column),))
  assert said in str(error.value) and '\n' not in str(error.value)


def test_splits_and_data_sets_that_are_not_there(tmp_path, monkeypatch):
  root = _save(tmp_path, train=_rows(_vqa, 1, _VQA))
  with pytest.raises(UserError, match="no split 'val'; splits: train$"):
    _read(root, 'val')
  with pytest.raises(UserError, match=r"no split 'train\[:9x\]' \("):
    _read(root, 'train[:9x]')
  with pytest.raises(UserError, match='has no examples; take another split'):
    _read(root, 'train[1:]')
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other' / 'a.txt').write_text('')
  with pytest.raises(UserError, match='not a folder that save_to_disk'):
    _read(str(tmp_path / 'other'))
  monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
  with pytest.raises(UserError, match="config.data.name='owner/none' cannot be loaded: "):
    _read('', name='owner/none')
  c = configs.base()
  c.data.source = 'hf'
  with pytest.raises(UserError, match="config.data.source='hf' needs config.data.root"):
    open_source(c, 'train', train=True)


def test_threads_read_at_once(tmp_path):
  source = _read(_save(tmp_path, train=_rows(_vqa, 12, _VQA)))
  one_by_one = list(source)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert list(pool.map(source.__getitem__, [*range(12)] * 20)) == one_by_one * 20


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
  monkeypatch.setattr(packages.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"needs datasets, .*pip install 'xmodal\[hf\]'"):
    _read(str(tmp_path))


def test_texts_are_read_without_pictures(tmp_path):
  folder = tmp_path / 'data' / 'train'  # datasets leaves these pictures where they are
  folder.mkdir(parents=True)
  _picture(0).save(folder / 'a.png')
  (folder / 'metadata.csv').write_text('file_name,text\na.png,a cat\n')
  source = _read(str(tmp_path / 'cache'), name=str(tmp_path / 'data'))
  np.testing.assert_array_equal(images.decode(source[0].image, (40, 60)).pixels, _picture(0))
  (folder / 'a.png').unlink()
  assert [example.captions for example in pipeline.sample(source, 0)] == [('a cat',)]
  with pytest.raises(UserError, match=r'a\.png: cannot be read'):
    images.decode(source[0].image, (8, 8))


def test_another_process_gets_it_by_pickle(tmp_path):
  source = _read(_save(tmp_path, train=_rows(_vqa, 9, _VQA)), 'train[2:]')
  sent = pickle.dumps(source)
  assert len(sent) < 20_000 and list(pickle.loads(sent)) == [source[i] for i in range(7)]
  assert pickle.loads(sent)[3].image.read() == source[3].image.read()
  assert source[3].image.name.endswith("'train[2:]': record 3")
