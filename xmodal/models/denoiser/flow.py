"""Flow matching: from noise to data along straight lines (arXiv:2210.02747, 2209.03003).

At time t in 0..1 a sample is z = t x + (1 - t) noise: noise at 0, data x at 1. Its velocity is
v = x - noise. A network may predict x, v or the noise; in all cases the loss compares velocities,
and a sampler integrates them (arXiv:2511.13720, table 1).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from xmodal.errors import UserError

PREDICTS = ('x', 'v', 'noise')
SAMPLERS = ('euler', 'heun')
# Lower bound of the divisor of x - z in the loss, 1 - t (t if noise is predicted), as in the paper.
LEAST = 0.05


def spread(t: Float[Array, ' B'] | Float[Array, ''], like: Float[Array, 'B ...']
           ) -> Float[Array, '...']:
  """Reshapes times [B] to broadcast with arrays [B, ...]; scalars stay unchanged."""
  return t.reshape(t.shape + (1,) * (like.ndim - t.ndim)) if t.ndim else t


def between(x: Float[Array, ' B *dims'], noise: Float[Array, ' B *dims'],
            t: Float[Array, ' B'] | Float[Array, '']) -> Float[Array, ' B *dims']:
  """Interpolates noise and data [B, ...] at times t [B]."""
  t = spread(t, x)
  return t * x + (1 - t) * noise


def draw_times(rng: Key[Array, ''], shape: tuple[int, ...], mean: jax.typing.ArrayLike,
               std: jax.typing.ArrayLike) -> Float[Array, '...']:
  """Samples logit-normal times (arXiv:2403.03206): sigmoid of Normal(mean, std)."""
  return jax.nn.sigmoid(mean + std * jax.random.normal(rng, shape))


def velocity(predicted: Float[Array, ' B *dims'], z: Float[Array, ' B *dims'],
             t: Float[Array, ' B'] | Float[Array, ''], predict: str, least: float = LEAST
             ) -> Float[Array, ' B *dims']:
  """Converts a prediction to a velocity [B, ...].

  Args:
    predicted: float [B, ...].
    z: float [B, ...], the samples.
    t: float [B] or scalar, their times.
    predict: the prediction target, 'x', 'v' or 'noise'.
    least: lower bound of the divisor: 1 - t for x, t for noise.

  Raises:
    UserError: `predict` is unknown.
  """
  t = spread(t, z)
  if predict == 'x':
    return (predicted - z) / jnp.maximum(1 - t, least)
  if predict == 'noise':
    return (z - predicted) / jnp.maximum(t, least)
  if predict != 'v':
    raise UserError(f'config.generation.predict={predict!r}: wanted {", ".join(PREDICTS)}')
  return predicted


def v_loss(predicted: Float[Array, ' B *dims'], x: Float[Array, ' B *dims'],
           noise: Float[Array, ' B *dims'], t: Float[Array, ' B'] | Float[Array, ''], predict: str
           ) -> Float[Array, ' B *dims']:
  """Squared error of velocities [B, ...]; 0 for a perfect prediction, even if t is clamped."""
  z = between(x, noise, t)
  truth = {'x': x, 'v': x - noise, 'noise': noise}[predict]
  return jnp.square(velocity(predicted, z, t, predict) - velocity(truth, z, t, predict))


def integrate(velocity_fn: Callable[[jax.Array, jax.Array], jax.Array], z: Float[Array, ' B *dims'],
              *, steps: int | Int[Array, ''], sampler: str = 'heun',
              start: float | Float[Array, ''] = 0.0,
              on_step: Callable[[jax.Array, jax.Array], None] | None = None
              ) -> Float[Array, ' B *dims']:
  """Integrates velocities from z at time `start` to time 1, in one compiled loop.

  Euler's error falls with the number of steps, Heun's with its square. Heun evaluates velocity_fn
  twice per step, but once in the last step: at t = 1 a prediction of x has no velocity
  (arXiv:2206.00364, algorithm 1).

  Args:
    velocity_fn: (z [B, ...], t scalar) -> [B, ...].
    z: float [B, ...].
    steps: number of steps, of equal length.
    sampler: 'euler' or 'heun'.
    start: time of z.
    on_step: called on the host after each step with the number of finished steps and z as numpy
      arrays, or None.

  Raises:
    UserError: the sampler is unknown, or steps is below 1.
  """
  if sampler not in SAMPLERS:
    raise UserError(f'config.generation.sampler={sampler!r}: wanted {", ".join(SAMPLERS)}')
  if isinstance(steps, int) and steps < 1:
    raise UserError(f'steps={steps}: wanted 1 or more')
  length = (1 - jnp.float32(start)) / steps

  def report(step, z):
    if on_step is not None:
      jax.debug.callback(on_step, step, z)

  def euler(step, z):
    z = z + length * velocity_fn(z, start + step * length)
    report(step + 1, z)
    return z

  if sampler == 'euler':
    return jax.lax.fori_loop(0, steps, euler, z)

  def heun(evaluation, carry):
    # One evaluation per iteration, so that the program contains the network once. The first
    # evaluation of a step advances like Euler; the second restarts from the step's beginning
    # with the mean of both velocities.
    z, before, first = carry
    step, again = evaluation // 2, evaluation % 2 == 1
    v = velocity_fn(z, start + (step + again) * length)
    after = jnp.where(again, before + length * (first + v) / 2, z + length * v)
    if on_step is not None:
      jax.lax.cond(again | (evaluation == 2 * steps - 2), lambda: report(step + 1, after),
                   lambda: None)
    return after, jnp.where(again, before, z), jnp.where(again, first, v)

  return jax.lax.fori_loop(0, 2 * steps - 1, heun, (z, z, jnp.zeros_like(z)))[0]
