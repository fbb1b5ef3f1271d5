"""Data in buckets, emulated on this machine, are those of a folder."""

import dataclasses
import io
import json
import os
import pathlib
import pickle
import tarfile
import threading

import buckets
import numpy as np
from PIL import Image
import published
import pytest
import test_fields
from test_pack import _small
from test_pipeline import CHANGES, Boxes, assert_equal, maker
from test_workers import started
import tiny

from xmodal import storage
from xmodal.data import check, pipeline
from xmodal.data.example import Example
from xmodal.data.open import open_source
from xmodal.data.pack import pack
from xmodal.data.pictures import images
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError


@pytest.fixture(scope='module', autouse=True)
def emulators():
  with buckets.emulated():
    yield
  storage._file_system_of.cache_clear()


@pytest.fixture(scope='module', params=['gs', 's3'])
def bucket(request):
  return f'{request.param}://{buckets.BUCKET}'


def _picture(seed, kind='JPEG', size=(60, 40)):
  pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
  file = io.BytesIO()
  # Turned, and longer than what is read for the header.
  Image.fromarray(pixels).save(file, kind, exif=b'Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0'
                               b'\0\x01\0\x06\0\0\0\0\0\0')
  return file.getvalue()


def _tar(*members):
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode='w') as tar:
    for name, content in members:
      entry = tarfile.TarInfo(name)
      entry.size = len(content)
      tar.addfile(entry, io.BytesIO(content))
  return file.getvalue()


def _parquet():
  import pyarrow as pa
  import pyarrow.parquet as pq
  file = io.BytesIO()
  pq.write_table(pa.table({
      'image': [{'bytes': _picture(i, 'PNG'), 'path': None} for i in range(5)],
      'caption': [f'picture {i}' for i in range(5)]}), file, row_group_size=2)
  return file.getvalue()


_P, _COCO_P, _XML = _picture(1), 'COCO_train2014_000000000007.jpg', (
    '<annotation><size><width>40</width><height>60</height></size><object><name>cat</name><bndbox>'
    '<xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object></annotation>')
_LINE = {'identifier': 'dev-850-0-1', 'sentence': 'Two dogs lie.', 'label': 'True'}
_AS_JSON = {'train.jsonl': json.dumps(test_fields._JSONL['train.jsonl']) + '\n' + json.dumps(
    {'image': 'deep\\ü.jpg', 'question': 'q?', 'answers': ['b']}), '7.jpg': _P,
    'deep/u\u0308.jpg': _picture(2)}
