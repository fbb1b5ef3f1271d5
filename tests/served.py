"""A model with five tasks, untrained, and servers of it in processes of their own."""

import atexit
import os
import pathlib
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request

import tiny

from xmodal.bench.predict import make_checkpoint

ROOT = pathlib.Path(__file__).parents[1]
TASKS = ('vqa', 'detection', 'captioning', 'retrieval', 'generation')


def make_run(folder, tasks=TASKS):
  """Writes a checkpoint; returns its folder."""
  return make_checkpoint(str(folder), tiny.changed(
      mixer__tasks=tasks, mixer__weights=(1.0,) * len(tasks), generation__steps=6))


class Served:
  """`xmodal serve` in a process; environment variables of the value None are unset."""

  def __init__(self, checkpoint, *arguments, **environment):
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), **environment}
    self.process = subprocess.Popen(
        [sys.executable, '-m', 'xmodal', 'serve', '--checkpoint', str(checkpoint), '--port', '0',
         *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={name: value for name, value in environment.items() if value is not None})
    atexit.register(self.process.kill)  # also where a test fails
    line = self.process.stdout.readline()
    found = re.match(r'http://127\.0\.0\.1:(\d+)/ serves ', line)
    assert found, line + self.process.communicate()[1]
    self.port = int(found[1])
    self.address = f'http://127.0.0.1:{self.port}'

  def wait_until_ready(self, seconds=240):
    end = time.monotonic() + seconds
    while self.status('/readyz') != 200:
      assert time.monotonic() < end and self.process.poll() is None
      time.sleep(0.05)
    return self

  def status(self, path):
    try:
      with urllib.request.urlopen(self.address + path, timeout=20) as response:
        return response.status
    except urllib.error.HTTPError as error:
      return error.code

  def stop(self):
    """Ends it as a cluster does; returns the exit code and what it wrote to stderr."""
    self.process.terminate()
    _, err = self.process.communicate(timeout=60)
    return self.process.returncode, err
