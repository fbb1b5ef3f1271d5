"""JAX's persistent compilation cache, on unless the user has set it otherwise."""

import os

import jax


def enable_compilation_cache() -> None:
  """Keeps compiled programs in the user's cache folder, so that a second start is quick.

  JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=0 turns it off.
  """
  if jax.config.jax_compilation_cache_dir is None:
    home = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
    jax.config.update('jax_compilation_cache_dir', os.path.join(home, 'xmodal', 'jax'))
