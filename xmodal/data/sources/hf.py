"""Data sets of the library `datasets`: of the Hugging Face hub, or folders of save_to_disk."""

from collections.abc import Iterable
import functools
import re

from xmodal import paths, storage
from xmodal.data.sources import columns, features, records
from xmodal.data.sources.features import Feature
from xmodal.data.sources.files import MissingSplit, existing_folder
from xmodal.data.sources.packages import need
from xmodal.data.sources.records import Records
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError
from xmodal.options import Option, Options

OPTIONS: Options = {**features.OPTIONS, 'corners': Option(
    False, 'Whether boxes are (xmin, ymin, xmax, ymax) in pixels, not (x, y, width, height).')}

# Pattern of a Value's dtype -> kind of feature.
_OF_DTYPE = {'bool': features.FLAG, 'float|double|decimal|u?int': features.NUMBER,
             '(large_)?string': features.TEXT, '(large_)?binary': features.PICTURE}


def splits_of_hf(root: str, name: str, **_) -> list[str]:
  """Names of the splits of a data set."""
  return list(_load(root, name))


@SOURCES.register('hf', options=OPTIONS, named=True, splits=splits_of_hf)
def read_hf(root: str, split: str, name: str = '', fields: tuple = (),
            question: str = columns.WHAT, corners: bool = False) -> Records:
  """Reads a data set by `datasets`, whose columns are found by usual names or given.

  Only the columns in use are read, and those of pictures when a picture is decoded. The usual names
  are those of the fields and others, such as text for captions; the label of a data set for
  classification is the answer to `question`. Objects are a column of {bbox, category}.

  Args:
    root: a folder that save_to_disk wrote; with a name, the cache of downloads ('': the library's
      own).
    split: as `datasets` writes it, such as 'validation', 'train[:90%]' or 'train+test'. A folder
      of a single split has that split alone, 'train' if it has no name.
    name: on the hub, such as 'lmms-lab/VQAv2' or 'owner/name:config'; '' for a folder.
    fields: pairs such as ('box', 'objects/bbox'), in place of columns found; '' leaves a field out.
      See xmodal.data.sources.features.
    question, corners: see OPTIONS.

  Returns:
    One Example a row, question or expression.

  Raises:
    UserError: the package, the data set, the split or a column is missing, or a box is not in
      pixels.
  """
  splits = _load(root, name)
  title = name or paths.local(root, 'data folder')
  where = f'{title}, {split!r}'
  rows = _rows(splits, split, title)
  found = {feature.path: feature for feature in map(_feature, _leaves(rows.features))}
  matched = features.match(features.find(found), fields, found, where)
  return Records(functools.partial(_only, rows), matched, question,
                 records.corners if corners else records.sides, where,
                 features.unread_boxes(matched, fields, found, where))


def _load(root, name):
  """The splits of a data set, by name."""
  if not name and storage.is_remote(root):
    raise UserError(f"config.data.root={root}: config.data.source='hf' reads folders of "
                    'save_to_disk on this machine; copy it here, or write Parquet (Dataset.'
                    "to_parquet) and set config.data.source='parquet'")
  need('hf', ('datasets',))
  import datasets

  if not name:
    root = existing_folder(root, 'a data set that save_to_disk of `datasets` wrote')
    try:
      loaded = datasets.load_from_disk(root)
    except (FileNotFoundError, ValueError) as error:
      raise UserError(f'{root}: not a folder that save_to_disk of `datasets` wrote '
                      f'({_line(error)}); set config.data.root or config.data.name') from None
    return loaded if isinstance(loaded, dict) else {str(loaded.split or 'train'): loaded}
  owner, _, config = name.partition(':')
  cache = paths.local(root, 'config.data.root:') if root else None
  try:
    return datasets.load_dataset(owner, config or None, cache_dir=cache)
  except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
    raise UserError(f'config.data.name={name!r} cannot be loaded: {_line(error)}') from None


def _rows(splits, split, title):
  """The rows of a split: one there is, a part of one, or several joined."""
  import datasets

  names = ', '.join(splits)
  wanted = {part.partition('[')[0].strip() for part in split.split('+')}
  if not wanted <= set(splits):
    raise MissingSplit(f'{title} has no split {split!r}; splits: {names}')
  try:
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(
        {name: len(rows) for name, rows in splits.items()})
  except (ValueError, AssertionError) as error:
    raise MissingSplit(f'{title} has no split {split!r} ({_line(error)}); splits: {names}, and '
                       "parts such as 'train[:90%]'") from None
  chosen = [splits[part.splitname].select(numbers) for part in parts
            if (numbers := range(len(splits[part.splitname]))[part.from_:part.to])]
  if not chosen:
    raise UserError(f'{title}, {split!r}: has no examples; take another split')
  return datasets.concatenate_datasets(chosen)


def _line(error):
  return ' '.join(re.sub(r'\s+', ' ', str(error)).split())


def _leaves(feature, at=(), depth=0):
  """Yields (keys, number of lists around it, feature) of each feature that holds no others."""
  import datasets

  if isinstance(feature, dict):
    for key, inner in feature.items():
      yield from _leaves(inner, (*at, key), depth)
  elif isinstance(feature, list):
    yield from _leaves(feature[0], at, depth + 1)
  elif isinstance(feature, datasets.List | datasets.LargeList) and not (
      depth and _is_box(feature)):  # a list once a record is no list of boxes
    yield from _leaves(feature.feature, at, depth + 1)
  else:
    yield at, depth, feature


def _is_box(feature):
  """Whether a feature may be a box: a list of four numbers."""
  import datasets

  inner = feature.feature
  return (getattr(feature, 'length', -1) in (4, -1) and isinstance(inner, datasets.Value)
          and re.match(r'float|double|u?int', inner.dtype) is not None)


def _feature(leaf):
  """The Feature of a leaf: its kind, and how its values become Python's."""
  import datasets

  keys, depth, feature = leaf
  kind, convert = '', None
  if isinstance(feature, datasets.Image) and len(keys) == 1:
    kind, convert = features.PICTURE, _file
  elif isinstance(feature, datasets.ClassLabel):
    kind, convert = features.CLASS, functools.partial(features.class_name, feature.names)
  elif isinstance(feature, datasets.List | datasets.LargeList):
    kind = features.BOX
  elif isinstance(feature, datasets.Value):
    kind = next((kind for pattern, kind in _OF_DTYPE.items() if re.match(pattern, feature.dtype)),
                '')

  return Feature(keys, kind, depth, repr(feature), convert)


def _file(picture):
  """The bytes of a picture file, or its path where it lies beside the table."""
  return picture['bytes'] or picture['path']


def _only(rows, wanted: Iterable[Feature]):
  """The rows with only the columns in use, whose pictures are not decoded."""
  import datasets

  rows = rows.with_format(None).select_columns(sorted({feature.keys[0] for feature in wanted}))
  for name, feature in rows.features.items():
    if isinstance(feature, datasets.Image):
      rows = rows.cast_column(name, datasets.Image(decode=False))
  return rows
