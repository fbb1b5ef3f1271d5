"""CSV and TSV: a table of text, RFC 4180, with a header."""

from collections.abc import Iterator
import csv
import os

from xmodal import storage
from xmodal.data.faults import Examples
from xmodal.data.sources import columns
from xmodal.data.sources.columns import Rows, of_cell
from xmodal.data.sources.files import MissingSplit, existing_folder, split_names, unreadable
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError
from xmodal.options import Option

_DELIMITERS = ',;\t'  # of several in a header, the most frequent; the first if equally so


@SOURCES.register('csv', options=columns.OPTIONS | columns.QUESTION | {
    'delimiter': Option('', "Between the columns of a table; '': a tab in .tsv, in .csv the most "
                        'frequent of comma, semicolon and tab in the header.')})
def read_csv(root: str, split: str, fields: tuple = (), question: str = columns.WHAT,
             delimiter: str = '') -> Examples:
  """Reads {root}/{split}.csv or .tsv: a row is an example, with the fields of a line of jsonl.

  Columns of other names are read if config.data.fields names them. A cell is text; one of
  answers or caption may also be a JSON list, one of objects or expression is JSON. An empty cell
  is a field that is not given. Paths of pictures are relative to the folder.

  Args:
    root, split: see xmodal.data.sources.source; val may also be validation.csv.
    fields, question: see xmodal.data.sources.columns.
    delimiter: between the columns.

  Returns:
    Examples in the order of the rows; their faults list everything left out of rows.

  Raises:
    UserError: no such file, or it is no table; no such column; or bad rows.
  """
  root = existing_folder(root, 'train.csv, val.csv and pictures')
  path = _find(root, split)
  rows = Rows(root, fields, 'csv', question)
  add_table(rows, path, delimiter)
  return rows.examples(path)


def add_table(rows: Rows, path: str, delimiter: str = '', image: str = 'image',
              folder: str = '') -> None:
  """Adds all rows of a file.

  Args:
    rows: where to.
    path: of the file.
    delimiter: between its columns, '' to guess it.
    image: its column of pictures, if config.data.fields names no other.
    folder: prefix to the paths of pictures.

  Raises:
    UserError: it is no table, or lacks a column.
  """
  found = None
  for number, cells in _lines(path, delimiter):
    if found is None:
      names = cells
      if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f'{path}:{number}: two columns are named {twice!r}, wanted different names')
      found = rows.columns(names, path, image)
      continue
    where = f'{path}:{number}'
    if len(cells) != len(names):
      rows.add_bad(f'has {len(cells)} cells, wanted {len(names)}, one for each column', where)
      continue
    cells = dict(zip(names, cells))
    record = {field: of_cell(field, cells[column]) for field, column in found.items()}
    if folder and record['image']:
      record['image'] = os.path.join(folder, record['image'])
    rows.add(record, where)
  if found is None:
    raise UserError(f'{path}: is empty, wanted a header and rows')


def _find(root, split):
  names = [f'{name}{ending}' for name in split_names(split) for ending in ('.csv', '.tsv')]
  for name in names:
    path = os.path.join(root, name)
    if storage.is_file(path):
      return path
  there = [name for name in sorted(storage.list_dir(root)) if name.endswith(('.csv', '.tsv'))]
  raise MissingSplit(f'{root}: no {names[0]} or {names[1]}; tables in that folder: '
                     f'{", ".join(there) or "none"}')


def _lines(path, delimiter) -> Iterator[tuple[int, list[str]]]:
  """Yields (number of the last line, cells) of the rows that are not blank, header included."""
  if delimiter and (len(delimiter) > 1 or delimiter in '\r\n"'):
    raise UserError(f'config.data.delimiter={delimiter!r}: wanted one character')
  try:
    with storage.open_file(path, encoding='utf-8-sig', newline='') as file:
      if not delimiter:
        delimiter = _guess(path, file.readline())
        file.seek(0)
      reader = csv.reader(file, delimiter=delimiter, strict=True)
      for cells in reader:
        if any(cell.strip() for cell in cells):
          yield reader.line_num, cells
  except UnicodeDecodeError as error:
    raise UserError(f'{path}: is not UTF-8 ({error.reason}); save it as CSV UTF-8') from None
  except csv.Error as error:
    raise UserError(f'{path}:{reader.line_num}: is no CSV ({error}); quote cells that contain '
                    'quotes, and double those quotes') from None
  except OSError as error:
    raise unreadable(path, error) from None


def _guess(path, header):
  return '\t' if path.endswith('.tsv') else max(_DELIMITERS, key=header.count)
