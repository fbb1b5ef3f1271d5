"""Packs give the examples and batches of their source, and say what is wrong with their files."""

import dataclasses
import errno
import json
import pathlib
import pickle
import shutil

import numpy as np
from PIL import Image
import pytest
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow
from test_pipeline import CHANGES, Boxes, assert_equal, maker

from xmodal import storage
from xmodal.data import check, pipeline
from xmodal.data.example import Example, Object, Packed
from xmodal.data.pack import examples, pack, records
from xmodal.data.scenes.shapes import Shapes
from xmodal.data.sources.jsonl import read_jsonl
from xmodal.data.sources.pack import read_pack
from xmodal.errors import UserError


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """A folder of our own format: 70 pictures of two examples each, one of them unreadable."""
  folder = tmp_path_factory.mktemp('data')
  source, lines = Shapes('train', size=70, image_size=40), []
  for i in range(70):
    Image.fromarray(source[i].image).save(folder / f'{i}.png')
    for question in (source[i].question, 'what else?'):
      lines.append({'image': f'{i}.png', 'question': question, 'answers': source[i].answers,
                    'objects': [{'name': o.name, 'box': o.box} for o in source[i].objects],
                    'caption': 'größer ✓', 'number': i / 3, 'made': i == 4, 'image_id': f'p{i}'})
  (folder / '33.png').write_bytes(b'no picture')
  for split, part in (('train', lines), ('val', lines[:9])):
    (folder / f'{split}.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in part))
  return folder


def packed(data, output, *flags):
  assert pack.main([str(data), '--output', str(output), '--file_mb', '1', *flags]) == 0
  return output


@pytest.fixture(scope='module')
def out(data, tmp_path_factory):
  return packed(data, tmp_path_factory.mktemp('pack') / 'out')


@pytest.fixture
def copy(out, tmp_path):
  return pathlib.Path(shutil.copytree(out, tmp_path / 'copy'))


def test_examples_and_batches_are_those_of_the_source(data, out):
  source, found = read_jsonl(str(data), 'train'), read_pack(str(out), 'train')
  assert len(found) == len(source) == 140 and found.num_made == 2
  assert found[-1] == found[139] and len(found[3:5]) == 2
  for a, b in zip(source, found, strict=True):
    assert isinstance(b.image, Packed) and b.image.name == a.image
    assert dataclasses.replace(b, image=a.image) == a
    assert b.image.read() == pathlib.Path(a.image).read_bytes()
  batches = [pipeline.train_batches(maker(of, Boxes(), CHANGES, share=0.1, seed=3), 8, 0, 40)
             for of in (source, pickle.loads(pickle.dumps(found)))]
  for a, b in zip(*batches, strict=True):
    assert_equal(a, b)
  assert json.loads((out / 'pack.json').read_text())['splits']['train']['pictures'] == 70
  assert pipeline.sample(found) is found


def test_another_process_maps_the_index_itself(out):
  source = read_pack(str(out), 'train')
  sent = pickle.dumps(source)
  assert len(sent) < 16 * len(source)  # bytes of an entry of one index
  assert list(pickle.loads(sent)) == list(source)


def test_tensorboard_reads_the_files_as_tfrecord(data, out):
  path = out / pack.file_name('val', 'pictures', 0)
  reader = pywrap_tensorflow.PyRecordReader_New(str(path))
  found = []
  while True:
    try:
      reader.GetNext()  # checks both checksums
    except Exception:  # its own of the file's end
      break
    found.append(reader.record())
  assert found[1:] == [(data / f'{i}.png').read_bytes() for i in range(5)]


def test_a_stopped_packing_goes_on_to_the_same_files(data, out, tmp_path, monkeypatch):
  add, count = records.Writer.add, []

  def stopped(self, content):
    count.append(1)
    if len(count) == 150:
      raise KeyboardInterrupt
    add(self, content)

  monkeypatch.setattr(pack, '_CHUNK', 8)
  monkeypatch.setattr(pack.uuid, 'uuid4', lambda: type('', (), {
      'hex': json.loads((out / 'pack.json').read_text())['pack']}))
  limited = [str(data), '--output', str(tmp_path / 'again')]
  for output in (tmp_path / 'again', tmp_path / 'whole'):
    limited[2] = str(output)
    with monkeypatch.context() as patched:
      patched.setattr(pack._Packing, '__init__', _small(pack._Packing.__init__))
      if output.name == 'again':
        patched.setattr(records.Writer, 'add', stopped)
        assert pack.main(limited) == 130
        patched.setattr(records.Writer, 'add', add)
        assert (output / 'train-00000.npz').exists() and not (output / 'pack.json').exists()
        with pytest.raises(UserError, match='no pack, or one that is not finished'):
          read_pack(str(output), 'train')
        assert pack.main([*limited, '--longest', '20']) == 2
      assert pack.main(limited) == 0
  names = sorted(path.name for path in (tmp_path / 'whole').iterdir())
  assert len(names) > 6 and not any(name.endswith(('.npz', '.part')) for name in names)
  assert sorted(path.name for path in (tmp_path / 'again').iterdir()) == names
  for name in names:
    assert (tmp_path / 'again' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()


def test_files_of_examples_are_no_larger_than_those_of_pictures(tmp_path, monkeypatch):
  Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
  (tmp_path / 'train.jsonl').write_text('\n'.join(
      json.dumps({'image': 'a.png', 'question': f'{i}? ' + 'x' * 300}) for i in range(100)))
  monkeypatch.setattr(pack, '_CHUNK', 8)
  monkeypatch.setattr(pack._Packing, '__init__', _small(pack._Packing.__init__))
  out = packed(tmp_path, tmp_path / 'out')
  sizes = json.loads((out / 'pack.json').read_text())['splits']['train']['files']['examples']
  assert len(sizes) > 6 and max(sizes) < 4000 + 8 * 400
  assert [e.question[:3] for e in read_pack(str(out), 'train')][::50] == ['0? ', '50?']


def _small(init):
  def small(self, *arguments):
    *others, file_bytes, max_bad_share = arguments
    del file_bytes
    init(self, *others, 4000, max_bad_share)

  return small


def test_data_that_changed_since_a_pack_was_begun_are_refused(tmp_path, monkeypatch, capsys):
  lines = [{'image': f'{i}.png', 'question': f'what is {i}?'} for i in range(30)]
  for i in range(30):
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 20, 3), np.uint8)).save(
        tmp_path / f'{i}.png')

  def write(changes):
    (tmp_path / 'train.jsonl').write_text('\n'.join(
        json.dumps(changes.get(i, line)) for i, line in enumerate(lines)))

  def stop(self, *arguments):
    if arguments[1] == 1:  # the second part
      raise KeyboardInterrupt
    return write_part(self, *arguments)

  monkeypatch.setattr(pack, '_CHUNK', 8)
  monkeypatch.setattr(pack._Packing, '__init__', _small(pack._Packing.__init__))
  write_part = pack._Packing._write_part
  write({})
  arguments = [str(tmp_path), '--output', str(tmp_path / 'out')]
  with monkeypatch.context() as patch:
    patch.setattr(pack._Packing, '_write_part', stop)
    assert pack.main(arguments) == 130
  for changes in ({2: lines[2] | {'question': 'how many?'}}, {3: lines[3] | {'image': '29.png'}},
                  {1: lines[4], 4: lines[1]}):
    write(changes)
    assert pack.main(arguments) == 2
    assert "examples 0 to 7 of 'train' are others" in capsys.readouterr().err
  write({25: lines[25] | {'question': 'not packed yet'}})
  assert pack.main(arguments) == 0
  assert read_pack(str(tmp_path / 'out'), 'train')[25].question == 'not packed yet'


