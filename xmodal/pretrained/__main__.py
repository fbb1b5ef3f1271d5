"""Exports a trained tower, or shows the contents of a checkpoint: xmodal export, xmodal show."""

import argparse
import sys

from xmodal import errors, outputs, paths


def main(argv=None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a user error)."""
  parser = argparse.ArgumentParser(prog='xmodal', description=__doc__)
  commands = parser.add_subparsers(required=True, metavar='COMMAND')
  export = commands.add_parser('export', help='writes a folder that transformers loads')
  export.add_argument('--checkpoint', required=True, metavar='DIR',
                      help='a workdir of xmodal.main, or one of its checkpoints/STEP folders')
  export.add_argument('--part', required=True, choices=['vision', 'text'])
  export.add_argument('--output', required=True, metavar='DIR',
                      help='a folder that is new or empty')
  export.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
  export.set_defaults(run=_export)
  show = commands.add_parser(
      'show', help='shows what a checkpoint holds, and whether it is complete')
  show.add_argument('name', help="a folder, or a checkpoint's name on the HuggingFace hub")
  show.set_defaults(run=_show)
  options = parser.parse_args(argv)
  return errors.command(lambda: options.run(options), getattr(options, 'output', ''))


def _export(options):
  # The Predictor reads the checkpoint of a run.
  from xmodal.predictor import Predictor
  from xmodal.pretrained.export import check_new, save
  options.output = paths.resolved(options.output, '--output')
  check_new(options.output)
  predictor = Predictor(options.checkpoint)
  module, variables, preprocessing = predictor.tower(options.part)
  with outputs.on_this_machine(options.output) as folder:
    save(folder, module, variables, preprocessing=preprocessing, dtype=options.dtype,
         save_tokenizer=predictor.tokenizer.save if options.part == 'text' else None)
  print(f'{options.part} tower of {options.checkpoint} in {options.output}: config.json, '
        f'model.safetensors ({options.dtype})')


def _show(options):
  from xmodal.pretrained.checkpoint import Checkpoint
  checkpoint = Checkpoint(options.name)
  use = ('xmodal.pretrained.load' if checkpoint.part == 'detector'
         else f'config.model.{checkpoint.part}.pretrained')
  print(f'{checkpoint.folder}: a {checkpoint.config["model_type"]}, for {use}\n'
        f'{checkpoint.module}\n{checkpoint.plan().report}')


if __name__ == '__main__':
  sys.exit(main())
