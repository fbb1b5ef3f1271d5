"""Compiled programs of a trained model's tasks, as StableHLO that needs none of its code."""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses

import jax
from jax import export
from jax.extend.core import jaxpr_as_fun
import jax.numpy as jnp
import numpy as np

from xmodal.bundle.precision import Precision, nested
from xmodal.errors import UserError
from xmodal.mixer.feed import task_config
from xmodal.predictor import Predictor
from xmodal.tasks.described import Described
from xmodal.tasks.task import Task
from xmodal.train import build

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
SIZES = (1, 4, 16, 32)
# What makes a prediction; a task that overrides one of them has to describe it anew.
_BEHAVIOUR = ('encode', 'decode', 'query', 'join', 'plain', 'head', 'vocabulary')


@dataclasses.dataclass(frozen=True)
class Program:
  """The programs of one task.

  Attributes:
    serialised: batch sizes -> a program as jax.export serialises it. One for all sizes where the
      batch can stay open.
    weights: names of the stored arrays that it takes.
    inputs: shapes and dtypes of its other arguments; dims are numbers or letters.
    described: the task's description.
    keep_aspect: whether pictures keep their aspect ratio in the model's input.
  """

  serialised: Mapping[tuple[int, ...], bytes]
  weights: tuple[str, ...]
  inputs: Mapping[str, tuple[tuple[int | str, ...], str]]
  described: Described
  keep_aspect: bool


def described(name: str, task: Task) -> Described:
  """The task's description; UserError if it has none, or one of another class's behaviour."""
  found = task.described()
  order = type(task).__mro__

  def defined(method):
    return next(place for place, one in enumerate(order) if method in vars(one))

  if found is None or any(defined(method) < defined('described') for method in _BEHAVIOUR):
    raise UserError(f'task {name!r} ({type(task).__module__}) does not describe its inputs and '
                    'answers as data, which a bundle needs; name the others with --tasks, or give '
                    'the task a method `described`')
  if task.senses:
    raise UserError(f'task {name!r} reads {", ".join(task.senses)}, and a bundle reads pictures '
                    'and texts alone; name the others with --tasks')
  return found


def call(predictor: Predictor, name: str, precision: Precision, platforms: Sequence[str]):
  """The function (weights by name, inputs by name) -> outputs by name of a task."""
  task = predictor.task(name)
  about, head = described(name, task), _head(task)

  def with_dtype(dtype):
    config = predictor.config.copy_and_resolve_references()
    if config.model.dtype == 'auto':
      config.model.dtype = dtype
    config.model.attention = 'xla'  # kernels of one vendor are no portable program
    model = build.make_model(config, predictor.tokenizer, predictor.tasks, predictor.towers)
    model = model.clone(heads={name: head}, vocabularies={})

    def run(weights, inputs):
      batch = {'image': inputs['image'], name: about.features(inputs)}
      if 'extent' in inputs:
        batch['extent'] = inputs['extent']
      arrays = model.apply(nested(precision.restore(weights)), batch, method='predict')[name]
      return {output: arrays[output] for output in about.outputs}

    return run

  on_cpu = with_dtype('float32')
  if precision.dtype == 'float32' or set(platforms) == {'cpu'}:
    return on_cpu
  elsewhere = with_dtype(precision.dtype)
  if 'cpu' not in platforms:
    return elsewhere
  # As in training: CPUs compute in float32, accelerators in bfloat16.
  return lambda weights, inputs: jax.lax.platform_dependent(
      weights, inputs, cpu=on_cpu, default=elsewhere)


