"""A trained model whose outputs a new one imitates, beside its targets.

    xmodal train --config vqa --config.train.teacher=runs/large

The loss of a task becomes its own, plus teacher_weight times the divergence of its outputs from the
teacher's (Task.imitation), plus teacher_tokens times the difference of the tokens' similarities
after the towers and the cross-modal layers (tasks.imitation). Tokens are compared where both models
run a stack of layers equally often, and on equally many tokens.
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
from xmodal.train.steps.read import as_read

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
    tasks: those that it teaches.
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
    earlier.config.model.dropout_rate = earlier.config.model.lora.dropout_rate = 0.0
    spec = earlier.spec()
    # In the student's order, in which its tokens are compared.
    shared = {name: spec.tasks[name] for name in tasks if name in spec.tasks}
    if not shared:
      raise UserError(f'{where}: it has learned {", ".join(spec.tasks)}, none of which is in '
                      f'config.mixer.tasks={tuple(tasks)}')
    for what, own, there in (
        ('tokens', tokenizer.vocabulary, spec.tokenizer.vocabulary),
        ('config.data.image_size', image_size, earlier.config.data.image_size),
        *((f'labels of {name}', tasks[name].labels(), task.labels())
          for name, task in shared.items()),
        *((f'units of {name}', tasks[name].units, task.units) for name, task in shared.items())):
      if own != there:
        raise UserError(f'{where}: it has other {what}; start from it by config.train.start_from, '
                        'or from a model made of it by xmodal prune')
    self.weight, self.tokens_weight = train.teacher_weight, train.teacher_tokens
    self._model = build.make_model(earlier.config, spec.tokenizer, shared, earlier.towers)
    self.tasks = tuple(shared)
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
             ) -> tuple[dict[str, Any], dict[str, list[jax.Array]]]:
    """The teacher's outputs for a batch by task, and its tokens, see imitation.last_tokens.

    Args:
      variables: see above; an argument, so that a program does not hold them.
      part: one of the batches of a step.
      rng: random key that the student's dropout has: both see the same noise and captions.
    """
    rest = [name for name in variables if name != 'params']
    outputs, state = self._model.apply(
        {**variables, 'params': as_read(self._model, variables['params'])}, part,
        deterministic=False, rngs={'dropout': rng},
        mutable=[*rest, capture.COLLECTION])
    return jax.lax.stop_gradient((outputs, last_tokens(state)))


def _nested(by_key):
  return traverse_util.unflatten_dict(
      {(collection, *path.split('/')): x for (collection, path), x in by_key.items()})
