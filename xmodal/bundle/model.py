"""Answers of a trained model, from the folder that holds this file.

    from model import load
    model = load('BUNDLE')
    model('a.jpg', 'what color is the square?')                 # {'answer': 'red', ...}
    model(['a.jpg', 'b.jpg'], 'what color is the square?')      # a list of two

    python BUNDLE/model.py --image a.jpg --text 'what color is the square?' [--task vqa]

It needs jax (with flatbuffers, for jax.export), numpy, tokenizers and Pillow. bundle.json says what
each task's program reads and what its outputs mean; README.md of xmodal.bundle lists the kinds.
"""

import argparse
import functools
import json
import math
import os
import re
import sys
import warnings
import zlib

import jax
import jax.export
import numpy as np
import tokenizers

if __package__:
  from .fields import answer
  from .files import BundleError, check_file, read_tensors
  from .pixels import decode, fit, upright_size
else:
  from fields import answer
  from files import BundleError, check_file, read_tensors
  from pixels import decode, fit, upright_size

FORMAT = 1  # of bundle.json
_LEAST = 8  # rows of names or texts, so that a few need no other program than one


# What bundle.json and each task in it have at least.
_KEYS = {'platforms': list, 'versions': dict, 'tasks': dict, 'files': dict, 'image_size': int,
         'pad_id': int, 'eos_id': int}
_TASK_KEYS = {'programs': list, 'inputs': dict, 'query': dict, 'options': dict, 'answer': list,
              'weights': list, 'keep_aspect': bool}


def load(folder=None, *, check=True):
  """Opens a bundle.

  Args:
    folder: the bundle; None: the folder that holds this file.
    check: whether files are compared with their checksums, besides their sizes.

  Raises:
    BundleError: it is missing, cut, of a newer format, or made for another platform or jax.
  """
  return Model(folder or os.path.dirname(os.path.abspath(__file__)), check)


