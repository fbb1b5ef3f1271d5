"""Flickr30k as distributed, and captions in Karpathy's splits."""

import published
import pytest

from xmodal.data import check
from xmodal.data.example import Example
from xmodal.data.sources.flickr30k import read_flickr30k
from xmodal.data.sources.karpathy import read_coco_karpathy
from xmodal.errors import UserError


def _image(name, split, *captions, **more):
  return {'sentids': [], 'imgid': 0, 'split': split, 'filename': name, 'sentences': [
      {'tokens': text.split(), 'raw': text, 'imgid': 0, 'sentid': i}
      for i, text in enumerate(captions)]} | more


def _karpathy(root, images, name='dataset_flickr30k.json', **files):
  pictures = {f'flickr30k-images/{n}.jpg': (60, 40) for n in (1, 2)}
  return published.write(root, pictures | {
      name: {'images': images, 'dataset': 'flickr30k'}} | files)


@pytest.mark.parametrize('folder', ['', 'karpathy/'])
def test_karpathys_splits_are_read(tmp_path, folder, capsys):
  root = _karpathy(tmp_path, [_image('1.jpg', 'train', 'A man .', ' ', 'Two .'),
                              _image('2.jpg', 'val', 'A dog .')], f'{folder}dataset_flickr30k.json')
  assert read_flickr30k(root, 'train') == [
      Example(f'{root}/flickr30k-images/1.jpg', captions=('A man .', 'Two .'), image_id='1.jpg')]
  [fault] = read_flickr30k(root, 'train').faults
  assert fault.endswith("'1.jpg': has an empty caption, left out")
  assert check.main([root, '--source', 'flickr30k']) == 1
  out = capsys.readouterr().out
  assert 'val: 1 examples' in out and 'test: not there' in out


def test_the_authors_file_is_read_with_a_list(tmp_path):
  root = published.write(tmp_path, {
      'results_20130124.token': '1.jpg#0\tA man .\n1.jpg#1\tTwo # men\t.\n2.jpg#0\tA dog .\n',
      'val.txt': '1\n', 'test.txt': '\n2.jpg\r\n', 'twice.txt': '1\n1.jpg\n', 'no.txt': '3\n',
      'empty.txt': '\n', 'images/1.jpg': (60, 40), 'flickr30k_images/2.jpg': (60, 40)})
  assert read_flickr30k(root, 'val') == [
      Example(f'{root}/images/1.jpg', captions=('A man .', 'Two # men\t.'), image_id='1.jpg')]
  assert [e.image_id for e in read_flickr30k(root, 'test')] == ['2.jpg']
  for split, said in (('train', 'train.txt: no such file'), ('empty', 'lists no pictures'),
                      ('twice', ":2: '1.jpg' is listed twice"), ('no', ":1: '3' has no captions")):
    with pytest.raises(UserError, match=said):
      read_flickr30k(root, split)
  for text, said in (('1.jpg A man', ":1: is '1.jpg A man', wanted NAME.jpg"),
                     ('1.jpg#0\ta\0b', "is '1.jpg#0.*without control characters"),
                     (b'1.jpg#0\t\xff', 'byte 9 is not UTF-8')):
    published.write(tmp_path, {'results_20130124.token': text})
    with pytest.raises(UserError, match=said):
      read_flickr30k(root, 'val')


def test_coco_trains_on_train_and_restval(tmp_path):
  images = [_image(f'COCO_val2014_{n}.jpg', split, 'A man .', filepath='val2014', cocoid=n)
            for n, split in ((1, 'restval'), (2, 'test'), (3, 'train'))]
  root = published.write(tmp_path, {
      f'val2014/COCO_val2014_{n}.jpg': (60, 40) for n in (1, 2, 3)} | {
          'dataset_coco.json': {'images': images}})
  assert [e.image_id for e in read_coco_karpathy(root, 'train')] == [1, 3]
  assert read_coco_karpathy(root, 'test') == [
      Example(f'{root}/val2014/COCO_val2014_2.jpg', captions=('A man .',), image_id=2)]


@pytest.mark.parametrize('images, said', [
    ([_image('1.jpg', 'val', 'A .'), _image('1.jpg', 'val', 'B .')], "both have filename '1.jpg'"),
    ([_image('1.jpg', 'val'), _image('2.jpg', 'val', cocoid='1.jpg')], "both have cocoid '1.jpg'"),
    ([_image('7.jpg', 'val', 'A .')], r'1 of 1 pictures are not in .*flickr30k-images.*7.jpg'),
    ([_image('1.jpg', 'train', 'A .')], "has no split 'val', wanted one of 'train'"),
    ([_image('1.jpg', 'val', sentences=['A .'])], "sentences 1 is 'A .', wanted an object"),
])
def test_mistakes_stop_in_one_line(tmp_path, images, said):
  root = _karpathy(tmp_path, images)
  with pytest.raises(UserError, match=said):
    read_flickr30k(root, 'val')
  with pytest.raises(UserError, match='dataset_coco.json: no such file'):
    read_coco_karpathy(root, 'val')
