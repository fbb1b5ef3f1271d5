"""The code keeps to .ruff.toml."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_ruff_finds_nothing():
  done = subprocess.run(
      [sys.executable, '-m', 'ruff', 'check', '--no-cache', '--output-format=concise', 'xmodal',
       'tests', 'configs', 'setup.py'], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