class Model:
  """A function of pictures and texts; `tasks` are the names of its tasks."""

  def __init__(self, folder, check=True):
    self._folder = os.fspath(folder)
    path = os.path.join(self._folder, 'bundle.json')
    try:
      with open(path, encoding='utf-8') as f:
        about = json.load(f)
    except OSError as error:
      raise BundleError(f'{path}: {error.strerror}; wanted a folder of xmodal export') from error
    except ValueError as error:
      raise BundleError(f'{path}: damaged ({error}); copy the bundle again') from error
    _check(path, about, {'format': int})
    if about['format'] != FORMAT:
      raise BundleError(f'{path}: format {about["format"]}, this loader reads {FORMAT}; use '
                        "the bundle's own model.py")
    _check(path, about, _KEYS)
    for name, own in about['tasks'].items():
      _check(path, own, _TASK_KEYS, f'tasks.{name}.')
    if (platform := _platform()) not in about['platforms']:
      raise BundleError(f'{path}: programs for {", ".join(about["platforms"])}, this machine has '
                        f'{platform}; export with --platforms {platform}, or set JAX_PLATFORMS=cpu')
    for name, stated in about['files'].items():
      _check(path, stated, {'bytes': int, 'sha256': str}, f'files.{name}.')
      check_file(os.path.join(self._folder, name), stated, check)
    self.about, self.tasks = about, tuple(about['tasks'])
    self._weights = read_tensors(os.path.join(self._folder, 'weights.safetensors'))
    self._on_device = functools.cache(lambda name: jax.device_put(self._weights[name]))
    self._writer, self._reader = (tokenizers.Tokenizer.from_file(os.path.join(self._folder, name))
                                  for name in ('tokenizer.json', 'tokenizer_reading.json'))
    self._reader.encode_special_tokens = True
    self._program = functools.cache(self._open_program)

  def __call__(self, image, text='', *, task=None, **options):
    """Asks one task.

    Args:
      image: a path, the bytes of a picture file, a PIL image or uint8 [H, W, 3]; None where a
        picture is drawn from a text alone; or a list, which gives a list of answers (of a task that
        ranks: one answer, the pictures in their order).
      text: the question, names or texts; a list with one for each picture (or for one picture).
      task: one of `tasks`; None: the first.
      **options: of the task, see bundle.json; and `details`: whether the answer also has the five
        most probable labels (`top`), or all boxes (`candidates`) and the `threshold`.

    Raises:
      BundleError: a picture cannot be read, or the text asks nothing.
    """
    name = task or self.tasks[0]
    ranks = name in self.tasks and self.about['tasks'][name]['query']['kind'] == 'texts'
    lists = [value for value in (image, text) if isinstance(value, (list, tuple))]
    if not lists or (ranks and len(lists) == 1):
      queries = [(image, text, options)]
    else:
      if len({len(value) for value in lists}) > 1:
        raise BundleError(f'{len(image)} pictures, {len(text)} texts; wanted lists of one length')
      images, texts = (value if isinstance(value, (list, tuple)) else [value] * len(lists[0])
                       for value in (image, text))
      queries = [(one, other, options) for one, other in zip(images, texts)]
    answers = self.answer(name, queries)
    for one in answers:
      if isinstance(one, BundleError):
        raise one
    return answers if lists and not (ranks and len(lists) == 1) else answers[0]

  def answer(self, task, queries):
    """Answers any number of queries of a task, a batch at a time.

    Args:
      task: one of `tasks`.
      queries: (picture, text, options) of each, see __call__.

    Returns:
      Plain JSON values for each query, or a BundleError where it cannot be answered.

    Raises:
      BundleError: there is no such task.
    """
    if task not in self.tasks:
      raise BundleError(f'no task {task!r}; wanted one of {", ".join(self.tasks)}')
    about, answers, groups = self.about['tasks'][task], [None] * len(queries), {}
    for place, query in enumerate(queries):
      try:
        rows, shared, finish = self._query(task, about, *query)
      except BundleError as error:
        answers[place] = error
        continue
      key = tuple((name, value.tobytes()) for name, value in shared.items())
      groups.setdefault(key, (shared, []))[1].append((place, rows, finish))
    for shared, members in groups.values():
      arrays = self._run(task, [row for _, rows, _ in members for row in rows], shared)
      start = 0
      for place, rows, finish in members:
        own = {name: array[start:start + len(rows)] for name, array in arrays.items()}
        start += len(rows)
        answers[place] = finish(own)
    return answers

  def warm_up(self, task):
    """Compiles a task's programs for all batch sizes, and so the first answers are quick."""
    about = self.about['tasks'][task]
    sizes = sorted({size for one in about['programs'] for size in one['sizes']})
    if about['query']['kind'] == 'drawing':  # one step compiles the same program as all
      self.answer(task, [(None, 'a', {'steps': 1})])
      return
    picture = np.zeros((*self._input_size, 3), np.uint8)
    for size in sizes:
      self.answer(task, [(picture, 'a', {})] * size)
      if about['query']['kind'] == 'texts':  # one text for several pictures is another program
        self.answer(task, [([picture] * size, 'a', {})])

  # ---- queries

  def _query(self, task, about, picture, text, options):
    """Rows of inputs, inputs that they share, and the function of their outputs to an answer."""
    details = options.get('details', False)
    for name in options:
      if name != 'details' and name not in about['options']:
        raise BundleError(f'{name} means nothing to {task}; its options: '
                          f'{", ".join(about["options"]) or "none"}')
    options = {name: _option(name, option, options.get(name))
               for name, option in about['options'].items()} | {'details': details}
    query, rows, shared, more = about['query'], None, {}, {}
    kind = query['kind']
    texts = text if isinstance(text, (list, tuple)) else [text]
    for one in texts:
      if not isinstance(one, str):
        raise BundleError(f'text is {one!r:.60}; wanted text')
    if isinstance(text, (list, tuple)) and kind != 'texts':
      raise BundleError(f'{task} takes one text for each picture')
    if picture is None and kind != 'drawing':
      raise BundleError(f'image is None; {task} wants a picture')
    if kind == 'question':
      if not text.strip():
        raise BundleError(f'text is empty; {task} wants the question to ask of the picture')
      more = {'question': self._encode([text], query['length'])[0]}
    elif kind == 'names':
      names, meant = _names(query, text)
      shared = self._name_inputs(names, about['inputs']['names']['shape'])
      if query['expressions']:
        rows = [{'expression': self._encode([one], query['expressions'])[0]} for one in meant]
        more = {'expression': np.full(query['expressions'], self.about['pad_id'], np.int32)}
      options |= {'names': names, 'meant': meant}
    elif kind == 'texts':
      if isinstance(picture, (list, tuple)):
        return self._search(about, picture, text, options)
      texts = list(text) if isinstance(text, (list, tuple)) else _split(query['pattern'], text)
      if not texts:
        raise BundleError(f'text {text!r:.60} says nothing; wanted texts, a full stop after each')
      more = {'captions': self._captions(about, texts, _LEAST)}
      options['texts'] = texts
    elif kind == 'drawing':
      more, shared = self._drawing(about, picture, text, options)
      picture = np.zeros((*self._input_size, 3), np.uint8) if picture is None else picture
    if 'seed' in about['inputs'] and 'seed' not in more:
      more['seed'] = _seed(picture)
    decoded = decode(picture, self._input_size)
    pixels, extent, placement = fit(decoded, self._input_size, about['keep_aspect'])
    if about['keep_aspect']:
      more['extent'] = np.array(extent, np.int32)
    rows = [{'image': pixels, **more, **row} for row in rows or [{}]]
    return rows, shared, lambda arrays: answer(
        about['answer'], arrays, {**options, 'placement': placement}, self._read)

  @property
  def _input_size(self):
    return (self.about['image_size'],) * 2

  def _search(self, about, pictures, text, options):
    """As _query, for pictures to be ranked for one text."""
    if not pictures or not isinstance(text, str) or not text.strip():
      raise BundleError('wanted pictures, and one text to rank them for')
    captions, rows = self._captions(about, [text.strip()], 1), []
    for picture in pictures:
      pixels, extent, _ = fit(decode(picture, self._input_size), self._input_size,
                               about['keep_aspect'])
      rows.append({'image': pixels, 'captions': captions})
      if about['keep_aspect']:
        rows[-1]['extent'] = np.array(extent, np.int32)
    names = [os.fspath(one) if isinstance(one, (str, os.PathLike)) else place
             for place, one in enumerate(pictures)]
    return rows, {}, lambda arrays: answer(
        about['answer'], arrays, {**options, 'pictures': names}, self._read)

  def _captions(self, about, texts, least):
    _, count, length = about['inputs']['captions']['shape']
    count = _rows(count, len(texts), 'texts', least)
    rows = np.full((count, length), self.about['pad_id'], np.int32)
    rows[:len(texts)] = self._encode(texts, length)
    return rows

  def _name_inputs(self, names, shape):
    rows, length = shape
    lengths = [len(ids) for ids in self._ids(names)]
    if max(lengths, default=0) > length:
      raise BundleError(f'the name {names[int(np.argmax(lengths))]!r} has {max(lengths)} tokens, '
                        f'the program reads {length}; shorten it')
    rows = _rows(rows, len(names), 'names', _LEAST)
    tokens = np.repeat(self._encode(names[:1] or [''], length), rows, axis=0)
    tokens[:len(names)] = self._encode(names, length)
    return {'names': tokens, 'counts': np.arange(rows) < len(names)}

  def _drawing(self, about, picture, text, options):
    """Inputs of a picture to draw, for each row and shared; checks which options go together."""
    strength, mask = options['strength'], options['mask']
    if picture is None and (mask is not None or strength is not None):
      raise BundleError('mask and strength change a picture: image is wanted, too')
    if picture is not None and mask is None and strength is None:
      raise BundleError('image is a picture to change: mask says where, or strength 0..1 how much')
    start = 0.0 if picture is None else 1.0 - (1.0 if strength is None else strength)
    repaint = np.ones(self._input_size, bool)
    if mask is not None:
      marked, whole = (decode(one, self._input_size, 'black') for one in (mask, picture))
      if upright_size(marked) != upright_size(whole):
        raise BundleError('mask and image are pictures of different sizes; wanted one size')
      repaint = fit(marked, self._input_size, about['keep_aspect'])[0].mean(-1) > 127
      if not repaint.any():
        raise BundleError('mask is white nowhere: paint white what is to change')
    seed = zlib.crc32(repr(f'{options["seed"]}/0').encode())
    row = {'caption': self._encode([text.strip()], about['query']['length'])[0], 'repaint': repaint,
           'seed': np.uint32(seed).astype(np.int32)}
    return row, {'guidance': np.float32(options['guidance']), 'steps': np.int32(options['steps']),
                 'start': np.float32(start)}

  def _ids(self, texts):
    end = self.about['eos_id']
    for one in self._reader.encode_batch(list(texts)):
      yield one.ids if one.ids and one.ids[-1] == end else one.ids + [end]

  def _encode(self, texts, length):
    """Token ids, int32 [N, length], each text cut before its end token."""
    rows = np.full((len(texts), length), self.about['pad_id'], np.int32)
    for row, ids, text in zip(rows, self._ids(texts), texts):
      if len(ids) > length:
        warnings.warn(f'{text!r:.60} has {len(ids)} tokens, the model reads {length}: its end is '
                      'left out', stacklevel=2)
        ids = ids[:length - 1] + [self.about['eos_id']]
      row[:len(ids)] = ids
    return rows

  # ---- the device

  def _open_program(self, task, file):
    path = os.path.join(self._folder, file)
    try:
      with open(path, 'rb') as f:
        exported = jax.export.deserialize(bytearray(f.read()))
    except OSError:
      raise
    except ImportError as error:
      raise BundleError(f'{error}: pip install -r {self._folder}/requirements.txt') from error
    except Exception as error:  # of many types: another version of jax, or damage
      raise BundleError(f'{path}: jax {jax.__version__} cannot read it, made by jax '
                        f'{self.about["versions"]["jax"]} ({" ".join(str(error).split())[:120]}); '
                        'install that version') from error
    weights = {name: self._on_device(name) for name in self.about['tasks'][task]['weights']}
    compiled = jax.jit(exported.call, compiler_options=_compiler_options())
    return lambda inputs: compiled(weights, inputs)

  def _run(self, task, rows, shared):
    """Outputs of all rows, {name: [N, ...]}."""
    about, done = self.about['tasks'][task], []
    sizes = {size: one['file'] for one in about['programs'] for size in one['sizes']}
    while rows:
      size = min((size for size in sizes if size >= len(rows)), default=max(sizes))
      some, rows = rows[:size], rows[size:]
      # Rows of one length stand side by side; the others have rows of padding.
      stacked = {name: _stack([row[name] for row in some], size, self.about['pad_id'])
                 for name in some[0]}
      # An input that the program does not use is not one of its arguments.
      inputs = {name: value for name, value in {**stacked, **shared}.items()
                if name in about['inputs']}
      outputs = jax.device_get(self._program(task, sizes[size])(inputs))
      done.append({name: array[:len(some)] for name, array in outputs.items()})
    return {name: list(array for part in done for array in part[name]) for name in done[0]}

  def _read(self, tokens):
    """The text of token ids [T], up to the first end token."""
    ends = np.flatnonzero(tokens == self.about['eos_id'])
    ids = tokens[:ends[0]] if ends.size else tokens
    return self._writer.decode(ids.tolist(), skip_special_tokens=True).strip()


