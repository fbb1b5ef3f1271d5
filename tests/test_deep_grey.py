"""Greyscale of more than 8 bits, also with missing pixels, and the output of data.check."""

import io
import json
import struct

import numpy as np
from PIL import Image, TiffImagePlugin
import pytest

from xmodal.data import check
from xmodal.data.pictures.images import decode, load_image
from xmodal.errors import UserError

RAMP = np.arange(64 * 64).reshape(64, 64) / (64 * 64 - 1)  # 0..1
SEEN = np.rint(RAMP * 255).astype(np.uint8)


def stored(grey, format='TIFF', nodata=None):
  buffer, options = io.BytesIO(), {}
  if nodata is not None:
    options['tiffinfo'] = TiffImagePlugin.ImageFileDirectory_v2()
    options['tiffinfo'][42113] = nodata
  Image.fromarray(grey).save(buffer, format, **options)
  return buffer.getvalue()


def read(data):
  return load_image(data, (64, 64))[0][..., 0]


@pytest.mark.parametrize('value, nodata', [
    (np.nan, None), (np.inf, None), (-np.inf, None), (-3.4028235e38, None), (9.96921e36, None),
    (1e20, None), (-9999, None), (-32768, None), (55.5, '55.5'), (-1, '-1'), (1e6, '1e6\0'),
    (np.float32(0.1), '0.1')])
def test_pixels_without_a_value_leave_the_others_as_they_are(value, nodata):
  grey = (RAMP * 100).astype(np.float32)
  grey[5, 5] = grey[40, 8] = value
  data = stored(grey, nodata=nodata)
  expected = SEEN.copy()
  expected[5, 5] = expected[40, 8] = 0
  np.testing.assert_array_equal(read(data), expected)
  assert '2 of 4,096 pixels have no value' in decode(data, (64, 64)).note


@pytest.mark.parametrize('value', [-9999, -32768, -2**31])
def test_whole_numbers_of_32_bits_too(value):
  grey = (RAMP * 9000).astype(np.int32)
  grey[5, 5] = value
  assert abs(read(stored(grey))[6:].astype(int) - SEEN[6:]).max() <= 1
  assert read(stored(grey))[5, 5] == 0


@pytest.mark.parametrize('grey', [
    (RAMP * 20_000 - 10_000).astype(np.float32),  # depths of the sea: -9999 and lower are values
    np.where(RAMP < 0.5, -9999, 7).astype(np.float32)])
def test_what_may_be_a_value_is_one(grey):
  seen = read(stored(grey))
  assert seen.min() == 0 and seen.max() == 255
  np.testing.assert_array_equal(seen > 127, grey > (grey.min() + grey.max()) / 2)


def test_a_picture_without_any_value_cannot_be_read():
  with pytest.raises(UserError, match='no pixel has a value'):
    decode(stored(np.full((9, 9), np.nan, np.float32)), (9, 9))


@pytest.mark.parametrize('bits', [8, 10, 12, 16])
@pytest.mark.parametrize('format', ['PNG', 'TIFF'])
def test_fewer_bits_stored_in_16_keep_their_grey_levels(bits, format):
  data = stored(np.rint(RAMP * (2 ** bits - 1)).astype(np.uint16), format)
  assert abs(read(data).astype(int) - SEEN).max() <= 1
  note = decode(data, (64, 64)).note
  assert (f'of which {bits} are used' in note) == (bits < 16)


def tiff(pixels, bits, width):
  """A TIFF of one row that Pillow cannot write."""
  tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1),
          (279, len(pixels))]
  data = b'II*\0' + struct.pack('<I', 8 + len(pixels)) + pixels + struct.pack('<H', len(tags))
  return data + b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags) + bytes(4)


def test_a_tiff_of_12_bits_says_so():
  """Two pixels in three bytes, dark, so that their values would fit 8 bits."""
  values = [0, 16, 100, 255]
  pixels = b''.join(((a << 12) | b).to_bytes(3) for a, b in zip(values[::2], values[1::2]))
  seen, _ = load_image(tiff(pixels, 12, 4), (1, 4))
  assert seen[0, :, 0].tolist() == [round(v / 4095 * 255) for v in values]


def test_a_tiff_of_32_bits_without_sign_goes_beyond_half_its_range():
  values = np.array([0, 2**30, 2**31, 3 * 2**30, 2**32 - 1], np.uint32)
  seen, _ = load_image(tiff(values.astype('<u4').tobytes(), 32, 5), (1, 5))
  assert seen[0, :, 0].tolist() == [0, 64, 128, 191, 255]


def test_transparent_grey_of_16_bits_shows_white():
  buffer = io.BytesIO()
  Image.fromarray((RAMP * 65535).astype(np.uint16)).save(buffer, 'PNG', transparency=0)
  seen = read(buffer.getvalue())
  assert seen[0, 0] == 255 and seen[0, 1] == 0


def test_check_says_what_to_look_at(tmp_path, capsys):
  nan, spike = (RAMP * 9).astype(np.float32), (RAMP * 9).astype(np.float32)
  nan[0, 0], spike[0, 0] = np.nan, 1e7
  for name, grey in {'nan': nan, 'spike': spike, 'sound': RAMP.astype(np.float32),
                     '12bit': (RAMP * 4095).astype(np.uint16)}.items():
    (tmp_path / f'{name}.tif').write_bytes(stored(grey))
  (tmp_path / 'empty.tif').write_bytes(stored(np.full((9, 9), np.nan, np.float32)))
  names = ('nan', 'spike', 'sound', '12bit', 'empty')
  (tmp_path / 'train.jsonl').write_text(''.join(
      json.dumps({'image': f'{name}.tif', 'caption': 'a field'}) + '\n' for name in names))
  assert check.main([str(tmp_path)]) == 1
  lines = capsys.readouterr().out.splitlines()
  assert 'empty.tif: damaged or unsupported picture (no pixel has a value' in lines[0]
  said = {name: [line for line in lines if f'{name}.tif' in line] for name in names}
  assert '1 of 4,096 pixels have no value' in said['nan'][0]
  assert 'is one of these not a measurement?' in said['spike'][0]
  assert '16 bits a pixel of which 12 are used' in said['12bit'][0]
  assert not said['sound']
  assert '  pictures to look at: 3 of 5' in lines
