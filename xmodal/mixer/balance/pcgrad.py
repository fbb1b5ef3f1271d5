"""PCGrad: removes gradient components that conflict with other tasks."""

import jax
import jax.numpy as jnp

from xmodal.mixer.balance.balance import BALANCES, Balance


@BALANCES.register('pcgrad')
class PCGrad(Balance):
  """Projects conflicting gradients (PCGrad, Yu et al., arXiv:2001.06782).

  Projects out of each task's gradient the components that conflict with other tasks' gradients,
  one task after the other in random order. The sum of the results is a weighted sum of the
  original gradients, so the inner products suffice to compute it.
  """

  needs = 'gradients'
  shared_only = True

  def _weights(self, state, losses, active, gram, rng):
    count = len(self.tasks)
    orders = jax.vmap(lambda key: jax.random.permutation(key, count))(jax.random.split(rng, count))
    return project(gram, orders).sum(0)


def project(gram: jax.Array, orders: jax.Array) -> jax.Array:
  """Projects conflicting gradients (PCGrad, algorithm 1).

  Args:
    gram: float32 [K, K], inner products of the gradients.
    orders: int [K, K], row i: the order in which gradient i is projected against the others (and
      itself, which changes nothing).

  Returns:
    float32 [K, K]: row i expresses projected gradient i as coefficients of the original gradients.
  """
  count = len(gram)
  coefficients = jnp.eye(count)
  for i in range(count):
    for j in orders[i]:
      product = coefficients[i] @ gram[:, j]
      opposed = (product < 0) & (j != i)
      step = -product / jnp.maximum(gram[j, j], 1e-30)
      coefficients = coefficients.at[i, j].add(jnp.where(opposed, step, 0))
  return coefficients
