"""Writes a trained model as a folder that answers without this package, or one of its towers.

  xmodal export --checkpoint RUN --output BUNDLE
  xmodal export --checkpoint RUN --output DIR --part vision

The first writes the whole model: StableHLO programs, weights, tokenizer, labels, a model card and a
loader that needs jax, numpy, tokenizers and Pillow (xmodal/bundle/README.md). The second writes a
tower as a folder that transformers loads.
"""

import argparse
import os
import sys
import time

from xmodal import errors, outputs, paths
from xmodal.errors import UserError

_OF_A_TOWER, _OF_A_MODEL = ('dtype',), ('precision', 'platforms', 'tasks', 'sizes', 'format')


def main(argv=None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a user error)."""
  parser = argparse.ArgumentParser(prog='xmodal export', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--checkpoint', required=True, metavar='DIR', help='a workdir of xmodal '
                      'train, WORKDIR/best, or one of its checkpoints/STEP folders')
  parser.add_argument('--output', required=True, metavar='DIR',
                      help='a folder that is new or empty')
  whole = parser.add_argument_group('the whole model')
  whole.add_argument('--precision', metavar='P', help='how weights are stored: float32, '
                     'bfloat16, int8, int8_weights or int4; by default as config.model.quantize '
                     'says, or float32')
  whole.add_argument('--platforms', metavar='P,P', help='what the programs run on, of cpu, cuda, '
                     'rocm and tpu; cpu,cuda,tpu by default')
  whole.add_argument('--tasks', metavar='T,T', help='tasks to export; all by default')
  whole.add_argument('--sizes', metavar='N,N', help='batch sizes that programs are compiled for '
                     'where they run; 1,4,16,32 by default')
  whole.add_argument('--format', metavar='F,F', help='further formats of the programs: onnx, '
                     'saved_model; what cannot be converted says why')
  tower = parser.add_argument_group('a tower')
  tower.add_argument('--part', choices=['vision', 'text'], help='write this tower alone')
  tower.add_argument('--dtype', choices=['float32', 'bfloat16'], help='of its weights; float32 by '
                     'default')
  options = parser.parse_args(argv)
  return errors.command(lambda: _export(options), options.output)


def _export(options):
  options.output = paths.resolved(options.output, '--output')
  kind, others = (('a tower', _OF_A_MODEL) if options.part else ('a whole model', _OF_A_TOWER))
  for name in others:
    if getattr(options, name, None) is not None:
      raise UserError(f'--{name} means nothing for {kind}; leave it out, or '
                      f'{"leave out --part" if options.part else "name a tower with --part"}')
  (_export_tower if options.part else _export_model)(options)


def _export_tower(options):
  # The Predictor reads the checkpoint of a run.
  from xmodal.predictor import Predictor
  from xmodal.pretrained.export import check_new, save
  check_new(options.output)
  predictor = Predictor(options.checkpoint, precision='float32')
  module, variables, preprocessing = predictor.tower(options.part)
  dtype = options.dtype or 'float32'
  with outputs.on_this_machine(options.output) as folder:
    save(folder, module, variables, preprocessing=preprocessing, dtype=dtype,
         save_tokenizer=predictor.tokenizer.save if options.part == 'text' else None)
  print(f'{options.part} tower of {options.checkpoint} in {options.output}: config.json, '
        f'model.safetensors ({dtype})')


def _export_model(options):
  from xmodal.bundle import programs
  from xmodal.bundle.write import check, write
  from xmodal.predictor import Predictor
  start = time.monotonic()
  platforms = _listed(options.platforms or 'cpu,cuda,tpu')
  try:
    sizes = tuple(map(int, _listed(options.sizes))) if options.sizes else programs.SIZES
  except ValueError:
    raise UserError(f'--sizes {options.sizes}: wanted whole numbers with commas') from None
  formats = _listed(options.format or '')
  check(options.output, options.precision or 'float32', platforms, sizes, formats)
  predictor = Predictor(options.checkpoint, precision='float32')
  precision = options.precision or predictor.config.model.quantize or 'float32'
  with outputs.on_this_machine(options.output) as folder:
    write(folder, predictor, tasks=_listed(options.tasks or ''), precision=precision,
          platforms=platforms, sizes=sizes, formats=formats, tell=print)
    size = sum(os.path.getsize(os.path.join(place, name))
               for place, _, names in os.walk(folder) for name in names)
  print(f'{options.checkpoint} in {options.output}: {size / 2**20:.1f} MiB, '
        f'{time.monotonic() - start:.0f} s; try: python {options.output}/model.py --help')


def _listed(text):
  return tuple(part.strip() for part in text.split(',') if part.strip())


if __name__ == '__main__':
  sys.exit(main())
