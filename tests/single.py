"""The tiny model with one task, for tests of files and processes: it compiles thrice as fast."""

import functools

import tiny

from xmodal.train.plan import Plan

_CHANGES = {'mixer.tasks': ('objects',), 'mixer.weights': (1.0,)}
# The same as arguments of a command.
ARGUMENTS = tuple(f'--config.{key}={value!r}' for key, value in _CHANGES.items())


def changed(**values):
  """As tiny.changed."""
  return tiny.changed(**{key.replace('.', '__'): value for key, value in _CHANGES.items()} | values)


def train(workdir, c=None):
  """As tiny.train."""
  return tiny.train(workdir, c or changed())


@functools.cache
def abstract():
  """Shapes and shardings of the state."""
  return Plan(changed(), 'unused').abstract


def restored(workdir, warnings=None):
  """As tiny.restored."""
  return tiny.restored(workdir, warnings, abstract())