# source -> its files and the split that they have.
_SETS = {
    'jsonl': (_AS_JSON, 'train'),
    'imagefolder': ({f'validation/{name}/{i}.jpg': _picture(i) for name in 'ab' for i in range(2)},
                    'val'),
    'imagefolder/metadata': ({
        'train/metadata.csv': 'file_name,caption\n7.jpg,one\n', 'train/7.jpg': _P,
        'train/deep/metadata.jsonl': '{"file_name": "8.jpg", "caption": "two"}',
        'train/deep/8.jpg': _picture(8)}, 'train'),
    'csv': ({'train.tsv': b'image\tcaption\r\n7.jpg\t"two\r\nlines"\r\n', '7.jpg': _P}, 'train'),
    'yolo': ({'data.yaml': 'names: [cat]\ntrain: ../train/images\nval: val.txt\n',
              **{f'train/images/{i}.{end}': _picture(i, kind) for i, (end, kind) in enumerate(
                  [('jpg', 'JPEG'), ('png', 'PNG'), ('webp', 'WEBP')])},
              'train/images/9.jpg': b'no picture', 'train/labels/9.txt': '0 0.5 0.5 0.2 0.2',
              'train/labels/0.txt': '0 0.5 0.5 0.2 0.2\n7 0 0 0 0',
              'train/labels/1.txt': '0 0.5 0.5 0.2 0.2'}, 'train'),
    'coco': ({**test_fields._COCO, 'train/7.jpg': _P}, 'train'),
    'voc': ({'VOCdevkit/VOC2007/ImageSets/Main/train.txt': '7\n8\n',
             **{f'VOCdevkit/VOC2007/JPEGImages/{i}.jpg': _P for i in (7, 8)},
             'VOCdevkit/VOC2007/Annotations/7.xml': _XML}, 'train'),
    'visual_genome': ({**test_fields._GENOME, 'VG_100K_2/7.jpg': _P}, 'train+val+test'),
    'vqa_v2': ({**test_fields._VQA, f'train2014/{_COCO_P}': _P}, 'train'),
    'okvqa': ({**test_fields._OKVQA, f'train2014/{_COCO_P}': _P}, 'train'),
    'aokvqa': ({**test_fields._AOKVQA, 'train2017/000000000007.jpg': _P}, 'train'),
    'clevr': ({**test_fields._CLEVR, 'images/train/7.jpg': _P}, 'train'),
    'gqa': ({**test_fields._GQA, 'images/7.jpg': _P}, 'train'),
    'vizwiz': ({**test_fields._VIZWIZ, 'train/7.jpg': _P}, 'train'),
    'nlvr2': ({'data/dev.json': json.dumps(_LINE), 'dev/dev-850-0-img0.png': _picture(3, 'PNG'),
               'dev/dev-850-0-img1.png': _picture(4, 'PNG')}, 'val'),
    'flickr30k': ({'results_20130124.token': '1.jpg#0\tA man .\n', 'val.txt': '1\n',
                   'flickr30k-images/1.jpg': _P}, 'val'),
    'coco_karpathy': ({**test_fields._KARPATHY, 'images/7.jpg': _P}, 'train'),
    'refcoco': ({'instances.json': test_fields._REFCOCO['instances.json'],
                 'refs(unc).p': pickle.dumps(test_fields._REFCOCO['refs(unc).p']),
                 '../train2014/7.jpg': _P}, 'train'),
    'vqa_rad': ({**test_fields._RAD, 'VQA_RAD Image Folder/7.jpg': _P}, 'train+val'),
    'parquet': ({'data/train-00000-of-00001.parquet': _parquet()}, 'train'),
    'webdataset': ({f'train-{n}.tar': _tar(
        *((f'{n}{i}.{end}', content) for i in range(3) for end, content in
          (('jpg', _picture(i)), ('cls', b'1')))) for n in range(2)} | {
              'classnames.txt': 'cat\ndog\n'}, 'train')}


def upload(folder: pathlib.Path, root: str):
  """Copies a folder into a bucket."""
  files = [path for path in sorted(folder.rglob('*')) if path.is_file()]
  for _ in storage.each(root, lambda path: storage.upload(
      str(path), f'{root}/{path.relative_to(folder)}'), files):
    pass


def assert_same(found, local, root, folder):
  """Examples of a bucket's root are those of a folder."""
  assert len(found) == len(local) > 0
  for a, b in zip(found, local):
    assert dataclasses.replace(a, image=b'') == dataclasses.replace(b, image=b'')
    assert str(a.image) == str(b.image).replace(*(map(os.path.dirname, (folder, root))))
    try:
      wanted = images.load_image(b.image, (20, 20))
    except UserError as error:
      with pytest.raises(UserError, match='not a picture'):
        images.load_image(a.image, (20, 20))
      assert 'not a picture' in str(error)
      continue
    got = images.load_image(a.image, (20, 20))
    assert (got[0] == wanted[0]).all() and got[1] == wanted[1]
  assert [str(fault).replace(root, folder) for fault in getattr(found, 'faults', ())] == [
      str(fault) for fault in getattr(local, 'faults', ())]


@pytest.mark.parametrize('name', _SETS)
def test_examples_are_those_of_a_folder(bucket, name, tmp_path):
  files, split = _SETS[name]
  folder, root = str(tmp_path / 'set'), f'{bucket}/{name}/set'
  published.write(tmp_path / 'set', files | {'notes.txt': 'x'})
  upload(tmp_path, f'{bucket}/{name}')
  read = SOURCES[name.partition('/')[0]].make
  assert_same(read(f'{root}/', split), read(folder, split), root, folder)


