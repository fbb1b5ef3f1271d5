"""CSV and TSV as other programs write them."""

import csv
import json
import shlex

import numpy as np
from PIL import Image
import pytest
import tiny

from xmodal.data import check
from xmodal.data.example import Example, Object
from xmodal.data.open import check_flags, open_source
from xmodal.data.sources.csv import read_csv
from xmodal.errors import UserError


def _folder(root, rows, name='train.csv', **writing):
  """A folder with a.jpg and a table that Python's own writer wrote."""
  Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(root / 'a.jpg')
  with open(root / name, 'w', encoding=writing.pop('encoding', 'utf-8'), newline='') as file:
    csv.writer(file, **writing).writerows(rows)
  return str(root)


def test_every_field_is_read(tmp_path):
  objects = [{'box': [1, 2, 3, 4], 'name': 'cat'}]
  header = ['image', 'question', 'answers', 'question_id', 'question_type', 'caption', 'objects',
            'expression', 'number', 'reason', 'image_id', 'made']
  root = _folder(tmp_path, [
      header,
      ['a.jpg', 'what, exactly?', '["a ""cat""", "cat"]'.replace('""', '\\"'), 'q7', 'animals',
       'A cat,\nasleep.', json.dumps(objects), json.dumps(objects[0]), '3.5', 'seen', 'i1', '0'],
      ['a.jpg', 'again?', 'no', '', '', '[unclear] lesion', '', '', '', '', '', '']])
  assert read_csv(root, 'train') == [
      Example(str(tmp_path / 'a.jpg'), 'what, exactly?', ('a "cat"', 'cat'), 'q7', 'animals',
              ('A cat,\nasleep.',), (Object('cat', (1, 2, 3, 4)),), Object('cat', (1, 2, 3, 4)),
              3.5, 'seen', 'i1'),
      Example(str(tmp_path / 'a.jpg'), 'again?', ('no',), captions=('[unclear] lesion',))]


@pytest.mark.parametrize('name, writing', [
    ('train.tsv', {'delimiter': '\t'}), ('train.csv', {'delimiter': ';', 'encoding': 'utf-8-sig'}),
    ('train.csv', {'quoting': csv.QUOTE_ALL, 'lineterminator': '\n'}),
    ('training.csv', {})])
def test_the_delimiter_is_guessed(tmp_path, name, writing):
  root = _folder(tmp_path, [['image', 'caption'], ['a.jpg', 'One; two, three.']], name, **writing)
  assert [e.captions for e in read_csv(root, 'train')] == [('One; two, three.',)]


def test_a_given_delimiter_counts(tmp_path):
  root = _folder(tmp_path, [['image', 'caption'], ['a.jpg', 'One,']], delimiter='|')
  assert [e.captions for e in read_csv(root, 'train', delimiter='|')] == [('One,',)]
  with pytest.raises(UserError, match='wanted one character'):
    read_csv(root, 'train', delimiter='||')


def test_other_columns_are_named_by_a_config(tmp_path):
  root = _folder(tmp_path, [['file', 'Report', 'label'], ['a.jpg', 'No finding.', 'ok']])
  config = tiny.changed(data__source='csv', data__root=root)
  config.data.fields = (('image', 'file'), ('caption', 'Report'), ('answers', 'label'))
  assert open_source(config, 'train', train=True) == [
      Example(str(tmp_path / 'a.jpg'), 'what is in the picture?', ('ok',),
              captions=('No finding.',))]
  assert check.main(shlex.split(check_flags(config, 'train'))) == 0


@pytest.mark.parametrize('fields, message', [
    ((('image', 'fil'),), r"train.csv: no column 'fil' \(did you mean 'file'\?\), which "
     "config.data.fields names; its columns: 'file', 'Report'"),
    ((('captoin', 'Report'),), r"no field 'captoin' \(did you mean 'caption'\?\)"),
    (('caption', 'Report'), "wanted pairs of field and column, .* found 'caption'"),
    ((('caption', 'Report'), ('caption', 'file')), "'caption' is given twice"),
    ((), "no column 'image'; its columns: 'file', 'Report'; name the one with pictures")])
def test_a_wrong_column_is_named(tmp_path, fields, message):
  root = _folder(tmp_path, [['file', 'Report'], ['a.jpg', 'x']])
  with pytest.raises(UserError, match=message):
    read_csv(root, 'train', fields)


def test_bad_rows_stop_training_and_are_all_listed_by_check(tmp_path, capsys):
  root = _folder(tmp_path, [
      ['image', 'question', 'answers', 'number', 'objects'], ['b.jpg', 'x?', 'y', '', ''],
      ['a.jpg', 'x?', 'y', 'many', ''], ['a.jpg', '', 'y', '', ''], ['a.jpg', 'x?'],
      ['a.jpg', 'x?', 'y', '', '[{"box": [1, 2, 0, 4], "name": "cat"}]'],
      ['a.jpg', 'x?', 'y', '', 'cat']])
  with pytest.raises(UserError, match=r'train.csv:2: image .b.jpg. is not there, .*4 more such rows'
                                      f'; to list them: xmodal check {root} --source csv'):
    read_csv(root, 'train')
  assert check.main([root, '--source', 'csv']) == 1
  out = capsys.readouterr().out
  assert "train.csv:3: number is 'many', wanted a finite number" in out
  assert 'train.csv:4: question is empty' in out and 'train.csv:5: has 2 cells, wanted 5' in out
  assert "train.csv:7: objects is 'cat', wanted a list" in out and 'train: 5 bad rows' in out


def test_a_box_without_area_is_left_out_and_counted(tmp_path):
  root = _folder(tmp_path, [['image', 'objects'],
                            ['a.jpg', '[{"box": [1, 2, 0, 4], "name": "cat"}]']])
  examples = read_csv(root, 'train')
  assert examples[0].objects == ()
  assert examples.faults == (
      f'{root}/train.csv:2: objects 1: box [1, 2, 0, 4] has no area, left out',)


@pytest.mark.parametrize('content, message', [
    (b'', 'is empty, wanted a header'), (b'image,caption\n', 'has no examples'),
    (b'image,image\na.jpg,a.jpg\n', "train.csv:1: two columns are named 'image'"),
    (b'image,caption\na.jpg,"open\n', r'is no CSV \(unexpected end of data\)'),
    (b'image,caption\na.jpg,\xff\n', 'is not UTF-8')])
def test_a_file_that_is_no_table(tmp_path, content, message):
  root = _folder(tmp_path, [])
  (tmp_path / 'train.csv').write_bytes(content)
  with pytest.raises(UserError, match=message):
    read_csv(root, 'train')


def test_a_missing_split(tmp_path, capsys):
  root = _folder(tmp_path, [['image'], ['a.jpg']])
  with pytest.raises(UserError, match='no val.csv or val.tsv; tables in that folder: train.csv'):
    read_csv(root, 'val')
  assert check.main([root, '--source', 'csv', '--config.data.delimter=x']) == 2
  assert 'options of the source \'csv\': --config.data.fields=...' in capsys.readouterr().err
