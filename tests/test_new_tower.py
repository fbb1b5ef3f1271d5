"""The plugin tower of xmodal/models/README.md: its code runs, and mistakes are one line."""

import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import pytest
import tiny

from xmodal import config as configs
from xmodal.errors import UserError
from xmodal.models.parts import PARTS
from xmodal.train.plan import Plan

GUIDE = pathlib.Path(__file__).parents[1] / 'xmodal' / 'models' / 'README.md'


@pytest.fixture
def load(tmp_path, monkeypatch):
  """Loads the guide's block, changed; its part is forgotten at the end."""
  blocks = re.findall(r'```python\n(.*?)```', GUIDE.read_text(encoding='utf-8'), re.DOTALL)
  block, = [block for block in blocks if "register('patches'" in block]
  monkeypatch.syspath_prepend(str(tmp_path))

  def loaded(name, *changes):
    text = block
    for old, new in changes:
      assert old in text
      text = text.replace(old, new)
    (tmp_path / f'{name}.py').write_text(text)
    configs.load_plugins((name,))

  yield loaded
  for name in ('patches', 'broken'):
    sys.modules.pop(name, None)
  PARTS._parts.pop('patches', None)


def config(name, **values):
  c = tiny.changed(plugins=('patches',))
  for key in ('mlp_dim', 'num_heads', 'num_layers'):
    c.model.vision[key] = None
  c.update_from_flattened_dict({'model.vision.name': name, **values})
  return c


def test_the_tower_of_the_guide_sees_pictures_and_leaves_others_alone(load):
  load('patches')
  plan = Plan(config('patches', **{'model.vision.window': 8}), 'unused')
  tower = plan.model.backbone.vision_tower
  assert tower.window == 8 and tower.hidden_dim == 16
  variables = jax.jit(tower.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  tokens = tower.apply(variables, jnp.arange(2 * 32 * 32 * 3.).reshape(2, 32, 32, 3))
  assert tokens.shape == (2, 4, 4, 16)
  assert {'windows'} == plan.abstract.params['backbone']['vision_tower'].keys()
  # Its option has a default that is not None, which other towers do not have.
  Plan(tiny.changed(plugins=('patches',)), 'unused')


@pytest.mark.parametrize('values, words', [
    ({'model.vision.window': 5}, 'config.model.vision.window=5 does not divide 32 x 32'),
    ({'model.vision.window': 0}, 'config.model.vision.window=0: wanted 1 or more'),
    ({'model.vision.num_heads': 2}, 'num_heads=2 means nothing to patches')])
def test_its_mistakes_are_one_line(load, values, words):
  load('patches')
  with pytest.raises(UserError, match=words):
    Plan(config('patches', **values), 'unused')


def test_an_option_that_others_declare_differently_is_one_line(load):
  load('patches', ("size('Width of the tokens.')", "Option(8, 'Width.', low=8)"))
  with pytest.raises(UserError, match="'vit' declares .*hidden_dim, which another of .*patches"):
    configs.base()


def test_a_parameter_without_a_rule_is_one_line(load):
  load('patches', ('vision_tower/windows/bias', 'other'))
  with pytest.raises(UserError, match='vision_tower/windows/bias.*no rule says how devices split'):
    Plan(config('patches'), 'unused')


def test_a_plugin_that_fails_says_where(load):
  with pytest.raises(UserError, match=r"'broken' fails at .*broken.py:\d+ \(NameError.*'Optoin'"):
    load('broken', ("'window': Option(", "'window': Optoin("))
