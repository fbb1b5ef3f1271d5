"""Runs initialised from an earlier run: parameters loaded and fitted, messages and errors."""

import json
import os
import shutil
import subprocess
import sys

from flax import traverse_util
import jax
import numpy as np
import pytest
import tiny
import torch
import transformers

from xmodal import config as configs
from xmodal.bench import start_from
from xmodal.data.tokenizer import train_tokenizer
from xmodal.errors import UserError
from xmodal.train.checkpoints.checkpoint import Checkpoints
from xmodal.train.plan import Plan

WORDS = 'a red circle or the blue square , what where which of many'


def flat(tree):
  return {path: np.asarray(x) for path, x in
          traverse_util.flatten_dict(jax.device_get(tree), sep='/').items()}


def plan(start, **values):
  """The Plan of a new run initialised from another."""
  return Plan(tiny.changed(train__start_from=str(start), **values), 'unused')


def initial_state(of):
  """A state of a plan with distinct values in every array; faster than `states.create`."""
  rng = np.random.default_rng(0)
  params, collections = jax.tree.map(
      lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding),
      (of.abstract.params, of.abstract.collections))
  return of.abstract.replace(params=params, collections=collections)


def begun(of):
  """A plan's initial parameters without the earlier run, and with it."""
  state = initial_state(of)
  return flat(state.params), flat(of.loader.fill(state).params)


def fault(start, **values):
  with pytest.raises(UserError) as error:
    plan(start, **values)
  assert '\n' not in str(error.value)
  return str(error.value)


def tokens(folder):
  """{token: number} of a tokenizer's file."""
  return json.loads((folder / 'tokenizer' / 'tokenizer.json').read_text())['model']['vocab']


@pytest.fixture(scope='module')
def stored(finished):
  """Parameters of the newest checkpoint of the tiny run."""
  return flat(tiny.restored(finished).params)


@pytest.fixture(scope='module')
def adapted(tmp_path_factory):
  """(workdir, config) of a run with a pretrained vision tower, adapters and a moving average."""
  root = tmp_path_factory.mktemp('adapted')
  torch.manual_seed(0)
  transformers.ViTModel(transformers.ViTConfig(
      hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
      image_size=32, patch_size=8)).save_pretrained(root / 'vit')
  config = tiny.changed(
      model__vision__pretrained=str(root / 'vit'), model__text__num_layers=2, train__steps=5,
      model__lora__pattern='text_tower/encoder_layers/.*/query/kernel', train__ema_decay=0.5,
      train__samples=0, mixer__tasks=('vqa',), mixer__weights=(1.0,), vqa__generation_weight=0.0)
  for key in ('hidden_dim', 'mlp_dim', 'num_heads', 'num_layers'):
    config.model.vision[key] = None
  tiny.train(root / 'run', config)
  shutil.rmtree(root / 'vit')  # it is not read again
  return root / 'run', config


@pytest.fixture(scope='module')
def adapted_state(adapted):
  workdir, config = adapted
  checkpoints = Checkpoints(str(workdir), keep=2)
  state = checkpoints.restore(Plan(config, str(workdir)).abstract, pytest.fail)
  checkpoints.close()
  return state


# Loaded parameters


def test_the_same_model_begins_where_the_other_ended(finished, stored):
  new = plan(finished)
  _, params = begun(new)
  assert params.keys() == stored.keys()
  for path, value in stored.items():
    np.testing.assert_array_equal(params[path], value)
  assert (f'start from {finished}/checkpoints/6: 131 tensors loaded, 0 fitted, 0 ignored'
          in new.notes)
  assert not any('newly' in note for note in new.notes)


def test_a_start_is_a_workdir_its_best_or_a_step(finished, tmp_path):
  (tmp_path / 'checkpoints').symlink_to(finished / 'checkpoints')
  (tmp_path / 'best.json').write_text('{"step": 3}')
  for name, step in (('', 6), ('best', 3), ('checkpoints/3', 3)):
    notes = plan(tmp_path / name).notes
    assert any(f'start from {tmp_path}/checkpoints/{step}: 131 tensors' in note for note in notes)


