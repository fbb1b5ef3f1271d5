"""Writes small data sets in the layouts in which data sets are distributed, for tests."""

import json
import pathlib

from PIL import Image


def write(root: pathlib.Path, files: dict) -> str:
  """Writes files by their paths below root; returns root.

  A picture's content is its (width, height); that of other files is text, bytes or JSON.
  """
  for name, content in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, tuple):
      Image.new('RGB', content).save(path)
    elif isinstance(content, bytes):
      path.write_bytes(content)
    else:
      path.write_text(content if isinstance(content, str) else json.dumps(content),
                      encoding='utf-8')
  return str(root)
