"""The command `xmodal`: runs the module of a subcommand as `python -m` does.

It imports nothing large, so that `xmodal --help` answers at once.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import runpy
import sys

import xmodal
from xmodal import errors


@dataclasses.dataclass(frozen=True)
class Command:
  """One subcommand.

  Attributes:
    sentence: what it does, for --help.
    module: what runs it; '' for one that only has subcommands of its own.
    arguments: what the module takes before the arguments of the user.
    commands: subcommands by their names.
  """

  sentence: str
  module: str = ''
  arguments: tuple[str, ...] = ()
  commands: Mapping[str, 'Command'] = dataclasses.field(default_factory=dict)


_BENCHMARKS = {
    'data': Command('Pictures a second: loading for training against bare decoding.',
                    'xmodal.bench.data'),
    'detection': Command('Pictures a second of DETR, against PyTorch.', 'xmodal.bench.detection'),
    'generate': Command('Tokens a second of generated text, against PyTorch.',
                        'xmodal.bench.generate'),
    'generation': Command('Examples trained on and pictures drawn a second by image generation.',
                          'xmodal.bench.generation'),
    'generation_quality': Command('Whether drawn pictures show their text, look real, or are '
                                  'copies.', 'xmodal.bench.generation_quality'),
    'multitask': Command('Whether tasks help each other: each alone against all together.',
                         'xmodal.bench.multitask'),
    'parity': Command('Differences of all families of towers from PyTorch.',
                      'xmodal.bench.parity'),
    'parity_published': Command('Differences of a published checkpoint from PyTorch.',
                                'xmodal.bench.parity_published'),
    'predict': Command('Seconds of a first answer and of later ones.', 'xmodal.bench.predict'),
    'same_losses': Command('Whether two source trees train alike, bit for bit.',
                           'xmodal.bench.same_losses'),
    'self_training': Command('Whether training on labels that a model made helps.',
                             'xmodal.bench.self_training'),
    'start_from': Command('Whether a run learns better that begins with an earlier one.',
                          'xmodal.bench.start_from'),
    'train_step': Command('Seconds of a training step, against PyTorch.',
                          'xmodal.bench.train_step'),
}

XMODAL = Command(xmodal.__doc__, commands={
    'train': Command('Trains a model, scores it, or checks its config: xmodal train --config vqa.',
                     'xmodal.main'),
    'predict': Command('Asks a trained model about a picture, or lets it draw one.',
                       'xmodal.predict'),
    'augment': Command('Labels pictures with a trained model, for another to train on.',
                       'xmodal.augment'),
    'check': Command('Reports faults of a folder of data before a run trains on it.',
                     'xmodal.data.check'),
    'show': Command('Shows what a pretrained checkpoint holds, and whether it is complete.',
                    'xmodal.pretrained', ('show',)),
    'export': Command('Writes a trained tower as a folder that transformers loads.',
                      'xmodal.pretrained', ('export',)),
    'bench': Command('Measures speed or quality; xmodal bench lists the benchmarks.',
                     commands=_BENCHMARKS),
})


def main() -> int:
  """Runs the command line of this process; returns its exit code: see xmodal.main."""
  return _run('xmodal', XMODAL, sys.argv[1:])


def _run(program: str, command: Command, arguments: Sequence[str]) -> int:
  if command.module:
    return _run_module(program, command, arguments)
  name, *rest = arguments or ['--help']
  if name in command.commands:
    return _run(f'{program} {name}', command.commands[name], rest)
  errors.settle_in()
  if name in ('-h', '--help'):
    print(_help(program, command))
    return 0
  if name == '--version':
    print(f'xmodal {xmodal.__version__}')
    return 0
  near = errors.did_you_mean(name, command.commands)
  return errors.fail(f'{program}: no command {name!r}{near}; wanted one of '
                     f'{", ".join(command.commands)}')


def _run_module(program, command, arguments):
  """Runs a module as `python -m` does, its block `if __name__ == '__main__'` included."""
  sys.argv = [program, *command.arguments, *arguments]
  if not sys.flags.safe_path:
    sys.path.insert(0, '')  # a user's own modules lie in the current folder
  try:
    runpy.run_module(command.module, run_name='__main__')
  except KeyboardInterrupt:  # while it imports; later ones are the module's own
    return 130
  return 0


def _help(program, command):
  width = max(map(len, command.commands))
  return '\n'.join([
      command.sentence, '', f'usage: {program} [--help | --version] COMMAND ...', '',
      *(f'  {name:<{width}}  {one.sentence}' for name, one in command.commands.items()), '',
      f'{program} COMMAND --help explains one of them.'])
