"""Every number of a config has a range that excludes NaN and infinity; seeds differ."""

import jax
from ml_collections import ConfigDict
import numpy as np
import pytest
import tiny

from xmodal import config as configs
from xmodal.data import order
from xmodal.errors import UserError
from xmodal.train import build


def numbers():
  """The keys of all numeric values, with their types."""
  def walk(section, prefix=''):
    for key in section:
      value = section[key]
      if isinstance(value, ConfigDict):
        yield from walk(value, f'{prefix}{key}.')
        continue
      kind = (section.get_ref(key).get_type() if value is None else type(value))
      if kind in (int, float):
        yield f'{prefix}{key}', kind

  # config.mixer.data repeats the keys of config.data.
  return {key: kind for key, kind in walk(configs.base()) if not key.startswith('mixer.data.')}


def check(key, value):
  c = configs.base()
  c.update_from_flattened_dict({key: value})
  configs.check(c)


def test_every_default_is_inside_its_range_and_every_number_has_one():
  configs.check(configs.base())
  found = numbers()
  assert {'seed': int, 'optimizer.eps': float, 'model.text.head_dim': int,
          'model.text.neighbor_bias': float}.items() <= found.items()
  for key, kind in found.items():
    for value in map(float, ('nan', 'inf', '-inf')) if kind is float else (True, -2, 2**70):
      with pytest.raises(UserError, match=f'^config.{key}={value}: wanted ') as error:
        check(key, value)
      assert '\n' not in str(error.value)


@pytest.mark.parametrize('key, value, wanted', [
    ('optimizer.learning_rate', 0.0, 'above 0'), ('optimizer.learning_rate', -1e-3, 'above 0'),
    ('optimizer.weight_decay', -0.1, '0 or more'), ('optimizer.clip_norm', 0.0, 'above 0'),
    ('optimizer.clip_norm', float('inf'), 'above 0, at most 3.4e+38'),
    ('optimizer.b1', 1.0, '0 or more, below 1'), ('optimizer.b2', -0.1, '0 or more, below 1'),
    ('optimizer.b2', 0.99999999, '0 or more, below 1'),  # 1 in float32, and divided by 1 - b2
    ('optimizer.eps', 0.0, 'above 0'), ('optimizer.eps', 1e-50, 'above 0'),
    ('optimizer.end_share', 1.5, '0 to 1'), ('optimizer.decay_share', 0.0, 'above 0, at most 1'),
    ('optimizer.muon_rate', 0.0, 'above 0'), ('model.vision.num_heads', 0, '1 or more'),
    ('model.vision.patch_size', 0, '1 or more'), ('model.text.head_dim', -8, '1 or more'),
    ('train.batch_size', 0, '1 or more'), ('model.lora.alpha', 0.0, 'above 0'),
    ('mixer.temperature', 1e-3, '0.1 or more'), ('seed', -1, '0 to 4294967295'),
    ('seed', 2**32, '0 to 4294967295')])
def test_what_means_nothing_is_named(key, value, wanted):
  with pytest.raises(UserError) as error:
    check(key, value)
  assert str(error.value) == f'config.{key}={value}: wanted {wanted}'


def test_guidance_between_times_that_cross_is_named():
  with pytest.raises(UserError, match='guidance_from=0.9: wanted at most .*guidance_to=0.5'):
    c = tiny.changed(generation__guidance_from=0.9, generation__guidance_to=0.5)
    configs.check(c)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), 1e39, 1e-50, 0.0, -1.0, True, '2'])
def test_weights_of_tasks_are_finite_and_above_zero(value):
  with pytest.raises(UserError, match='config.mixer.weights=.*finite number above 0'):
    build.task_weights(tiny.changed(mixer__weights=(1.0, value)))


def test_every_seed_that_is_taken_draws_and_orders_its_own():
  seeds = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
  for seed in seeds:
    check('seed', seed)
  drawn = {tuple(np.asarray(jax.random.key_data(jax.random.key(seed)))) for seed in seeds}
  ordered = {tuple(order.permute(np.arange(100), 100, seed, 0)) for seed in seeds}
  assert len(drawn) == len(ordered) == len(seeds)