@pytest.fixture(scope='module')
def jsonl(bucket, tmp_path_factory):
  """A folder of 20 pictures in our own format, and its copy in a bucket."""
  folder = tmp_path_factory.mktemp('jsonl')
  lines = [{'image': f'p/{i % 20}.jpg', 'question': f'which of {i}?', 'answers': [str(i % 3)],
            'objects': [{'box': [1, 2, 9, 8], 'name': f'thing {i % 2}'}], 'image_id': f'i{i % 20}'}
           for i in range(40)]
  text = '\n'.join(map(json.dumps, lines))
  published.write(folder, {'train.jsonl': text, 'val.jsonl': text, **{
      f'p/{i}.jpg': b'no picture' if i == 7 else _picture(i) for i in range(20)}})
  upload(folder, root := f'{bucket}/own')
  return str(folder), root


def test_a_folder_of_pictures_is_listed_once(jsonl, monkeypatch):
  listed, scan = [], storage.scan
  monkeypatch.setattr(storage, 'scan', lambda path: listed.append(path) or scan(path))
  SOURCES['jsonl'].make(jsonl[1], 'train')
  assert listed == [f'{jsonl[1]}/p']


def test_a_local_file_may_name_pictures_of_a_bucket(jsonl, tmp_path):
  published.write(tmp_path, {'train.jsonl': json.dumps({'image': f'{jsonl[1]}/p/1.jpg'})})
  [example] = SOURCES['jsonl'].make(str(tmp_path), 'train')
  assert example.image == f'{jsonl[1]}/p/1.jpg' and images.decode(example.image, (8, 8))
  published.write(tmp_path, {'val.jsonl': json.dumps({'image': 'http://host/1.jpg'})})
  with pytest.raises(UserError, match="'http://host/1.jpg' is not there"):
    SOURCES['jsonl'].make(str(tmp_path), 'val')


def _batches(root, source='jsonl', workers=0):
  data = SOURCES[source].make(root, 'train')
  make = maker(data, Boxes(), CHANGES, share=0.2, seed=3, root=root)
  if not workers:
    return list(pipeline.train_batches(make, 8, 0, 6)), make.bad.reasons
  with started(make, workers) as make:
    return list(pipeline.train_batches(make, 8, 0, 6)), make.bad.reasons


@pytest.fixture(scope='module')
def packed(jsonl):
  """A pack in a bucket of what is there."""
  out = f'{os.path.dirname(jsonl[1])}/pack'
  assert pack.main([jsonl[1], '--output', out]) == 0
  return out


def test_batches_are_those_of_a_folder(jsonl, packed):
  wanted, bad = _batches(jsonl[0])
  forked = 'jsonl' if jsonl[1].startswith('gs') else 'pack'
  for source, workers in (('jsonl', 0), ('pack', 0), (forked, 2)):
    found, reasons = _batches(packed if source == 'pack' else jsonl[1], source, workers)
    assert reasons.keys() == bad.keys() == {7, 27}
    for a, b in zip(found, wanted, strict=True):
      assert_equal(a, b)


def test_a_picture_that_vanishes_is_an_unreadable_one(jsonl):
  [example] = SOURCES['jsonl'].make(jsonl[1], 'train')[:1]
  make = maker([dataclasses.replace(example, image=f'{jsonl[1]}/p/none.jpg')], Boxes(), share=1.0)
  [batch] = pipeline.eval_batches(make, 1)
  assert not batch['valid'].any()
  assert make.bad.lines()[0].startswith(f'{jsonl[1]}/p/none.jpg: cannot be read (no such file)')


def test_check_and_more_read_buckets(jsonl, capsys):
  assert check.main([jsonl[1], '--split', 'train']) == 1
  out = capsys.readouterr().out
  assert f'{jsonl[1]}/train.jsonl:8: image cannot be decoded' in out and '2 bad lines' in out
  config = tiny.changed(data__source='jsonl', data__root=jsonl[0], data__more=(jsonl[1],))
  assert len(open_source(config, 'train', train=True)) == 80


