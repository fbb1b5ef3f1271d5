"""JAX's persistent compilation cache, on unless the user has set it otherwise."""

import os

import jax


def enable_compilation_cache() -> None:
  """Keeps compiled programs in the user's cache folder, so that a second start is quick.

  JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=0 turns it off. A
  user without a home folder that can be written to has none.
  """
  if jax.config.jax_compilation_cache_dir is None and (folder := _folder()):
    jax.config.update('jax_compilation_cache_dir', folder)


def _folder():
  for base in (os.environ.get('XDG_CACHE_HOME', ''), os.path.join(os.path.expanduser('~'), '.cache')):
    # Without HOME and an entry in the list of users `~` stays as it is.
    if os.path.isabs(base):
      folder = os.path.join(base, 'xmodal', 'jax')
      try:
        os.makedirs(folder, exist_ok=True)
      except OSError:
        continue
      if os.access(folder, os.W_OK | os.X_OK):
        return folder
  return None