@pytest.fixture(scope='module')
def detection(finished):
  """A detection run on other data, with larger pictures, deeper towers and a larger vocabulary."""
  return plan(finished, mixer__tasks=('detection',), mixer__weights=(1.0,), data__crowded=True,
              data__image_size=48, model__vision__num_layers=2, model__cross__num_layers=2,
              model__text__vocab_size=150, train__ema_decay=0.9)


def test_another_task_takes_all_that_fits_and_the_rest_is_new(finished, stored, detection):
  initial, params = begun(detection)
  vision, grid = 'backbone/vision_tower', 'backbone/grid_position'
  embedding = 'backbone/text_tower/token_embedding/embedding'
  resized = {f'{vision}/position_embedding', f'{grid}/row_embedding', f'{grid}/column_embedding'}
  copied = 0
  for path, value in params.items():
    if path.startswith('heads_detection'):
      np.testing.assert_array_equal(value, initial[path])
    elif path.startswith((f'{vision}/layers', 'backbone/cross_modal/layers')):
      np.testing.assert_array_equal(value, np.concatenate([stored[path], initial[path][1:]]))
    elif path not in {embedding, *resized}:
      np.testing.assert_array_equal(value, stored[path])
      copied += 1
  assert copied == 34

  # Tokens by their strings; those only in the crowded scenes are new.
  own, there = detection.tokenizer.vocabulary, tokens(finished / 'assets')
  assert set(there) < set(own) and len(there) == 120 and len(own) > 130
  for token, number in own.items():
    np.testing.assert_array_equal(
        params[embedding][number],
        stored[embedding][there[token]] if token in there else initial[embedding][number])

  # Positions as torch resizes them.
  table = torch.tensor(stored[f'{vision}/position_embedding'].reshape(4, 4, 16))
  theirs = torch.nn.functional.interpolate(table.permute(2, 0, 1)[None], (6, 6), mode='bicubic')
  np.testing.assert_allclose(params[f'{vision}/position_embedding'].reshape(6, 6, 16),
                             theirs[0].permute(1, 2, 0), atol=1e-5)
  table = torch.tensor(stored[f'{grid}/row_embedding'])
  theirs = torch.nn.functional.interpolate(table.T[None, :, :, None], (6, 1), mode='bicubic')
  np.testing.assert_allclose(params[f'{grid}/row_embedding'], theirs[0, :, :, 0].T, atol=1e-5)


def test_the_average_of_a_new_run_begins_as_its_parameters(detection):
  state = detection.loader.fill(initial_state(detection))
  jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)


def test_what_became_of_each_tensor_is_said(finished, detection):
  said = '\n'.join(detection.notes)
  known = len(detection.tokenizer.vocabulary)
  for line in (
      f'start from {finished}/checkpoints/6: 34 tensors loaded, 72 fitted, 25 ignored: ',
      'heads_objects (2)',
      'fitted: backbone/cross_modal/layers (52), backbone/vision_tower/layers (16): the first 1 '
      'layer, 1 new after',
      f'embedding: 120 of {known} tokens found', 'row_embedding: 4 positions resized to 6',
      'position_embedding: 4 x 4 positions resized to 6 x 6',
      'newly initialised: heads_detection/expression, '):
    assert line in said


def test_answers_are_found_by_their_texts(finished, stored, tmp_path):
  new = plan(finished, data__train_examples=40, vqa__max_answers=12)
  initial, params = begun(new)
  there = json.loads((finished / 'assets/vqa/answers.json').read_text())
  own = list(new.tasks['vqa'].answers)
  places = [there.index(answer) if answer in there else None for answer in own]
  assert places != list(range(12)) and sum(p is not None for p in places) > 6
  for name in ('kernel', 'bias'):
    path = f'heads_vqa/answers/{name}'
    for i, place in enumerate(places):
      np.testing.assert_array_equal(
          params[path][..., i],
          initial[path][..., i] if place is None else stored[path][..., place])
  # Answers in another order are other answers, though the shape is equal.
  folder = shutil.copytree(finished / 'checkpoints/6', tmp_path / 'checkpoints/6')
  (folder / 'assets/vqa/answers.json').write_text(json.dumps(there[::-1]))
  (folder / 'assets/files.json').unlink()
  _, params = begun(plan(tmp_path))
  np.testing.assert_array_equal(params['heads_vqa/answers/kernel'],
                                stored['heads_vqa/answers/kernel'][:, ::-1])


