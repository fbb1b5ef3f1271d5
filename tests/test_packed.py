"""Pictures that are not files of their own: bytes, and pictures inside larger files."""

import io

import numpy as np
from PIL import Image
import pytest

from xmodal.data import check
from xmodal.data.example import Example, Object, Packed
from xmodal.data.faults import Examples
from xmodal.data.pictures import images
from xmodal.data.pictures.box_checks import BadBoxes, size_notes
from xmodal.data.pictures.cache import KeepDecoded
from xmodal.data.pipeline import BadPictures, BatchMaker
from xmodal.errors import UserError
from xmodal.metrics.detection import coco_files


def _png(value, size=(8, 6)):
  file = io.BytesIO()
  Image.fromarray(np.full((*size[::-1], 3), value, np.uint8)).save(file, 'PNG')
  return file.getvalue()


def _packed(name, content, read=None):
  return Packed(name, read or (lambda: content))


def test_any_kind_of_picture_gives_the_same_pixels(tmp_path):
  path = tmp_path / 'a.png'
  path.write_bytes(_png(70))
  kinds = [str(path), _png(70), _packed('t.tar: a.png', _png(70)), np.full((6, 8, 3), 70, np.uint8)]
  make = BatchMaker([Example(kind) for kind in kinds], {}, (16, 16), None)
  batch = make(np.arange(4), np.arange(4))
  assert batch['valid'].all() and (batch['image'] == 70).all()


def test_a_picture_is_told_from_others():
  read = lambda: _png(1)
  assert Example(Packed('a', read)) == Example(Packed('a', lambda: b''))
  assert Example(Packed('a', read)).picture != Example(Packed('b', read)).picture
  assert Example(_png(1)).picture == Example(_png(1)).picture != Example(_png(2)).picture
  flat, tall = np.zeros((2, 8, 3), np.uint8), np.zeros((8, 2, 3), np.uint8)
  assert Example(flat).picture == Example(flat.copy()).picture != Example(tall).picture
  seeds = [Example(image).seed() for image in ('a', Packed('b', read), _png(1), _png(2), flat)]
  assert len(set(seeds)) == 5 and Example(Packed('b', read)).seed() == seeds[1]
  assert [Example(image).file_name for image in ('a', Packed('b', read), b'', flat)] == [
      'a', 'b', '', '']


@pytest.mark.parametrize('image', [_png(3), _packed('a', _png(3))])
def test_a_decoded_picture_is_kept(image):
  decode = KeepDecoded(2**20)
  assert decode(image, (6, 8)) is decode(image, (6, 8))


def test_one_that_cannot_be_read_is_counted_under_its_name():
  def fail():
    raise UserError('t.tar: ends within a picture')

  source = [Example(_packed('t.tar: 1.png', b'no picture')), Example(_packed('x', b'', fail)),
            Example(_packed('t.tar: 2.png', _png(2)))]
  bad = BadPictures(3, 1.0)
  batch = BatchMaker(source, {}, (16, 16), bad)(np.arange(3), np.arange(3))
  assert batch['valid'].tolist() == [False, False, True]
  assert bad.reasons[0].startswith('t.tar: 1.png: not a picture')
  assert bad.reasons[1] == 't.tar: ends within a picture'


def test_check_counts_pictures_of_every_kind():
  thing = Object('cat', (4, 0, 9, 3))
  complaints, lines = check.check_source(Examples([
      Example(_png(1), objects=(thing,)), Example(_png(1), objects=(thing,)), Example(_png(2)),
      Example(_packed('t.tar: 1.png', _png(1))), Example(b'nothing')], ()))
  assert lines[0].startswith('5 examples, 4 pictures, 1 boxes')
  assert sum('has box [4, 0, 9, 3] outside the picture' in line for line in complaints) == 1
  assert any('not a picture' in line for line in complaints)
  assert any('in example 0;' in line for line in lines)
  assert all(len(line) < 200 for line in complaints)


def test_messages_name_a_picture_and_never_hold_its_bytes():
  thing = Object('cat', (0, 0, 4, 4))
  for image, name in ((_packed('t.tar: 1.png', _png(1)), 't.tar: 1.png'), (_png(1), '0')):
    example = Example(image, objects=(thing,), recorded_size=(80, 60))
    notes = size_notes([example], 'train', 'DIR')
    assert notes[1].strip().startswith(f'{name}: is 8 x 6 pixels')
    boxes = BadBoxes()
    boxes.add_size(example, 8, 6)
    boxes.add(0, example, ['has no area'])
    assert len(boxes.of_size) == 1 and all(len(line) < 250 for line in boxes.lines())
    [picture] = coco_files([example], [()], {'cat': 1})[0]['images']
    assert picture == {'id': 0, 'file_name': 't.tar: 1.png' if name != '0' else ''}


def test_header_size_is_that_of_the_upright_picture(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 8
  Image.new('RGB', (8, 6)).save(tmp_path / 'a.jpg', exif=exif)
  (tmp_path / 'b.jpg').write_bytes(b'text')
  assert images.stored_size(str(tmp_path / 'a.jpg')) == (6, 8)
  assert images.stored_size((tmp_path / 'a.jpg').read_bytes()) == (6, 8)
  assert images.stored_size(str(tmp_path / 'b.jpg')) is None