def test_a_disk_or_bucket_that_gives_no_pictures_ends_the_packing(
    data, out, tmp_path, monkeypatch, capsys):
  output, read, count = tmp_path / 'new', storage.read, []

  def fails(path, *place):
    if path.endswith('.png'):
      count.append(path)
      if len(count) > 30:
        raise error
    return read(path, *place)

  for error in (OSError(errno.EIO, 'Input/output error'), storage.Unreachable('no answer'),
                storage.AccessRefused('no valid credentials')):
    count.clear()
    with monkeypatch.context() as patch:
      patch.setattr(storage, 'read', fails)
      assert pack.main([str(data), '--output', str(output), '--splits', 'train']) == 2
    assert str(error).rpartition('] ')[2] in capsys.readouterr().err
    assert not (output / 'pack.json').exists()
  assert pack.main([str(data), '--output', str(output), '--splits', 'train']) == 0
  name = pack.file_name('train', 'pictures', 0)
  assert (output / name).stat().st_size == (out / name).stat().st_size  # all are there


def test_too_many_unreadable_pictures_end_the_packing(tmp_path, capsys):
  Image.new('RGB', (8, 8)).save(tmp_path / '0.png')
  for i in range(1, 4):
    (tmp_path / f'{i}.png').write_bytes(b'no picture')
  (tmp_path / 'train.jsonl').write_text(
      '\n'.join(json.dumps({'image': f'{i}.png'}) for i in range(4)))
  arguments = [str(tmp_path), '--output', str(tmp_path / 'out'), '--longest', '8']
  assert pack.main(arguments) == 2
  assert 'more than 5.0% as many pictures as examples' in capsys.readouterr().err
  assert pack.main([*arguments, '--max_bad_share', '0.75']) == 0
  assert '3 pictures could not be read' in capsys.readouterr().out


