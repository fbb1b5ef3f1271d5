"""Folders of pictures by class, and the metadata that `datasets` defines."""

import csv
import json

import numpy as np
from PIL import Image
import pytest

from xmodal.data import check
from xmodal.data.sources.imagefolder import read_imagefolder
from xmodal.errors import UserError


def _picture(path):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(path)


def _classes(root):
  for name in ('train/dog/1.png', 'train/cat/1.jpg', 'train/cat/deeper/2.jpg',
               'validation/cat/3.jpg'):
    _picture(root / name)
  (root / 'train' / 'cat' / 'notes.txt').write_text('x')
  return str(root)


def test_a_folder_is_a_class(tmp_path):
  root = _classes(tmp_path)
  assert [(e.image.removeprefix(f'{root}/train/'), e.answers, e.question)
          for e in read_imagefolder(root, 'train')] == [
      ('cat/1.jpg', ('cat',), 'what is in the picture?'),
      ('cat/deeper/2.jpg', ('cat',), 'what is in the picture?'),
      ('dog/1.png', ('dog',), 'what is in the picture?')]
  [example] = read_imagefolder(root, 'val', question='which animal?')
  assert (example.question, example.answers) == ('which animal?', ('cat',))


def test_check_counts_the_splits(tmp_path, capsys):
  assert check.main([_classes(tmp_path), '--source', 'imagefolder']) == 0
  out = capsys.readouterr().out
  assert 'train: 3 examples, 3 pictures' in out and 'test: not there' in out
  assert "answers: 2 different; 'cat' 67%, 'dog' 33%" in out
  (tmp_path / 'train' / 'dog' / '1.png').write_bytes(b'no picture')
  assert check.main([str(tmp_path), '--source', 'imagefolder']) == 1
  assert 'dog/1.png: not a picture' in capsys.readouterr().out


def _metadata(folder, name, rows):
  if name.endswith('.parquet'):
    pq = pytest.importorskip('pyarrow.parquet')
    pq.write_table(pytest.importorskip('pyarrow').Table.from_pylist(rows), folder / name)
    return
  with open(folder / name, 'w', newline='') as file:
    if name.endswith('.csv'):
      writer = csv.DictWriter(file, rows[0].keys())
      writer.writeheader()
      writer.writerows(rows)
    else:
      file.writelines(json.dumps(row) + '\n' for row in rows)


@pytest.mark.parametrize('name', ['metadata.csv', 'metadata.jsonl', 'metadata.parquet'])
def test_metadata_name_pictures_and_fill_fields(tmp_path, name):
  root = _classes(tmp_path)
  _metadata(tmp_path / 'train', name, [{'file_name': 'dog/1.png', 'text': 'A dog.', 'number': 2},
                                       {'file_name': 'cat/1.jpg', 'text': 'A cat.', 'number': 3}])
  examples = read_imagefolder(root, 'train', (('caption', 'text'),))
  assert [(e.image, e.captions, e.number, e.answers) for e in examples] == [
      (f'{root}/train/dog/1.png', ('A dog.',), 2.0, ()),
      (f'{root}/train/cat/1.jpg', ('A cat.',), 3.0, ())]


def test_metadata_lie_beside_their_pictures(tmp_path):
  root = _classes(tmp_path)
  _metadata(tmp_path / 'train' / 'dog', 'metadata.jsonl', [{'file_name': '1.png', 'caption': 'A'}])
  _metadata(tmp_path / 'train' / 'cat', 'metadata.jsonl', [
      {'file_name': 'deeper/2.jpg'}, {'file_name': '1.jpg', 'answers': ['a cat']}])
  examples = read_imagefolder(root, 'train')
  assert [(e.image.removeprefix(f'{root}/train/'), e.captions, e.answers) for e in examples] == [
      ('cat/deeper/2.jpg', (), ()), ('cat/1.jpg', (), ('a cat',)), ('dog/1.png', ('A',), ())]


def test_faults_are_one_line(tmp_path):
  root = _classes(tmp_path)
  with pytest.raises(UserError, match="no folder 'test', wanted SPLIT/CLASS/PICTURE, such as "
                                      'train/cat/1.jpg; folders there: train, validation$'):
    read_imagefolder(root, 'test')
  with pytest.raises(UserError, match='has no metadata.csv or metadata.jsonl or metadata.parquet'):
    read_imagefolder(root, 'train', (('caption', 'text'),))
  _metadata(tmp_path / 'train', 'metadata.csv', [{'file_name': 'dog/9.png'}])
  with pytest.raises(UserError, match="metadata.csv:2: image 'train/dog/9.png' is not there"):
    read_imagefolder(root, 'train')
  _metadata(tmp_path / 'train', 'metadata.csv', [{'name': 'dog/9.png'}])
  with pytest.raises(UserError, match="no column 'file_name'; its columns: 'name'"):
    read_imagefolder(root, 'train')
  _picture(tmp_path / 'validation' / 'loose.jpg')
  with pytest.raises(UserError, match='loose.jpg: is in no folder of a class'):
    read_imagefolder(root, 'val')
  (tmp_path / 'test').mkdir()
  with pytest.raises(UserError, match='has no examples'):
    read_imagefolder(root, 'test')
