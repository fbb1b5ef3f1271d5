"""Pictures per second of the training input pipeline, against bare decoding.

`xmodal bench data [--pictures 512] [--sizes 640x480 256x256] [--workers 1 2]` makes
photo-like JPEGs (quality 90, 4:2:0) in a temporary folder. For each size it
measures two ways in alternating rounds, each on every core through the same
prefetching (data.pipeline.threaded):
  bare      reads and decodes each file at full size and drops the pixels
  pipeline  data.pipeline.train_batches: reads in random order, decodes, resizes
            to 224x224 and makes batches
'cpu' columns are processor milliseconds per picture, which are stable on a
shared machine where pictures per second are not. With --workers, it also measures the
pipeline with so many processes (config.data.workers), from files and from a pack.
"""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import importlib.metadata
import io
import json
import os
import re
import statistics
import sys
import tempfile
import time

import cv2
import numpy as np
from PIL import Image
import simplejpeg

from xmodal.bench.harness import check_positive, run_command
from xmodal.data import pipeline
from xmodal.data.example import Example
from xmodal.data.pack import pack
from xmodal.data.sources.pack import read_pack
from xmodal.data.workers import Workers
from xmodal.errors import UserError

_TARGET = (224, 224)
_BATCH = 32


def photo_like(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
  """A random picture with the statistics that matter to a JPEG decoder.

  Smooth light at three scales, a dozen sharp-edged shapes, and texture of
  varying strength: about 0.35 bytes per pixel at quality 90, as in photos.

  Returns:
    uint8 [height, width, 3].
  """
  pixels = np.full((height, width, 3), 128, np.float32)
  for cells, strength in ((4, 60), (12, 30), (40, 15)):
    field = rng.standard_normal((cells, cells, 3), np.float32) * strength
    pixels += cv2.resize(field, (width, height), interpolation=cv2.INTER_CUBIC)
  rows, columns = np.ogrid[:height, :width]
  for i in range(12):
    y, x, radius = rng.uniform(0, 1, 3) * (height, width, 0.25 * height)
    if i % 2:
      inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
    else:
      inside = (abs(rows - y) < radius) & (abs(columns - x) < 0.7 * radius)
    pixels[inside] += rng.normal(0, 40, 3)
  roughness = cv2.resize(rng.uniform(0, 14, (5, 5)).astype(np.float32), (width, height))
  pixels += (roughness * rng.standard_normal((height, width), np.float32))[..., None]
  return pixels.clip(0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray, **options) -> bytes:
  """uint8 [H, W, 3] as JPEG bytes, quality 90 and 4:2:0 by default."""
  buffer = io.BytesIO()
  options = {'quality': 90, 'subsampling': '4:2:0'} | options
  Image.fromarray(pixels).save(buffer, 'JPEG', **options)
  return buffer.getvalue()


def write_pictures(folder: str, count: int, height: int, width: int) -> list[str]:
  """Fills a folder with photo-like JPEGs, the same on every run; returns their paths."""
  rng = np.random.default_rng(0)
  paths = [os.path.join(folder, f'{width}x{height}_{i}.jpg') for i in range(count)]
  for path in paths:
    with open(path, 'wb') as file:
      file.write(jpeg(photo_like(rng, height, width)))
  return paths


def _decode_batch(paths: list[str]) -> np.int32:
  for path in paths:
    with open(path, 'rb') as file:
      simplejpeg.decode_jpeg(file.read())
  return np.int32(len(paths))


def _run_once(batches: Iterator, pictures: int) -> tuple[float, float]:
  """(pictures per second, processor milliseconds per picture) of one pass."""
  wall, processor = time.perf_counter(), time.process_time()
  for _ in batches:
    pass
  wall, processor = time.perf_counter() - wall, time.process_time() - processor
  return pictures / wall, 1e3 * processor / pictures


def measure(paths: list[str], rounds: int) -> dict[str, float]:
  """Medians over rounds, of each way and of the ratio within a round."""
  steps = len(paths) // _BATCH
  source = [Example(image=path) for path in paths]
  make = pipeline.BatchMaker(source, {}, _TARGET, pipeline.BadPictures(len(paths), 0.0))
  ways = {
      'bare': lambda: pipeline.threaded(
          lambda step: _decode_batch(paths[step * _BATCH : (step + 1) * _BATCH]), range(steps)),
      'pipeline': lambda: pipeline.train_batches(make, _BATCH, 0, steps),
  }
  seen = {name: [] for name in ways}
  for i in range(rounds + 1):
    for name, way in ways.items():
      result = _run_once(way(), steps * _BATCH)
      if i:  # The first round warms up.
        seen[name].append(result)
  pairs = list(zip(seen['bare'], seen['pipeline'], strict=True))
  median = statistics.median
  return {
      'bare': median(bare[0] for bare, _ in pairs),
      'pipeline': median(full[0] for _, full in pairs),
      'ratio': median(full[0] / bare[0] for bare, full in pairs),
      'cpu bare': median(bare[1] for bare, _ in pairs),
      'cpu pipeline': median(full[1] for _, full in pairs),
      'cpu ratio': median(bare[1] / full[1] for bare, full in pairs),
  }


def measure_workers(paths: list[str], counts: Sequence[int], rounds: int) -> list[str]:
  """A line for each number of processes: pictures per second, and per process against the first."""
  folder = os.path.dirname(paths[0])
  with open(os.path.join(folder, 'train.jsonl'), 'w', encoding='utf-8') as f:
    f.writelines(json.dumps({'image': path, 'caption': 'a'}) + '\n' for path in paths)
  out = os.path.join(folder, 'pack')
  with contextlib.redirect_stdout(io.StringIO()):
    pack.main([folder, '--output', out, '--splits', 'train'])
  sources = {'files': [Example(image=path) for path in paths], 'pack': read_pack(out, 'train')}
  steps, lines = len(paths) // _BATCH, []
  for name, source in sources.items():
    make = pipeline.BatchMaker(source, {}, _TARGET, pipeline.BadPictures(len(source), 0.0),
                               name=name)
    found = {}
    with contextlib.ExitStack() as opened:
      makers = {count: dataclasses.replace(make, workers=opened.enter_context(contextlib.closing(
          Workers([[(make, _BATCH)]], count, print)))) for count in counts}
      for i in range(rounds + 1):
        for count, maker in makers.items():
          speed, _ = _run_once(pipeline.train_batches(maker, _BATCH, 0, steps), steps * _BATCH)
          if i:  # the first round warms up
            found.setdefault(count, []).append(speed)
    for count in counts:
      ratio = statistics.median(b / a for a, b in zip(found[counts[0]], found[count]))
      lines.append(f'{name:>9} {count:9} processes {statistics.median(found[count]):9.0f} images/s'
                   f' {ratio * counts[0] / count:9.2f} of the first, per process')
  return lines


def _size(text: str) -> tuple[int, int]:
  """(width, height) of 'WIDTHxHEIGHT'."""
  match = re.fullmatch(r'([1-9]\d*)x([1-9]\d*)', text)
  if not match:
    raise UserError(f'--sizes {text}: wanted WIDTHxHEIGHT in pixels, such as 640x480')
  return int(match[1]), int(match[2])


def main(arguments: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a user error)."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--pictures', type=int, default=512, help='pictures of each size')
  parser.add_argument('--sizes', nargs='+', default=['640x480', '256x256'], help='width x height')
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--workers', type=int, nargs='+', default=[], help='numbers of processes')
  return run_command(_run, parser.parse_args(arguments))


def _run(options):
  if options.pictures < _BATCH:
    raise UserError(f'--pictures={options.pictures}: wanted {_BATCH} or more, one '
                    'batch')
  check_positive(options, 'rounds')
  if options.workers and min(options.workers) < 1:
    raise UserError(f'--workers={options.workers}: wanted 1 or more')
  sizes = [_size(text) for text in options.sizes]
  versions = [
      f'{name} {importlib.metadata.version(name)}'
      for name in ('simplejpeg', 'opencv-python-headless', 'pillow', 'numpy')
  ]
  print(f'{os.cpu_count()} cores, {options.rounds} rounds, Python {sys.version.split()[0]},',
        ', '.join(versions))
  print(f'to {_TARGET[1]}x{_TARGET[0]}, batches of {_BATCH}; bare, pipeline: images/s;'
        ' cpu: ms per image')
  columns = ('bare', 'pipeline', 'ratio', 'cpu bare', 'cpu pipeline', 'cpu ratio')
  print(f'{"size":>9} {"bytes/px":>9}', *(f'{column:>12}' for column in columns))
  for width, height in sizes:
    with tempfile.TemporaryDirectory() as folder:
      paths = write_pictures(folder, options.pictures, height, width)
      density = sum(map(os.path.getsize, paths)) / (len(paths) * height * width)
      figures = measure(paths, options.rounds)
      lines = measure_workers(paths, options.workers, options.rounds) if options.workers else []
    shown = (f'{figures[c]:12.0f}' if c in ('bare', 'pipeline') else f'{figures[c]:12.3f}'
             for c in columns)
    print(f'{f"{width}x{height}":>9} {density:9.2f}', *shown, flush=True)
    for line in lines:
      print(line, flush=True)


if __name__ == '__main__':
  sys.exit(main())
