"""Describes a run without starting it."""

import math

import jax

from xmodal.sharding.rules import path_name
from xmodal.train.programs import compile_step


def describe(plan) -> str:
  """Parameter table, batch, sharding and memory estimate of a plan; trains nothing."""
  params = jax.tree_util.tree_flatten_with_path(plan.abstract.params)[0]
  rows = [(path_name(path), _shape(x), str(x.dtype), _axes(x.sharding),
           'frozen' if path_name(path) in plan.frozen else '') for path, x in params]
  total = sum(x.size for _, x in params)
  batch = [(path_name(path), _shape(x), str(x.dtype), "('data', 'fsdp')")
           for path, x in jax.tree_util.tree_flatten_with_path(plan.batch)[0]]
  lines = [*_table(('parameter', 'shape', 'dtype', 'split over', ''), rows), '',
           *_table(('batch', 'shape', 'dtype', 'split over'), batch), '',
           f'{total:,} parameters; mesh {dict(plan.mesh.shape)} of {plan.mesh.size} '
           f'{plan.mesh.devices.flat[0].device_kind}', *_memory(plan), *plan.notes,
           'nothing was trained']
  return '\n'.join(lines)


def _memory(plan):
  local = bytes_on_one(plan.abstract)
  lines = [f'state (parameters, optimizer, average): {local / 2**20:,.1f} MiB per device']
  analyses = [compile_step(plan, kind).memory_analysis() for kind in plan.sampling.kinds]
  if None not in analyses:
    most = max(analysis.temp_size_in_bytes for analysis in analyses)
    lines.append(f'during a step: {most / 2**20:,.1f} MiB more per device')
  line = (f'evaluation: {plan.evaluation.batch_size} examples per batch '
          f'(config.train.eval_batch_size={plan.config.train.eval_batch_size})')
  analyses = [plan.evaluation.compile(feed, plan.abstract_variables).memory_analysis()
              for feed in plan.feeds]
  if None not in analyses:
    most = max(analysis.temp_size_in_bytes for analysis in analyses)
    line += f', {most / 2**20:,.1f} MiB more per device'
  lines.append(line)
  return lines


def bytes_on_one(tree) -> int:
  """Bytes of a tree of arrays, or of their shapes with shardings, on one device."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
             for x in jax.tree.leaves(tree))


def _shape(x):
  return ' x '.join(map(str, x.shape)) or 'scalar'


def _axes(sharding):
  return ', '.join(str(axis or '-') for axis in sharding.spec) if any(sharding.spec) else ''


def _table(head, rows):
  widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
  return ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
          for row in (head, *rows)]
