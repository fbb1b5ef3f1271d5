"""The captioning task: its features and scores, and a whole run."""

import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import tiny
import torch

import xmodal
from xmodal import predict
from xmodal.data.example import Example
from xmodal.data.pictures.placement import Placement
from xmodal.data.scenes.shapes import Shapes
from xmodal.data.tokenizer import train_tokenizer
from xmodal.errors import UserError
from xmodal.metrics import captioning as metrics
from xmodal.tasks.captioning import Caption, Captioning
from xmodal.train import build
from xmodal.train import run as runs
from xmodal.train.plan import Plan

IMAGE = np.zeros((4, 4, 3), np.uint8)
TEXTS = ('a red square.', 'a square', 'the dog sits on a red mat')


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
  """Skips METEOR, whose program takes ten seconds to start."""
  monkeypatch.setattr(metrics, 'meteor', lambda *_: None)


@pytest.fixture(scope='module')
def tokenizer():
  return train_tokenizer(TEXTS, 80)


def make(tokenizer, examples, **values):
  return Captioning.from_data(tiny.changed(**values), tokenizer, examples)


@pytest.fixture(scope='module')
def task(tokenizer):
  return make(tokenizer, [Example(IMAGE, captions=TEXTS)], captioning__caption_length=8,
              captioning__max_captions=2)


def features(task, *captions):
  rows = [task.encode(Example(IMAGE, captions=c), Placement(4, 4)) for c in captions]
  return jax.tree.map(lambda *x: np.stack(x), *rows)


def test_the_loss_is_the_mean_over_captions_of_torch_cross_entropy(task, tokenizer):
  batch = features(task, TEXTS[:2], TEXTS[:1], TEXTS[1:], ())
  logits = np.random.default_rng(0).normal(size=(4, 2, 8, tokenizer.vocab_size), scale=3)
  logits = logits.astype(np.float32)
  losses = task.losses(jnp.asarray(logits), batch)['gen']
  for i, count in enumerate((2, 1, 2)):
    theirs = [torch.nn.functional.cross_entropy(
        torch.tensor(logits[i, k]), torch.tensor(batch['captions'][i, k]).long(),
        ignore_index=tokenizer.pad_id) for k in range(count)]
    np.testing.assert_allclose(losses[i], np.mean(theirs), rtol=1e-5)
  assert losses[3] == 0
  np.testing.assert_array_equal(task.weights(batch)['gen'], [1, 1, 1, 0])


def test_progress_is_the_share_of_right_tokens(task, tokenizer):
  batch = features(task, TEXTS[1:2], ())
  logits = np.array(jax.nn.one_hot(batch['captions'], tokenizer.vocab_size))
  assert task.progress(logits, batch)['accuracy'].tolist() == [1, 0]
  length = int(tokenizer.lengths([TEXTS[1]])[0])
  logits[0, 0, 0] = -logits[0, 0, 0]
  np.testing.assert_allclose(task.progress(logits, batch)['accuracy'][0], 1 - 1 / length)


def test_what_training_leaves_out_is_said(task, tokenizer):
  (captions,) = features(task, TEXTS)['captions']
  assert tokenizer.decode(captions) == ['a red square.', 'a square']
  long = 'the dog sits on a red mat and the dog sits on a red mat'
  said = task.survey([Example(IMAGE, captions=TEXTS), Example(IMAGE, captions=(long,))])
  assert 'of 4 captions are longer than 8 tokens' in said[0]
  assert '1 of 2 pictures have more than 2 captions (up to 3)' in said[1]
  with pytest.raises(UserError, match='none of 1 examples has "caption"'):
    task.survey([Example(IMAGE, question='what?')])


def test_a_saved_task_comes_back(task, tokenizer, tmp_path):
  task.save(str(tmp_path))
  config = tiny.changed(captioning__caption_length=8)
  loaded = Captioning.from_files(config, tokenizer, str(tmp_path))
  assert loaded.encode(Example(IMAGE), Placement(4, 4))['captions'].shape == (2, 8)


def test_a_search_at_random_is_a_mistake(tokenizer):
  with pytest.raises(UserError, match='beams=2 .*temperature=0.5'):
    make(tokenizer, [], captioning__beams=2, captioning__temperature=0.5)


def test_results_are_a_line_a_picture(task):
  examples = [Example(IMAGE, captions=TEXTS[:1], image_id=7), Example(IMAGE, image_id=7),
              Example(IMAGE, image_id='b'), Example(IMAGE)]
  predictions = [Caption('a red square', 0.5), Caption('a red square', 0.5),
                 Caption('a dog', 0.1), Caption('x', 0.2)]
  assert task.files(examples, predictions) == {'results': [
      {'image_id': 7, 'caption': 'a red square'}, {'image_id': 'b', 'caption': 'a dog'}]}
  assert task.files(examples[3:], predictions[3:]) == {}
  scores = task.score(examples, predictions)
  assert scores['examples'] == 1 and scores['exact'] == 1
  assert task.score(examples[1:], predictions[1:]) == {} and task.headline({}) == ''
  assert '100.0%' in task.table(scores) and 'word for word' in task.headline(scores)


