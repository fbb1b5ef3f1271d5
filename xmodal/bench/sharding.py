"""What sharded steps cost on machines that are not attached: collectives, memory, predicted time.

`xmodal bench sharding [--topologies h100:8 v5e:4x4] [--cases vqa-base ...] [--mesh 2,2,2]` compiles
the steps of CASES, as `xmodal compile` does, and prints a row for each. Without --mesh the
parameters are split over all devices (config.mesh.fsdp). 'bound' is 3.2 times the bytes of the
parameters: two gathers, one sum of gradients, and a little of other arrays.
"""

import argparse
import math
import sys

from xmodal.bench import gpu
from xmodal.bench.harness import changed, read_config, run_command
from xmodal.errors import UserError, did_you_mean

_BATCH = {'base': 256, 'large': 128}
CASES = {f'{name}-{size}': (*parts, f'model.size={size}', f'train.batch_size={batch}')
         for size, batch in _BATCH.items()
         for name, parts in (('vqa', gpu.VQA), ('detection', gpu.DETECTION),
                             ('generation', gpu.GENERATION))}
CASES |= {f'{name}-base': (name, 'data.image_size=224', 'model.size=base', 'train.batch_size=256')
          for name in ('captioning', 'retrieval', 'regression', 'multitask_shared')}
_COLUMNS = ('case', 'devices', 'gathered', 'reduced', 'scattered', 'other', 'all', 'bound',
            'collectives', 'in conditions', 'GiB at most', 'step ms', 'limit')


def row(case: str, topology: str, mesh: tuple[int, ...] | None = None) -> tuple[str, ...]:
  """Compiles a case for a topology; returns a value for each column. Bytes are GB a step."""
  from xmodal import compile as compiling
  from xmodal.cost import estimate
  from xmodal.cost import topology as topologies
  name, *changes = CASES[case]
  devices = math.prod(topologies.split(topology)[1])
  data, fsdp, tensor = mesh or (1, devices, 1)
  config = changed(read_config(name), [
      *gpu.SMALL, *changes, f'mesh.data={data}', f'mesh.fsdp={fsdp}', f'mesh.tensor={tensor}'])
  found = next(compiling.compile_for(config, topology))
  kinds = estimate.by_kind(found.cost.collectives)
  sizes = [kinds.pop(kind, (0, 0.0))[1] / 1e9
           for kind in ('all-gather', 'all-reduce', 'reduce-scatter')]
  sizes.append(sum(size for _, size in kinds.values()) / 1e9)
  waits = sum(one.times for one in found.cost.collectives if one.in_condition)
  return (case, topology, *(f'{size:.2f}' for size in sizes), f'{sum(sizes):.2f}',
          f'{3.2 * 4 * found.parameters / 1e9:.2f}',
          f'{sum(one.times for one in found.cost.collectives):,}', str(waits),
          f'{found.peak_bytes / 2**30:.2f}', f'{1e3 * found.estimate.step:.1f}',
          found.estimate.limit)


def _mesh(text):
  sizes = tuple(int(size) for size in text.split(','))
  if len(sizes) != 3:
    raise ValueError
  return sizes


def _run(options):
  for case in options.cases:
    if case not in CASES:
      raise UserError(f'--cases: no case {case!r}{did_you_mean(case, CASES)}; wanted some of '
                      f'{", ".join(CASES)}')
  print('| ' + ' | '.join(_COLUMNS) + ' |\n' + '|---' * len(_COLUMNS) + '|', flush=True)
  for topology in options.topologies:
    for case in options.cases:
      try:
        print('| ' + ' | '.join(row(case, topology, options.mesh)) + ' |', flush=True)
      except UserError as error:
        print(f'| {case} | {topology} | {error} |', flush=True)


def main(argv=None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a user error)."""
  parser = argparse.ArgumentParser(prog='xmodal bench sharding', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--topologies', nargs='+', default=['h100:8', 'v5e:4x4'])
  parser.add_argument('--cases', nargs='+', default=list(CASES))
  parser.add_argument('--mesh', type=_mesh, metavar='DATA,FSDP,TENSOR')
  return run_command(_run, parser.parse_args(argv))


if __name__ == '__main__':
  sys.exit(main())
