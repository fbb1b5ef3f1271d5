"""Checkpoints in a bucket: which are complete, which are damaged, and copies of this machine's.

checkpoints/STEP/ is complete once it has `COMPLETE`, which Orbax writes last. Nothing is renamed in
a bucket, which would copy it: a damaged checkpoint loses that file and gets `DAMAGED`.
"""

from collections.abc import Callable
import os
import shutil
import sys

from xmodal import downloads, storage
from xmodal.train.checkpoints import damage

COMPLETE, DAMAGED = 'commit_success.txt', 'damaged.txt'


def steps(folder: str, mark: str = COMPLETE) -> list[int]:
  """The steps of WORKDIR/checkpoints in a bucket whose folders have a file."""
  return [int(name) for name in storage.list_dir(folder)
          if name.isdigit() and storage.is_file(os.path.join(folder, name, mark))]


def set_aside(folder: str, proof: str) -> None:
  """Marks checkpoints/STEP as damaged."""
  storage.write(os.path.join(folder, DAMAGED), proof.encode())
  storage.remove(os.path.join(folder, COMPLETE))


class Copies:
  """Copies the checkpoints of this machine into a bucket that Orbax does not write to."""

  def __init__(self, local: str, address: str, keep: int, best: Callable[[], int | None]):
    """
    Args:
      local: folder of the checkpoints on this machine; those that are not in the bucket are
        removed.
      address: the same in the bucket.
      keep, best: which to keep there, see Checkpoints.
    """
    self._local, self._address, self._keep, self._best = local, address, keep, best
    complete = set(steps(address))
    for step in set(_numbers(local)) - complete:
      shutil.rmtree(os.path.join(local, str(step)))
    kept = complete | set(steps(address, DAMAGED))
    for name in storage.walk(address):  # of uploads and removals that were cut off
      step = name.partition('/')[0]
      if step.isdigit() and int(step) not in kept:
        storage.remove(f'{address}/{name}')

  def fetch(self, step: int) -> str:
    """Downloads a checkpoint, unless this machine has the same; returns its folder here."""
    source, target = self._of(step)
    names = [name for name in storage.entries(source) if name != DAMAGED]
    if os.path.isdir(target):
      if _is_same(target, source, names):
        return target
      shutil.rmtree(target)
    print(f'downloading {source}', file=sys.stderr, flush=True)
    part = f'{target}.part'
    shutil.rmtree(part, ignore_errors=True)
    downloads.download(source, names, part)
    os.rename(part, target)
    return target

  def send(self) -> None:
    """Uploads what the bucket lacks, and removes the checkpoints that are not to be kept there."""
    there = set(steps(self._address))
    for step in sorted(set(_numbers(self._local)) - there):
      target, source = self._of(step)
      names = damage.names(source)
      for name in set(storage.walk(target)) - set(names):  # of an upload that was cut off
        storage.remove(f'{target}/{name}')
      storage.copy_all(storage.upload, ((os.path.join(source, name), f'{target}/{name}')
                                        for name in names if name != COMPLETE))
      storage.write(f'{target}/{COMPLETE}', b'complete')
      there.add(step)
    for step in there - {*sorted(there)[-self._keep:], self._best()}:
      target, _ = self._of(step)
      for name in (COMPLETE, *storage.walk(target)):  # it is incomplete from the first on
        storage.remove(f'{target}/{name}')

  def drop(self, step: int) -> None:
    """Removes this machine's copy of a damaged checkpoint."""
    shutil.rmtree(self._of(step)[1], ignore_errors=True)

  def _of(self, step):
    return f'{self._address}/{step}', os.path.join(self._local, str(step))


def _numbers(folder):
  names = os.listdir(folder) if os.path.isdir(folder) else ()
  return [int(name) for name in names if name.isdigit()]


def _is_same(local, address, names):
  """Whether a local checkpoint is intact, and has the same lists of files as one in a bucket."""
  lists = [name for name in names if os.path.basename(name) == damage.LIST]
  if not lists:
    return False
  try:
    for name in lists:
      path = os.path.join(local, name)
      if storage.read(path) != storage.read(f'{address}/{name}') or (
          damage.find_damage(os.path.dirname(path))):
        return False
    return True
  except OSError:
    return False
