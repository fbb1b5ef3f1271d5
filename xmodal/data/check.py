"""Checks a folder of data: xmodal check DIR [--source coco] [--split train]

For jsonl, prints every bad line of train.jsonl, val.jsonl and test.jsonl as
'file:line: what, wanted what', including pictures that cannot be decoded, then a
summary, which lists pictures that are read in an unusual way (pixels without a
value, 12 bits stored in 16). For other sources, prints everything that was left out
of a split or repaired in it, pictures whose size differs from the size stated with
their boxes, and boxes outside their pictures; of a table whose rows cannot be used,
those rows. Options of a source are given as in xmodal train, --config.data.KEY=VALUE.
Exits with 0 if all is good, 1 if something is wrong, 2 if there is nothing to check.
"""

import argparse
import ast
import collections
from collections.abc import Hashable, Iterable, Mapping, Sequence
import concurrent.futures
import dataclasses
import functools
import os
import statistics
import sys
from typing import Any

from xmodal import errors, storage
from xmodal.data.example import Example, Source
from xmodal.data.pictures import images
from xmodal.data.pictures.box_checks import keep_inside, other_size
from xmodal.data.sources.columns import BadRows
from xmodal.data.sources.files import MissingSplit, existing_folder
from xmodal.data.sources.jsonl import SPLITS, LineParser, numbered_lines
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError, did_you_mean
from xmodal.registry import import_plugins

# (height, width) in pixels: decoding small is faster and still reads the whole file.
_DECODED_SIZE = (32, 32)
_MOST_NAMES, _MOST_NOTES = 100, 5
_CHUNK = 4096
_OPTION = '--config.data.'


@dataclasses.dataclass
class CheckedFile:
  """The examples and complaints of one .jsonl file.

  Attributes:
    examples: line number -> Example, for the lines that parse.
    complaints: line number -> all that is wrong with it, for the bad lines.
    note: names the ignored keys, or ''.
    pictures: lines on pictures that are read in an unusual way, see picture_notes.
  """

  path: str
  examples: dict[int, Example] = dataclasses.field(default_factory=dict)
  complaints: dict[int, list[str]] = dataclasses.field(default_factory=dict)
  note: str = ''
  pictures: list[str] = dataclasses.field(default_factory=list)

  def complain(self, number: int, complaint: str) -> None:
    self.complaints.setdefault(number, []).append(complaint)


def check_folder(root: str, splits: Sequence[str] = SPLITS) -> list[CheckedFile]:
  """Parses every line of {split}.jsonl, then decodes every picture once, in threads.

  Raises:
    UserError: no such folder, or none of the files in it.
  """
  root = existing_folder(root, 'train.jsonl, val.jsonl, test.jsonl and pictures')
  paths = [os.path.join(root, f'{split}.jsonl') for split in splits]
  paths = [path for path in paths if storage.is_file(path)]
  if not paths:
    raise UserError(f'{root} has none of {", ".join(f"{split}.jsonl" for split in splits)}; '
                    'see xmodal/data/sources/jsonl.py for what is in them')
  files = [_parse_file(path, LineParser(root)) for path in paths]
  pictures = decode_all(example.image for file in files for example in file.examples.values())
  for file in files:
    _check_pictures(file, pictures)
  return files


def check_source(source: Source) -> tuple[list[str], list[str]]:
  """The complaints about a split, and its summary, as lists of lines.

  Decodes every picture once, in threads.
  """
  complaints = list(getattr(source, 'faults', ()))
  sizes, seen, names, ignored = {}, {}, collections.Counter(), 0
  called, contents = {}, _Contents()  # called: picture -> its name in messages
  for start in range(0, len(source), _CHUNK):  # millions may be generated on access
    examples = [source[i] for i in range(start, min(start + _CHUNK, len(source)))]
    for number, example in enumerate(examples, start):
      called.setdefault(example.picture, example.file_name or f'example {number}')
    decoded = decode_all(e.image for e in examples if e.picture not in sizes)
    sizes |= decoded
    contents.add(examples)
    complaints += sorted(size for size in decoded.values() if isinstance(size, str))
    for example in examples:
      key, name = example.picture, called[example.picture]
      met = key in seen
      objects = () if met else example.objects or ()
      seen.setdefault(key, len(objects))
      names.update(thing.name for thing in objects)
      ignored += sum(thing.ignore for thing in objects)
      if not isinstance(size := sizes[key], str):
        if not met and (line := other_size(example, *size)):
          complaints.append(f'{name}: {line}')
        shown = dataclasses.replace(example, objects=objects)
        complaints += [f'{name}: {line}' for line in keep_inside(shown, *size)[1]]
  lines = [f'{len(source):,} examples, {len(seen):,} pictures, {names.total():,} boxes '
           f'({ignored:,} to be ignored)', *(contents.lines() if contents.has_more else ())]
  lines += picture_notes({called[key]: size for key, size in sizes.items()})
  if names:
    most = max(seen, key=seen.get)
    rest = len(names) - _MOST_NAMES
    lines += [
        f'  most boxes: {seen[most]} in {called[most]}; '
        f'none in {list(seen.values()).count(0):,} pictures',
        '  ' + ', '.join(f'{name} {count:,}' for name, count in names.most_common(_MOST_NAMES))
        + (f' and {rest:,} names more' if rest > 0 else '')]
  return complaints, lines