def test_several_captions_are_read_as_each_by_itself():
  """The caption's probability is also that of its text, decoded without a cache."""
  tokens = types.SimpleNamespace(vocab_size=30, pad_id=0, eos_id=1)
  config = build.resolve(tiny.changed(captioning__caption_length=6, captioning__beams=2), {})
  task = Captioning(config.captioning, tokens, 2)
  model = build.make_model(config, tokens, {'captioning': task})
  rng = np.random.default_rng(0)
  batch = {'image': rng.integers(0, 256, (3, 32, 32, 3), np.uint8),
           'captioning': {'captions': rng.integers(2, 30, (3, 2, 6))}}
  variables = jax.jit(lambda: model.init(jax.random.key(0), batch, deterministic=True))()
  # Sharper logits than at initialisation, so that texts differ in length.
  variables = jax.tree.map(lambda x: 3 * x, variables)
  read = jax.jit(lambda v, b: model.apply(v, b, deterministic=True)['captioning'])
  both = read(variables, batch)
  arrays = jax.jit(lambda v: model.apply(v, batch, method='predict'))(variables)['captioning']
  second = batch['captioning']['captions'][:, 1]
  batch['captioning'] = {'captions': np.stack([second, arrays['tokens']], axis=1)}
  apart = read(variables, batch)
  np.testing.assert_allclose(both[:, 1], apart[:, 0], rtol=2e-4, atol=2e-4)
  of_token = np.take_along_axis(jax.nn.log_softmax(apart[:, 1]), arrays['tokens'][..., None],
                                axis=-1)[..., 0]
  ends = np.cumsum(arrays['tokens'] == 1, axis=1) - (arrays['tokens'] == 1)
  np.testing.assert_allclose(arrays['log_probability'], (of_token * (ends == 0)).sum(1),
                             rtol=1e-4, atol=1e-4)


# A whole run


def config(folder, **values):
  return tiny.changed(
      mixer__tasks=('captioning',), mixer__weights=(1.0,), data__source='jsonl',
      data__root=str(folder), captioning__caption_length=12, train__steps=4, train__eval_every=4,
      train__checkpoint_every=2, **values)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """A folder of shapes with captions: every third has two, every fourth none."""
  folder = tmp_path_factory.mktemp('captions')
  for split, count in (('train', 16), ('val', 10)):
    source = Shapes(split, size=count, image_size=32)
    lines = []
    for i in range(count):
      name, (caption,) = f'{split}_{i}.png', source[i].captions
      Image.fromarray(source[i].image).save(folder / name)
      known = {} if i % 4 == 3 else {'caption': [caption, 'Shapes.'] if i % 3 == 0 else caption}
      lines.append(json.dumps({'image': name, 'image_id': 100 + i, **known}))
    (folder / f'{split}.jsonl').write_text('\n'.join(lines))
  return folder


@pytest.fixture(scope='module')
def run(data, tmp_path_factory):
  """(workdir, the task's scores in final.json)."""
  workdir = tmp_path_factory.mktemp('captioning') / 'run'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(metrics, 'meteor', lambda *_: None)
    return workdir, tiny.train(workdir, config(data))['evaluation']['captioning']


def test_scores_are_those_of_the_file_written(run, data):
  workdir, scores = run
  results = json.loads((workdir / 'captioning_val_results.json').read_text())
  assert [line['image_id'] for line in results] == list(range(100, 110))
  truths = [json.loads(line) for line in (data / 'val.jsonl').read_text().splitlines()]
  known = [(r['caption'], [t['caption']] if isinstance(t['caption'], str) else t['caption'])
           for r, t in zip(results, truths) if 'caption' in t]
  again = metrics.caption_scores(*zip(*known))
  assert scores == {**again, 'examples': 8}
  lines = [json.loads(x) for x in (workdir / 'predictions_captioning_val.jsonl').open()]
  assert [line['caption'] for line in lines] == [line['caption'] for line in results]
  assert Image.open(workdir / 'samples' / 'captioning_val_0000004.png').width > 1000


def test_a_stopped_run_goes_on_to_the_same_end(run, data, tmp_path):
  workdir = shutil.copytree(run[0], tmp_path / 'run')
  shutil.rmtree(workdir / 'checkpoints' / '4')
  assert tiny.train(workdir, config(data))['evaluation']['captioning'] == run[1]


def test_an_evaluation_may_draw_at_random(run, data, tmp_path):
  workdir, texts = shutil.copytree(run[0], tmp_path / 'run'), []
  path = workdir / 'captioning_val_results.json'
  few = {'captioning__top_k': 9, 'captioning__top_p': 0.9}
  for values in (few, {'captioning__top_k': 1}, {**few, 'train__eval_batch_size': 3}):
    c = config(data, captioning__temperature=1.5, **values)
    runs.evaluate_newest(Plan(c, str(workdir), 'eval'))
    texts.append([line['caption'] for line in json.loads(path.read_text())])
  greedy = [line['caption'] for line in
            json.loads((run[0] / 'captioning_val_results.json').read_text())]
  assert texts[0] != greedy
  assert texts[1] == greedy  # top_k=1 is greedy
  assert texts[2] == texts[0]  # independent of the rest of the batch


def test_a_loaded_model_describes_pictures(run, data):
  model = xmodal.load(run[0])
  paths = [data / f'val_{i}.png' for i in range(10)]
  captions = [caption.caption for caption in model(paths)]
  lines = [json.loads(x) for x in (run[0] / 'predictions_captioning_val.jsonl').open()]
  assert captions == [line['caption'] for line in lines]
  one = model(paths[0])
  assert isinstance(one, Caption) and one.caption == captions[0]
  assert model.plain(one).keys() == {'caption', 'probability'}
  with pytest.warns(UserWarning, match='^captioning reads no text: text is not used'):
    model(paths[0], 'what is it?')


def test_predict_needs_no_text(run, data, capsys):
  arguments = ['--checkpoint', str(run[0]), '--image', str(data / 'val_0.png')]
  assert predict.main(arguments) == 0
  said = capsys.readouterr()
  assert said.out.strip().endswith('%)') and not said.err
  assert predict.main([*arguments, '--text', 'what is it?']) == 0
  again = capsys.readouterr()
  assert again.out == said.out and '--text is not used' in again.err
