"""CSV files in WORKDIR/csv, one for each split: train.csv, eval.csv, and so on.

A row is a step, a column a metric: 'step', 'loss', 'vqa/accuracy'. A file whose columns grow is
written anew, so that one header holds for all rows; cells of metrics that a step lacks are empty.
"""

from collections.abc import Mapping
import csv
import os

from xmodal import atomic
from xmodal.train.logs import metrics
from xmodal.train.logs.trackers.tracker import TRACKERS


@TRACKERS.register('csv')
class Tables:
  """Writes the files; those of earlier starts are made anew from metrics.jsonl."""

  def __init__(self, run):
    self._folder = os.path.join(run.workdir, 'csv')
    os.makedirs(self._folder, exist_ok=True)
    for name in os.listdir(self._folder):
      if name.endswith('.csv'):
        os.remove(os.path.join(self._folder, name))
    self._columns = {}
    tables = {}
    for line in run.lines:
      row = tables.setdefault(line['split'], {}).setdefault(line['step'], {'step': line['step']})
      row |= metrics.numbers(line)
    for split, rows in tables.items():
      self._write(split, list(rows.values()))

  def add(self, step: int, split: str, numbers: Mapping[str, float]) -> None:
    """Appends a row."""
    row = {'step': step, **numbers}
    if not row.keys() <= self._columns.get(split, {}).keys():
      self._write(split, [*self._read(split), row])
      return
    with open(self._path(split), 'a', encoding='utf-8', newline='') as f:
      self._writer(f, split).writerow(row)

  def close(self) -> None:
    """Nothing to do: each row is written at once."""

  def _path(self, split):
    return os.path.join(self._folder, f'{split}.csv')

  def _read(self, split):
    if split not in self._columns:
      return []
    with open(self._path(split), encoding='utf-8', newline='') as f:
      return list(csv.DictReader(f))

  def _write(self, split, rows):
    self._columns[split] = dict.fromkeys(key for row in rows for key in row)
    with atomic.written(self._path(split)) as f:
      writer = self._writer(f, split)
      writer.writeheader()
      writer.writerows(rows)

  def _writer(self, f, split):
    return csv.DictWriter(f, self._columns[split], restval='', lineterminator='\n')
