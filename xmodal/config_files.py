"""Resolves --config to a file: a path, or the name of a config."""

import os

from xmodal import errors
from xmodal.errors import UserError


def find(config: str) -> str:
  """The file for a config given by its path, or by its name without folder and '.py'.

  An existing file with that path comes first, then configs/NAME.py in the current folder, then the
  configs shipped with this package.

  Args:
    config: a path or a name.

  Raises:
    UserError: there is no such file and no config of that name.
  """
  if os.path.isfile(config):
    return config
  known = _by_name()
  if config not in known:
    near = errors.did_you_mean(os.path.basename(config).removesuffix('.py'), known)
    raise UserError(f'--config={config}{near}: wanted a Python file with get_config(), or one of '
                    f'the names {", ".join(sorted(known))}')
  return known[config]


def _by_name():
  """Name -> file of all configs; those in the current folder override the shipped ones."""
  return _files(_shipped()) | _files('configs')


def _files(folder):
  try:
    names = os.listdir(folder)
  except OSError:  # no such folder, or no permission
    return {}
  return {name.removesuffix('.py'): os.path.join(folder, name) for name in names
          if name.endswith('.py') and not name.startswith('_')}


def _shipped():
  """The folder of the shipped configs: inside this package, or beside it in a clone."""
  package = os.path.dirname(os.path.abspath(__file__))
  inside = os.path.join(package, 'configs')  # setup.py puts them there
  return inside if os.path.isdir(inside) else os.path.join(os.path.dirname(package), 'configs')

