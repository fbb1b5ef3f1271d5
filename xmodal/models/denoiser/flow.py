"""Flow matching: from noise to data along straight lines (arXiv:2210.02747, 2209.03003).

At time t in 0..1 a sample lies at z = t x + (1 - t) noise: noise at 0, data x at 1. Its velocity
is v = x - noise. A network may predict x, v or the noise; whichever it is, the loss compares
velocities, and a sampler follows them (arXiv:2511.13720, table 1).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from xmodal.errors import UserError

PREDICTS = ('x', 'v', 'noise')
SAMPLERS = ('euler', 'heun')
# Of 1 - t, which x - z is divided by in the loss (of t, for noise): the paper's choice.
LEAST = 0.05


def spread(t: jax.Array, like: jax.Array) -> jax.Array:
  """Times [B] (or a scalar) in a shape that broadcasts with arrays [B, ...]."""
  return t.reshape(t.shape + (1,) * (like.ndim - t.ndim)) if t.ndim else t


def between(x: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
  """z at times t [B], of data and noise [B, ...]."""
  t = spread(t, x)
  return t * x + (1 - t) * noise


def draw_times(rng: jax.Array, shape: tuple[int, ...], mean: jax.typing.ArrayLike,
               std: jax.typing.ArrayLike) -> jax.Array:
  """Logit-normal times (arXiv:2403.03206): sigmoid of a normal of this mean and deviation."""
  return jax.nn.sigmoid(mean + std * jax.random.normal(rng, shape))


def velocity(predicted: jax.Array, z: jax.Array, t: jax.Array, predict: str,
             least: float = LEAST) -> jax.Array:
  """The velocity [B, ...] that a prediction at z and times t ([B] or a scalar) means.

  Args:
    predict: what is predicted, 'x', 'v' or 'noise'.
    least: of what is divided by. x - z is divided by 1 - t, z - noise by t.

  Raises:
    UserError: another prediction.
  """
  t = spread(t, z)
  if predict == 'x':
    return (predicted - z) / jnp.maximum(1 - t, least)
  if predict == 'noise':
    return (z - predicted) / jnp.maximum(t, least)
  if predict != 'v':
    raise UserError(f'config.generation.predict={predict!r}: wanted {", ".join(PREDICTS)}')
  return predicted


def v_loss(predicted: jax.Array, x: jax.Array, noise: jax.Array, t: jax.Array, predict: str
           ) -> jax.Array:
  """Squared error of velocities [B, ...]; 0 for the perfect prediction, also where t is clamped."""
  z = between(x, noise, t)
  truth = {'x': x, 'v': x - noise, 'noise': noise}[predict]
  return jnp.square(velocity(predicted, z, t, predict) - velocity(truth, z, t, predict))


def integrate(velocity_fn: Callable[[jax.Array, jax.Array], jax.Array], z: jax.Array, *, steps: int,
              sampler: str = 'heun', start: float | jax.Array = 0.0,
              told: Callable[[jax.Array], None] | None = None) -> jax.Array:
  """Follows velocities from z at time `start` to time 1: one compiled loop.

  Euler's error falls with the number of steps, Heun's with its square. Heun looks twice a step, but
  once in the last: at t = 1 a prediction of x has no velocity (arXiv:2206.00364, algorithm 1).

  Args:
    velocity_fn: (z [B, ...], t scalar) -> [B, ...].
    z: float [B, ...].
    steps: of equal length.
    sampler: 'euler' or 'heun'.
    start: time of z.
    told: called on the host with the number of each step that is done; None: nothing is.

  Raises:
    UserError: another sampler, or fewer than one step.
  """
  if sampler not in SAMPLERS:
    raise UserError(f'config.generation.sampler={sampler!r}: wanted {", ".join(SAMPLERS)}')
  if steps < 1:
    raise UserError(f'steps={steps}: wanted 1 or more')
  length = (1 - jnp.float32(start)) / steps

  def tell(step):
    if told is not None:
      jax.debug.callback(told, step)

  def euler(step, z):
    z = z + length * velocity_fn(z, start + step * length)
    tell(step + 1)
    return z

  if sampler == 'euler':
    return jax.lax.fori_loop(0, steps, euler, z)

  def heun(turn, carry):
    # A turn is one look, so that the program holds the network once: the first look of a step
    # goes on as Euler would, the second goes back and takes the mean of both.
    z, before, first = carry
    step, again = turn // 2, turn % 2 == 1
    v = velocity_fn(z, start + (step + again) * length)
    jax.lax.cond(again | (turn == 2 * steps - 2), lambda: tell(step + 1), lambda: None)
    return (jnp.where(again, before + length * (first + v) / 2, z + length * v),
            jnp.where(again, before, z), jnp.where(again, first, v))

  return jax.lax.fori_loop(0, 2 * steps - 1, heun, (z, z, jnp.zeros_like(z)))[0]
