"""Tables as examples: which columns fill our fields. Shared by csv, parquet and other sources."""

from collections.abc import Iterable, Mapping
import json
import logging
import shlex
from typing import Any

from xmodal.data.example import Example
from xmodal.data.faults import Examples, Fault, count_kinds, fault
from xmodal.data.fields import shown
from xmodal.data.sources.jsonl import LineParser
from xmodal.errors import UserError, did_you_mean
from xmodal.options import Option

OPTIONS = {
    'fields': Option((), 'Columns whose names are not those of our fields, as pairs of field and '
                     "column: (('caption', 'Report'), ('answers', 'label')).")}
WHAT = 'what is in the picture?'
# For sources whose files may have classes in place of questions and answers.
QUESTION = {
    'question': Option(WHAT, 'Question of examples that have answers, where the files have no '
                       'questions.')}

_KEY = 'config.data.fields'


class BadRows(UserError):
  """Some rows of a table cannot be used.

  Attributes:
    lines: a line on each of them.
  """

  def __init__(self, lines: Iterable[str], command: str):
    self.lines = tuple(lines)
    rest = len(self.lines) - 1
    more = f' ({rest:,} more such row{"s"[:rest > 1]}; to list them: {command})' if rest else ''
    super().__init__(f'{self.lines[0]}{more}')


class Rows:
  """Collects the rows of one split as examples.

  Attributes:
    parser: what turns a row into an Example.
    given: field -> column, as config.data.fields names them.
  """

  def __init__(self, root: str, fields: Iterable, source: str, question: str = ''):
    """
    Args:
      root: folder to which paths of pictures are relative.
      fields: the value of config.data.fields.
      source: name of the source, for messages.
      question: question of examples with answers, where the columns hold no question.

    Raises:
      UserError: fields is invalid.
    """
    self.parser = LineParser(root)
    self.given = pairs(fields, self.parser.known)
    self._command = f'xmodal check {shlex.quote(root)} --source {source}'
    if self.given:
      self._command += f' {shlex.quote(f"--{_KEY}={tuple(self.given.items())}")}'
    self._question = question
    self._examples: list[Example] = []
    self._faults: list[Fault] = []
    self._bad: list[str] = []

  def columns(self, names: Iterable[str], where: str, image: str = 'image') -> dict[str, str]:
    """The column of each field that a table fills.

    Args:
      names: the table's columns.
      where: path of the table.
      image: column of pictures, if config.data.fields names no other.

    Raises:
      UserError: config.data.fields names a column that is not there, or no column has pictures.
    """
    names = list(names)
    for column in self.given.values():
      if column not in names:
        raise UserError(f'{where}: no column {column!r}{did_you_mean(column, names)}, which {_KEY} '
                        f'names; its columns: {_listed(names)}')
    found = {name: name for name in names if name in self.parser.known}
    if image in names:
      found['image'] = image
    found |= self.given
    if 'image' not in found:
      raise UserError(f'{where}: no column {image!r}; its columns: {_listed(names)}; name the one '
                      f"with pictures: --{_KEY}=\"(('image', 'COLUMN'),)\"")
    used = {*found, *found.values(), 'made_by'}
    self.parser.ignored.update((name, None) for name in names if name not in used)
    return found

  def add(self, record: Mapping[str, Any], where: str) -> None:
    """Adds a row.

    Args:
      record: field -> value, as in a line of jsonl.
      where: its place, 'FILE:7'.
    """
    record = dict(record)
    if self._question and 'question' not in record and record.get('answers') not in (None, []):
      record['question'] = self._question
    example, complaints = self.parser.parse_record(record, where)
    if example is None:
      self._bad.append(f'{where}: {"; ".join(complaints)}')
      return
    self._examples.append(example)
    self._faults += [Fault(f'{where}: {left_out}', left_out.kind) for left_out in complaints]

  def add_bad(self, complaint: str, where: str) -> None:
    """Adds a row that cannot be used."""
    self._bad.append(f'{where}: {complaint}')

  def leave_out(self, where: str, what: str) -> None:
    """Counts a row that is left out, as a fault."""
    self._faults.append(fault(where, f'{what}, left out'))

  def examples(self, where: str) -> Examples:
    """All rows.

    Raises:
      BadRows: some cannot be used.
      UserError: there are none.
    """
    if self._bad:
      raise BadRows(self._bad, self._command)
    if not self._examples:
      why = f' ({count_kinds(self._faults)})' if self._faults else ''
      raise UserError(f'{where}: has no examples{why}, wanted one a row')
    if self.parser.ignored:
      logging.getLogger(__name__).warning('%s: %s', where, self.parser.ignored_note())
    return Examples(self._examples, self._faults)


def of_cell(field: str, text: str) -> Any:
  """The value in a cell of text, such as a CSV file's, as a line of jsonl would hold it.

  Empty: None. Answers and captions: a JSON list, or one text. Objects and expression: JSON.
  """
  if not text.strip():
    return None
  if field in ('objects', 'expression') or (field in ('answers', 'caption')
                                            and text.lstrip().startswith('[')):
    try:
      return json.loads(text)
    except (ValueError, RecursionError):
      return text  # '[unclear] lesion'; what has to be JSON is refused as text
  if field == 'number':
    try:
      return float(text)
    except ValueError:
      return text
  if field == 'made':
    return {'true': True, '1': True, 'false': False, '0': False}.get(text.strip().lower(), text)
  return text


def pairs(given: Iterable, known: Iterable[str]) -> dict[str, str]:
  """config.data.fields as field -> column.

  Args:
    given: the value of config.data.fields.
    known: the names of the fields.

  Raises:
    UserError: not pairs of a field and a column, or a field is not known or given twice.
  """
  wanted = f"{_KEY}: wanted pairs of field and column, such as (('caption', 'Report'),), found "
  found = {}
  for pair in given:
    if not isinstance(pair, tuple | list) or len(pair) != 2 or (
        not all(isinstance(name, str) for name in pair)):
      raise UserError(f'{wanted}{shown(pair)}')
    field, column = pair
    if field not in known:
      raise UserError(f'{_KEY}: no field {field!r}{did_you_mean(field, known)}; wanted one of '
                      f'{", ".join(known)}')
    if field in found:
      raise UserError(f'{_KEY}: {field!r} is given twice, wanted one column for each field')
    found[field] = column
  return found


def _listed(names):
  return ', '.join(map(shown, names)) or 'none'
