"""Data sets that TensorFlow Datasets has prepared (https://www.tensorflow.org/datasets)."""

from collections.abc import Iterable, Sequence
import functools
import json
import os
import threading

import numpy as np

import xmodal
from xmodal import storage
from xmodal.data.sources import columns, features, records
from xmodal.data.sources.features import Feature
from xmodal.data.sources.files import MissingSplit, existing_folder
from xmodal.data.sources.packages import need
from xmodal.data.sources.records import Records
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError, did_you_mean

_BOXES = {'box': 'objects/bbox', 'name': 'objects/label'}
_EXPRESSIONS = {'image': 'image', 'image_id': 'image/id', 'box': 'objects/bbox',
                'expression': 'objects/refexp/raw'}
# Builder -> config.data.fields of it.
_BUILDERS = {
    'coco': {'image': 'image', 'image_id': 'image/id', **_BOXES, 'ignore': 'objects/is_crowd'},
    'coco_captions': {'image': 'image', 'image_id': 'image/id', **_BOXES,
                      'ignore': 'objects/is_crowd', 'caption': 'captions/text'},
    'voc': {'image': 'image', 'image_id': 'image/filename', **_BOXES,
            'ignore': 'objects/is_difficult'},
    'clevr': {'image': 'image', 'image_id': 'file_name', 'question': 'question_answer/question',
              'answers': 'question_answer/answer'},
    # Not their objects: only those with an expression are there, or none has a name.
    'ref_coco': _EXPRESSIONS, 'gref': _EXPRESSIONS}
# Letter of a NumPy dtype -> kind of feature and Python's type of it; others are text.
_OF_DTYPE = {'b': (features.FLAG, bool), 'i': (features.NUMBER, int), 'u': (features.NUMBER, int),
             'f': (features.NUMBER, float)}
# TensorFlow, which computes nothing here, prints nothing about its instructions.
_QUIET = {'TF_CPP_MIN_LOG_LEVEL': '2', 'TF_ENABLE_ONEDNN_OPTS': '0'}
_MODULES = ('tensorflow_datasets', 'tensorflow', 'array_record', 'importlib_resources')


def splits_of_tfds(root: str, name: str, **_) -> list[str]:
  """Names of the splits of a prepared data set."""
  return list(_open(root, name).info.splits)


@SOURCES.register('tfds', options=features.OPTIONS, splits=splits_of_tfds)
def read_tfds(root: str, split: str, name: str = '', fields: tuple = (),
              question: str = columns.WHAT) -> Records:
  """Reads a data set that TFDS prepared in a format of random access, file_format='array_record'.

  Only the features in use are parsed, and pictures when they are decoded. A record is read with its
  picture, so the first run reads all files for its vocabularies, and keeps in the user's cache what
  it found.

  The features of coco, coco_captions, voc, clevr, ref_coco and gref are known. Of other builders,
  those with usual names are found: image and label of a data set for classification, whose label is
  the answer to `question`. ImageNet's labels are WordNet's numbers.

  Args:
    root: the folder of all data sets (data_dir); without a name, that of one version of one.
    split: as TFDS writes it, such as 'validation', 'train[:90%]' or 'train+test'.
    name: of the builder, as TFDS writes it, such as 'coco/2017' or 'voc/2007:4.0.0'; or ''.
    fields: pairs such as ('box', 'objects/bbox'), in place of features known or found; '' leaves a
      field out. See xmodal.data.sources.features.
    question: see columns.QUESTION.

  Returns:
    One Example a record, question (clevr) or expression (ref_coco, gref). Boxes are in pixels of
    the upright picture, in whose shares TFDS has them.

  Raises:
    UserError: a package, the data set, the split or a feature is missing, or the files have no
      random access.
  """
  builder = _open(root, name)
  where = f'{builder.data_path}, {split!r}'
  splits = builder.info.splits
  try:
    size = splits[split].num_examples
  except (ValueError, KeyError) as error:
    known = split.split('[')[0].split('+')[0].strip() in splits
    raise MissingSplit(f'{builder.data_path} has no split {split!r}; splits: {", ".join(splits)}'
                       + (f' ({" ".join(str(error).split())})' if known else '')) from None
  if not size:
    raise UserError(f'{where}: has no examples; take another split')
  found = {feature.path: feature for feature in map(_feature, _leaves(builder.info.features))}
  usual = _BUILDERS.get(builder.name)
  if not usual or not set(usual.values()) <= found.keys():  # another config: coco/2017_panoptic
    usual = features.find(found)
  matched = features.match(usual, fields, found, where)
  return Records(functools.partial(_Parsed, _Files(str(builder.data_path), split)), matched,
                 question, records.boxes_in_shares, where,
                 features.unread_boxes(matched, fields, found, where),
                 _fingerprint(builder, split, question, matched))


