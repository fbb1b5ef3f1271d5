"""Gradients without the parts that oppose other tasks'."""

import jax
import jax.numpy as jnp

from xmodal.mixer.balance.balance import BALANCES, Balance


@BALANCES.register('pcgrad')
class PCGrad(Balance):
  """No task's gradient against another's (Yu et al., arXiv:2001.06782).

  Of each task's gradient, what opposes another task's is projected out, one after the other in
  random order. The sum of what is left is a weighted sum of the gradients as they were, so that
  their products are all that it takes.
  """

  needs = 'gradients'
  of_shared = True

  def _weights(self, state, losses, active, gram, rng):
    count = len(self.tasks)
    orders = jax.vmap(lambda key: jax.random.permutation(key, count))(jax.random.split(rng, count))
    return project(gram, orders).sum(0)


def project(gram: jax.Array, orders: jax.Array) -> jax.Array:
  """Gradients without what opposes the others (PCGrad, algorithm 1).

  Args:
    gram: float32 [K, K], products of the gradients.
    orders: int [K, K], in which order each meets the others (and itself, which changes nothing).

  Returns:
    float32 [K, K]: row i has what gradient i is of all, as they were.
  """
  count = len(gram)
  left = jnp.eye(count)
  for i in range(count):
    for j in orders[i]:
      product = left[i] @ gram[:, j]
      opposed = (product < 0) & (j != i)
      left = left.at[i, j].add(jnp.where(opposed, -product / jnp.maximum(gram[j, j], 1e-30), 0))
  return left
