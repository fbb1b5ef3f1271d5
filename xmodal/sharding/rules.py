"""Rules for how each parameter is sharded over the mesh.

A rule names the mesh axes of a parameter's last dimensions (two axes may split one dimension);
dimensions before those (the layers of a scanned stack) are never split. The first rule whose
pattern is found in the parameter's path applies: first the rules that parts declare for their own
parameters ('sharding' where they register), then RULES, for layers that many parts share. A
parameter without a rule is an error, because silent replication would exhaust memory.
"""

import math
import re

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xmodal.errors import UserError
from xmodal.registry import declared

# Megatron's split (arXiv:1909.08053): heads and MLP width over `tensor`, so that
# each pair of linear layers needs one sum; the other side over `fsdp`.
RULES = (
    (r'_gate/(kernel|bias)$', ()),
    (r'(query|key|value|up|gate|hidden\d?)/kernel$', ('fsdp', 'tensor')),
    (r'(out|down)/kernel$', ('tensor', 'fsdp')),
    (r'(query|key|value|up|gate|hidden\d?)/bias$', (('tensor', 'fsdp'),)),
    (r'(out|down)/bias$', ()),
    (r'(answers|lm_head|class_head)/kernel$', ('fsdp', 'tensor')),
    (r'(answers|lm_head|class_head)/bias$', ('tensor',)),
    (r'token_embedding/embedding$', ('tensor', 'fsdp')),
    # Adapters are sharded like their kernels; those of convolutions are small.
    (r'(conv\w*|stem|shortcut)/lora_[ab]$', ()),
    (r'(out|down)/lora_a$', ('tensor', None)),
    (r'(out|down)/lora_b$', (None, 'fsdp')),
    (r'/lora_a$', ('fsdp', None)),
    (r'/lora_b$', (None, 'tensor')),
    (r'_projection/kernel$|/projection/kernel$', ('fsdp', 'tensor')),
    (r'_projection/bias$|/projection/bias$', ()),
    # On (data, fsdp, tensor) meshes XLA's partitioner computes wrong gradients of
    # convolutions split over two axes (jaxlib 0.10.2): see test_sharding.
    (r'(conv\w*|stem|shortcut)/kernel$', (None, None, None, 'fsdp')),
    (r'conv\w*/bias$', ()),
    (r'norm\w*/(scale|bias|mean|var)$', ()),
    (r'position_embedding$', (None, 'fsdp')),
    (r'(row_embedding|column_embedding|log_scale|score_bias)$', ()),
)


def path_name(path) -> str:
  """Formats a key path of a tree as 'a/b/c'."""
  return '/'.join(str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key))))
                  for key in path)


def spec_for(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
  """The PartitionSpec of a parameter by its path and shape; UserError if no rule matches.

  A dimension that is not divisible by the devices of its axis is not split.
  """
  for pattern, axes in (*declared('sharding'), *RULES):
    if re.search(pattern, name):
      axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
      return PartitionSpec(*(axis if axis and size % _devices(axis, mesh) == 0 else None
                             for axis, size in zip(axes, shape)))
  raise UserError(f'parameter {name} {shape}: no rule says how devices split it; declare one where '
                  f"its part registers: sharding=((r'{name}$', {(None,) * len(shape)}),), or "
                  'axes such as in xmodal/sharding/rules.py')


def _devices(axis, mesh):
  names = (axis,) if isinstance(axis, str) else axis
  return math.prod(mesh.shape[name] for name in names)


def shard_tree(tree, mesh: Mesh):
  """A NamedSharding for each array (or its shape) of a tree of parameters."""
  return jax.tree_util.tree_map_with_path(
      lambda path, x: NamedSharding(mesh, spec_for(path_name(path), x.shape, mesh)), tree)