def test_a_pack_has_the_examples_of_its_source_and_its_index_is_kept(jsonl, packed, monkeypatch):
  source, found = (SOURCES[name].make(root, 'train') for name, root in (
      ('jsonl', jsonl[1]), ('pack', packed)))
  assert [str(e.image) for e in found] == [e.image for e in source]
  for a, b in zip(found, source, strict=True):
    assert dataclasses.replace(a, image=b'') == dataclasses.replace(b, image=b'')
  asked, read = [], storage.read

  def counted(path, *place):
    asked.append(path)
    return read(path, *place)

  monkeypatch.setattr(storage, 'read', counted)
  found = SOURCES['pack'].make(packed, 'train')
  assert not [path for path in asked if path.endswith('.npy')]
  asked.clear()
  assert len([*found]) == 40 and len(asked) == 2  # one record, then all that follow
  assert images.read_bytes(found[3].image)[0] == images.read_bytes(source[3].image)[0]


def test_a_stopped_packing_goes_on(jsonl, monkeypatch, capsys):
  out, upload_ = f'{os.path.dirname(jsonl[1])}/stopped', storage.upload
  arguments = [jsonl[0], '--output', out, '--splits', 'train', '--file_mb', '1']
  monkeypatch.setattr(pack, '_CHUNK', 10)
  monkeypatch.setattr(pack._Packing, '__init__', _small(pack._Packing.__init__))
  done = []

  def stopped(local, path):
    if len(done) == 5:
      raise KeyboardInterrupt
    done.append(path)
    upload_(local, path)

  monkeypatch.setattr(storage, 'upload', stopped)
  assert pack.main(arguments) == 130
  # A part's own file comes last.
  assert [os.path.basename(path) for path in done] == [
      'unfinished.json', 'train-pictures-00000.tfrecord', 'train-examples-00000.tfrecord',
      'train-00000.npz', 'train-pictures-00001.tfrecord']
  monkeypatch.setattr(storage, 'upload', upload_)
  assert pack.main(arguments) == 0
  found = SOURCES['pack'].make(out, 'train')
  assert [e.question for e in found] == [f'which of {i}?' for i in range(40)]
  assert not [name for name in storage.list_dir(out) if name.endswith(('.npz', 'unfinished.json'))]
  capsys.readouterr()
  assert pack.main(arguments) == 2 and 'is a pack already' in capsys.readouterr().err


def test_pictures_of_a_bucket_are_packed_many_at_a_time(jsonl, monkeypatch, tmp_path):
  met, picture = threading.Barrier(20), pack._picture

  def together(*arguments, **options):
    met.wait(60)  # for all 20 pictures
    return picture(*arguments, **options)

  monkeypatch.setattr(pack, '_picture', together)
  assert pack.main([jsonl[1], '--output', str(tmp_path / 'out'), '--splits', 'train']) == 0


def test_damage_of_a_pack_is_one_line(packed, tmp_path):
  copy = f'{os.path.dirname(packed)}/copy'
  for name in storage.list_dir(packed):
    storage.write(f'{copy}/{name}', storage.read(f'{packed}/{name}'))
  path = f'{copy}/train-pictures-00000.tfrecord'
  whole = storage.read(path)
  opened = SOURCES['pack'].make(copy, 'train')
  for content, line in ((whole[:5000], 'has 5,000 bytes of'), (b'', 'has 0 bytes of'),
                        (bytes(len(whole)), 'is a file of another pack')):
    storage.write(path, content)
    with pytest.raises(UserError, match=f'{path}: {line}'):
      SOURCES['pack'].make(copy, 'train')
    with pytest.raises(UserError, match='record 19 is damaged'):
      images.read_bytes(opened[39].image)
  storage.remove(path)
  with pytest.raises(UserError, match=f'{path}: no such file'):
    SOURCES['pack'].make(copy, 'train')
  with pytest.raises(UserError, match='no pack, or one that is not finished'):
    SOURCES['pack'].make(os.path.dirname(packed) + '/own', 'train')


