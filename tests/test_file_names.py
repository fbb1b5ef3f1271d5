"""Pictures are found with names from Windows, macOS and users (spaces)."""

import json
import os
import unicodedata

from PIL import Image
import pytest

from xmodal.data import check
from xmodal.data.sources.coco import read_coco
from xmodal.data.sources.find_pictures import Pictures
from xmodal.data.sources.jsonl import read_jsonl
from xmodal.data.sources.voc import read_voc
from xmodal.errors import UserError

_DECOMPOSED = unicodedata.normalize('NFD', 'Größe é')
_COMPOSED = unicodedata.normalize('NFC', _DECOMPOSED)


def _picture(path, size=(60, 40), **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new('RGB', size, 'red').save(path, **options)
  return str(path)


@pytest.mark.parametrize('on_disk, written', [
    ('sub/a.jpg', 'sub\\a.jpg'), ('sub/a.jpg', '.\\sub\\a.jpg'), ('sub\\a.jpg', 'sub\\a.jpg'),
    (f'{_DECOMPOSED}.jpg', f'{_COMPOSED}.jpg'), (f'{_COMPOSED}.jpg', f'{_DECOMPOSED}.jpg'),
    (f'{_DECOMPOSED}/in/{_DECOMPOSED}.jpg', f'{_COMPOSED}\\in\\{_COMPOSED}.jpg'),
    ('../beside/ä.jpg', '../beside/a\u0308.jpg')])
def test_names_are_found_as_other_systems_write_them(on_disk, written, tmp_path):
  root = tmp_path / 'data'
  root.mkdir()
  path = _picture(root / on_disk)
  (root / 'train.jsonl').write_text(json.dumps({'image': written}))
  (root / 'train.json').write_text(json.dumps(
      {'images': [{'id': 1, 'file_name': written}], 'annotations': []}))
  for read in (read_jsonl, read_coco):
    [example] = read(str(root), 'train')
    assert os.path.samefile(example.image, path)


def test_the_name_as_written_goes_before_others(tmp_path):
  for form in (_COMPOSED, _DECOMPOSED):
    _picture(tmp_path / f'{form}.jpg')
  found = {Pictures(str(tmp_path)).find(f'{form}.jpg') for form in (_COMPOSED, _DECOMPOSED)}
  assert found == {str(tmp_path / f'{form}.jpg') for form in (_COMPOSED, _DECOMPOSED)}


def test_names_that_are_not_utf8_are_reported_in_one_line(tmp_path, capsys):
  """Names as a zip from another system unpacks them."""
  path = os.path.join(os.fsencode(tmp_path), b'gr\xf6\xdfe.jpg')
  try:
    open(path, 'wb').close()
  except OSError:
    pytest.skip('this file system takes no such names')
  root, name = str(tmp_path), 'größe.jpg'
  (tmp_path / 'train.jsonl').write_text(json.dumps({'image': name}))
  (tmp_path / 'train.json').write_text(json.dumps(
      {'images': [{'id': 1, 'file_name': name}], 'annotations': []}))
  said = r"names there are not UTF-8, such as 'gr\\udcf6\\udcdfe\.jpg': rename"
  for read in (read_jsonl, read_coco):
    with pytest.raises(UserError, match=said):
      read(root, 'train')
  for source in ('jsonl', 'coco'):
    assert check.main([root, '--source', source]) > 0
    assert 'rename those files' in ''.join(capsys.readouterr())
  inside = os.path.join(os.fsencode(tmp_path), b'\xff')
  os.mkdir(inside)
  assert check.main([os.fsdecode(inside)]) == 2
  assert 'its name is not UTF-8; rename it' in capsys.readouterr().err
  (tmp_path / 'Annotations').mkdir()
  folder = tmp_path / 'ImageSets' / 'Main'
  folder.mkdir(parents=True)
  (folder / 'train.txt').write_bytes(b'a\ngr\xf6\xdfe\n')
  with pytest.raises(UserError, match='train.txt: byte 4 is not UTF-8, wanted names of pictures'):
    read_voc(root, 'train')


def _voc(root, listed, pictures):
  """A VOC folder of pictures, each with one object."""
  for name in pictures:
    _picture(root / 'JPEGImages' / name)
    path = root / 'Annotations' / f'{os.path.splitext(name)[0]}.xml'
    path.parent.mkdir(exist_ok=True)
    path.write_text('<annotation><object><name>cat</name><bndbox><xmin>1</xmin><ymin>2</ymin>'
                    '<xmax>9</xmax><ymax>8</ymax></bndbox></object></annotation>')
  path = root / 'ImageSets' / 'Main' / 'train.txt'
  path.parent.mkdir(parents=True)
  path.write_text('\n'.join(listed))
  return [(e.image_id, os.path.basename(e.image), len(e.objects))
          for e in read_voc(str(root), 'train')]


def test_voc_lists_name_a_picture_a_line(tmp_path):
  pictures = ['my cat 1.jpg', 'my cat.jpg', 'my.jpg', '2008_000008.jpg', 'no space.jpg']
  # Lists of one class (VOC2007, cat_train.txt) have -1, 0 or 1 behind the name.
  listed = ['my cat 1', 'my cat', '  my  ', '2008_000008 -1', 'no space  1']
  assert _voc(tmp_path, listed, pictures) == [
      (os.path.splitext(name)[0], name, 1) for name in pictures]


def test_voc_pictures_are_of_any_kind(tmp_path):
  pictures = ['a.tif', 'b.webp', 'c.bmp', 'd.JPeG', 'e.TIFF', 'f.1.png', f'{_DECOMPOSED}.tif',
              'g.gif']
  listed = ['a', 'b', 'c', 'd', 'e', 'f.1', _COMPOSED, 'g']
  assert _voc(tmp_path, listed, pictures) == [
      (name, picture, 1) for name, picture in zip(listed, pictures)]


def test_voc_takes_the_jpeg_where_there_are_several(tmp_path):
  assert _voc(tmp_path, ['a'], ['a.bmp', 'a.jpg', 'a.tif']) == [('a', 'a.jpg', 1)]
