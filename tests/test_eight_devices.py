"""Every task and tower family trains and predicts on eight devices as on one."""

import itertools
import json
import os
import sys

import jax
import numpy as np
import optax
from PIL import Image
import pytest
from test_sharding import by_name, run_alone
import tiny

from xmodal.cost import hlo
from xmodal.data.scenes.crowds import Crowds
from xmodal.models import parts
from xmodal.sharding import mesh as meshes
from xmodal.tasks.retrieval.losses import LOSSES, matching_pairs, normalise, pair_logits
from xmodal.tasks.task import TASKS
from xmodal.train import scoring
from xmodal.train.plan import Plan
from xmodal.train.programs import compile_step
from xmodal.train.steps import state as states

# ViT and T5, with vqa and objects, are in test_sharding.py: those together are all there are.
# Weights of losses: of random parameters some are much larger than others.
MODELS = {('resnet', 'bert'): {'detection': 0.01, 'captioning': 1.0, 'regression': 1.0,
                               'generation': 0.1},
          ('vgg', 'gpt2'): {'vqa': 1.0, 'retrieval': 1.0}}
MESHES = {('resnet', 'bert'): {'all': (2, 2, 2)},
          ('vgg', 'gpt2'): {'data': (8, 1, 1), 'tensor': (1, 2, 4)}}
CASES = [(towers, mesh) for towers in MODELS for mesh in MESHES[towers]]
EXAMPLES = 20  # of the split that is predicted: batches of eight do not divide it


def write_data(folder):
  """Pictures of several shapes, with labels for every task, in differing numbers."""
  for split in ('train', 'val'):
    source, lines = Crowds(split, size=EXAMPLES, image_size=32), []
    for i, example in enumerate(source):
      height, width = ((32, 32), (24, 32), (32, 17))[i % 3]
      name = f'{split}_{i}.png'
      Image.fromarray(example.image[:height, :width]).save(folder / name)
      things = [{'name': o.name, 'box': o.box} for o in example.objects
                if o.box[0] + o.box[2] <= width and o.box[1] + o.box[3] <= height]
      names = [thing['name'] for thing in things]
      line = {'image': name, 'objects': things, 'number': len(names) + i / 10,
              'question': f'how many {names[0] if names else "things"}?',
              'answers': [str(len(names))] * 2 + ['many'] * (i % 2),
              'caption': [', '.join(names) or 'nothing', f'{len(names)} things'][:1 + i % 2]}
      if names and i % 4:
        line['expression'] = {**things[-1], 'name': f'the {names[-1]}'}
        if i % 4 == 3:  # not one of the objects: its box is learned, too
          things.pop()
      lines.append(json.dumps(line))
    (folder / f'{split}.jsonl').write_text('\n'.join(lines))


def config(folder, towers, sizes):
  c = tiny.changed(
      data__source='jsonl', data__root=str(folder), data__keep_aspect=True,
      mixer__tasks=tuple(MODELS[towers]), mixer__weights=tuple(MODELS[towers].values()),
      model__vision__name=towers[0], model__text__name=towers[1], model__text__head_dim=None,
      model__size='tiny', captioning__caption_length=6, detection__expression_length=6,
      generation__caption_length=6, generation__steps=2, generation__guidance_from=0.0,
      regression__number_length=3, retrieval__caption_length=8, retrieval__embedding_dim=16,
      retrieval__loss='softmax', vqa__answer_length=3, train__ema_decay=0.9)
  for size in ('hidden_dim', 'mlp_dim', 'num_heads', 'num_layers'):
    c.model.vision[size] = None
  c.mesh.data, c.mesh.fsdp, c.mesh.tensor = sizes
  return c


def learn_and_predict(folder, towers, sizes, file):
  """Predicts a split and takes two steps from random parameters, and writes what came of it.

  Returns the metrics of each step. The file gets arrays 'predicted/TASK/KEY', 'gradient/NAME', the
  running sum of gradients, 'moved/NAME', how far a parameter came, and 'average/NAME', likewise its
  average. The optimizer is plain descent: AdamW, which test_sharding.py has, would make whole steps
  of rounding.
  """
  run = Plan(config(folder, towers, sizes), 'unused')
  run.optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.5))
  run.init = states.init_fn(states.variables_fn(run.model, run.batch, 0), run.optimizer, 0, True,
                            run.frozen, run.balance)
  run.abstract = states.abstract_state(run.init, run.optimizer, run.mesh, run.frozen)
  first = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), run.abstract)
  rng = np.random.default_rng(0)
  # Not the initial parameters, because many of their gradients are zero.
  params = jax.tree.map(lambda x: rng.normal(
      size=x.shape, scale=min(0.3, max(np.prod(x.shape[:-1]), 1) ** -0.5)).astype(np.float32),
                        run.abstract.params)
  first = first.replace(params=params, ema=params)
  state = jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), first, run.abstract)

  predicted = []
  def predict_step(variables, batch):
    result = run.evaluation.predict_step(variables, batch)
    predicted.append(jax.device_get(result))
    jax.tree.map(np.testing.assert_array_equal, meshes.get_batch(result), predicted[-1])
    return result
  records, _ = scoring.predict_all(predict_step, state.variables, run.maker('eval'), 8, run.mesh)
  assert records.tolist() == list(range(EXAMPLES))
  predicted = jax.tree.map(lambda *x: np.concatenate(x)[:EXAMPLES], *(x for _, x in predicted))

  step, stream, told = compile_step(run), run.stream('train'), []
  assert not any(one.in_condition for one in hlo.cost(step.as_text()).collectives)
  for i in range(2):
    batch = stream.batch(run.config.mixer.tasks, lambda _: (np.arange(8) + 8 * i,) * 2)
    state, metrics = step(state, meshes.put_batch(batch, run.mesh, 8))
    told.append({key: float(value) for key, value in metrics.items()})
  (_, gradient), = optax.tree_utils.tree_get_all_with_path(state.opt_state, 'trace')
  moved, average = (jax.tree.map(lambda new, old: np.asarray(new) - old, x, first.params)
                    for x in (state.params, state.ema))
  np.savez(file, **by_name(predicted, 'predicted'), **by_name(gradient, 'gradient'),
           **by_name(moved, 'moved'), **by_name(average, 'average'))
  return told


