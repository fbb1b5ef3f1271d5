"""Data sets of the library `datasets`: of the Hugging Face hub, or folders of save_to_disk."""

from collections.abc import Mapping
import re

from xmodal import paths
from xmodal.data.sources import columns
from xmodal.data.sources.columns import Column, Records
from xmodal.data.sources.files import MissingSplit, existing_folder
from xmodal.data.sources.packages import need
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError
from xmodal.options import Option, Options

OPTIONS: Options = {**columns.OPTIONS, 'corners': Option(
    False, 'Whether boxes are (xmin, ymin, xmax, ymax) in pixels, not (x, y, width, height).')}


# Pattern of a Value's dtype -> kind of column.
_OF_DTYPE = {'bool': columns.FLAG, 'float|double|decimal|u?int': columns.NUMBER,
             '(large_)?string': columns.TEXT, '(large_)?binary': columns.PICTURE}


def splits_of_hf(root: str, name: str, **_) -> list[str]:
  """Names of the splits of a data set."""
  return list(_load(root, name))


@SOURCES.register('hf', options=OPTIONS, named=True, splits=splits_of_hf)
def read_hf(root: str, split: str, name: str, fields: Mapping[str, str], question: str,
            corners: bool) -> Records:
  """Reads a data set by `datasets`, whose columns are found by usual names or given.

  Pictures are kept as files and decoded later; only the columns in use are read. The usual names
  are those of the fields and others, such as text for captions; the label of a data set for
  classification is the answer to `question`. Objects are a column of {bbox, category}.

  Args:
    root: a folder that save_to_disk wrote; with a name, the cache of downloads ('': the library's
      own).
    split: as `datasets` writes it, such as 'validation', 'train[:90%]' or 'train+test'. A folder
      of a single split has that split alone, 'train' if it has no name.
    name: on the hub, such as 'lmms-lab/VQAv2' or 'owner/name:config'; '' for a folder.
    fields: field -> column, such as {'box': 'objects/bbox'}, in place of those found; '' leaves a
      field out. See xmodal.data.sources.columns.
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
  leaves = {'/'.join(leaf[0]): leaf for leaf in _leaves(rows.features)}
  found = {path: _column(*leaf) for path, leaf in leaves.items()}
  given = {**columns.find_columns(found), **fields}
  matched = columns.match_columns({field: path for field, path in given.items() if path}, found,
                                  where)
  deciding = [column for field, column in matched.items() if field in ('question', 'expression')]
  return Records(_only(rows, matched.values(), leaves), matched, question,
                 columns.corners if corners else columns.sides, where,
                 _only(rows, deciding, leaves) if deciding else None)


def _load(root, name):
  """The splits of a data set, by name."""
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
  elif isinstance(feature, datasets.List | datasets.LargeList) and not _is_box(feature):
    yield from _leaves(feature.feature, at, depth + 1)
  else:
    yield at, depth, feature


def _is_box(feature):
  """Whether a feature may be a box: a list of four numbers."""
  import datasets

  inner = feature.feature
  return (getattr(feature, 'length', -1) in (4, -1) and isinstance(inner, datasets.Value)
          and re.match(r'float|double|u?int', inner.dtype) is not None)


def _column(at, depth, feature):
  """The Column of a feature: its kind, and how its values become Python's."""
  import datasets

  kind, convert = '', lambda value: value
  if isinstance(feature, datasets.Image) and len(at) == 1:
    # A file of its own is left where it is.
    kind, convert = columns.PICTURE, lambda value: value['bytes'] or value['path']
  elif isinstance(feature, datasets.ClassLabel):
    names = feature.names
    # -1: the class is not known, as in many test splits.
    kind, convert = columns.CLASS, lambda value: names[value] if value >= 0 else None
  elif isinstance(feature, datasets.List | datasets.LargeList):
    kind = columns.BOX
  elif isinstance(feature, datasets.Value):
    kind = next((kind for pattern, kind in _OF_DTYPE.items() if re.match(pattern, feature.dtype)),
                '')

  def read(row):
    return _nested(_inside(row, at), depth, convert)

  return Column('/'.join(at), kind, depth, repr(feature), read)


def _inside(value, keys):
  """What lies under some keys of a row; objects may be a list of dicts or a dict of lists."""
  if not keys or value is None:
    return value
  if isinstance(value, list):
    return [_inside(item, keys) for item in value]
  return _inside(value[keys[0]], keys[1:])


def _nested(value, depth, convert):
  if value is None:
    return [] if depth else None
  return [_nested(item, depth - 1, convert) for item in value] if depth else convert(value)


def _only(rows, wanted, leaves):
  """The rows with only the columns in use, whose pictures are not decoded."""
  import datasets

  used = sorted({leaves[column.path][0][0] for column in wanted})
  rows = rows.with_format(None).select_columns(used)
  for name, feature in rows.features.items():
    if isinstance(feature, datasets.Image):
      rows = rows.cast_column(name, datasets.Image(decode=False))
  return rows
