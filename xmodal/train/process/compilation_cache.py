"""JAX's persistent compilation cache, on unless the user has set it otherwise."""

import glob
import os
import re
import sys
import warnings

import jax

from xmodal import paths

_LEAST = 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'
# JAX writes a cache entry in place. A killed process leaves a truncated entry: JAX then warns at
# every start, compiles again, and never replaces the entry.
_CUT = re.compile(r"Error reading persistent compilation cache entry for '([^']+)'")


def enable_compilation_cache(least_seconds: float | None = None) -> None:
  """Caches compiled programs in the user's cache folder, so that later starts are quick.

  JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=0 turns it off.
  Without a writable home folder there is no cache.

  Args:
    least_seconds: programs that compile faster are not cached, unless
      JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS says otherwise; None: JAX's default, a second.
  """
  if jax.config.jax_compilation_cache_dir is None and (folder := paths.cache('jax')):
    jax.config.update('jax_compilation_cache_dir', folder)
  if least_seconds is not None and _LEAST not in os.environ:
    jax.config.update(_LEAST.lower(), least_seconds)
  if warnings.showwarning.__module__ != __name__:
    warnings.showwarning = _without_cut_entries(warnings.showwarning)


def _without_cut_entries(show):
  """Removes unreadable entries and prints one line; shows other warnings as before."""
  def showwarning(message, *args, **kwargs):
    found = _CUT.match(str(message))
    folder = jax.config.jax_compilation_cache_dir
    if not found or not folder or not os.path.isdir(folder):
      show(message, *args, **kwargs)
      return
    # The warning names the program, not its shapes: entries of all shapes are removed.
    for path in glob.glob(f'{glob.escape(os.path.join(folder, found[1]))}-*-cache'):
      try:
        os.remove(path)
      except OSError:
        continue
    print(f'note: {folder}: {found[1]} was truncated and is compiled again', file=sys.stderr)
  return showwarning
