"""How a program on a CPU gets its memory from the system."""

import importlib.util
import os
import platform
import sys

# glibc's settings, read once at the start of a program. A step of a small model frees
# hundreds of megabytes, which the next one asks for again: by default they go back to
# the kernel between the two, and come back as zeroed pages of 4 KB, for a quarter of the time.
_SETTINGS = {
    'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1',  # pages of 2 MB
    'MALLOC_MMAP_MAX_': '0',  # large blocks too come from one heap ...
    'MALLOC_TRIM_THRESHOLD_': str(2**40),  # ... that does not shrink
}
_ACCELERATORS = ('jax_cuda12_plugin', 'jax_cuda13_plugin', 'jax_rocm60_plugin', 'jax_rocm7_plugin',
                 'libtpu')


def keep_memory() -> None:
  """Starts the running program anew with those settings, before it has done anything.

  Does nothing where it has them or others of its own, where the C library is another, and where
  JAX has an accelerator, whose steps do not run in this memory.
  """
  if (platform.libc_ver()[0] == 'glibc' and not _SETTINGS.keys() & os.environ.keys()
      and not any(map(importlib.util.find_spec, _ACCELERATORS))):
    os.execve(sys.executable, sys.orig_argv, os.environ | _SETTINGS)
