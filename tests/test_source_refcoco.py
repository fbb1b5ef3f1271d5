"""RefCOCO, RefCOCO+ and RefCOCOg as distributed."""

import os
import pickle

import published
import pytest

from xmodal.data import check
from xmodal.data.example import Example, Object
from xmodal.data.sources.refcoco import read_refcoco
from xmodal.errors import UserError

_NAME = 'COCO_train2014_000000000007.jpg'
_INSTANCES = {
    'images': [{'id': 7, 'file_name': _NAME, 'width': 60, 'height': 40}],
    'annotations': [
        {'id': 11, 'image_id': 7, 'category_id': 1, 'bbox': [1, 2, 30, 4], 'iscrowd': 0, 'area': 9},
        {'id': 12, 'image_id': 7, 'category_id': 1, 'bbox': [5, 5, 0, 9], 'iscrowd': 0}],
    'categories': [{'id': 1, 'name': 'cat', 'supercategory': 'animal'}]}


def _reference(annotation=11, split='val', sentences=('the cat  left',), **more):
  return {'sent_ids': [1], 'file_name': 'COCO_train2014_000000000007_11.jpg', 'ann_id': annotation,
          'ref_id': 3, 'image_id': 7, 'split': split, 'category_id': 1, 'sentences': [
              {'tokens': [], 'raw': text, 'sent_id': i, 'sent': text}
              for i, text in enumerate(sentences)]} | more


def _refcoco(root, references, by='unc', protocol=2, pictures='images/mscoco/images/train2014',
             **files):
  published.write(root, {
      f'refcoco/refs({by}).p': pickle.dumps(references, protocol), f'{pictures}/{_NAME}': (60, 40),
      'refcoco/instances.json': _INSTANCES} | files)
  return str(root / 'refcoco')


@pytest.mark.parametrize('pictures', ['images/mscoco/images/train2014', 'train2014',
                                      'refcoco/train2014', 'refcoco/images'])
@pytest.mark.parametrize('protocol', [0, 2, 4])
def test_each_sentence_means_a_box(tmp_path, pictures, protocol):
  root = _refcoco(tmp_path, [_reference(sentences=('the cat  left', 'Cat'))], protocol=protocol,
                  pictures=pictures)
  cat = Object('cat', (1, 2, 30, 4), area=9, category_id=1)
  assert read_refcoco(root, 'val') == [
      Example(f'{tmp_path}/{pictures}/{_NAME}', image_id=7, objects=(cat,),
              expression=Object(text, (1, 2, 30, 4)), recorded_size=(60, 40))
      for text in ('the cat left', 'Cat')]


def test_splits_are_those_of_the_authors_named(tmp_path):
  root = _refcoco(tmp_path, [_reference(split=split, sentences=[split])
                             for split in ('train', 'testA', 'testB')])
  _refcoco(tmp_path, [_reference(split='train', sentences=['by google'])], 'google')

  def texts(*arguments):
    return [e.expression.name for e in read_refcoco(root, *arguments)]

  assert texts('testB') == ['testB'] and texts('test') == ['testA', 'testB']
  assert texts('train') == ['train'] and texts('train', 'google') == ['by google']
  with pytest.raises(UserError, match="no split 'val', wanted one of 'testA', 'testB', 'train'"):
    texts('val')
  with pytest.raises(UserError, match=r'refs\(umd\).p: no such file'):
    texts('train', 'umd')


def test_what_cannot_be_used_is_left_out_and_listed(tmp_path, capsys):
  root = _refcoco(tmp_path, [_reference(), _reference(12), _reference(99),
                             _reference(sentences=(' ', 'a\0b'))])
  assert len(read_refcoco(root, 'val')) == 1
  assert check.main([root, '--source', 'refcoco']) == 1
  lines = capsys.readouterr().out.splitlines()
  assert [line.split('object ')[1] for line in lines if 'object ' in line] == [
      f'{n}: has no box in instances.json that can be used, left out' for n in (12, 99)] + [
          '11: has no name, left out',
          r"11: name is 'a\x00b', wanted text without control characters, left out"]
  assert 'val: 1 examples, 1 pictures, 1 boxes (0 to be ignored)' in lines


class _Evil:

  def __reduce__(self):
    return os.mkdir, ('made by a pickle',)


@pytest.mark.parametrize('content, said', [
    (pickle.dumps([_reference(sentences=[_Evil()])]), r'it names \w+.mkdir, which is not read'),
    (b'not a pickle', 'not a pickle of plain lists'), (b'', 'Ran out of input'),
    (pickle.dumps({}), 'wanted a list with at least one record'),
    (pickle.dumps([7]), r'record 0 \(from 0\) is 7, wanted the fields'),
    (pickle.dumps([_reference(ann_id=None)]), 'ann_id is None, wanted a whole number or text'),
    (pickle.dumps([_reference(99)]), "no expression of 'val' can be used"),
])
def test_a_file_that_is_none_or_runs_code_stops_in_one_line(
    tmp_path, monkeypatch, content, said):
  root = _refcoco(tmp_path, [])
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'refcoco' / 'refs(unc).p').write_bytes(content)
  with pytest.raises(UserError, match=said):
    read_refcoco(root, 'val')
  assert not (tmp_path / 'made by a pickle').exists()


def test_missing_pictures_are_counted(tmp_path):
  root = _refcoco(tmp_path, [_reference()], pictures='elsewhere')
  with pytest.raises(UserError, match=f'1 of 1 pictures are not in .*refcoco .*{_NAME}'):
    read_refcoco(root, 'val')