def program_of(predictor: Predictor, name: str, stored: Mapping[str, np.ndarray],
               precision: Precision, platforms: Sequence[str], sizes: Sequence[int]) -> Program:
  """Lowers a task's prediction for some platforms.

  Args:
    predictor: the trained model.
    name: the task.
    stored: the model's parameters as `precision` stores them.
    precision: see bundle.precision.
    platforms: names from PLATFORMS.
    sizes: batch sizes, for a program whose batch has to be known.

  Raises:
    UserError: the task cannot be described as data, or not be lowered for a platform.
  """
  about, run = described(name, predictor.task(name)), call(predictor, name, precision, platforms)
  side = predictor.config.data.image_size
  keep_aspect = bool(task_config(predictor.config, name).data.keep_aspect)
  inputs = {'image': (('b', side, side, 3), 'uint8'), **about.inputs}
  if keep_aspect:
    inputs['extent'] = (('b', 2), 'int32')
  lowered = _lowered(lambda letters: _lower(run, stored, _arguments(inputs, letters), platforms),
                     about, sizes)
  if isinstance(lowered, Exception):
    raise UserError(f'task {name!r} cannot be lowered for {", ".join(platforms)}: '
                    f'{" ".join(str(lowered).split())[:300]}; name fewer --platforms') from lowered
  whole, fixed = lowered
  inputs = {key: (tuple(fixed.get(dim, dim) for dim in dims), dtype)
            for key, (dims, dtype) in inputs.items()}
  used = next(iter(whole.values()))[1]
  return Program({sizes: bytes(one.serialize()) for sizes, (one, _) in whole.items()}, used,
                 inputs, about, keep_aspect)


def _lowered(lower, about, sizes):
  """Programs by their batch sizes, and the letters whose values they fix; or what went wrong.

  An operation may have to know a size: as many dims stay open as can.
  """
  for letters in dict.fromkeys((('b', *about.most), ('b',), ())):
    fixed = {letter: size for letter, size in about.most.items() if letter not in letters}
    try:
      if letters:
        dims = export.symbolic_shape(', '.join(letters), constraints=[
            f'{letter} >= {least}' for letter, least in about.least.items() if letter in letters])
        return {tuple(sizes): lower({**fixed, **dict(zip(letters, dims))})}, fixed
      return {(size,): lower({**fixed, 'b': size}) for size in sizes}, fixed
    except (TypeError, ValueError, NotImplementedError) as error:  # what jax.export raises
      fault = error
  return fault


def _head(task):
  # Generation scores its pictures in evaluations, which needs the true ones.
  return task.with_sampling().head() if task.draws else task.head()


def _arguments(inputs, letters):
  return {name: jax.ShapeDtypeStruct(tuple(letters.get(dim, dim) for dim in dims), dtype)
          for name, (dims, dtype) in inputs.items()}


def _lower(run, stored, inputs, platforms):
  """(jax.export's program, names of the stored arrays that it takes: those that a result needs)."""
  weights = {path: jax.ShapeDtypeStruct(array.shape, array.dtype)
             for path, array in stored.items()}
  closed, shapes = jax.make_jaxpr(run, return_shape=True)(weights, inputs)
  names = sorted(weights)  # the order in which JAX flattens a dict
  live = {id(one) for one in closed.jaxpr.outvars}
  for equation in reversed(closed.jaxpr.eqns):
    if equation.effects or any(id(one) in live for one in equation.outvars):
      live.update(id(one) for one in equation.invars)
  used = tuple(name for name, one in zip(names, closed.jaxpr.invars) if id(one) in live)

  def program(some, inputs):
    # What is traced is lowered again, which takes less time than to trace again.
    arrays = [some[name] if name in some else jnp.zeros(weights[name].shape, weights[name].dtype)
              for name in names]
    flat = jaxpr_as_fun(closed)(*arrays, *jax.tree.leaves(inputs))
    return jax.tree.unflatten(jax.tree.structure(shapes), flat)

  with without_paths():
    return export.export(jax.jit(program), platforms=list(platforms))(
        {name: weights[name] for name in used}, inputs), used


@contextlib.contextmanager
def without_paths():
  """A program names the lines of Python that it was made of: without paths of this machine."""
  key = 'jax_hlo_source_file_canonicalization_regex'
  before = getattr(jax.config, key)
  jax.config.update(key, r'.*[/\\](?=[^/\\]*$)')
  try:
    yield
  finally:
    jax.config.update(key, before)
