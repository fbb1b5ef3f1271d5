"""Runs xmodal train with a fault of the machine: a child process of the benchmark.

The faults are in Python's functions. TensorStore writes arrays from C++, past them; what Python
does of a checkpoint is its metadata, its checksums, and the renaming that makes it complete.
"""

import builtins
import errno
import os
import resource
import sys
import time

from xmodal import main as program

_SLOW = 0.15  # seconds that each operation takes longer
_GOOD = 60  # operations in checkpoints/ before the disk fails
_BACK = 3600.0  # seconds by which the clock is set back, at the start and once more later
_LATER = 8.0  # seconds
_FILE_BYTES = 30_000


def _before(module, name, action):
  """Makes a function of a module call action(path or descriptor) first."""
  original = getattr(module, name)

  def changed(path, *args, **kwargs):
    action(path)
    return original(path, *args, **kwargs)

  setattr(module, name, changed)


def _slow_disk():
  for name in ('fsync', 'replace', 'rename', 'mkdir'):
    _before(os, name, lambda _: time.sleep(_SLOW))


def _failing_disk():
  done = []

  def fail(path):
    if 'checkpoints/' in str(path):
      done.append(path)
      if len(done) > _GOOD:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

  for module, name in ((os, 'rename'), (os, 'replace'), (os, 'mkdir'), (builtins, 'open')):
    _before(module, name, fail)


def _clock_back():
  now, began = time.time, time.monotonic()
  time.time = lambda: now() - _BACK * (1 + (time.monotonic() - began > _LATER))


def _small_files():
  resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_BYTES, _FILE_BYTES))


FAULTS = {'slow_disk': _slow_disk, 'failing_disk': _failing_disk, 'clock_back': _clock_back,
          'small_files': _small_files}


def main() -> int:
  """Runs `FAULT ARGUMENTS_OF_XMODAL_TRAIN`; returns the program's exit code."""
  FAULTS[sys.argv.pop(1)]()
  return program.main()
