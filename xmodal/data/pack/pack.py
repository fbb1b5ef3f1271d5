"""Packs a source: `xmodal pack DIR --source coco --output OUT`.

OUT gets, for each split, files of examples and of pictures (see records.py), an index of each, and
at last pack.json. A picture that several examples have is written once. Pictures stay as they are;
--longest 512 makes larger ones smaller, and scales their boxes. A run that was stopped goes on
where it was. OUT may be in a bucket; each file is then written to $TMPDIR and copied there.

  xmodal train --config vqa --config.data.source=pack --config.data.root=OUT
"""

import argparse
import contextlib
import errno
import functools
import hashlib
import json
import os
import shlex
import sys
import tempfile
import uuid

import numpy as np
from tqdm import tqdm

from xmodal import atomic, errors, paths, storage
from xmodal.data import pipeline, tokenizer
from xmodal.data.check import source_options, source_splits, sources_of_files
from xmodal.data.example import Source
from xmodal.data.open import OPTIONS
from xmodal.data.overview import Gathering, with_tokenizer
from xmodal.data.pack import examples, records
from xmodal.data.sources.files import MissingSplit
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError

VERSION = 1
TITLE = 'pack.json'
KINDS = ('examples', 'pictures')
_STATE = 'unfinished.json'
_CHUNK = 64  # examples that are read at the same time
_MOST_LINES = 20
# Of a disk or share that does not answer, or refuses a file that is there.
_AWAY = (errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN,
         errno.EHOSTDOWN, errno.EMFILE)


def file_name(split: str, kind: str, number: int) -> str:
  """Name of a file of records of a split; kind: 'examples' or 'pictures'."""
  return f'{split}-{kind}-{number:05d}.tfrecord'


def title(pack: str, split: str, kind: str, number: int) -> bytes:
  """The first record of a file."""
  return f'{pack} {split} {kind} {number}'.encode()


def overview_name(split: str) -> str:
  """Name of the file with the overview of a split: first runs need not read all examples."""
  return f'{split}-overview.zip'


def fingerprint(pack: str, split: str) -> str:
  """Tells the examples of a split of a pack from any others."""
  return f'{pack} {split}'


