"""Parquet as pyarrow and `datasets` write it."""

import concurrent.futures
import io
import json

import numpy as np
from PIL import Image
import pytest

from xmodal.data import check
from xmodal.data.example import Example
from xmodal.data.pictures import images
from xmodal.data.pictures.cache import KeepDecoded
from xmodal.data.sources import parquet
from xmodal.data.sources.parquet import read_parquet
from xmodal.errors import UserError

pa = pytest.importorskip('pyarrow')
pq = pytest.importorskip('pyarrow.parquet')


def _png(value):
  """The bytes of a picture of one grey value."""
  file = io.BytesIO()
  Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(file, 'PNG')
  return file.getvalue()


def _write(path, columns, features=None, **writing):
  path.parent.mkdir(parents=True, exist_ok=True)
  table = pa.table(columns)
  if features:  # as datasets.Features stores itself
    table = table.replace_schema_metadata(
        {'huggingface': json.dumps({'info': {'features': features}})})
  pq.write_table(table, path, **writing)


def _struct(*values):
  return [{'bytes': _png(value), 'path': None} for value in values]


def _value(example):
  return int(images.load_image(example.image, (4, 6))[0][0, 0, 0])


def test_shards_of_the_hub_are_read_in_order(tmp_path):
  for number in range(2):
    values = range(number * 5, number * 5 + 5)
    _write(tmp_path / 'data' / f'train-0000{number}-of-00002.parquet',
           {'image': _struct(*values), 'caption': [f'grey {v}' for v in values]},
           row_group_size=2)
  _write(tmp_path / 'data' / 'validation-00000-of-00001.parquet', {'image': _struct(99)})
  examples = read_parquet(str(tmp_path), 'train')
  assert [(_value(e), e.captions) for e in examples] == [(v, (f'grey {v}',)) for v in range(10)]
  assert [_value(e) for e in read_parquet(str(tmp_path), 'val')] == [99]
  order = np.random.default_rng(0).integers(0, 10, 200).tolist()
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert list(pool.map(lambda n: _value(examples[n]), order)) == order


def test_classes_have_their_names(tmp_path):
  label = {'names': ['cat', 'dog'], '_type': 'ClassLabel'}
  _write(tmp_path / 'train.parquet', {'image': _struct(1, 2, 3), 'label': [1, 0, -1]},
         {'image': {'_type': 'Image'}, 'label': label})
  examples = read_parquet(str(tmp_path), 'train', (('answers', 'label'),))
  assert [(e.question, e.answers) for e in examples] == [
      ('what is in the picture?', ('dog',)), ('what is in the picture?', ('cat',)), ('', ())]
  _write(tmp_path / 'train.parquet', {'image': _struct(1, 2), 'label': [[1, 0], [2]]},
         {'label': {'feature': label, '_type': 'List'}})
  with pytest.raises(UserError, match=r'train.parquet: row 1: class 2 has no name, wanted a number '
                                      'of 0 to 1'):
    read_parquet(str(tmp_path), 'train', (('answers', 'label'),))


def test_every_field_has_the_types_of_parquet(tmp_path):
  _write(tmp_path / 'train.parquet', {
      'image': [_png(5)], 'question': ['how many?'], 'answers': [['2', 'two']], 'number': [2.0],
      'question_id': [7], 'objects': [[{'box': [1.0, 0.0, 2.0, 3.0], 'name': 'cat'}]], 'row': [3]})
  [example] = read_parquet(str(tmp_path), 'train')
  assert (example.question, example.answers, example.number, example.question_id) == (
      'how many?', ('2', 'two'), 2.0, 7)
  assert example.objects[0].box == (1, 0, 2, 3) and _value(example) == 5
  assert example.image.name == f'{tmp_path}/train.parquet: row 0'


