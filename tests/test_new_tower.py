"""The plugin towers of xmodal/models/README.md: their code runs, and mistakes are one line."""

import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import pytest
import tiny

from xmodal import config as configs
from xmodal import keys
from xmodal.errors import UserError
from xmodal.models.parts import PARTS
from xmodal.train.plan import Plan

GUIDE = pathlib.Path(__file__).parents[1] / 'xmodal' / 'models' / 'README.md'


@pytest.fixture
def load(tmp_path, monkeypatch):
  """Loads the guide's block, changed; its part is forgotten at the end."""
  blocks = re.findall(r'```python\n(.*?)```', GUIDE.read_text(encoding='utf-8'), re.DOTALL)
  monkeypatch.syspath_prepend(str(tmp_path))

  def loaded(name, *changes):
    guided = 'bag' if name == 'bag' else 'patches'
    text, = [block for block in blocks if f"register('{guided}'" in block]
    for old, new in changes:
      assert old in text
      text = text.replace(old, new)
    (tmp_path / f'{name}.py').write_text(text)
    configs.load_plugins((name,))

  yield loaded
  for name in ('patches', 'bag', 'broken'):
    sys.modules.pop(name, None)
    PARTS._parts.pop(name, None)


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


def test_its_keys_are_listed(load, capsys):
  load('patches')
  plugins, section = ['--plugins', 'patches'], ['model.vision']
  for arguments in (plugins + section, section + plugins):
    assert keys.main(arguments) == 0
    assert 'window = 4  (1 or more)' in capsys.readouterr().out


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


def test_the_text_tower_of_the_guide_reads_and_has_a_decoder(load):
  load('bag')
  c = tiny.changed(plugins=('bag',))
  for key in ('mlp_dim', 'num_heads', 'num_layers', 'head_dim'):
    c.model.text[key] = None
  c.update_from_flattened_dict({'model.text.name': 'bag', 'model.text.num_decoder_layers': 1})
  plan = Plan(c, 'unused')
  tower = plan.model.backbone.text_tower
  variables = jax.jit(tower.init, static_argnames='method')(
      jax.random.key(0), jnp.ones((1, 5), int), jnp.ones((1, 5), bool), method='encode')
  tokens, mask = jnp.array([[3, 4, 7, 0, 0]] * 2), jnp.array([[1, 1, 1, 0, 0]] * 2, bool)
  read = tower.apply(variables, tokens, mask, method='encode')
  assert read.shape == (2, 5, 16)
  other = tower.apply(variables, tokens.at[1, 4].set(9), mask, method='encode')
  assert (read[1, :3] == other[1, :3]).all()  # padding is not read
  assert jnp.isfinite(tower.apply(variables, tokens, mask & False, method='encode')).all()
  assert 'decoder_tower' in plan.abstract.params['backbone']
