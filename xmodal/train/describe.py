"""What a run would be, without running it."""

import jax

from xmodal.sharding.rules import path_name


def describe(run) -> str:
  """Parameter table, batch, sharding and memory estimate of a train.loop.Run; trains nothing."""
  params = jax.tree_util.tree_flatten_with_path(run.abstract.params)[0]
  rows = [(path_name(path), _shape(x), str(x.dtype), _axes(x.sharding),
           'frozen' if path_name(path) in run.frozen else '') for path, x in params]
  total = sum(x.size for _, x in params)
  batch = [(path_name(path), _shape(x), str(x.dtype), "('data', 'fsdp')")
           for path, x in jax.tree_util.tree_flatten_with_path(run.batch)[0]]
  lines = [*_table(('parameter', 'shape', 'dtype', 'split over', ''), rows), '',
           *_table(('batch', 'shape', 'dtype', 'split over'), batch), '',
           f'{total:,} parameters; mesh {dict(run.mesh.shape)} of {jax.device_count()} '
           f'{jax.devices()[0].device_kind}', *_memory(run), *run.notes, 'nothing was trained']
  return '\n'.join(lines)


def _memory(run):
  local = sum(_bytes_on_one(x) for x in jax.tree.leaves(run.abstract))
  lines = [f'state (parameters, optimiser, average): {local / 2**20:,.1f} MiB a device']
  analyses = [run.compile_step(kind).memory_analysis() for kind in run.sampling.kinds]
  if None not in analyses:
    most = max(analysis.temp_size_in_bytes for analysis in analyses)
    lines.append(f'while a step runs: {most / 2**20:,.1f} MiB more a device')
  line = (f'evaluation: {run.eval_batch_size} examples at once '
          f'(config.train.eval_batch_size={run.config.train.eval_batch_size})')
  analyses = [run.compile_predict(feed).memory_analysis() for feed in run.feeds]
  if None not in analyses:
    most = max(analysis.temp_size_in_bytes for analysis in analyses)
    line += f', {most / 2**20:,.1f} MiB more a device'
  lines.append(line)
  return lines


def _bytes_on_one(x):
  size = x.dtype.itemsize
  for side in x.sharding.shard_shape(x.shape):
    size *= side
  return size


def _shape(x):
  return ' x '.join(map(str, x.shape)) or 'scalar'


def _axes(sharding):
  return ', '.join(str(axis or '-') for axis in sharding.spec) if any(sharding.spec) else ''


def _table(head, rows):
  widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
  return ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
          for row in (head, *rows)]