class Size(tuple[int, int]):
  """(width, height) of a picture after EXIF rotation.

  Attributes:
    note: note for the user on an unusual way it is read, see images.Decoded.
  """

  note: str = ''


def decode_all(pictures: Iterable[Any]) -> dict[Hashable, Size | str]:
  """Decodes pictures as training does: Example.picture -> their size, or the error message.

  Args:
    pictures: values of Example.image.
  """
  distinct = {Example(image).picture: image for image in pictures}
  with concurrent.futures.ThreadPoolExecutor() as pool:  # decoders run outside the GIL
    return dict(zip(distinct, pool.map(_decode, distinct.values())))


def picture_notes(pictures: Mapping[str, Size | str]) -> list[str]:
  """Lines on the readable pictures that decode_all has notes on: their number, the first few."""
  noted = [f'  {path}: {size.note}' for path, size in sorted(pictures.items())
           if not isinstance(size, str) and size.note]
  if not noted:
    return []
  more = [f'  and {len(noted) - _MOST_NOTES:,} more'] if len(noted) > _MOST_NOTES else []
  return [f'  pictures to look at: {len(noted):,} of {len(pictures):,}', *noted[:_MOST_NOTES],
          *more]


def summary(file: CheckedFile) -> list[str]:
  """Lines of text: counts, filled fields, most frequent answers, question lengths."""
  bad, total = len(file.complaints), len(file.examples.keys() | file.complaints.keys())
  examples = file.examples.values()
  contents = _Contents()
  contents.add(examples)
  lines = [
      f'{os.path.basename(file.path)}: {total} lines, {total - bad} good, {bad} bad, '
      f'{len({example.image for example in examples})} pictures', *contents.lines()]
  if file.note:
    lines.append(f'  {file.note}')
  return lines + file.pictures


class _Contents:
  """Counts what examples have."""

  def __init__(self):
    self._filled = {field.name: 0 for field in dataclasses.fields(Example)
                    if field.name != 'image'}
    self._answers: collections.Counter[str] = collections.Counter()
    self._lengths: list[int] = []

  def add(self, examples: Iterable[Example]) -> None:
    for example in examples:
      for name in self._filled:
        self._filled[name] += example.has(name)
      self._answers.update(example.answers)
      if example.question:
        self._lengths.append(len(example.question.split()))

  @property
  def has_more(self) -> bool:
    """Whether there is more than objects."""
    return any(self._filled[name] for name in ('question', 'answers', 'captions', 'number'))

  def lines(self) -> list[str]:
    """Lines of text: filled fields, most frequent answers, lengths of questions."""
    lines = ['  filled: ' + (', '.join(f'{name} {n}' for name, n in self._filled.items() if n)
                             or 'image only')]
    if self._answers:
      top = ', '.join(f'{answer[:40]!r} {count / self._answers.total():.0%}'
                      for answer, count in self._answers.most_common(5))
      lines.append(f'  answers: {len(self._answers)} different; {top}')
    if self._lengths:
      lines.append(f'  questions: {min(self._lengths)} to {max(self._lengths)} words, '
                   f'median {statistics.median(self._lengths):g}')
    return lines


def _parse_file(path, parser):
  """The first check: each line by itself, and whether ids are unique."""
  file = CheckedFile(path)
  for number, line in numbered_lines(path):
    example, complaints = parser.parse(line, number)
    if complaints:
      file.complaints[number] = complaints
    if example is not None:
      file.examples[number] = example
  if not file.examples and not file.complaints:
    file.complain(1, 'no examples, wanted one JSON object a line')
  file.note = parser.ignored_note()
  return file


def _decode(path):
  try:
    picture = images.decode(path, _DECODED_SIZE)
  except (storage.Unreachable, storage.AccessRefused):  # says nothing of the picture
    raise
  except UserError as error:
    return str(error)
  size = Size(picture.size[::-1])
  size.note = picture.note
  return size


