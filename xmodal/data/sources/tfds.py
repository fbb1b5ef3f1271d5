"""Data sets that TensorFlow Datasets has prepared (https://www.tensorflow.org/datasets)."""

from collections.abc import Iterable, Mapping, Sequence
import os

import numpy as np

from xmodal.data.sources import columns
from xmodal.data.sources.columns import Column, Records
from xmodal.data.sources.files import MissingSplit, existing_folder
from xmodal.data.sources.packages import need
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
# Letter of a NumPy dtype -> kind of column; others are text.
_OF_DTYPE = {'b': columns.FLAG, 'i': columns.NUMBER, 'u': columns.NUMBER, 'f': columns.NUMBER}
# TensorFlow, which computes nothing here, prints nothing about its instructions.
_QUIET = {'TF_CPP_MIN_LOG_LEVEL': '2', 'TF_ENABLE_ONEDNN_OPTS': '0'}
_MODULES = ('tensorflow_datasets', 'tensorflow', 'array_record', 'importlib_resources')


def splits_of_tfds(root: str, name: str, **_) -> list[str]:
  """Names of the splits of a prepared data set."""
  return list(_open(root, name).info.splits)


@SOURCES.register('tfds', options=columns.OPTIONS, splits=splits_of_tfds)
def read_tfds(root: str, split: str, name: str, fields: Mapping[str, str], question: str
              ) -> Records:
  """Reads a data set that TFDS prepared in a format of random access, file_format='array_record'.

  Pictures are kept as files and decoded later; only the features in use are parsed. The features
  of coco, coco_captions, voc, clevr, ref_coco and gref are known. Of other builders, those with
  usual names are found: image and label of a data set for classification, whose label is the
  answer to `question`. ImageNet's labels are WordNet's numbers.

  Args:
    root: the folder of all data sets (data_dir); without a name, that of one version of one.
    split: as TFDS writes it, such as 'validation', 'train[:90%]' or 'train+test'.
    name: of the builder, as TFDS writes it, such as 'coco/2017' or 'voc/2007:4.0.0'; or ''.
    fields: field -> feature, such as {'box': 'objects/bbox'}, in place of those known or found;
      '' leaves a field out. See xmodal.data.sources.columns.
    question: see columns.OPTIONS.

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
  leaves = list(_leaves(builder.info.features))
  found = {'/'.join(at): _column(at, depth, feature) for at, depth, feature in leaves}
  paths = _BUILDERS.get(builder.name) or columns.find_columns(found)
  if builder.name in _BUILDERS and not set(paths.values()) <= found.keys():
    paths = columns.find_columns(found)  # another config: coco/2017_panoptic
  paths = {field: path for field, path in {**paths, **fields}.items() if path}
  matched = columns.match_columns(paths, found, where)
  deciding = [column for field, column in matched.items() if field in ('question', 'expression')]
  return Records(_Parsed(builder, split, leaves, matched.values()), matched, question,
                 columns.boxes_in_shares, where, _Parsed(builder, split, leaves, deciding))


def _open(root, name):
  """The builder of a prepared data set with random access."""
  need('tfds', _MODULES)
  for key, value in _QUIET.items():
    os.environ.setdefault(key, value)
  import tensorflow_datasets as tfds

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


def _column(at, depth, feature):
  """The Column of a feature: its kind, and how its values become Python's."""
  import tensorflow_datasets as tfds

  kind, convert = '', lambda value: value
  if isinstance(feature, tfds.features.Image) and not isinstance(feature,
                                                                 tfds.features.LabeledImage):
    kind = columns.PICTURE
  elif isinstance(feature, tfds.features.ClassLabel):
    names = feature.names
    # -1: the class is not known, as in many test splits.
    kind, convert = columns.CLASS, lambda value: names[value] if value >= 0 else None
  elif isinstance(feature, tfds.features.BBoxFeature):
    kind, convert = columns.BOX, lambda value: list(map(float, value))
  elif isinstance(feature, tfds.features.Tensor) and feature.shape == ():
    dtype = np.dtype(feature.np_dtype).kind
    kind = _OF_DTYPE.get(dtype, columns.TEXT)
    convert = {'b': bool, 'i': int, 'u': int, 'f': float}.get(dtype, _text)

  def read(record):
    for key in at:
      record = record[key]
    return _nested(record, depth, convert)

  return Column('/'.join(at), kind, depth, repr(feature), read)


def _nested(value, depth, convert):
  if not depth:
    return convert(value)
  return [_nested(item, depth - 1, convert) for item in value]


def _text(value):
  return value.decode('utf-8', 'replace') if isinstance(value, bytes) else str(value)


class _Parsed:
  """The records of a split, of which only some features are parsed.

  Several threads may read at once: readers of ArrayRecord may be shared, and parsing keeps nothing.

  Args:
    builder: of the data set.
    split: name of the split.
    leaves: of its features, see _leaves.
    wanted: the columns to parse; pictures are not decoded.
  """

  def __init__(self, builder, split: str, leaves: Sequence[tuple], wanted: Iterable[Column]):
    import tensorflow_datasets as tfds

    paths = {column.path for column in wanted}
    # TFDS cannot leave out lists of lists.
    parsed = {at: feature for at, depth, feature in leaves if '/'.join(at) in paths or depth > 1}
    self._features = _part(builder.info.features, parsed)
    self._decoders = _tree({at: tfds.decode.SkipDecoding() for at, feature in parsed.items()
                            if isinstance(feature, tfds.features.Image)}) or None
    self._raw = builder.as_data_source(
        split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)

  def __len__(self) -> int:
    return len(self._raw)

  def __getitem__(self, index: int) -> dict:
    return self._features.deserialize_example_np(self._raw[index], decoders=self._decoders)


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
