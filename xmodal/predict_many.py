"""xmodal predict about a folder of pictures or a file of questions: one line of JSON an answer."""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import functools
import os
import sys
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from xmodal import atomic, outputs, storage, strict_json
from xmodal.answers import Query, answers
from xmodal.data import fields
from xmodal.data.fields import Complaint
from xmodal.data.pictures.decoded import DecodedPictures
from xmodal.data.sources.find_pictures import Pictures, find_pictures
from xmodal.data.sources.jsonl import json_object, numbered_lines
from xmodal.errors import UserError
from xmodal.predictor import Predictor
from xmodal.tasks.task import Task

_ONE_PICTURE = ('n', 'mask')  # options that mean nothing to several pictures
_CHECKS = {'image': fields.optional(fields.path), 'question': fields.optional(fields.trimmed),
           'image_id': fields.optional(fields.identifier),
           'question_id': fields.optional(fields.identifier)}


class _Request(NamedTuple):
  """One picture and its text.

  Attributes:
    known: what identifies it in the line of its answer.
    image: path; None: none was given.
    text: the question.
    where: FILE:LINE that it is from; '': none.
  """

  known: dict[str, Any]
  image: str | None
  text: str
  where: str = ''


def check_output(path: str | None, overwrite: bool) -> None:
  """Raises UserError before the work where answers could not be written to --output."""
  if path is None:
    return
  outputs.check_folder(path)
  if os.path.splitext(path)[1].lower() in Image.registered_extensions():
    raise UserError(f'--output {path} is named as a picture; answers to several pictures are lines '
                    'of JSON: a name ending in .jsonl is wanted')
  if storage.is_dir(path) or (storage.exists(path) and not overwrite):
    raise UserError(f'--output {path} is there already; give another, or take --overwrite')


def answer_all(predictor: Predictor, opened: DecodedPictures, task: Task, *, folder: str | None,
               questions: str | None, text: str, output: str | None,
               options: Mapping[str, Any]) -> int:
  """Writes a line for each picture, batch by batch, and says how many there were.

  Args:
    predictor: its `decode` is `opened`.
    opened: what pictures are opened with.
    task: makes the queries.
    folder: of pictures, or None.
    questions: a jsonl file with "image" and "question", or None; one of the two is given.
    text: the question for the folder's pictures, and for lines without one.
    output: the file of answers; None: stdout.
    options: of Task.query, for all.

  Returns:
    The exit code: 0, or 1 if no picture could be read.

  Raises:
    UserError: a line of the file cannot be used, found before anything is computed; or there are
      no pictures.
  """
  if given := sorted(set(options).intersection(_ONE_PICTURE)):
    raise UserError(f'--{given[0]} is for one picture; leave it out')
  if questions:
    read = functools.partial(_of_file, questions, text, task.draws)
  else:
    read = functools.partial(_of_folder, folder, find_pictures(folder, '--image'), text)
  total = sum(1 for request in read() if _query(task, request, options))
  if not total:
    raise UserError(f'--input {questions}: no questions in it; wanted one JSON object a line')
  with _lines(output) as (write, shows_answers):
    with tqdm(total=total, unit='picture', dynamic_ncols=True,
              disable=shows_answers or not sys.stderr.isatty()) as bar:
      unread = _write_answers(predictor, opened, (
          (request, _query(task, request, options)) for request in read()), write, bar.update)
  said = f'; {unread:,} with "error": cannot be read' if unread else ''
  print(f'{total - unread:,} of {total:,} answered{said}', file=sys.stderr)
  return 1 if unread == total else 0


def _write_answers(predictor, opened, requests_and_queries, write, advance) -> int:
  """Answers all queries; returns how many pictures could not be read."""
  waiting: collections.deque[tuple[_Request, Query]] = collections.deque()

  def queries():
    for request, query in requests_and_queries:
      waiting.append((request, query))
      yield query

  unread = 0
  for answer in answers(predictor, opened, queries()):
    request, (task, examples) = waiting.popleft()
    if isinstance(answer, UserError):
      unread += 1
      line = {'error': _as_utf8(str(answer))}
    else:
      line = task.plain(answer)
      if notes := list(dict.fromkeys(n for example in examples for n in task.notes(example))):
        line['notes'] = notes
    write({**request.known, **line}, flush=not waiting)
    advance(1)
  return unread


def _query(task: Task, request: _Request, options: Mapping[str, Any]) -> Query:
  try:
    return task.query(request.image, request.text, **options)
  except UserError as error:
    if not request.where:
      raise
    raise UserError(f'{request.where}: {str(error).replace("--text", "question")}') from None


def _of_folder(folder: str, paths: Sequence[str], text: str) -> Iterator[_Request]:
  for path in paths:
    name = _as_utf8(os.path.relpath(path, folder))
    yield _Request({'image': name} | ({'question': text} if text else {}), path, text)


def _of_file(path: str, text: str, draws: bool) -> Iterator[_Request]:
  """The lines of a file; UserError at one that cannot be used."""
  pictures = Pictures(os.path.dirname(path))
  for number, line in numbered_lines(path):
    where = f'{path}:{number}'
    try:
      known, complaints = fields.check_fields(json_object(line), _CHECKS)
    except Complaint as complaint:
      known, complaints = {}, [str(complaint)]
    known = {key: value for key, value in known.items() if value is not None}
    if not complaints and not draws and 'image' not in known:
      complaints = ['image is missing, wanted the path of a picture']
    if complaints:
      raise UserError(f'{where}: {"; ".join(complaints)}')
    image = known.get('image')
    if image is not None:
      image = os.path.join(pictures.root, image)
      if storage.is_remote(image) or not os.path.exists(image):  # found in a listing, in any form
        image = pictures.find(known['image']) or image
    if question := known.pop('question', '') or text:
      known['question'] = question
    yield _Request(known, image, question, where)


def _as_utf8(text: str) -> str:
  """Text with the name of a file in it: bytes of the name that are not UTF-8 become '\\xNN'."""
  return text.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')


@contextlib.contextmanager
def _lines(path: str | None) -> Iterator[tuple[Callable[..., None], bool]]:
  """What writes lines of JSON, to a file or stdout; and whether people see them as they come."""
  with contextlib.ExitStack() as closing:
    file = sys.stdout
    if path:
      own = closing.enter_context(outputs.on_this_machine(path))
      file = closing.enter_context(atomic.written(own))

    def write(line: Mapping[str, Any], flush: bool) -> None:
      print(strict_json.dumps(line, ensure_ascii=file.encoding.lower() != 'utf-8'), file=file,
            flush=flush)

    try:
      yield write, not path and sys.stdout.isatty()
    except BrokenPipeError:  # of `| head`, which has read enough
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      sys.exit(141)  # as of a program that SIGPIPE ends
