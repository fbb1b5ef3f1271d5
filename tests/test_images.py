"""Every kind of picture, against Pillow: decode in full, convert, resize with BILINEAR."""

import io
import os
import subprocess
import sys

import numpy as np
from PIL import Image, ImageOps
import pytest

from xmodal.bench.data import jpeg, photo_like
from xmodal.data import check
from xmodal.data.pictures import images
from xmodal.data.pictures.cache import KeepDecoded
from xmodal.data.pictures.decoded import DecodedPictures
from xmodal.data.pictures.images import fit, load_image, resize_antialiased
from xmodal.errors import UserError

SIZE = (40, 56)  # height and width differ, so that swapping them shows


def saved(image: Image.Image, format: str, **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, format, **options)
  return buffer.getvalue()


def reference(image: Image.Image, size=SIZE) -> np.ndarray:
  """Pillow's own antialiased bilinear resize, int [H, W, 3]."""
  resized = image.convert('RGB').resize(size[::-1], Image.Resampling.BILINEAR)
  return np.asarray(resized).astype(int)


def assert_close(pixels, expected, mean=0.7, most=2):
  assert pixels.dtype == np.uint8 and pixels.shape == expected.shape
  difference = np.abs(pixels.astype(int) - expected)
  assert difference.mean() <= mean, difference.mean()
  assert difference.max() <= most, difference.max()


@pytest.fixture(scope='module')
def photo() -> Image.Image:
  """Smaller than SIZE: enlarging is the same with any filter, so this tests decoding."""
  return Image.fromarray(photo_like(np.random.default_rng(1), 30, 38))


def smooth(height: int, width: int) -> np.ndarray:
  rows, columns = np.mgrid[:height, :width]
  light = [np.sin(rows / height * 5 + c) * np.cos(columns / width * 4 - c) for c in range(3)]
  return (127 + 120 * np.stack(light, axis=-1)).astype(np.uint8)


KINDS = {
    'PNG': '1 L P RGB', 'TIFF': '1 L P RGB CMYK YCbCr', 'JPEG': '1 L RGB CMYK YCbCr',
    'BMP': '1 L P RGB', 'GIF': '1 L P RGB', 'WEBP': '1 L P RGB CMYK YCbCr', 'PPM': '1 L RGB',
}


@pytest.mark.parametrize(
    'format,mode', [(format, mode) for format in KINDS for mode in KINDS[format].split()])
