"""NLVR2 as distributed, and two pictures decoded as one."""

import json

import numpy as np
from PIL import Image
import published
import pytest

from xmodal.data import check
from xmodal.data.example import Example
from xmodal.data.pictures import images
from xmodal.data.sources.nlvr2 import read_nlvr2
from xmodal.errors import UserError


def _line(split='dev', **more):
  return {'sentence': 'Two dogs lie.', 'left_url': 'https://a/b.jpg', 'label': 'True',
          'right_url': 'https://a/c.jpg', 'identifier': f'{split}-850-0-1', 'synset': 'dog',
          'query': 'dogs12', 'writer': 3, 'validation': {'9': 'True'}} | more


def _nlvr2(root, *lines, split='dev', folder='dev', data='nlvr2/data/'):
  return published.write(root, {
      f'{data}{split}.json': '\n'.join(map(json.dumps, lines)) + '\n',
      f'{folder}/{split}-850-0-img0.png': (60, 40), f'{folder}/{split}-850-0-img1.png': (50, 20)})


@pytest.mark.parametrize('split, name, folder, more', [
    ('train', 'train', 'images/train/42', {'directory': 42}), ('val', 'dev', 'dev', {}),
    ('val', 'dev', 'images/dev', {}), ('test', 'test1', 'test1', {'label': False}),
    ('test1', 'test1', 'test1', {})])
@pytest.mark.parametrize('data', ['', 'data/', 'nlvr2/data/'])
def test_a_sentence_and_its_pair(tmp_path, split, name, folder, more, data):
  root = _nlvr2(tmp_path, _line(name, **more), split=name, folder=folder, data=data)
  picture = f'{root}/{folder}/{name}-850-0-img'
  [example] = read_nlvr2(root, split)
  assert example == Example(
      images.SideBySide(f'{picture}0.png', f'{picture}1.png'), 'Two dogs lie.',
      ('false',) if 'label' in more else ('true',), f'{name}-850-0-1', image_id=f'{name}-850-0')
  assert example.image.paths == (f'{picture}0.png', f'{picture}1.png')


def test_check_decodes_both_pictures(tmp_path, capsys):
  root = _nlvr2(tmp_path, _line())
  assert check.main([root, '--source', 'nlvr2']) == 0
  assert 'val: 1 examples, 1 pictures' in capsys.readouterr().out
  (tmp_path / 'dev' / 'dev-850-0-img1.png').write_bytes(b'no picture')
  assert check.main([root, '--source', 'nlvr2']) == 1
  assert 'dev-850-0-img1.png: not a picture' in capsys.readouterr().out


@pytest.mark.parametrize('ending', ['png', 'jpg'])
def test_two_pictures_are_decoded_side_by_side(tmp_path, ending):
  for name, size, colour, turned in (
      ('a', (60, 40), (255, 0, 0), 1), ('b', (20, 50), (0, 0, 255), 6)):
    exif = Image.Exif()
    exif[0x0112] = turned  # 6: stored on its side, so that b is 50 wide and 20 high
    Image.new('RGB', size, colour).save(tmp_path / f'{name}.{ending}', exif=exif, quality=100)
  pair = images.SideBySide(*(str(tmp_path / f'{name}.{ending}') for name in 'ab'))
  pixels, size = images.load_image(pair, (20, 80))
  assert size == (20, 80)
  assert np.abs(pixels.astype(int) - ([[[255, 0, 0]] * 30 + [[0, 0, 255]] * 50] * 20)).max() < 12


@pytest.mark.parametrize('line, said', [
    ({'label': 'maybe'}, "dev.json:1: label is 'maybe', wanted True or False"),
    ({'sentence': ' '}, ":1: sentence is ' ', wanted text, not empty"),
    ({'identifier': None}, ':1: identifier is None, wanted text'),
    ({'identifier': 'dev-1-0-0'}, r'2 of 2 pictures are not in .* such as dev/dev-1-0-img0.png'),
])
def test_mistakes_stop_in_one_line(tmp_path, line, said):
  root = _nlvr2(tmp_path, _line(**line))
  with pytest.raises(UserError, match=said):
    read_nlvr2(root, 'val')
  with pytest.raises(UserError, match='train.json: no such file'):
    read_nlvr2(root, 'train')
  published.write(tmp_path, {'nlvr2/data/dev.json': '\n'.join([json.dumps(_line())] * 2)})
  with pytest.raises(UserError, match="both have identifier 'dev-850-0-1'"):
    read_nlvr2(root, 'val')
  for text, said in (('', 'has no sentences'), ('[]', 'wanted one JSON object a line')):
    published.write(tmp_path, {'nlvr2/data/dev.json': text})
    with pytest.raises(UserError, match=said):
      read_nlvr2(root, 'val')