def test_a_tokenizer_of_the_users_own_takes_the_rows_of_words_that_both_know(
    finished, stored, tmp_path):
  train_tokenizer([WORDS], 60).save(tmp_path / 'own')
  new = plan(finished, model__text__tokenizer=str(tmp_path / 'own'))
  initial, params = begun(new)
  own, there = new.tokenizer.vocabulary, tokens(finished / 'assets')
  assert 10 < len(own.keys() & there.keys()) < len(own)
  for path, axis in (('backbone/text_tower/token_embedding/embedding', 0),
                     ('backbone/text_tower/lm_head/kernel', 1)):
    for token, number in own.items():
      np.testing.assert_array_equal(
          params[path].take(number, axis), initial[path].take(number, axis)
          if token not in there else stored[path].take(there[token], axis))


def test_parts_are_taken_by_their_paths(finished, stored):
  new = plan(finished, train__start_parts='vision_tower|^heads_vqa', model__cross__hidden_dim=24,
             model__text__hidden_dim=24, data__train_examples=40)
  initial, params = begun(new)
  vision = {path for path in stored if 'vision_tower' in path}
  for path, value in params.items():
    np.testing.assert_array_equal(value, stored[path] if path in vision else initial[path])
  # A bias is not loaded without its kernel.
  assert 'not loaded, as shapes differ: heads_vqa/answers/kernel [16, 21] there, [24, ' in (
      '\n'.join(new.notes))
  # No token of the other run is loaded, so not its tokenizer either.
  learned = Plan(tiny.changed(data__train_examples=40), 'unused').tokenizer.vocabulary
  assert new.tokenizer.vocabulary == learned != tokens(finished / 'assets')


def test_sizes_that_the_config_leaves_open_are_those_of_the_run(finished, stored):
  c = configs.base()
  c.update({'data': {'train_examples': 64, 'eval_examples': 20}, 'vqa': {'question_length': 12},
            'model': {'text': {'vocab_size': 120}},
            'train': {'batch_size': 8, 'start_from': str(finished)}})
  new = Plan(c, 'unused')
  assert new.config.data.image_size == 32 and new.config.model.vision.hidden_dim == 16
  assert {path: x.shape for path, x in
          traverse_util.flatten_dict(new.abstract.params, sep='/').items()} == {
              path: x.shape for path, x in stored.items() if 'objects' not in path}
  # Sizes stay unset for a part from which nothing is loaded.
  c.model.cross.hidden_dim, c.train.start_parts = 16, 'heads'
  other = Plan(c, 'unused')
  assert other.config.model.vision.hidden_dim is None
  assert other.model.backbone.vision_tower.hidden_dim == 64


# Towers, averages and adapters of the earlier run


def test_the_average_and_the_pretrained_tower_are_taken(adapted, adapted_state):
  workdir, config = adapted
  ema = flat(adapted_state.ema)
  for name in ('', config.model.vision.pretrained):  # a deleted folder
    new = plan(workdir, model__vision__pretrained=name)
    _, params = begun(new)
    assert new.towers['vision'].family == 'vit' and new.model.backbone.vision_tower.use_cls_token
    tower = [path for path in params if 'vision_tower' in path]
    assert len(tower) == 22
    for path in tower:
      np.testing.assert_array_equal(params[path], ema[path])
    assert not np.array_equal(params[path], flat(adapted_state.params)[path])
    assert any('(its moving average)' in note for note in new.notes)
  assert new.config.model.vision.pretrained == config.model.vision.pretrained