@pytest.mark.parametrize('source, root, message', [
    ('jsonl', 'gs://nowhere/own', 'gs://nowhere/own is not there, wanted a folder with'),
    ('jsonl', 's3://nowhere/own', 's3://nowhere/own is not there, wanted a folder with'),
    ('coco', f's3://{buckets.BUCKET}/nothing', 's3://bucket/nothing is not there'),
    ('jsonl', f'gs://{buckets.BUCKET}/notes.txt', 'is a file, wanted a folder'),
    ('jsonl', 'http://host/data', 'addresses of this kind are not read'),
    ('tfds', f'gs://{buckets.BUCKET}', "'tfds' reads from this machine"),
    ('hf', f's3://{buckets.BUCKET}', "'hf' reads folders of save_to_disk on this machine")])
def test_what_cannot_be_read_is_one_line(source, root, message, capsys):
  storage.write(f'gs://{buckets.BUCKET}/notes.txt', b'x')
  assert check.main([root, '--source', source, '--split', 'train']) == 2
  error = capsys.readouterr().err
  assert message in error and error.count('\n') == 1


def test_missing_credentials_are_one_line(monkeypatch, capsys):
  for name in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'):
    monkeypatch.delenv(name)
  monkeypatch.setenv('AWS_EC2_METADATA_DISABLED', 'true')
  storage._file_system_of.cache_clear()
  assert check.main([f's3://{buckets.BUCKET}/own']) == 2
  error = capsys.readouterr().err
  assert 'no valid credentials' in error and error.count('\n') == 1
  storage._file_system_of.cache_clear()


def test_refused_credentials_end_the_run_and_are_no_unreadable_pictures(
    jsonl, monkeypatch, tmp_path, capsys):
  example, = SOURCES['jsonl'].make(jsonl[1], 'train')[:1]

  class Expired:
    async_impl = True

    def cat_file(self, path, **_):
      raise PermissionError('The provided token has expired.')  # as s3fs raises it

  real = storage._file_system
  monkeypatch.setattr(storage, '_file_system', lambda kind: Expired())
  make = maker([example], Boxes(), share=1.0)
  with pytest.raises(UserError, match='p/0.jpg: no permission .The provided token has expired'):
    list(pipeline.eval_batches(make, 1))

  class Reading:  # lists folders, and reads no pictures

    def __getattr__(self, name):
      return getattr(real(storage.scheme(jsonl[1])), name)

    def cat_file(self, path, **options):
      if path.endswith('.jpg'):
        raise PermissionError('The provided token has expired.')
      return real(storage.scheme(path)).cat_file(path, **options)

  monkeypatch.setattr(storage, '_file_system', lambda kind: Reading())
  assert check.main([jsonl[1], '--split', 'train']) == 2
  assert pack.main([jsonl[1], '--output', str(tmp_path / 'pack'), '--splits', 'train']) == 2
  assert capsys.readouterr().err.count('has expired') == 2


def test_an_outage_ends_the_run_and_counts_no_picture_as_unreadable(monkeypatch):
  monkeypatch.setattr(storage, '_PAUSES', (0,))
  monkeypatch.setattr(storage, 'PATIENCE', 0.2)
  monkeypatch.setattr(storage, '_failing_since', {})
  asked = []

  class Dead:

    def cat_file(self, path, **_):
      asked.append(path)
      raise ConnectionRefusedError('refused')

  monkeypatch.setattr(storage, '_file_system', lambda kind: Dead())
  make = maker([Example('gs://away/0.jpg')], Boxes(), share=1.0)
  with pytest.raises(UserError, match='gs://away/0.jpg: no answer'):
    list(pipeline.eval_batches(make, 1))
  assert len(asked) > 2
  asked.clear()  # requests that begin during the outage do not wait anew
  with pytest.raises(UserError, match='no answer'):
    list(pipeline.eval_batches(make, 1))
  assert len(asked) == 1
