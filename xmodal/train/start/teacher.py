"""A trained model whose outputs a new one imitates, beside its targets.

    xmodal train --config vqa --config.train.teacher=runs/large

The loss of a task becomes its own, plus teacher_weight times the divergence of its outputs from the
teacher's (see Task.imitation), plus teacher_tokens times that of the tokens of towers and
cross-modal layers, by their similarities to each other (see tasks.imitation).
"""

from collections.abc import Mapping
import functools
from typing import Any

from flax import traverse_util
import jax

from xmodal.data.tokenizer import Tokenizer
from xmodal.errors import UserError
from xmodal.models import capture
from xmodal.options import Option
from xmodal.sharding.rules import spec_for
from xmodal.tasks.imitation import last_tokens
from xmodal.tasks.task import Task
from xmodal.train import build
from xmodal.train.start.earlier import EarlierRun

OPTIONS = {
    'teacher': Option('', 'Run whose outputs the model imitates: its workdir, WORKDIR/best or '
                          "WORKDIR/checkpoints/STEP; '': none."),
    'teacher_weight': Option(1.0, "Weight of the divergence from the teacher's outputs.", low=0),
    'teacher_tokens': Option(1.0, "Weight of the difference from the similarities of the teacher's "
                                  'tokens.', low=0)}


class Teacher:
  """A trained model and what a student imitates of it.

  Attributes:
    abstract: shapes and shardings of its variables.
    weight, tokens_weight: see OPTIONS.
  """

  def __init__(self, train, tokenizer: Tokenizer, tasks: Mapping[str, Task], image_size: int,
               mesh):
    """Opens the run that config.train.teacher names; reads no arrays.

    Args:
      train: config.train.
      tokenizer, tasks, image_size: of the student.
      mesh: the device mesh.

    Raises:
      UserError: it cannot be read, or does not read what the student reads.
    """
    where = f'config.train.teacher={train.teacher!r}'
    earlier = EarlierRun(train.teacher, '', key='config.train.teacher')
    spec = earlier.spec()
    shared = {name: task for name, task in spec.tasks.items() if name in tasks}
    if not shared:
      raise UserError(f'{where}: it has learned {", ".join(spec.tasks)}, none of which is in '
                      f'config.mixer.tasks={tuple(tasks)}')
    for what, own, there in (
        ('tokens', tokenizer.vocabulary, spec.tokenizer.vocabulary),
        ('config.data.image_size', image_size, earlier.config.data.image_size),
        *((f'labels of {name}', tasks[name].labels(), task.labels())
          for name, task in shared.items())):
      if own != there:
        raise UserError(f'{where}: it has other {what}; start from it by config.train.start_from, '
                        'or from a model made of it by xmodal prune')
    self.weight, self.tokens_weight = train.teacher_weight, train.teacher_tokens
    config = earlier.config.copy_and_resolve_references()
    config.model.dropout_rate = 0.0
    self._model = build.make_model(config, spec.tokenizer, shared, earlier.towers)
    self._earlier, self._structs = earlier, {
        key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(
            mesh, spec_for(key[1] if key[0] == 'params' else '/'.join(key), x.shape, mesh)))
        for key, x in earlier.shapes.items()}
    self.abstract = _nested(self._structs)

  @functools.cached_property
  def variables(self) -> dict[str, Any]:
    """Its parameters and other variables, over the mesh; UserError if they cannot be read."""
    return _nested(self._earlier.read(self._structs))

  def taught(self, variables: Mapping, part: Mapping, rng: jax.Array
             ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """What the teacher makes of a batch: outputs by task, tokens by path.

    Args:
      variables: see above; an argument, so that a program does not hold them.
      part: one of the batches of a step.
      rng: random key that the student's dropout has: both see the same noise and captions.
    """
    rest = [name for name in variables if name != 'params']
    outputs, state = self._model.apply(
        variables, part, deterministic=False, rngs={'dropout': rng},
        mutable=[*rest, capture.COLLECTION])
    return jax.lax.stop_gradient((outputs, last_tokens(state)))


def _nested(by_key):
  return traverse_util.unflatten_dict(
      {(collection, *path.split('/')): x for (collection, path), x in by_key.items()})