def test_adapters_are_merged_or_kept(adapted, adapted_state):
  workdir, config = adapted
  ema = flat(adapted_state.ema)
  layer = 'backbone/text_tower/encoder_layers/attention/query'
  kernel, a, b = (ema[f'{layer}/{name}'] for name in ('kernel', 'lora_a', 'lora_b'))
  assert kernel.shape[0] == 2 and np.abs(b).max() > 0
  new = plan(workdir)  # of one layer, without adapters
  _, params = begun(new)
  np.testing.assert_allclose(params[f'{layer}/kernel'], (kernel + 2 * a @ b)[:1], atol=1e-6)
  assert any('query/kernel: adapters merged; the first 1 layer of 2 taken' in n for n in new.notes)
  _, params = begun(plan(workdir, model__text__num_layers=2,
                         model__lora__pattern=config.model.lora.pattern))
  for name, value in (('kernel', kernel), ('lora_a', a), ('lora_b', b)):
    np.testing.assert_array_equal(params[f'{layer}/{name}'], value)
  initial, params = begun(plan(workdir, model__text__num_layers=2, model__lora__rank=4,
                               model__lora__pattern=config.model.lora.pattern))
  np.testing.assert_allclose(params[f'{layer}/kernel'], kernel + 2 * a @ b, atol=1e-6)
  np.testing.assert_array_equal(params[f'{layer}/lora_b'], initial[f'{layer}/lora_b'])


def test_two_towers_for_one_place_are_refused(adapted, finished, tmp_path):
  workdir, _ = adapted
  for start in (workdir, finished):
    told = fault(start, model__vision__pretrained='google/vit')
    assert "config.model.vision.pretrained='google/vit' and config.train.start_from=" in told
    assert "config.train.start_parts='^(?!backbone/vision_tower/)'" in told


# Resuming


def test_a_run_goes_on_without_the_other_bit_for_bit(finished, tmp_path):
  start = shutil.copytree(finished, tmp_path / 'start')
  c = tiny.changed(
      train__start_from=str(start), data__train_examples=40, train__samples=0,
      mixer__tasks=('vqa',), mixer__weights=(1.0,), vqa__generation_weight=0.0)
  for slot in ('vision', 'text', 'cross'):
    for key in ('hidden_dim', 'mlp_dim', 'num_heads', 'num_layers'):
      c.model[slot][key] = None
  c.model.text.head_dim = c.data.image_size = None
  assert tiny.train(tmp_path / 'run', c)['step'] == 6

  def arrays():
    checkpoints = Checkpoints(str(tmp_path / 'run'), keep=5)
    state = checkpoints.restore(Plan(c, str(tmp_path / 'run')).abstract, pytest.fail)
    checkpoints.close()
    return jax.device_get(state)

  whole = arrays()
  shutil.rmtree(start)
  shutil.rmtree(tmp_path / 'run/checkpoints/6')
  assert tiny.train(tmp_path / 'run', c)['resumed_from'] == 3
  jax.tree.map(np.testing.assert_array_equal, arrays(), whole)

  # A run with another start is another run.
  c.train.start_from = str(tmp_path / 'other')
  with pytest.raises(UserError, match=r'another config \(train.start_from=.*/start.* there and '
                                      '.*/other.* here'):
    Plan(c, str(tmp_path / 'run'))


FITTED = dict(vqa__max_answers=12, data__image_size=48, model__vision__num_layers=2,
              model__text__vocab_size=150)
_SHARDED = """
import sys, jax, numpy as np, test_start
plan = test_start.plan(sys.argv[1], mesh__data=2, mesh__fsdp=2, mesh__tensor=2, **test_start.FITTED)
state = plan.loader.fill(test_start.initial_state(plan))
jax.tree.map(lambda x, struct: (x.sharding == struct.sharding and x.dtype == struct.dtype
                                and x.shape == struct.shape) or 1 / 0, state.params,
             plan.abstract.params)
np.savez(sys.argv[2], **test_start.flat(state.params))
"""