def _fingerprint(builder, split, question, matched):
  """Tells the Examples of a split from any others."""
  path = os.path.join(builder.data_path, 'dataset_info.json')
  with open(path, encoding='utf-8') as f:
    info = f.read()
  return json.dumps([xmodal.__version__, str(builder.data_path), info, os.stat(path).st_mtime_ns,
                     split, question, {field: one.path for field, one in matched.items()}])


def _import():
  """The module tensorflow_datasets, with all that it needs."""
  need('tfds', _MODULES)
  for key, value in _QUIET.items():
    os.environ.setdefault(key, value)
  import tensorflow_datasets as tfds
  return tfds


def _open(root, name):
  """The builder of a prepared data set with random access."""
  if storage.is_remote(root):
    raise UserError(f"config.data.root={root}: config.data.source='tfds' reads from this machine "
                    'alone, as array_record does; copy the folder here, and pack it into a bucket '
                    'with `xmodal pack`')
  tfds = _import()
  root = existing_folder(root, 'data sets that TFDS prepared')
  if not name and not os.path.isfile(os.path.join(root, 'dataset_info.json')):
    raise UserError(f'{root} is not a version of a data set of TFDS, such as coco/2017/1.1.0; give '
                    'that folder, or config.data.name')
  try:
    builder = tfds.builder(name, data_dir=root) if name else tfds.builder_from_directory(root)
  except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
    known = isinstance(error, tfds.core.DatasetNotFoundError) and tfds.list_builders(
        with_community_datasets=False)
    why = did_you_mean(name, known) if known else f' ({" ".join(str(error).split())})'
    raise UserError(f'config.data.name={name!r}: no such data set{why}; folders in {root}: '
                    f'{", ".join(sorted(os.listdir(root)))}') from None
  if not builder.info.splits:
    raise UserError(f'{builder.data_path}: not prepared; run: {_preparation(name, root)}')
  formats = {kind.value for kind in builder.info.available_file_formats()}
  if 'array_record' not in formats:
    new = f'{root}_array_record'
    raise UserError(f'{builder.data_path}: its files are {", ".join(sorted(formats))}, which have '
                    f'no random access; set config.data.root={new!r} after running: '
                    f'{_preparation(":".join(builder.info.full_name.rsplit("/", 1)), new, root)}')
  return builder


def _preparation(name, root, downloaded=''):
  """The command that prepares a data set."""
  given = downloaded and f'download_dir={os.path.join(downloaded, "downloads")!r}'
  return (f'python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}, data_dir={root!r}'
          f", file_format='array_record').download_and_prepare({given})\"")


def _leaves(feature, at=(), depth=0):
  """Yields (keys, number of lists around it, feature) of each feature that holds no others."""
  import tensorflow_datasets as tfds

  if isinstance(feature, tfds.features.FeaturesDict):
    for key, inner in feature.items():
      yield from _leaves(inner, (*at, key), depth)
  elif isinstance(feature, tfds.features.Sequence):
    yield from _leaves(feature.feature, at, depth + 1)
  else:
    yield at, depth, feature


