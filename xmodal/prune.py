"""Takes the least important heads, MLP units and layers out of a trained model.

  xmodal prune --checkpoint runs/vqa --output runs/half --keep 0.5
  xmodal train --config vqa --config.train.start_from=runs/half --config.train.teacher=runs/vqa

The result is a checkpoint of a smaller model, for `train.start_from`, `predict` and all the rest.
It usually wants fine-tuning; the second command also teaches it what the large model answers.
Importance is measured on training data of the run, which has to be where it was.
"""

import argparse
import os
import shutil
import sys
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from xmodal import config as configs
from xmodal import errors, outputs, paths
from xmodal.errors import UserError
from xmodal.models import lora, parts, pruning
from xmodal.predictor import Predictor
from xmodal.sharding import mesh as meshes
from xmodal.train import build
from xmodal.train.checkpoints import checkpoint
from xmodal.train.plan import Plan, count
from xmodal.train.process.compilation_cache import enable_compilation_cache
from xmodal.train.start.pretrained import Tower
from xmodal.train.start.settings import MODULES
from xmodal.train.steps.gradients import at_step, make_gradients
from xmodal.train.steps.state import TrainState

_TRIES = 12  # of shares, by bisection
_SIZES = ('num_heads', 'head_dim', 'mlp_dim', 'num_layers', 'num_decoder_layers')