def test_each_device_gets_its_own_part(finished, tmp_path):
  environment = os.environ | {
      'XLA_FLAGS': os.environ['XLA_FLAGS'] + ' --xla_force_host_platform_device_count=8',
      'PYTHONPATH': os.pathsep.join(filter(None, sys.path))}
  done = subprocess.run([sys.executable, '-c', _SHARDED, finished, tmp_path / 'params.npz'],
                        env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  _, params = begun(plan(finished, **FITTED))
  with np.load(tmp_path / 'params.npz') as sharded:
    assert set(sharded) == set(params)
    for path, value in params.items():
      np.testing.assert_allclose(sharded[path], value, atol=1e-6)


# User errors: one line each


def test_what_cannot_be_is_said_before_anything_is_written(finished, tmp_path):
  assert "start_from='/no/such': no checkpoint in /no/such" in fault('/no/such')
  assert 'needs config.train.start_from, the run to' in fault('', train__start_parts='vision')
  assert 'is no regular expression' in fault(finished, train__start_parts='(')
  told = fault(finished, train__start_parts='vision_towr')
  assert "start_parts: 'vision_towr' matches no parameter" in told and 'heads_vqa' in told
  told = fault(finished, train__start_parts='vision_tower|heads_(detection|captioning)')
  assert "'heads_(detection|captioning)' of 'vision_tower|heads_(detection|captioning)' ma" in told
  told = fault(finished, train__start_parts='heads_vqa', mixer__tasks=('retrieval',),
               mixer__weights=(1.0,))
  assert f'none of the 4 parameters selected from {finished}/checkpoints/6 fits' in told
  c = tiny.changed(train__start_from='/no/such')
  with pytest.raises(UserError):
    Plan(c, str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('item', ['model', 'assets'])
def test_a_damaged_start_is_told(finished, tmp_path, item):
  step = shutil.copytree(finished / 'checkpoints/6', tmp_path / 'checkpoints/6')
  file = max((path for path in (step / item).rglob('*')
              if path.is_file() and path.name != 'files.json'), key=os.path.getsize)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 4
  file.write_bytes(data)
  assert f'checkpoint {step} is damaged ({item}: ' in fault(tmp_path)
  assert 'has changed since it was written' in fault(step)


def test_the_config_says_what_an_earlier_run_gives():
  table = configs.table('train')
  assert 'start_from' in table and 'tokenizer' in table


# The benchmark


def at(config, key):
  for part in key.split('.'):
    config = config[part]
  return config


def test_the_benchmark_compares_runs_that_differ_in_their_start_alone(finished):
  base = tiny.changed(model__vision__hidden_dim=None, train__steps=100)
  both = start_from.pair(base, str(finished), steps=8)
  assert [key for key, _ in configs.keys() if at(both['nothing'], key) != at(both['start'], key)
          ] == ['train.start_from']
  assert both['nothing'].model.vision.hidden_dim == 16 and both['nothing'].train.steps == 8


def test_the_benchmark_tells_which_is_sooner(capsys):
  def summary(*scores):
    return {'seeds': 2, 'mean': {'vqa': scores[-1]}, 'spread': {'vqa': 0.01},
            'curve': {'vqa': [[10 * i, score] for i, score in enumerate(scores, 1)]}}

  rows = start_from.table({'rad': {'nothing': summary(0.1, 0.2, 0.3),
                                   'start': summary(0.2, 0.35, 0.4)}}).splitlines()
  assert rows[2:] == [
      '| rad: vqa accuracy | from scratch | 2 | 0.100 (10), 0.200 (20) | 0.300 (0.010) |  |',
      '| rad: vqa accuracy | from the run | 2 | 0.200 (10), 0.350 (20) | 0.400 (0.010) | 20 |']
  assert start_from.main(['--seeds', '0']) == 2
  assert capsys.readouterr().err == 'error: --seeds=0: wanted 1 or more\n'