def test_smaller_pictures_and_their_boxes(tmp_path):
  Image.new('RGB', (200, 100), 'red').save(tmp_path / 'a.png')
  line = {'image': 'a.png', 'objects': [{'name': 'x', 'box': [20, 10, 100, 50]}]}
  (tmp_path / 'train.jsonl').write_text(json.dumps(line))
  example, = read_pack(str(packed(tmp_path, tmp_path / 'out', '--longest', '50')), 'train')
  thing, = example.objects
  assert thing.box == (5, 2.5, 25, 12.5)
  assert pipeline.images.decode(example.image, (8, 8)).size == (25, 50)


def test_pixels_bytes_and_inputs_of_other_senses_are_kept(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
  for image in (pixels, b'any file'):
    example = Example(image, inputs={'touch': np.arange(3, dtype=np.float32)}, objects=(),
                      expression=Object('x', (0.0, 0.0, 2.0, 3.0), area=5.0, category_id=7))
    data, scale = examples.picture_file(image, None, 95)
    found = examples.from_record(examples.to_record(example, 3, scale), {3: data}.get)
    np.testing.assert_array_equal(found.image, image)
    np.testing.assert_array_equal(found.inputs['touch'], example.inputs['touch'])
    assert found.seed() == example.seed()
    assert dataclasses.replace(found, image='', inputs=None) == dataclasses.replace(
        example, image='', inputs=None)


def change(path, place, by=1):
  data = bytearray(path.read_bytes())
  data[place] ^= by
  path.write_bytes(data)


def test_a_record_that_rots_counts_as_an_unreadable_picture(copy):
  change(copy / pack.file_name('val', 'pictures', 0), -6)  # of the last picture, of record 8
  change(copy / pack.file_name('val', 'examples', 0),
         int(np.load(copy / 'val-examples.npy')[0]['offset']))
  make = maker(read_pack(str(copy), 'val'), Boxes(), share=0.5)
  batch, = pipeline.eval_batches(make, 9)
  assert batch['valid'].tolist() == [False, *[True] * 7, False]
  assert 'val-examples-00000.tfrecord: record 0 is damaged' in make.bad.reasons[0]
  assert 'val-pictures-00000.tfrecord: record 4 is damaged' in make.bad.reasons[8]


@pytest.mark.parametrize('spoil, message', [
    (lambda d: (d / 'val-pictures-00000.tfrecord').unlink(), 'No such file.*copy the pack again'),
    (lambda d: (d / 'val-pictures-00000.tfrecord').write_bytes(b'x' * 50), 'has 50 bytes of'),
    (lambda d: change(d / 'val-examples-00000.tfrecord', 14), 'is a file of another pack'),
    (lambda d: (d / 'val-examples.npy').write_bytes(b'\x93NUMPY'), 'cannot be read'),
    (lambda d: shutil.copy(d / 'train-examples.npy', d / 'val-examples.npy'),
     'is the index of another pack'),
    (lambda d: (d / 'pack.json').write_text('{"version": 1'), 'cannot be read'),
    (lambda d: (d / 'pack.json').write_text('{"version": 2, "splits": {}}'),
     'is of version 2, this program reads 1'),
    (lambda d: (d / 'pack.json').unlink(), 'no pack, or one that is not finished')])
def test_a_damaged_pack_is_one_line(copy, spoil, message):
  spoil(copy)
  with pytest.raises(UserError, match=message) as error:
    read_pack(str(copy), 'val')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name, message', [
    ('train-examples-00000.tfrecord', 'is a file of another pack'),
    ('train-pictures-00000.tfrecord', 'is a file of another pack'),
    ('train-examples.npy', 'is the index of another pack')])