def main(argv=None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a mistake of the user's)."""
  parser = argparse.ArgumentParser(prog='xmodal prune', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--checkpoint', required=True, metavar='DIR',
                      help='a workdir of xmodal train, or one of its checkpoints/STEP folders')
  parser.add_argument('--output', required=True, metavar='OUT',
                      help='a folder that is new or empty')
  parser.add_argument('--keep', type=float, default=0.5, metavar='SHARE',
                      help="share of the model's parameters that stay, 0 to 1; 0.5 if not given")
  parser.add_argument('--layers', type=float, default=1.0, metavar='SHARE',
                      help='share of the layers of each stack that stay; 1 if not given')
  parser.add_argument('--batches', type=int, default=32, metavar='N',
                      help='training batches that importance is measured on; 32 if not given')
  args = parser.parse_args(argv)
  return errors.command(lambda: _prune(args), args.output)


def _prune(args):
  for name in ('keep', 'layers'):
    if not 0 < getattr(args, name) <= 1:
      raise UserError(f'--{name} is {getattr(args, name)}, wanted above 0, at most 1')
  if args.batches < 1:
    raise UserError(f'--batches is {args.batches}, wanted 1 or more')
  step = checkpoint.find(paths.resolved(args.checkpoint, '--checkpoint'))
  output = paths.local(args.output, '--output')
  outputs.check_folder(output)
  if os.path.exists(output) and (not os.path.isdir(output) or os.listdir(output)):
    raise UserError(f'--output {output} is not empty; give a new folder')
  enable_compilation_cache()
  model = Trained(step)
  modules = model.modules()
  shares = _shares(model, modules, args.keep, args.layers)
  chosen = pruning.choose(model.importance(modules, args.batches), modules, model.params, **shares)
  kept = pruning.cut(model.params, modules, chosen)
  config, towers = model.resized(modules, chosen)
  _save(output, model, kept, config, towers)
  before, after = count(model.params), count(kept)
  print(f'{step}: {before:,} parameters; {output}: {after:,} ({after / before:.1%})')
  for slot in dict.fromkeys(module.slot for module in modules):
    print(f'  {slot}: ' + ', '.join(
        f'{key} {there} -> {config.model[slot][key]}'
        for key, there in model.sizes[slot].items()
        if config.model[slot][key] not in (None, there)))
  print(f'fine-tune it: --config.train.start_from={output}')
  return 0


class Trained:
  """A trained model with the data of its run.

  Attributes:
    plan: of the run.
    params: float32 parameters by path, adapters merged.
    sizes: by slot, the options that pruning changes.
  """

  def __init__(self, step: str):
    """Loads a checkpoints/STEP folder and opens the data."""
    assets = os.path.join(checkpoint.local_copy(step), checkpoint.ASSETS)
    config = configs.load(os.path.join(assets, 'config.json'))
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = -1, 1, 1  # those that are here
    self.plan = Plan(config, os.path.dirname(os.path.dirname(step)), 'dry_run')
    predictor = Predictor(step, precision='float32')
    self.collections = dict(predictor.variables)
    params = lora.merge(self.collections.pop('params'), config.model.lora)
    self.params = traverse_util.flatten_dict(params, sep='/')
    config.model.lora.pattern = ''
    self.step, self.config = step, config
    self.sizes = {slot: self._sizes(slot) for slot in MODULES
                  if any(path.startswith(MODULES[slot]) for path in self.params)}
    self.sizes = {slot: sizes for slot, sizes in self.sizes.items() if 'num_heads' in sizes}

  def _sizes(self, slot):
    tower = self.plan.towers.get(slot)
    found = ({name: getattr(tower.module, name, None) for name in parts.slot_options(slot)}
             if tower else parts.fields(self.config.model, slot))
    sizes = {key: found[key] for key in _SIZES if found.get(key)}
    if 'num_heads' in sizes:
      sizes.setdefault('head_dim', found['hidden_dim'] // sizes['num_heads'])
    return sizes

  def modules(self) -> list[pruning.Module]:
    """The modules that can be pruned; UserError if there are none."""
    found = pruning.find_modules(
        self.params, {slot: MODULES[slot] for slot in self.sizes},
        {slot: sizes['num_heads'] for slot, sizes in self.sizes.items()})
    if not found:
      raise UserError(f'{self.step} has no transformer layers to take anything out of')
    return found

  def importance(self, modules, batches: int) -> dict[str, np.ndarray]:
    """Mean importance over some training batches."""
    plan = self.plan
    model = build.make_model(self.config, plan.tokenizer, plan.tasks, plan.towers)
    gradients = make_gradients(model, plan.tasks, plan.task_weights,
                               accumulation=self.config.train.accumulation)

    def measure(params, collections, batch, step):
      rng = jax.random.fold_in(jax.random.key(self.config.seed), step)
      grads, *_ = gradients(traverse_util.unflatten_dict(params, sep='/'), {}, collections,
                            at_step(batch, step), rng, lambda losses: dict.fromkeys(losses, 1.0))
      return pruning.importances(params, traverse_util.flatten_dict(grads, sep='/'), modules)

    measure = jax.jit(meshes.over(plan.mesh, measure))
    total, size = None, self.config.train.batch_size
    stream = plan.stream('train')
    for number, batch in enumerate(tqdm(
        stream.batches(plan.sampling, size, 0, batches), 'measuring', batches,
        disable=not sys.stderr.isatty(), leave=False)):
      found = measure(self.params, self.collections, meshes.put_batch(batch, plan.mesh, size),
                      jnp.int32(number))
      total = found if total is None else jax.tree.map(jnp.add, total, found)
    return jax.device_get(total)

  def resized(self, modules, chosen: pruning.Cut) -> tuple[Any, dict[str, Tower]]:
    """The config and the pretrained towers of what stays."""
    config, towers = self.config.copy_and_resolve_references(), dict(self.plan.towers)
    for module in modules:
      own = {'num_heads' if module.has_heads else 'mlp_dim': chosen.units[module.path].shape[-1],
             'head_dim': self.sizes[module.slot]['head_dim'],
             'num_decoder_layers' if module.stack.endswith('decoder_layers') else 'num_layers':
                 len(chosen.layers[module.stack])}
      for key, value in own.items():
        config.model[module.slot][key] = int(value)
      if tower := towers.get(module.slot):
        towers[module.slot] = Tower(tower.family, tower.clone(**own), tower.preprocessing)
    return config, towers


def _shares(model, modules, keep, layers):
  """Shares of heads and width with which `keep` of all parameters stay, or a little less."""
  alike = {module.path: np.zeros((len(model.params[
      f'{module.path}/{"out" if module.has_heads else "down"}/kernel']), module.units))
           for module in modules}

  def left(heads, width):
    chosen = pruning.choose(alike, modules, model.params, heads=heads, width=width, layers=layers)
    return count(jax.eval_shape(lambda params: pruning.cut(params, modules, chosen), model.params))

  wanted = keep * count(model.params)
  if left(0, 0) > wanted:
    least = left(0, 0) / count(model.params)
    raise UserError(f'--keep {keep}: with one head and one unit in each layer, {least:.0%} of the '
                    'parameters are left; keep more, or fewer layers by --layers')
  share = _largest(lambda share: left(share, share) <= wanted, 0.0)
  # Parameters that rounding the number of heads down leaves over go to the MLPs.
  return {'heads': share, 'width': _largest(lambda width: left(share, width) <= wanted, share),
          'layers': layers}


def _largest(fits, low):
  """The largest share from `low` to 1 that fits."""
  if fits(1.0):
    return 1.0
  high = 1.0
  for _ in range(_TRIES):
    middle = (low + high) / 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return low


def _save(output, model, kept, config, towers):
  """Writes a checkpoint of step 0."""
  plan, zero = model.plan, jnp.zeros((), jnp.int32)
  part = f'{output}.part'
  shutil.rmtree(part, ignore_errors=True)
  assets = os.path.join(part, checkpoint.ASSETS)
  os.makedirs(assets)
  build.save_assets(config, plan.tokenizer, plan.tasks, towers, assets)
  params = traverse_util.unflatten_dict(kept, sep='/')
  state = TrainState(
      step=zero, params=params, collections=model.collections, opt_state={},
      ema=params if config.train.ema_decay > 0 else None, mixer={},
      rng=jax.random.key_data(jax.random.key(config.seed)), skipped=zero, skipped_in_a_row=zero)
  checkpoints = checkpoint.Checkpoints(part, keep=1)
  checkpoints.save(state, assets)
  checkpoints.close()
  if os.path.isdir(output):
    os.rmdir(output)
  os.rename(part, output)


if __name__ == '__main__':
  sys.exit(main())
