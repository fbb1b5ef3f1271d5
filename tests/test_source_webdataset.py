"""Tar files in the layout of WebDataset, written by Python's tarfile."""

import concurrent.futures
import io
import json
import tarfile

import numpy as np
from PIL import Image
import pytest

from xmodal.data import check
from xmodal.data.pictures import images
from xmodal.data.sources.webdataset import read_webdataset
from xmodal.errors import UserError


def _picture(value, kind='PNG'):
  """The bytes of a picture of one grey value."""
  file = io.BytesIO()
  Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(file, kind)
  return file.getvalue()


def _tar(path, members, mode='w'):
  """Writes (name, content) pairs; a content is bytes, text, or an object for JSON."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, mode) as tar:
    for name, content in members:
      if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
      entry = tarfile.TarInfo(name)
      entry.size = len(content)
      tar.addfile(entry, io.BytesIO(content))
  return path


def _value(example):
  return int(images.load_image(example.image, (4, 6))[0][0, 0, 0])


def test_shards_are_read_in_order_and_by_any_thread(tmp_path):
  for shard in range(3):
    _tar(tmp_path / f'train-{shard:06d}.tar', [
        member for n in range(shard * 10, shard * 10 + 10)
        for member in ((f'./{n:04d}.png', _picture(n)), (f'./{n:04d}.txt', f'grey {n}\n'))])
  examples = read_webdataset(str(tmp_path), 'train')
  assert [(_value(e), e.captions) for e in examples] == [(n, (f'grey {n}',)) for n in range(30)]
  assert examples[11].image.name == f'{tmp_path}/train-000001.tar: ./0011.png'
  order = np.random.default_rng(0).integers(0, 30, 300).tolist()
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert list(pool.map(lambda n: _value(examples[n]), order)) == order


@pytest.mark.parametrize('name', [
    'val/0.tar', 'data/val-0000.tar', 'validation.tar', 'imagenet-val-00.tar', 'data/valid/1.tar'])
def test_places_of_shards(tmp_path, name):
  _tar(tmp_path / name, [('1.png', _picture(3))])
  assert [_value(e) for e in read_webdataset(str(tmp_path), 'val')] == [3]
  with pytest.raises(UserError, match="no files of 'train', wanted train.tar"):
    read_webdataset(str(tmp_path), 'train')


def test_members_fill_fields(tmp_path):
  _tar(tmp_path / 'train.tar', [
      ('__meta__.json', '{}'), ('a/1.JPG', _picture(9, 'JPEG')),
      ('a/1.json', {'question': 'how many?', 'answers': ['2', 'two'], 'url': 'x', 'caption': 'A',
                    'objects': [{'box': [0, 0, 2, 2], 'name': 'cat'}]}),
      ('a/1.txt', 'not this'), ('b.1/2.png', _picture(4)), ('b.1/2.cls', '1'),
      ('b.1/' + 'long' * 60 + '.png', _picture(5)), ('._7.png', b'no member of its own')])
  first, second, third = read_webdataset(str(tmp_path), 'train')
  assert (first.question, first.answers, first.captions, first.objects[0].name) == (
      'how many?', ('2', 'two'), ('A',), 'cat')
  assert (second.question, second.answers) == ('what is in the picture?', ('1',))
  assert _value(third) == 5
  (tmp_path / 'classnames.txt').write_text('cat\ndog\n')
  assert read_webdataset(str(tmp_path), 'train', question='which?')[1].answers == ('dog',)


def test_names_are_grouped_as_the_library_groups_them(tmp_path):
  library = pytest.importorskip('webdataset')
  names = ['./a.b/1.png', './a.b/1.txt', 'x/2.PNG', 'x/2.cls', '.hid.png', '__x__/3.png',
           '4.seg.png', 'noext', '5/6.png', '5/7.png', '5/6.txt', '8.png']
  path = _tar(tmp_path / 'train.tar', [
      (name, _picture(1) if 'png' in name.lower() else 'x') for name in names])
  theirs = [(one['__key__'], sorted(ending for ending in one if not ending.startswith('__')))
            for one in library.WebDataset(str(path), shardshuffle=False)]
  ours = read_webdataset(str(tmp_path), 'train')
  assert [(example.image.name.removeprefix(f'{path}: '), len(example.captions + example.answers))
          for example in ours] == [
      (f'{key}.{ending}', len(endings) - 1) for key, endings in theirs
      for ending in endings if ending.endswith('png')]
  assert len(ours) + len(ours.faults) == len(theirs)


def test_other_members_and_keys_are_named_by_a_config(tmp_path):
  _tar(tmp_path / 'train.tar', [
      ('1.left.png', _picture(1)), ('1.right.png', _picture(2)), ('1.report', 'No finding.'),
      ('1.json', {'meta': 3, 'label': 'ok'})])
  with pytest.raises(UserError, match='train.tar: 1: has the pictures left.png and right.png, '
                                      'wanted one: --config.data.fields='):
    read_webdataset(str(tmp_path), 'train')
  [example] = read_webdataset(str(tmp_path), 'train', (
      ('image', 'right.png'), ('caption', 'report'), ('answers', 'label')))
  assert (_value(example), example.captions, example.answers) == (2, ('No finding.',), ('ok',))
  with pytest.raises(UserError, match="no column 'reprt'.*did you mean 'report'"):
    read_webdataset(str(tmp_path), 'train', (('image', 'right.png'), ('caption', 'reprt')))


def test_members_without_a_picture_are_faults(tmp_path, capsys):
  path = _tar(tmp_path / 'train.tar', [('1.txt', 'lonely'), ('2.png', _picture(2)),
                                       ('3.png', b'nothing')])
  examples = read_webdataset(str(tmp_path), 'train')
  assert len(examples) == 2
  assert examples.faults == (f'{path}: 1: has no picture, but txt, left out',)
  assert check.main([str(tmp_path), '--source', 'webdataset']) == 1
  out = capsys.readouterr().out
  assert f'{path}: 3.png: not a picture' in out and '2 faults' in out


def test_bad_examples_are_all_listed_by_check(tmp_path, capsys):
  (tmp_path / 'classnames.txt').write_text('cat\ndog\n')
  _tar(tmp_path / 'train.tar', [
      ('1.png', _picture(1)), ('1.cls', '2'), ('2.png', _picture(1)), ('2.txt', b'\xff'),
      ('3.png', _picture(1)), ('3.json', '{'), ('4.png', _picture(1)), ('4.json', {'number': 'x'})])
  with pytest.raises(UserError, match=r'train.tar: 1: cls is 2, wanted a number of 0 to 1.*'
                                      r'3 more such rows; .* --source webdataset'):
    read_webdataset(str(tmp_path), 'train')
  assert check.main([str(tmp_path), '--source', 'webdataset']) == 1
  out = capsys.readouterr().out
  assert 'train.tar: 2: txt: byte 0 is not UTF-8' in out and 'train.tar: 3: not JSON' in out
  assert "train.tar: 4: number is 'x', wanted a finite number" in out


def test_damage_is_one_line_and_found_at_once(tmp_path):
  members = [(f'{n}.png', _picture(n)) for n in range(20)]
  path = _tar(tmp_path / 'train.tar', members)
  whole = path.read_bytes()
  with tarfile.open(path) as tar:
    middle = tar.getmembers()[10]
  no_header = whole[:middle.offset] + b'\x07' * 512 + whole[middle.offset + 512:]
  compressed = _tar(tmp_path / 'train.tar', members, 'w:gz').read_bytes()
  for content in (b'', b'text' * 500, whole[:middle.offset_data + 10], no_header, compressed):
    path.write_bytes(content)
    with pytest.raises(UserError, match='train.tar: damaged, compressed, or no tar') as raised:
      read_webdataset(str(tmp_path), 'train')
    assert '\n' not in str(raised.value)
  path.write_bytes(whole)
  examples = read_webdataset(str(tmp_path), 'train')
  path.write_bytes(whole[:middle.offset_data + 10])
  with pytest.raises(UserError, match='within a picture'):
    images.decode(examples[10].image, (4, 6))
  _tar(tmp_path / 'train.tar', [('1.png', _picture(1)), ('1.png', _picture(2))])
  with pytest.raises(UserError, match='1.png is there twice'):
    read_webdataset(str(tmp_path), 'train')