def contrastive(count):
  """{loss: [its mean over one batch on `count` devices, its gradients]}."""
  mesh = meshes.make_mesh(count, 1, 1)
  rng = np.random.default_rng(0)
  batch = meshes.put_batch({
      'image': rng.normal(size=(16, 8)).astype(np.float32),
      'text': rng.normal(size=(16, 8)).astype(np.float32),
      'tokens': rng.integers(0, 6, (16, 1)), 'picture': np.arange(16) // 2,
      'valid': np.arange(16) % 7 > 0}, mesh, 16)

  def mean_loss(vectors, batch, loss):
    logits = pair_logits(*(normalise(vectors[key]) for key in ('image', 'text')), 2.0, -1.0)
    positive = matching_pairs(batch['tokens'], batch['picture'], batch['valid'])
    return (LOSSES[loss](logits, positive, batch['valid']) * batch['valid']).mean()

  vectors = {key: batch[key] for key in ('image', 'text')}
  losses = {}
  for loss in LOSSES:
    value, gradients = jax.jit(jax.value_and_grad(mean_loss), static_argnums=2)(
        vectors, batch, loss)
    losses[loss] = [float(value), *(np.asarray(x).tolist() for x in gradients.values())]
  return losses


def file_of(folder, towers, mesh):
  return os.path.join(folder, f'{"_".join(towers)}_{mesh}.npz')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('eight')
  write_data(folder)
  return folder


@pytest.fixture(scope='module')
def on_one(folder):
  return {towers: learn_and_predict(folder, towers, (1, 1, 1), file_of(folder, towers, 'one'))
          for towers in MODELS}


@pytest.fixture(scope='module')
def on_eight(folder):
  """The metrics of each of CASES, and the result of contrastive."""
  metrics, losses = run_alone(__file__, folder)
  return dict(zip(CASES, metrics)) | {'contrastive': losses}


@pytest.fixture(scope='module')
def results(on_one, on_eight, folder):
  def arrays(towers, mesh):
    one, eight = (dict(np.load(file_of(folder, towers, name))) for name in ('one', mesh))
    assert one.keys() == eight.keys()
    return one, eight
  return arrays


def test_all_tasks_and_towers_are_here_or_in_test_sharding():
  assert set(TASKS) == {*tiny.get_config().mixer.tasks, *itertools.chain(*MODELS.values())}
  families = {*parts.families('vision'), *parts.families('text')}
  c = tiny.get_config()
  assert families == {c.model.vision.name, c.model.text.name, *itertools.chain(*MODELS)}


@pytest.mark.parametrize('towers, mesh', CASES)
def test_losses_are_those_of_one_device(on_one, on_eight, towers, mesh):
  for a, b in zip(on_one[towers], on_eight[towers, mesh], strict=True):
    assert {f'{task}/loss' for task in MODELS[towers]} <= a.keys()
    assert b == pytest.approx(a, rel=2e-4, abs=1e-5)


def test_a_contrastive_loss_is_of_the_whole_batch(on_eight):
  for loss, one in contrastive(1).items():
    for a, b in zip(one, on_eight['contrastive'][loss], strict=True):
      np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-7)
  # One example per device: the loss of that pair alone would be 0.
  assert on_eight[('vgg', 'gpt2'), 'data'][0]['retrieval/contrastive'] > 0.5


@pytest.mark.parametrize('towers, mesh', CASES)
def test_every_parameter_learns_as_on_one_device(results, towers, mesh):
  one, eight = results(towers, mesh)
  sizes = {name: np.linalg.norm(x) for name, x in one.items() if not name.startswith('predicted')}
  largest = max(size for name, size in sizes.items() if name.startswith('gradient'))
  for name, size in sizes.items():
    error = np.linalg.norm(eight[name] - one[name])
    if name.startswith('gradient'):
      # Some biases shift all logits of a softmax equally, so their gradients are rounding only.
      assert size > 1e-8 * largest or name.endswith('/bias'), name
      assert error < 1e-4 * size + 1e-8 * largest, name
    else:  # the difference of two float32 of about 1
      assert error < 1e-4 * size + 1e-7 * one[name].size ** 0.5, name


@pytest.mark.parametrize('towers, mesh', CASES)
def test_predictions_are_those_of_one_device(results, towers, mesh):
  one, eight = results(towers, mesh)
  if 'generation' in MODELS[towers]:
    assert len(np.unique(one['predicted/generation/loss'])) == EXAMPLES
  names = [name for name in one if name.startswith('predicted')]
  assert {name.split('/')[1] for name in names} == set(MODELS[towers])
  for name in names:
    if name.endswith('/image') and one[name].dtype == np.uint8:
      assert np.abs(one[name].astype(int) - eight[name]).max() <= 1, name
    else:
      np.testing.assert_allclose(eight[name], one[name], rtol=1e-4, atol=1e-5, err_msg=name)


if __name__ == '__main__':
  jax.config.update('jax_num_cpu_devices', 8)
  told = [learn_and_predict(sys.argv[1], towers, MESHES[towers][mesh],
                            file_of(sys.argv[1], towers, mesh)) for towers, mesh in CASES]
  print(json.dumps([told, contrastive(8)]))