def _feature(leaf):
  """The Feature of a leaf: its kind, and how its values become Python's."""
  import tensorflow_datasets as tfds

  keys, depth, feature = leaf
  kind, convert = '', None
  if isinstance(feature, tfds.features.Image) and not isinstance(feature,
                                                                 tfds.features.LabeledImage):
    kind = features.PICTURE
  elif isinstance(feature, tfds.features.ClassLabel):
    kind, convert = features.CLASS, functools.partial(features.class_name, feature.names)
  elif isinstance(feature, tfds.features.BBoxFeature):
    kind, convert = features.BOX, _floats
  elif isinstance(feature, tfds.features.Tensor) and feature.shape == ():
    kind, convert = _OF_DTYPE.get(np.dtype(feature.np_dtype).kind, (features.TEXT, _text))
  return Feature(keys, kind, depth, repr(feature), convert)


def _floats(values):
  return list(map(float, values))


def _text(value):
  return value.decode('utf-8', 'replace') if isinstance(value, bytes) else str(value)


class _Files:
  """The records of a split as bytes; threads read at the same time.

  Another process gets it by pickle and opens the files itself: nothing is read here before, as
  readers have threads that a fork would lose.
  """

  def __init__(self, folder: str, split: str):
    """
    Args:
      folder: of a version of a data set.
      split: as TFDS writes it.
    """
    tfds = _import()
    self._folder, self._split = folder, split
    builder = tfds.builder_from_directory(folder)
    self.features = builder.info.features
    self._records = builder.as_data_source(
        split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    self._last = threading.local()

  def __reduce__(self):
    return _Files, (self._folder, self._split)

  def __len__(self) -> int:
    return len(self._records)

  def read(self, index: int) -> bytes:
    """A record; a thread that reads one twice, for its texts and then its picture, has it still."""
    if getattr(self._last, 'index', None) != index:
      self._last.record, self._last.index = self._records[index], index
    return self._last.record


class _Parsed(Sequence):
  """The records of a split, of which only some features are parsed. Pictures are not decoded."""

  def __init__(self, files: _Files, wanted: Iterable[Feature]):
    tfds = _import()
    self._files, self._wanted = files, tuple(wanted)
    paths = {feature.keys for feature in self._wanted}
    # TFDS cannot leave out lists of lists.
    parsed = {keys: feature for keys, depth, feature in _leaves(files.features)
              if keys in paths or depth > 1}
    self._features = _part(files.features, parsed)
    self._decoders = _tree({keys: tfds.decode.SkipDecoding() for keys, feature in parsed.items()
                            if isinstance(feature, tfds.features.Image)}) or None

  def __reduce__(self):
    return _Parsed, (self._files, self._wanted)

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> dict:
    if index >= len(self):
      raise IndexError(index)
    return self._features.deserialize_example_np(self._files.read(index), decoders=self._decoders)


def _part(feature, parsed, at=()):
  """The feature at some keys with only those inside it whose keys are in `parsed`."""
  import tensorflow_datasets as tfds

  # Not tfds.decode.PartialDecoding: it warns of its own use of TFDS.
  if isinstance(feature, tfds.features.FeaturesDict):
    return tfds.features.FeaturesDict({
        key: _part(inner, parsed, (*at, key)) for key, inner in feature.items()
        if any(keys[:len(at) + 1] == (*at, key) for keys in parsed)})
  if isinstance(feature, tfds.features.Sequence):
    return tfds.features.Sequence(_part(feature.feature, parsed, at))
  return feature


def _tree(values):
  """{('a', 'b'): value} -> {'a': {'b': value}}."""
  tree = {}
  for at, value in values.items():
    inner = tree
    for key in at[:-1]:
      inner = inner.setdefault(key, {})
    inner[at[-1]] = value
  return tree
