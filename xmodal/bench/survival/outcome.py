"""What a run left behind, and how far it is from the undisturbed run."""

import json
import os

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

from xmodal.bench.survival import small
from xmodal.bench.survival.launch import Broken
from xmodal.train.logs import speed

# Of runs on different meshes; see test_two_hosts_train_as_one.
_RELATIVE, _ABSOLUTE = 1e-3, 1e-4


def saved_steps(workdir: str) -> list[int]:
  """Steps of the complete checkpoints."""
  folder = os.path.join(workdir, 'checkpoints')
  names = os.listdir(folder) if os.path.isdir(folder) else ()
  return sorted(int(name) for name in names if name.isdigit())


def is_saving(workdir: str) -> bool:
  """Whether a checkpoint is being written."""
  folder = os.path.join(workdir, 'checkpoints')
  return os.path.isdir(folder) and any('tmp' in name for name in os.listdir(folder))


def compare(workdir: str, reference: str, same_mesh: bool) -> str:
  """Compares a finished run with the undisturbed one; returns how they agree.

  Raises:
    Broken: parameters, optimizer state or metrics differ, or metrics.jsonl has a line twice.
  """
  steps = small.get_config().train.steps
  if saved_steps(workdir)[-1:] != [steps]:
    raise Broken(f'the last checkpoint is {saved_steps(workdir)[-1:]}, wanted {steps}')
  ours, theirs = _metrics(workdir), _metrics(reference)
  if ours.keys() != theirs.keys():
    raise Broken(f'metrics.jsonl lacks or adds {sorted(ours.keys() ^ theirs.keys())[:3]}')
  if same_mesh and ours != theirs:
    first = min(key for key in theirs if ours[key] != theirs[key])
    raise Broken(f'other metrics first at {first}')
  most = 0.0
  ours, theirs = (_arrays(os.path.join(folder, 'checkpoints', str(steps)))
                  for folder in (workdir, reference))
  for name, value in theirs.items():
    if same_mesh and ours[name].tobytes() != value.tobytes():
      raise Broken(f'{name} differs from the undisturbed run')
    if value.dtype.kind == 'f' and value.size:
      most = max(most, float(np.abs(ours[name] - value).max()))
      if 'params' in name and not np.allclose(ours[name], value, _RELATIVE, _ABSOLUTE):
        raise Broken(f'{name} differs from the undisturbed run by {most:.1e}')
  return 'identical' if same_mesh else f'equal to {most:.0e}'


def _metrics(workdir):
  """The lines of metrics.jsonl without speeds, by step, split and task."""
  lines = {}
  with open(os.path.join(workdir, 'metrics.jsonl'), encoding='utf-8') as f:
    for line in map(json.loads, f):
      key = line['step'], line['split'], line['task']
      if key in lines:
        raise Broken(f'metrics.jsonl has {key} twice')
      lines[key] = {name: value for name, value in line.items() if name not in speed.NAMES}
  return lines


def _arrays(folder):
  """All arrays of a checkpoint, by path."""
  arrays = {}
  for item in ('model', 'training'):
    path, handler = epath.Path(folder) / item, ocp.PyTreeCheckpointHandler()
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
                            handler.metadata(path).tree)
    tree = handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    arrays |= {f'{item}{jax.tree_util.keystr(key)}': np.asarray(value) for key, value in
               jax.tree_util.tree_leaves_with_path(tree['arrays'])}
  return arrays