def test_modes_and_formats(photo, format, mode):
  data = saved(photo.convert(mode), format)
  pixels, stored_size = load_image(data, SIZE)
  assert stored_size == (30, 38)
  assert_close(pixels, reference(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize('mode', ['RGBA', 'LA'])
def test_transparency_shows_white(photo, mode):
  alpha = Image.fromarray(smooth(30, 38)[..., 0])
  image = photo.convert(mode)
  image.putalpha(alpha)
  opacity = np.asarray(alpha)[..., None] / 255
  colours = np.asarray(image.convert('RGB'))
  over_white = np.rint(colours * opacity + 255 * (1 - opacity)).astype(np.uint8)
  pixels, _ = load_image(saved(image, 'PNG'), SIZE)
  assert_close(pixels, reference(Image.fromarray(over_white)))


def test_transparent_palette_entry_shows_white(photo):
  palette = photo.quantize(16)
  index = np.asarray(palette)
  expected = np.where(index[..., None] == 3, 255, np.asarray(palette.convert('RGB')))
  pixels, _ = load_image(saved(palette, 'PNG', transparency=3), SIZE)
  assert_close(pixels, reference(Image.fromarray(expected.astype(np.uint8))))


def test_transparent_colour_of_rgb_shows_white():
  image = Image.new('RGB', (20, 20), (10, 200, 30))
  pixels, _ = load_image(saved(image, 'PNG', transparency=(10, 200, 30)), SIZE)
  assert (pixels == 255).all()


def test_inverted_cmyk_of_adobe(photo):
  data = saved(photo.convert('CMYK'), 'JPEG', quality=95)
  assert b'Adobe' in data  # the marker that says the inks are stored inverted
  pixels, _ = load_image(data, SIZE)
  assert_close(pixels, reference(photo), mean=3, most=25)


@pytest.mark.parametrize('format', ['PNG', 'TIFF', 'PPM'])
def test_16_bit_grey_keeps_its_range(format):
  grey = np.linspace(0, 65535, 30 * 38).reshape(30, 38).astype(np.uint16)
  pixels, _ = load_image(saved(Image.fromarray(grey), format), SIZE)
  eight_bit = Image.fromarray(np.rint(grey / 257).astype(np.uint8))
  assert_close(pixels, reference(eight_bit), most=2)


@pytest.mark.parametrize('dtype', [np.int32, np.float32])
def test_32_bit_grey_spans_its_own_range(dtype):
  grey = (np.linspace(-1, 3, 30 * 38) * 1e6).reshape(30, 38).astype(dtype)
  pixels, _ = load_image(saved(Image.fromarray(grey), 'TIFF'), SIZE)
  eight_bit = np.rint(np.linspace(0, 255, 30 * 38)).reshape(30, 38).astype(np.uint8)
  assert_close(pixels, reference(Image.fromarray(eight_bit)), most=2)


@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'WEBP'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation(photo, orientation, format):
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = saved(photo, format, exif=exif)
  upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
  pixels, stored_size = load_image(data, SIZE)
  assert stored_size == upright.size[::-1]
  assert_close(pixels, reference(upright))


def test_malformed_exif_is_no_orientation(photo):
  data = saved(photo, 'JPEG', exif=b'Exif\0\0' + b'rubbish' * 5)
  assert_close(load_image(data, SIZE)[0], reference(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize('options', [
    {'progressive': True}, {'subsampling': '4:4:4'}, {'subsampling': '4:2:2'}, {'quality': 20},
    {'restart_marker_blocks': 2}, {'keep_rgb': True, 'subsampling': 0},
])
def test_kinds_of_jpeg(photo, options):
  data = jpeg(np.asarray(photo), **options)
  assert_close(load_image(data, SIZE)[0], reference(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize('shrink', [1.05, 1.16, 1.2, 1.4, 1.6, 1.8, 2.0, 2.3, 3.0, 4.0, 7.3])
def test_resize_of_a_photo_is_pillows(shrink):
  photo = photo_like(np.random.default_rng(2), round(150 * shrink), round(200 * shrink))
  expected = reference(Image.fromarray(photo), (150, 200))
  assert_close(resize_antialiased(photo, (150, 200)), expected, mean=1.0, most=20)


@pytest.mark.parametrize('shrink', [1.4, 1.6, 1.8, 2.0, 2.3, 3.0, 4.0, 7.3])
def test_fine_dots_do_not_alias(shrink):
  """Black and white dots, the worst case: without antialias the mean difference is 30 to 90."""
  photo = Image.fromarray(photo_like(np.random.default_rng(3), *[round(200 * shrink)] * 2))
  dots = photo.convert('1').convert('RGB')
  pixels = resize_antialiased(np.asarray(dots), (200, 200))
  assert_close(pixels, reference(dots, (200, 200)), mean=10, most=80)


@pytest.mark.parametrize('size', [(60, 300), (300, 60), (299, 40)])
def test_sides_shrink_and_grow_apart(size):
  photo = photo_like(np.random.default_rng(4), 120, 150)
  assert_close(resize_antialiased(photo, size), reference(Image.fromarray(photo), size), 0.9, 20)


@pytest.mark.parametrize('height,width', [(256, 256), (300, 400), (440, 640)])
def test_jpeg_decoded_in_full(height, width):
  data = jpeg(photo_like(np.random.default_rng(5), height, width))
  expected = reference(Image.open(io.BytesIO(data)), (224, 224))
  assert_close(load_image(data, (224, 224))[0], expected, mean=0.9, most=20)


@pytest.mark.parametrize('height,width', [(448, 448), (480, 640), (794, 833), (900, 1300)])
def test_jpeg_decoded_at_reduced_scale(height, width):
  """Decoding at 1/2, 3/8, 1/4, 1/8 looks like decoding in full and averaging."""
  size = (224, 224)
  flat = jpeg(smooth(height, width))
  assert_close(load_image(flat, size)[0], reference(Image.open(io.BytesIO(flat)), size), 0.6, 3)
  rough = jpeg(photo_like(np.random.default_rng(6), height, width))
  expected = reference(Image.open(io.BytesIO(rough)), size)
  assert_close(load_image(rough, size)[0], expected, mean=1.7, most=40)


def test_jpeg_of_any_side_fills_its_row_and_stays_in_place():
  """Decoding 45 pixels at 1/2 gives 23, not 22.5; sizes must match, and no picture may shift."""
  size = (16, 16)
  for side in range(16, 150):
    image = Image.fromarray(smooth(side, side + 3))
    data = saved(image, 'JPEG', quality=95)
    row = np.zeros((*size, 3), np.uint8)
    pixels, _ = load_image(data, size, out=row)
    assert (pixels == row).all()
    assert_close(row, reference(Image.open(io.BytesIO(data)), size), mean=1.8, most=12)


@pytest.mark.parametrize('shape', [(1, 1), (1, 500), (500, 1), (3, 2), (9000, 5), (1300, 1500)])
@pytest.mark.parametrize('format', ['PNG', 'JPEG'])
def test_tiny_long_and_huge(shape, format):
  data = saved(Image.fromarray(smooth(*shape)), format)
  pixels, stored_size = load_image(data, SIZE)
  assert stored_size == shape
  assert_close(pixels, reference(Image.open(io.BytesIO(data))), mean=1.0, most=4)


def test_arrays_paths_and_bytes_agree(photo, tmp_path):
  data = saved(photo, 'PNG')
  path = tmp_path / 'a.png'
  path.write_bytes(data)
  expected, stored_size = load_image(np.asarray(photo), SIZE)
  for source in (str(path), path, data):
    pixels, size = load_image(source, SIZE)
    assert (pixels == expected).all() and size == stored_size
  batch = np.zeros((3, *SIZE, 3), np.uint8)
  load_image(str(path), SIZE, out=batch[1])
  assert (batch[1] == expected).all() and not batch[[0, 2]].any()


def test_array_of_the_wanted_size_is_untouched(photo):
  pixels = np.asarray(photo)
  assert (load_image(pixels, (30, 38))[0] == pixels).all()


def test_animation_gives_its_first_frame():
  frames = [Image.new('RGB', (30, 30), colour) for colour in ('red', 'blue')]
  data = saved(frames[0], 'GIF', save_all=True, append_images=frames[1:])
  assert (load_image(data, SIZE)[0] == (255, 0, 0)).all()


def test_many_threads_give_the_same_pixels(photo):
  from concurrent.futures import ThreadPoolExecutor
  pictures = [jpeg(photo_like(np.random.default_rng(i), 100, 150)) for i in range(8)] * 3
  alone = [load_image(data, SIZE)[0] for data in pictures]
  with ThreadPoolExecutor(4) as pool:
    together = pool.map(lambda data: load_image(data, SIZE)[0], pictures)
    assert all((a == b).all() for a, b in zip(alone, together, strict=True))


def refused(source) -> str:
  with pytest.raises(UserError) as caught:
    load_image(source, SIZE)
  message = str(caught.value)
  assert '\n' not in message
  return message


@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'GIF', 'WEBP', 'TIFF', 'BMP'])
@pytest.mark.parametrize('kept', [0.97, 0.5, 0.1])
def test_cut_off_file_is_refused(photo, tmp_path, format, kept):
  whole = saved(photo, format)
  path = tmp_path / 'cut'
  path.write_bytes(whole[: int(kept * len(whole))])
  assert str(path) in refused(str(path))


def test_jpeg_that_ends_one_scan_early_is_refused():
  whole = jpeg(photo_like(np.random.default_rng(0), 500, 500))
  assert 'damaged' in refused(whole[:-200])


@pytest.mark.parametrize('content', [b'', b'just text', b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n'])
def test_what_is_no_picture_is_refused(tmp_path, content):
  path = tmp_path / 'a.jpg'
  path.write_bytes(content)
  assert str(path) in refused(str(path))


@pytest.mark.parametrize('options', [
    {'format': 'JPEG'}, {'format': 'JPEG', 'exif': True}, {'format': 'PNG'}, {'format': 'TIFF'},
    {'format': 'JPEG', 'mode': 'CMYK'}, {'format': 'GIF'}])
@pytest.mark.parametrize('side, read', [(40, True), (41, False), (80, False)])
def test_one_limit_on_pixels_for_every_decoder(tmp_path, monkeypatch, options, side, read):
  """40 x 40 are allowed; Pillow by itself warns at half its limit, and raises at its own."""
  monkeypatch.setattr(images, 'MAX_PIXELS', 1600)
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1600)
  options = {'mode': 'L', **options}
  if options.pop('exif', False):
    options['exif'] = Image.Exif()
    options['exif'][0x010F] = 'camera'
  path = str(tmp_path / 'a')
  Image.new(options.pop('mode'), (side, side + (side == 80)), 90).save(path, **options)
  if read:
    assert load_image(path, SIZE)[1] == (40, 40)
    assert isinstance(check.decode_all([path])[path], tuple)
  else:
    assert f'{path}: ' in refused(path) and 'more than the 1,600 that are read' in refused(path)
    assert 'that are read' in check.decode_all([path])[path]
    wrong = DecodedPictures().open([path], 40)
    assert 'that are read' in wrong[path]


def test_the_limit_is_where_pillow_refuses_by_itself():
  script = 'from PIL import Image; print(2 * Image.MAX_IMAGE_PIXELS)'
  unchanged = subprocess.run([sys.executable, '-c', script], capture_output=True, check=True)
  assert int(unchanged.stdout) == images.MAX_PIXELS == Image.MAX_IMAGE_PIXELS


def test_missing_file_and_folder_are_refused(tmp_path):
  assert 'nowhere.jpg' in refused(str(tmp_path / 'nowhere.jpg'))
  assert str(tmp_path) in refused(str(tmp_path))


@pytest.mark.parametrize('array', [
    np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8),
    np.zeros((0, 4, 3), np.uint8)])
def test_other_arrays_are_refused(array):
  assert str(array.dtype) in refused(array)


def test_no_tensorflow_is_needed():
  script = 'import sys, xmodal.data.pictures.images; sys.exit("tensorflow" in sys.modules)'
  assert subprocess.run([sys.executable, '-c', script], check=False).returncode == 0


def test_memory_gives_the_same_pictures_and_reads_each_file_once(tmp_path):
  rng = np.random.default_rng(0)
  paths = [str(tmp_path / f'{i}.jpg') for i in range(3)]
  for path, side in zip(paths, (100, 301, 90)):
    with open(path, 'wb') as f:
      f.write(jpeg(photo_like(rng, side, side + 7)))
  expected = [load_image(path, SIZE) for path in paths]
  decode = KeepDecoded(2 * 100 * 107 * 3)  # room for two of the three
  for _ in range(2):
    for path, (pixels, stored_size) in zip(paths, expected):
      again, again_size = fit(decode(path, SIZE), SIZE)
      np.testing.assert_array_equal(again, pixels)
      assert again_size == stored_size

  for path in paths:
    os.remove(path)
  np.testing.assert_array_equal(fit(decode(paths[0], SIZE), SIZE)[0], expected[0][0])
  with pytest.raises(UserError, match=paths[2]):  # the memory was full
    decode(paths[2], SIZE)
