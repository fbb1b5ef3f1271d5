"""Checks the shapes and dtypes that jaxtyping annotations state, in tests only."""

from typing import get_args

from beartype import BeartypeConf, beartype
import jax
import jaxtyping
import numpy as np

PACKAGES = ['xmodal.models', 'xmodal.tasks']
_typed = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, too


def install():
  """Checks every function of PACKAGES with such an annotation; call before they are imported."""
  jaxtyping.Array = jax.Array | np.ndarray | np.generic  # JAX accepts all
  jaxtyping.install_import_hook(PACKAGES, 'shape_checks.check')


def check(function):
  """A type checker for jaxtyping. Functions without array annotations are not checked."""
  hints = getattr(function, '__annotations__', {}).values()
  return _typed(function) if any(map(_has_array, hints)) else function


def _has_array(hint):
  if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
    return True
  return any(map(_has_array, get_args(hint)))