def test_a_file_of_another_pack_of_as_many_examples_is_named(data, copy, tmp_path, name, message):
  lines = (data / 'train.jsonl').read_text().replace('what else?', 'what?')
  for path in data.glob('*.png'):
    shutil.copy(path, tmp_path / path.name)
  (tmp_path / 'train.jsonl').write_text(lines)
  shutil.copy(packed(tmp_path, tmp_path / 'other') / name, copy / name)
  with pytest.raises(UserError, match=f'{name}: {message}'):
    read_pack(str(copy), 'train')


def test_a_damaged_index_is_no_defect(copy):
  places = np.load(copy / 'val-pictures.npy')
  places['file'][1] = 7
  np.save(copy / 'val-pictures.npy', places)
  make = maker(read_pack(str(copy), 'val'), Boxes(), share=0.5)
  batch, = pipeline.eval_batches(make, 9)
  assert batch['valid'].sum() == 7
  assert 'its index is damaged' in make.bad.reasons[2]


def test_check_reads_all_splits_of_a_pack(tmp_path, capsys):
  Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
  line = {'image': 'a.png', 'objects': [{'name': 'x', 'box': [5, 1, 7, 2]}]}
  (tmp_path / 'validation.jsonl').write_text(json.dumps(line))
  packed(tmp_path, tmp_path / 'out', '--splits', 'validation')
  capsys.readouterr()
  assert check.main([str(tmp_path / 'out'), '--source', 'pack']) == 1
  out = capsys.readouterr().out
  assert 'has box [5.0, 1.0, 7.0, 2.0] outside' in out and 'validation: 1 examples' in out


@pytest.mark.parametrize('flags, message', [
    (['--longest', '3'], '--longest 3: wanted 8 to'),
    (['--splits', 'other'], 'other.jsonl: no such file'),
    (['--config.data.delimiter=;'], 'not understood; options of the source')])
def test_mistakes_are_one_line(data, tmp_path, capsys, flags, message):
  assert pack.main([str(data), '--output', str(tmp_path / 'new'), *flags]) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / 'new').exists()


def test_a_split_that_is_not_there_and_a_folder_in_use(data, out, tmp_path, capsys):
  with pytest.raises(UserError, match="no split 'test'; it has train, val"):
    read_pack(str(out), 'test')
  (tmp_path / 'note').touch()
  for folder, words in ((out, 'is a pack already'), (tmp_path, 'is not empty')):
    assert pack.main([str(data), '--output', str(folder)]) == 2
    assert words in capsys.readouterr().err