class _Packing:
  """Writes the splits of a source into a folder."""

  def __init__(self, folder: str, pack: str, root: str, longest: int | None, quality: int,
               file_bytes: int, max_bad_share: float):
    self._folder, self._pack, self._limit = folder, pack, file_bytes
    self._read = pipeline.threaded
    if storage.is_remote(root):
      self._read = functools.partial(storage.each, root)
    self._file = functools.partial(_picture, longest=longest, quality=quality)
    self._max_bad_share = max_bad_share
    self.num_unread, self.unread = 0, []  # pictures; lines on those of this run

  def write(self, split: str, source: Source) -> dict:
    """Writes what is missing of a split; returns its section of pack.json."""
    parts = self._parts(split)
    known = {}  # picture -> its number and scale
    for part in parts:
      for key, scale in zip(part['keys'].tolist(), part['scales'].tolist()):
        known[key] = len(known), scale
    start = 0
    allowed = int(self._max_bad_share * len(source))
    gathering = Gathering(languages=True)
    with tqdm(total=len(source), desc=split, unit=' examples', disable=None) as bar:
      for part in parts:
        self._check_part(split, part, source, start, known, gathering, bar)
        start += int(part['read'])
      while start < len(source):
        part = self._write_part(split, len(parts), source, start, known, gathering, bar,
                                allowed - sum(map(_num_unread, parts)))
        start += int(part['read'])
        parts.append(part)
    self.num_unread += sum(map(_num_unread, parts))
    section = {'examples': len(source), 'pictures': len(known), 'files': {
        kind: [storage.size(self._path(split, kind, number)) for number in range(len(parts))]
        for kind in KINDS}, 'categories': dict(getattr(source, 'categories', {})),
               'made': sum(int(part['made']) for part in parts)}
    for kind in KINDS:
      with _written(os.path.join(self._folder, f'{split}-{kind}.npy'), 'wb') as f:
        np.save(f, np.concatenate([part[kind] for part in parts]))
    found = with_tokenizer(gathering.overview(), tokenizer.OPTIONS['vocab_size'].default)
    with _written(os.path.join(self._folder, overview_name(split)), 'wb') as f:
      found.save(f, fingerprint(self._pack, split))
    return section

  def _path(self, split, kind, number):
    return os.path.join(self._folder, file_name(split, kind, number))

  def _parts(self, split):
    found = []
    while storage.is_file(path := os.path.join(self._folder, f'{split}-{len(found):05d}.npz')):
      with storage.open_file(path, 'rb') as f, np.load(f) as part:
        found.append(dict(part))
    return found

  def _check_part(self, split, part, source, start, known, gathering, bar):
    """Gathers the examples of a part that an earlier run wrote, which have to be the same."""
    found = hashlib.blake2b()
    for i in range(start, start + int(part['read'])):
      example = source[i]
      gathering.add(example)
      found.update(examples.to_record(example, *known.get(_key(example), (-1, 1.0))))
      bar.update()
    if found.hexdigest() != str(part.get('digest')):
      raise UserError(f'{self._folder}: the data have changed since this pack was begun: examples '
                      f'{start} to {start + int(part["read"]) - 1} of {split!r} are others; give '
                      'another --output')

  def _write_part(self, split, number, source, start, known, gathering, bar, allowed):
    keys, scales, first, made, unread = [], [], start, 0, []
    digest = hashlib.blake2b()
    with contextlib.ExitStack() as opened:
      writers = {kind: records.Writer(
          opened.enter_context(_written(self._path(split, kind, number), 'wb')), number,
          title(self._pack, split, kind, number)) for kind in KINDS}
      while start < len(source) and max(w.size for w in writers.values()) < self._limit:
        read = [source[i] for i in range(start, min(start + _CHUNK, len(source)))]
        of_read = [_key(example) for example in read]
        new = {key: example.image for key, example in zip(of_read, read) if key not in known}
        for key, (data, scale, fault) in zip(new, self._read(self._file, new.values())):
          known[key] = len(known), scale
          keys.append(key)
          scales.append(scale)
          writers['pictures'].add(data)
          unread += [fault] if fault else []
          if len(unread) > allowed:
            raise UserError(
                f'{split}: more than {self._max_bad_share:.1%} as many pictures as examples cannot '
                f'be read; the last: {fault}; repair them (xmodal check lists all), or raise '
                '--max_bad_share, and run the same command again')
        for key, example in zip(of_read, read):
          record = examples.to_record(example, *known[key])
          digest.update(record)
          writers['examples'].add(record)
          gathering.add(example)
        made += sum(example.made for example in read)
        start += len(read)
        bar.update(len(read))
    part = {'keys': np.array(keys, 'S32'), 'scales': np.array(scales), 'read': start - first,
            'made': made, 'digest': digest.hexdigest()} | {
        kind: writer.places for kind, writer in writers.items()}
    with _written(os.path.join(self._folder, f'{split}-{number:05d}.npz'), 'wb') as f:
      np.savez(f, **part)
    self.unread += unread
    return part

  def finish(self, description: dict) -> None:
    """Writes pack.json and removes what only an unfinished pack needs."""
    with _written(os.path.join(self._folder, TITLE)) as f:
      json.dump(description, f, indent=2)
    for split in description['splits']:
      for number in range(len(self._parts(split))):
        storage.remove(os.path.join(self._folder, f'{split}-{number:05d}.npz'))
    storage.remove(os.path.join(self._folder, _STATE))


@contextlib.contextmanager
def _written(path, mode='w'):
  """As atomic.written; a file of a bucket is written on this machine first."""
  if not storage.is_remote(path):
    with atomic.written(path, mode) as f:
      yield f
    return
  with tempfile.NamedTemporaryFile(mode, encoding=None if 'b' in mode else 'utf-8') as f:
    yield f
    f.flush()
    storage.upload(f.name, path)


def _key(example):
  return hashlib.blake2b(repr(example.picture).encode(), digest_size=16).hexdigest().encode()


def _num_unread(part):
  return int(np.count_nonzero(part['pictures']['size'] == 0))


def _picture(image, longest, quality):
  """(picture file, scale, fault); a picture that cannot be read is empty, and unreadable again.

  Raises UserError if nothing is known of the picture, as its bucket or disk does not answer.
  """
  try:
    return *examples.picture_file(image, longest, quality), ''
  except (storage.Unreachable, storage.AccessRefused):
    raise
  except UserError as error:
    if getattr(error.__cause__, 'errno', None) in _AWAY:
      raise
    return b'', 1.0, str(error)


