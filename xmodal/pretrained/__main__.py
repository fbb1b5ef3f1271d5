"""Shows the contents of a checkpoint: xmodal show."""

import argparse
import sys

from xmodal import errors


def main(argv=None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a user error)."""
  parser = argparse.ArgumentParser(prog='xmodal', description=__doc__)
  commands = parser.add_subparsers(required=True, metavar='COMMAND')
  show = commands.add_parser(
      'show', help='shows what a checkpoint holds, and whether it is complete')
  show.add_argument('name', help="a folder, or a checkpoint's name on the HuggingFace hub")
  show.set_defaults(run=_show)
  options = parser.parse_args(argv)
  return errors.command(lambda: options.run(options), '')


def _show(options):
  from xmodal.pretrained.checkpoint import Checkpoint
  checkpoint = Checkpoint(options.name)
  use = ('xmodal.pretrained.load' if checkpoint.part == 'detector'
         else f'config.model.{checkpoint.part}.pretrained')
  print(f'{checkpoint.folder}: a {checkpoint.config["model_type"]}, for {use}\n'
        f'{checkpoint.module}\n{checkpoint.plan().report}')


if __name__ == '__main__':
  sys.exit(main())