def _check_pictures(file, pictures):
  """The second check: pictures that do not decode, boxes that are not inside their pictures."""
  own = {example.image for example in file.examples.values()}
  file.pictures = picture_notes({path: pictures[path] for path in own})
  for number, example in file.examples.items():
    found = pictures[example.image]
    if isinstance(found, str):
      file.complain(number, f'image cannot be decoded: {found}')
      continue
    for complaint in keep_inside(example, *found)[1]:
      file.complain(number, complaint)


def main(arguments: list[str] | None = None) -> int:
  """Prints the report on the folder named in arguments; returns the exit code."""
  flags = argparse.ArgumentParser(prog='xmodal check', description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('folder', metavar='DIR', help='folder of the data, as config.data.root')
  flags.add_argument('--source', default='jsonl', help='as config.data.source: '
                     f'{", ".join(sources_of_files())}; jsonl if not given')
  flags.add_argument('--split', help='as config.data.train_split; if not given, train, val and '
                                     'test, whichever are there; all splits of tfds, hf and pack')
  flags, rest = flags.parse_known_args(arguments)
  return errors.command(lambda: _report(flags, rest), flags.folder)


def _report(flags, rest):
  options = source_options(flags.source, rest)
  splits = (flags.split,) if flags.split else source_splits(flags.source, flags.folder, options)
  if flags.source == 'jsonl':
    return _report_files(check_folder(flags.folder, splits), splits)
  read = functools.partial(SOURCES[flags.source].make, **options)
  return _report_splits(read, flags.folder, splits)


def source_splits(name: str, root: str, options: Mapping[str, Any]) -> Sequence[str]:
  """The splits of the data in a folder if the source of this name knows them, or the usual ones."""
  known = SOURCES[name].facts.get('splits')
  return known(root, **options) if known else SPLITS


def sources_of_files() -> list[str]:
  """The names of all sources but the embedded ones."""
  return [name for name, source in SOURCES.items() if not source.facts.get('embedded')]


def source_options(name: str, arguments: Sequence[str]) -> dict[str, Any]:
  """The options of the source of this name, its defaults where the arguments give no other.

  Args:
    name: of the source.
    arguments: --config.data.KEY=VALUE, and --config.plugins, which are imported.

  Raises:
    UserError: there is no such source of files, it has no such option, or the value is invalid.
  """
  arguments = import_plugins(arguments)
  if name not in (known := sources_of_files()):
    raise UserError(f'--source {name}: no such source{did_you_mean(name, known)}; wanted one of '
                    f'{", ".join(known)}')
  options = {key: option.default for key, option in SOURCES[name].options.items()}
  return options | dict(_option(argument, name) for argument in arguments)


def _option(argument, name):
  """The key and value of --config.data.KEY=VALUE, an option of the source of this name."""
  options = SOURCES[name].options
  flag, _, text = argument.partition('=')
  key = flag.removeprefix(_OPTION)
  if not flag.startswith(_OPTION) or key not in options:
    known = ', '.join(f'{_OPTION}{key}=...' for key in options) or 'none'
    raise UserError(f'{argument}: not understood; options of the source {name!r}: {known}')
  option, value = options[key], text
  if option.type is not str:
    try:
      value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      pass
    if not isinstance(value, option.type):
      raise UserError(f'{argument}: wanted a {option.type.__name__}')
  option.check(f'config.data.{key}', value)
  return key, value


def _report_files(files, splits):
  for file in files:
    for number in sorted(file.complaints):
      for complaint in file.complaints[number]:
        print(f'{file.path}:{number}: {complaint}')
  for file in files:
    print('\n'.join(summary(file)))
  for name in sorted({f'{s}.jsonl' for s in splits} - {os.path.basename(f.path) for f in files}):
    print(f'{name}: not there')
  num_bad = sum(len(file.complaints) for file in files)
  print(f'{num_bad} bad lines' if num_bad else 'all good')
  return 1 if num_bad else 0


def _report_splits(read, root, splits):
  num_bad, absent = 0, []
  for split in splits:
    try:
      source = read(root, split)
    except MissingSplit as error:
      absent.append(error)
      print(f'{split}: not there')
      continue
    except BadRows as error:
      num_bad += len(error.lines)
      print('\n'.join([*error.lines, f'{split}: {len(error.lines):,} bad rows']))
      continue
    complaints, lines = check_source(source)
    num_bad += len(complaints)
    print('\n'.join([*complaints, f'{split}: {lines[0]}', *lines[1:]]))
  if len(absent) == len(splits):
    raise absent[0]
  print(f'{num_bad} faults' if num_bad else 'all good')
  return 1 if num_bad else 0


if __name__ == '__main__':
  sys.exit(main())
