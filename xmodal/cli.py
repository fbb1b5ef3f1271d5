"""The command `xmodal`: runs the module of a subcommand as `python -m` does.

It imports nothing large, so that `xmodal --help` is fast.
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
    sentence: its description in --help.
    module: the module that runs it; '' if it only has subcommands.
    arguments: arguments of the module that precede the user's.
    commands: its subcommands by name.
  """

  sentence: str
  module: str = ''
  arguments: tuple[str, ...] = ()
  commands: Mapping[str, 'Command'] = dataclasses.field(default_factory=dict)


_BENCHMARKS = {
    'attention': Command('Milliseconds of attention on a GPU, for each kernel.',
                         'xmodal.bench.attention'),
    'compress': Command('Size, speed and score of a model in integers, pruned, or distilled.',
                        'xmodal.bench.compress'),
    'data': Command('Pictures per second: loading for training, compared with bare decoding.',
                    'xmodal.bench.data'),
    'data_size': Command('Seconds and memory until the first batch, at the size of VQAv2.',
                         'xmodal.bench.data_size'),
    'detection': Command('Pictures per second of DETR, compared with PyTorch.',
                         'xmodal.bench.detection'),
    'evaluation': Command('Examples per second of evaluation, compared with training.',
                          'xmodal.bench.evaluation'),
    'generate': Command('Tokens per second of generated text, compared with PyTorch.',
                        'xmodal.bench.generate'),
    'generation': Command('Training examples and generated pictures per second of image '
                          'generation.', 'xmodal.bench.generation'),
    'generation_quality': Command('Whether generated pictures match their text, look real, or are '
                                  'copies.', 'xmodal.bench.generation_quality'),
    'gpu': Command('Training speed of three tasks at three sizes on one GPU.', 'xmodal.bench.gpu'),
    'input_wait': Command('How long training waits for input, from files and from a pack.',
                          'xmodal.bench.input_wait'),
    'latency': Command('Milliseconds from a question to its scores, compared with PyTorch.',
                       'xmodal.bench.latency'),
    'mfu': Command("How much of a device's peak a training step reaches.", 'xmodal.bench.mfu'),
    'multitask': Command('Whether tasks help each other: each alone, compared with all together.',
                         'xmodal.bench.multitask'),
    'parity': Command('Numerical differences from PyTorch, for all families of towers.',
                      'xmodal.bench.parity'),
    'parity_published': Command('Numerical differences from PyTorch, for a published checkpoint.',
                                'xmodal.bench.parity_published'),
    'predict': Command('Seconds for the first answer and for later ones.', 'xmodal.bench.predict'),
    'same_losses': Command('Whether two source trees train alike, bit for bit.',
                           'xmodal.bench.same_losses'),
    'self_training': Command('Whether training on labels made by a model helps.',
                             'xmodal.bench.self_training'),
    'serve': Command('Latency and throughput of the server, compared with a bare loop.',
                     'xmodal.bench.serve'),
    'sharding': Command('What sharded steps cost on GPUs and TPUs that are not attached.',
                        'xmodal.bench.sharding'),
    'soak': Command('Whether the server holds out under valid and hostile requests.',
                    'xmodal.bench.soak'),
    'start': Command('Seconds from a training command to its first step.', 'xmodal.bench.start'),
    'start_from': Command('Whether starting from an earlier run helps.', 'xmodal.bench.start_from'),
    'survival': Command('Whether runs survive kills, signals, lost peers and bad disks.',
                        'xmodal.bench.survival'),
    'train_step': Command('Seconds per training step, compared with PyTorch.',
                          'xmodal.bench.train_step'),
}

XMODAL = Command(xmodal.__doc__, commands={
    'train': Command('Trains a model, evaluates it, or checks its config: xmodal train --config '
                     'vqa.', 'xmodal.main'),
    'predict': Command('Runs a trained model on pictures, or generates one.', 'xmodal.predict'),
    'serve': Command('Serves a trained model over HTTP, with a web page.', 'xmodal.serve'),
    'augment': Command('Labels pictures with a trained model, for another to train on.',
                       'xmodal.augment'),
    'prune': Command('Takes the least important parts out of a trained model.', 'xmodal.prune'),
    'check': Command('Reports faults in a folder of data before training.', 'xmodal.data.check'),
    'pack': Command('Packs a data set into a few large files, to read from any disk at any size.',
                    'xmodal.data.pack.pack'),
    'compile': Command('Compiles a training step for GPUs or TPUs that are not attached; says what '
                       'it costs.', 'xmodal.main', ('--mode=compile',)),
    'plan': Command('Suggests a mesh for 1 to 4,096 GPUs or TPUs, with predicted memory and time.',
                    'xmodal.main', ('--mode=plan',)),
    'keys': Command('Lists the keys of the config, with defaults and ranges.', 'xmodal.keys'),
    'show': Command('Shows what a pretrained checkpoint holds, and whether it is complete.',
                    'xmodal.pretrained', ('show',)),
    'export': Command('Writes a trained model as a folder that answers without xmodal, or one of '
                      'its towers.', 'xmodal.export'),
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
  errors.prepare_environment()
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
    sys.path.insert(0, '')  # for the user's own modules in the current folder
  try:
    runpy.run_module(command.module, run_name='__main__')
  except KeyboardInterrupt:  # during imports; the module handles later ones
    return 130
  return 0


def _help(program, command):
  width = max(map(len, command.commands))
  return '\n'.join([
      command.sentence, '', f'usage: {program} [--help | --version] COMMAND ...', '',
      *(f'  {name:<{width}}  {one.sentence}' for name, one in command.commands.items()), '',
      f'{program} COMMAND --help explains one of them.'])


if __name__ == '__main__':
  sys.exit(main())