def test_pictures_may_be_files(tmp_path):
  (tmp_path / 'a.png').write_bytes(_png(7))
  path = str(tmp_path / 'a.png')
  _write(tmp_path / 'train.parquet', {'image': ['a.png']})
  assert read_parquet(str(tmp_path), 'train') == [Example(path)]
  _write(tmp_path / 'train.parquet', {'image': [
      {'bytes': None, 'path': 'a.png'}, {'bytes': _png(8), 'path': 'no file'}]})
  examples = read_parquet(str(tmp_path), 'train')
  assert examples[0] == Example(path) and [_value(e) for e in examples] == [7, 8]


def test_memory_is_bounded(tmp_path, monkeypatch):
  _write(tmp_path / 'train.parquet', {'image': _struct(*range(40))}, row_group_size=4)
  monkeypatch.setattr(parquet, '_KEPT_BYTES', 9 * len(_png(0)))
  examples = read_parquet(str(tmp_path), 'train')
  groups = examples[0].image.read.func.__self__
  for number, example in enumerate(examples):
    assert _value(example) == number
    assert len(groups._kept) <= 3


def test_a_picture_is_decoded_once_and_counts_as_one(tmp_path):
  _write(tmp_path / 'train.parquet', {'image': _struct(1, 2)})
  first, second = read_parquet(str(tmp_path), 'train')
  again = read_parquet(str(tmp_path), 'train')[0]
  decode = KeepDecoded(2**20)
  assert decode(first.image, (4, 6)) is decode(again.image, (4, 6))
  assert decode(second.image, (4, 6)) is not decode(first.image, (4, 6))
  assert first.seed() == again.seed() != second.seed()
  assert KeepDecoded(2**20)(_png(3), (4, 6)).pixels[0, 0, 0] == 3


def test_check_decodes_pictures(tmp_path, capsys):
  _write(tmp_path / 'train.parquet', {'image': [_png(1), b'nothing']})
  assert check.main([str(tmp_path), '--source', 'parquet']) == 1
  out = capsys.readouterr().out
  assert f'{tmp_path}/train.parquet: row 1: not a picture' in out
  assert 'train: 2 examples, 2 pictures' in out


@pytest.mark.parametrize('columns, fields, message', [
    ({'img': ['a']}, (), "train.parquet: no column 'image'; its columns: 'img'"),
    ({'image': [b'a']}, (('caption', 'Text'),), "no column 'Text', which config.data.fields"),
    ({'image': [3]}, (), "column 'image' is 'int64', wanted pictures"),
    ({'image': ['a.png']}, (), "row 0: image 'a.png' is not there"),
    ({'image': [b'a'], 'number': ['x']}, (), "row 0: number is 'x', wanted a finite number")])
def test_wrong_columns_and_rows_are_one_line(tmp_path, columns, fields, message):
  _write(tmp_path / 'train.parquet', columns)
  with pytest.raises(UserError, match=message):
    read_parquet(str(tmp_path), 'train', fields)


def test_damage_is_one_line(tmp_path):
  path = tmp_path / 'train.parquet'
  _write(path, {'image': _struct(*range(50))}, compression='none')
  whole = path.read_bytes()
  for content in (b'', b'text', whole[:-40]):
    path.write_bytes(content)
    with pytest.raises(UserError, match='train.parquet: damaged, or no Parquet') as raised:
      read_parquet(str(tmp_path), 'train')
    assert '\n' not in str(raised.value)
  path.write_bytes(whole[:4] + bytes(3000) + whole[3004:])
  examples = read_parquet(str(tmp_path), 'train')
  for _ in range(2):
    with pytest.raises(UserError, match='train.parquet'):
      images.decode(examples[0].image, (4, 6))


def test_a_missing_split_names_the_files(tmp_path):
  _write(tmp_path / 'data' / 'train-0.parquet', {'image': _struct(1)})
  with pytest.raises(UserError, match="no files of 'val', wanted val.parquet, val-.*; .parquet "
                                      'files there: train-0.parquet'):
    read_parquet(str(tmp_path), 'val')
