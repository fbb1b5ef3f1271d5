"""Shapes in annotations hold: the tests check them, so a function that states a wrong one fails."""

import importlib
import pkgutil

import jax
import jax.numpy as jnp
from jaxtyping import TypeCheckError
import pytest

from xmodal.models.attention import attention
from xmodal.models.layers import Mlp
from xmodal.models.stream import Stream
from xmodal.tasks.writing import token_loss


def wrong_rank():
  """Heads are missing."""
  attention(*[jnp.zeros((2, 3, 8))] * 3)


def wrong_length():
  """Keys and values differ in length."""
  attention(jnp.zeros((2, 3, 4, 8)), jnp.zeros((2, 5, 4, 8)), jnp.zeros((2, 6, 4, 8)))


def wrong_dtype():
  """Logits, not token ids."""
  jax.jit(token_loss, static_argnums=2)(jnp.zeros((2, 3, 9)), jnp.zeros((2, 3)), 0)


def wrong_field():
  """The mask of another batch, in a dataclass."""
  Stream(jnp.zeros((2, 3, 8)), jnp.ones((4, 3), bool))


def wrong_input_of_a_module():
  """Token ids instead of vectors, in a Linen module's compact method."""
  Mlp(8, 4).init(jax.random.key(0), jnp.zeros((2, 3), int))


@pytest.mark.parametrize('call', [wrong_rank, wrong_length, wrong_dtype, wrong_field,
                                  wrong_input_of_a_module])
def test_a_wrong_shape_or_dtype_is_an_error(call):
  with pytest.raises(TypeCheckError, match='Type-check error'):
    call()


def test_every_module_of_the_packages_is_checked():
  """A module imported before the checks are installed would be silently unchecked."""
  import shape_checks
  for package in shape_checks.PACKAGES:
    path = importlib.import_module(package).__path__
    for found in pkgutil.walk_packages(path, f'{package}.'):
      loader = importlib.import_module(found.name).__spec__.loader
      assert type(loader).__name__ == '_JaxtypingLoader', found.name