def _check(path, part, kinds, where=''):
  for key, kind in kinds.items():
    if not isinstance(part, dict) or not isinstance(part.get(key), kind):
      raise BundleError(f'{path}: damaged ({where}{key}: wanted {kind.__name__}); copy the bundle '
                        'again')


def _compiler_options():
  """Turns off the fusions by which jaxlib 0.10 to 0.12 compute wrong results on a CPU (jax issue
  39103), but the right one for products of integers."""
  version = tuple(map(int, jax.lib.__version__.split('.')[:2]))
  if _platform() != 'cpu' or not (0, 10) <= version < (0, 13):
    return None
  return {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT'}


def _names(query, text):
  """(names, expressions) of a text: an expression begins with 'the' and means one thing."""
  parts = (part if part in query['known'] else part.rstrip(query['strip'])
           for part in _split(query['pattern'], text))
  phrases = [part for part in dict.fromkeys(parts) if part]
  if not phrases:
    raise BundleError(f'text {text!r:.60} names nothing; wanted names ("red circle. blue square.")')
  meant = [part for part in phrases
           if part.lower().startswith('the ') and part not in query['known']]
  if meant and not query['expressions']:
    raise BundleError(f'{meant[0]!r:.60} means one thing (it begins with "the"), and this model '
                      'learned names alone; name what to find: "dog. cat."')
  return [part for part in phrases if part not in meant], meant


def _split(pattern, text):
  parts = (m['text'].strip() for m in re.finditer(
      pattern, re.sub(r'[^\S\n]+', ' ', text), re.X))
  return [part for part in dict.fromkeys(parts) if part.strip('.')]


def _option(name, option, value):
  """A user's value of an option, checked; None: its default."""
  if value is None:
    return option['default']
  if 'low' in option:
    low, high, whole = option['low'], option.get('high', math.inf), type(option['default']) is int
    if type(value) not in ((int,) if whole else (int, float)) or not (
        low <= value <= high and value < math.inf):
      raise BundleError(f'{name}={value!r:.30}: wanted a {"whole " * whole}number, {low} ' + (
          'or more' if high == math.inf else f'to {high}'))
  return value


def _seed(picture):
  """The seed of sampled text: it depends on the picture, or its path, alone."""
  if isinstance(picture, np.ndarray):
    picture = picture.tobytes()
  data = picture if isinstance(picture, bytes) else str(picture).encode()
  return np.uint32(zlib.crc32(data)).astype(np.int32)


def _rows(stated, number, what, least):
  """Rows for a number of names or texts: a power of two, to compile few programs."""
  if isinstance(stated, str):
    return max(least, 1 << max(number - 1, 0).bit_length())
  if number > stated:
    raise BundleError(f'{number} {what}; the program takes up to {stated} at once')
  return stated


def _stack(rows, size, fill):
  """Rows as one array of `size` rows: short ones are padded, missing ones copies of the first."""
  longest = max(len(row) if np.ndim(row) else 0 for row in rows)
  rows = [np.pad(row, [(0, longest - len(row)), (0, 0)], constant_values=fill)
          if np.ndim(row) == 2 and len(row) < longest else row for row in rows]
  return np.stack(rows + rows[:1] * (size - len(rows)))


def _platform():
  return {'gpu': 'cuda'}.get(jax.default_backend(), jax.default_backend())


def _named(option):
  name, _, value = option.partition('=')
  return name, value


def main(argv=None):
  """Prints the answer to --text about --image as JSON."""
  parser = argparse.ArgumentParser(description='Asks the model in this folder about a picture.')
  parser.add_argument('--image', help='a file that Pillow opens')
  parser.add_argument('--text', default='', help='the question, names, texts, or what to draw')
  parser.add_argument('--task', help='the first by default')
  parser.add_argument('--option', action='append', default=[], metavar='NAME=NUMBER')
  args = parser.parse_args(argv)
  try:
    options = {name: json.loads(value) for name, value in map(_named, args.option)}
    answer = load()(args.image, args.text, task=args.task, **options)
    print(json.dumps(answer, ensure_ascii=False))
  except ValueError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())
