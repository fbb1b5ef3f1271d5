"""Commands on a CPU keep freed memory: they restart themselves once."""

import os
import subprocess
import sys

import pytest

PROGRAM = '''
import os, platform, sys
from xmodal import heap
print('begun', sys.argv[1:], flush=True)
heap.keep_memory()
print(os.environ.get('MALLOC_MMAP_MAX_'), os.environ.get('GLIBC_TUNABLES'))
'''


def run(**more):
  environment = {key: value for key, value in os.environ.items()
                 if not key.startswith(('MALLOC_', 'GLIBC_'))} | more
  ended = subprocess.run([sys.executable, '-c', PROGRAM, 'an argument', '--another'],
                         env=environment, capture_output=True, text=True, check=True)
  return ended.stdout.split('\n')


@pytest.mark.skipif(sys.platform != 'linux', reason="the settings are those of Linux's C library")
def test_it_starts_anew_once_with_the_same_arguments():
  begun = "begun ['an argument', '--another']"
  assert run() == [begun, begun, '0 glibc.malloc.hugetlb=1', '']


def test_settings_of_the_users_own_stay():
  assert run(MALLOC_MMAP_MAX_='7') == ["begun ['an argument', '--another']", '7 None', '']