def main(arguments: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  flags = argparse.ArgumentParser(prog='xmodal pack', description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('folder', metavar='DIR', help='folder of the data')
  flags.add_argument('--source', default='jsonl', help='as config.data.source: '
                     f'{", ".join(sources_of_files())}; its options as --config.data.KEY=VALUE')
  flags.add_argument('--output', required=True, metavar='OUT', help='new folder of the pack')
  flags.add_argument('--splits', nargs='+', metavar='SPLIT',
                     help='if not given, those of train, val, test that are there; all splits of '
                          'tfds, hf and pack')
  flags.add_argument('--longest', type=int, metavar='PIXELS',
                     help='make pictures with a longer side smaller')
  flags.add_argument('--quality', type=int, default=95, help='of JPEG, with --longest (default 95)')
  flags.add_argument('--file_mb', type=int, default=512, help='size of a file (default 512)')
  flags.add_argument('--max_bad_share', type=float, default=OPTIONS['max_bad_share'].default,
                     help='share of unreadable pictures above which packing stops (default '
                          f'{OPTIONS["max_bad_share"].default})')
  flags, rest = flags.parse_known_args(arguments)
  return errors.command(lambda: _run(flags, rest), flags.output)


def _run(flags, rest):
  for key, low, high in (('longest', 8, 2**16), ('quality', 1, 100), ('file_mb', 1, 2**20),
                         ('max_bad_share', 0, 1)):
    if (value := getattr(flags, key)) is not None and not low <= value <= high:
      raise UserError(f'--{key} {value}: wanted {low} to {high}')
  output = paths.resolved(flags.output, '--output')
  if storage.is_remote(output):
    storage.check_bucket(output)
  options = source_options(flags.source, rest)
  opened = {}
  for split in flags.splits or source_splits(flags.source, flags.folder, options):
    try:
      opened[split] = SOURCES[flags.source].make(flags.folder, split, **options)
    except MissingSplit:
      if flags.splits:
        raise
  if not opened:
    raise UserError(f'{flags.folder}: has none of train, val, test; name some with --splits')
  made_from = {'source': flags.source, 'root': flags.folder if storage.is_remote(flags.folder)
               else os.path.abspath(flags.folder), 'arguments': rest,
               'longest': flags.longest, 'quality': flags.quality,
               'examples': {split: len(source) for split, source in opened.items()}}
  pack = _begin(output, made_from)
  packing = _Packing(output, pack, flags.folder, flags.longest, flags.quality,
                     flags.file_mb * 2**20, flags.max_bad_share)
  splits = {split: packing.write(split, source) for split, source in opened.items()}
  packing.finish({'format': 'xmodal pack', 'version': VERSION, 'pack': pack, **made_from,
                  'splits': splits})
  for line in packing.unread[:_MOST_LINES]:
    print(f'cannot be read, left empty: {line}')
  for split, section in splits.items():
    size = sum(map(sum, section['files'].values())) / 2**20
    print(f'{split}: {section["examples"]:,} examples, {section["pictures"]:,} pictures, '
          f'{size:,.1f} MiB')
  if packing.num_unread:
    print(f'{packing.num_unread:,} pictures could not be read')
  print(f'in {output}: --config.data.source=pack --config.data.root={shlex.quote(output)}')
  return 0


def _begin(output, made_from):
  """The id of the pack in a folder, a new one or an unfinished one of the same arguments."""
  if storage.is_file(os.path.join(output, TITLE)):
    raise UserError(f'{output}: is a pack already; give another --output')
  state = os.path.join(output, _STATE)
  if not storage.is_file(state):
    if storage.is_dir(output) and storage.list_dir(output):
      raise UserError(f'{output}: is not empty; give a new folder')
    storage.make_dirs(output)
    begun = {'pack': uuid.uuid4().hex, 'from': made_from}
    with _written(state) as f:
      json.dump(begun, f)
  else:
    with storage.open_file(state) as f:
      begun = json.load(f)
    if begun['from'] != made_from:
      raise UserError(f'{output}: holds an unfinished pack of other data or arguments, '
                      f'{begun["from"]}; give these, or another --output')
  return begun['pack']


if __name__ == '__main__':
  sys.exit(main())
