"""Image generation: training, queries and scores."""

import base64
import copy
import io
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import scipy.linalg
import tiny

import xmodal
from xmodal import predict
from xmodal.bench import generation as bench
from xmodal.bench import generation_quality as quality
from xmodal.data.example import Example
from xmodal.data.pictures.placement import Placement
from xmodal.data.scenes.drawings import Drawings
from xmodal.data.tokenizer import train_tokenizer
from xmodal.errors import UserError
from xmodal.metrics import captioning, frechet
from xmodal.models import parts
from xmodal.models.denoiser.denoiser import PATCHES, Denoiser
from xmodal.sharding.rules import path_name, spec_for
from xmodal.tasks.generation.task import GeneratedImage, Generation, Start
from xmodal.train.plan import Plan
from xmodal.train.steps import state as states
from xmodal.train.steps.gradients import at_step

LENGTH = 14


def config(**values):
  return tiny.changed(**{
      'mixer__tasks': ('generation',), 'mixer__weights': (1.0,), 'data__drawn': True,
      'data__without': ('red circle',), 'model__denoiser__hidden_dim': 32,
      'model__denoiser__num_layers': 2, 'generation__steps': 4,
      'generation__caption_length': LENGTH, 'generation__guidance_from': 0.0,
      'train__ema_decay': 0.9, 'train__steps': 30, 'train__eval_every': 30,
      'train__checkpoint_every': 30, 'optimizer__learning_rate': 3e-3, **values})


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """The workdir of a run, and what final.json holds."""
  workdir = tmp_path_factory.mktemp('drawing') / 'run'
  return workdir, tiny.train(workdir, config())


@pytest.fixture(scope='module')
def predictor(trained):
  return predict.Predictor(str(trained[0]))


def lines_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


# A run


def test_a_run_learns_and_leaves_scores_pictures_and_faults(trained):
  workdir, final = trained
  losses = [line['v'] for line in lines_of(workdir / 'metrics.jsonl') if 'v' in line]
  assert len(losses) == 30 and np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
  scores = final['evaluation']['generation']
  assert scores['examples'] == 20 == scores['examples/faithfulness']
  assert 0 <= scores['faithfulness'] <= 1 and scores['main'] == scores['faithfulness']
  records = lines_of(workdir / 'predictions_generation_val.jsonl')
  assert scores['faithfulness'] == np.mean([not r['fault'] for r in records])
  assert scores['loss'] == pytest.approx(np.mean([r['loss'] for r in records]), rel=1e-4)
  assert Image.open(workdir / 'samples' / 'generation_val_0000030.png').width > 1000


def test_it_learns_beside_other_tasks_with_data_of_its_own(tmp_path, monkeypatch):
  monkeypatch.setattr(captioning, 'meteor', lambda *_: None)  # its program takes ten seconds
  final = tiny.train(tmp_path / 'run', config(
      mixer__tasks=('captioning', 'generation'), mixer__weights=(1.0, 1.0),
      data__drawn=False, data__without=(), mixer__data__generation__drawn=True, train__steps=2,
      train__eval_every=2, train__checkpoint_every=2))
  assert final['evaluation'].keys() == {'captioning', 'generation'}
  assert 'faithfulness' in final['evaluation']['generation']


def test_captions_of_people_give_a_loss_and_no_faithfulness(tmp_path):
  """Some pictures have several captions, some none; shapes stay the same."""
  folder = tmp_path / 'data'
  folder.mkdir()
  rng = np.random.default_rng(0)
  for split, count in (('train', 16), ('val', 8)):
    lines = []
    for i in range(count):
      Image.fromarray(rng.integers(0, 256, (20, 40, 3), np.uint8)).save(folder / f'{split}{i}.png')
      lines.append({'image': f'{split}{i}.png'}
                   | ({'caption': ['a dog', f'dog {i}']} if i % 4 else {}))
    (folder / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  final = tiny.train(tmp_path / 'run', config(
      data__drawn=False, data__without=(), data__source='jsonl', data__root=str(folder),
      data__keep_aspect=True, train__steps=2, train__eval_every=2, train__checkpoint_every=2))
  scores = final['evaluation']['generation']
  assert scores['examples'] == 6 and 'faithfulness' not in scores and np.isfinite(scores['loss'])
  assert scores['main'] == -scores['loss'] < 0


# What the head computes


def test_what_is_evaluated_hangs_on_the_example_alone(predictor):
  source = Drawings('val', size=6, image_size=32)
  task = predictor.task('generation')
  _, forth = predictor(list(source), task)
  _, back = predictor([source[i] for i in reversed(range(6))], task)
  for a, b in zip(forth, reversed(back)):
    assert a.loss == pytest.approx(b.loss, rel=1e-5)
    assert np.abs(a.image.astype(int) - b.image).max() <= 1
    np.testing.assert_array_equal(a.truth, b.truth)


@pytest.mark.parametrize('share, hidden', [(0.0, range(1)), (0.5, range(1, 8)), (1.0, range(8, 9))])
def test_captions_are_hidden_as_often_as_said(share, hidden):
  """With a dropped caption, the loss does not depend on the caption."""
  run = Plan(config(generation__caption_drop=share), 'unused')
  batch = run.maker('train')(np.arange(8), np.arange(8))
  variables = states.create(run.init, run.abstract).variables
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
      lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), variables)

  @jax.jit
  def losses(captions):
    of_batch = {**batch, 'generation': {**batch['generation'], 'captions': captions}}
    return run.model.apply(variables, of_batch, deterministic=False,
                           rngs={'dropout': jax.random.key(0)})['generation']

  captions = batch['generation']['captions']
  same = losses(captions) == losses(np.roll(captions, 1, axis=0))
  assert int(same.sum()) in hidden


def test_the_loss_of_an_example_is_the_mean_of_its_noises():
  found = {}
  for noises in (1, 16):
    run = Plan(config(generation__noises=noises), 'unused')
    batch = run.maker('train')(np.arange(8), np.arange(8))
    variables = states.create(run.init, run.abstract).variables
    found[noises] = np.array(jax.jit(jax.vmap(lambda key: run.model.apply(
        variables, batch, deterministic=False, rngs={'dropout': key})['generation']))(
            jax.random.split(jax.random.key(0), 64)))
  one, many = ((x.mean(), x.std(axis=0).mean()) for x in found.values())
  assert many[0] == pytest.approx(one[0], rel=0.05)
  assert one[1] / many[1] == pytest.approx(4, rel=0.2)


def test_early_steps_have_times_of_their_own():
  """Of a third of them, half way from there, and after the last: the losses of runs that always
  have these times."""
  def losses(*steps, **values):
    run = Plan(config(**values), 'unused')
    batch = run.maker('train')(np.arange(8), np.arange(8))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32),
                             run.abstract_variables)
    found = jax.jit(lambda step: run.model.apply(
        variables, at_step(batch, step), deterministic=False,
        rngs={'dropout': jax.random.key(0)})['generation'].mean())
    return [float(found(number)) for number in steps]

  late = {'generation__time_mean': -1.0, 'generation__time_std': 0.7}
  early, between, after = losses(100, 200, 300, **late, generation__early_steps=300,
                                 generation__early_mean=1.0)
  assert len({early, between, after}) == 3
  # Equal up to rounding, because each config compiles its own program.
  for loss, step, values in (
      (early, 100, dict(generation__time_mean=1.0, generation__time_std=0.3)),
      (between, 200, dict(generation__time_mean=0.0, generation__time_std=0.5)),
      (after, 300, late)):
    assert [loss] == pytest.approx(losses(step, **values), rel=1e-5)


def test_guidance_goes_on_from_no_text_through_the_text(predictor):
  """After one step from noise, the picture is linear in the guidance."""
  task, blank = predictor.task('generation'), np.zeros((32, 32, 3), np.uint8)

  def drawn(guidance, *captions):
    example = Example(blank, image_id='a', captions=captions)
    sampled = task.with_sampling(guidance=guidance, steps=1)
    return predictor([example], sampled)[1][0].image.astype(float)

  text = 'a large blue cross'
  without, plain, more = (drawn(guidance, text) for guidance in (0.0, 1.0, 3.0))
  assert np.abs(without - drawn(1.0)).max() <= 1
  inside = (more > 0) & (more < 255)
  assert np.abs(plain - without).max() > 1 and inside.mean() > 0.5
  assert np.abs(more - (without + 3 * (plain - without)))[inside].max() <= 3  # pictures are rounded

  # Outside its interval there is no guidance, and the plain conditional picture remains.
  task = copy.copy(task)
  task._config = task._config.copy_and_resolve_references()
  task._config.generation.guidance_from = 0.5
  np.testing.assert_allclose(drawn(3.0, text), plain, atol=1)
  np.testing.assert_allclose(drawn(0.0, text), without, atol=1)


@pytest.mark.parametrize('settings, strength', [
    ({}, None), ({'guidance': 1}, None), ({'guidance': 2.3, 'steps': 7}, None), ({}, 0.9)])
def test_settings_in_the_batch_draw_what_settings_in_the_program_draw(predictor, settings,
                                                                      strength):
  task, image = predictor.task('generation'), Drawings('test', size=1, image_size=32)[0].image
  query, examples = task.query(None if strength is None else image, 'a red circle', n=2,
                               strength=strength, **settings)
  fixed = task.with_sampling(**settings, start=strength and Start(strength))
  ours, theirs = (np.stack([one.image for one in predictor(examples, asked)[1]]).astype(int)
                  for asked in (query, fixed))
  # Equal from noise; from a picture, times are rounded once more.
  assert np.abs(ours - theirs).max() <= (0 if strength is None else 1)


# predict


def asked(predictor, tmp_path, capsys, *arguments, code=0):
  """(stdout, stderr, picture) of the command."""
  output = tmp_path / 'out.png'
  found = predict.main(['--checkpoint', str(predictor), '--output', str(output),
                        *map(str, arguments)])
  out, err = capsys.readouterr()
  assert found == code, err
  return out, err, np.asarray(Image.open(output)) if found == 0 else None


def test_the_same_seed_draws_the_same_picture_and_several_make_a_grid(trained, tmp_path, capsys):
  text = ('--task', 'generation', '--text', 'a red circle above a blue square')
  out, err, one = asked(trained[0], tmp_path, capsys, *text, '--seed', 1)
  assert '1 picture of 32x32 pixels' in out and 'of 1 show the text' in out
  assert one.shape == (32, 32, 3)
  again = asked(trained[0], tmp_path, capsys, *text, '--seed', 1)[2]
  np.testing.assert_array_equal(one, again)
  assert (asked(trained[0], tmp_path, capsys, *text, '--seed', 2)[2] != one).any()
  grid = asked(trained[0], tmp_path, capsys, *text, '--seed', 1, '--n', 3, '--guidance', 2,
               '--steps', 3)[2]
  assert grid.shape == (66, 66, 3)
  assert (grid[32:34] == 255).all() and (grid[34:, 34:] == 255).all()
  assert (grid[:32, :32] != grid[:32, 34:]).any()


def test_what_is_not_masked_stays_and_strength_says_how_much_changes(trained, tmp_path, capsys):
  source = Drawings('test', size=1, image_size=32)[0]
  Image.fromarray(source.image).save(tmp_path / 'in.png')
  mask = np.zeros((32, 32), np.uint8)
  mask[:, 16:] = 255
  Image.fromarray(mask).save(tmp_path / 'mask.png')
  image = ('--text', source.captions[0], '--image', tmp_path / 'in.png')
  filled = asked(trained[0], tmp_path, capsys, *image, '--mask', tmp_path / 'mask.png')[2]
  assert np.abs(filled[:, :16].astype(int) - source.image[:, :16]).max() <= 1
  assert np.abs(filled[:, 16:].astype(int) - source.image[:, 16:]).mean() > 5
  distances = []
  for strength in (0, 0.4, 0.9):
    changed = asked(trained[0], tmp_path, capsys, *image, '--strength', strength)[2]
    distances.append(np.abs(changed.astype(int) - source.image).mean())
  assert distances[0] == 0 and distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P'])
def test_transparent_parts_of_a_mask_are_not_drawn_anew(tmp_path, mode):
  """White strokes on an empty layer, as paint programs export them, and as a palette image."""
  task = Generation(config(), train_tokenizer(['a red circle'], 40), {
      'max_captions': 1, 'words': [], 'drawn': False, 'names': []})
  Image.new('RGB', (32, 32)).save(tmp_path / 'in.png')
  strokes = np.full((32, 32, 2), (255, 0), np.uint8)  # white, fully transparent
  strokes[:, 20:, 1] = 255
  mask, expected = Image.fromarray(strokes, 'LA'), strokes[..., 1] == 255
  path = tmp_path / 'mask.png'
  if mode == 'P':
    mask = Image.fromarray((strokes[..., 1] == 0).astype(np.uint8), 'P')
    mask.putpalette([255] * 6)
    mask.save(path, transparency=1)
  else:
    mask.convert(mode).save(path)
  asked_task = task.query(str(tmp_path / 'in.png'), 'a red circle', mask=str(path))[0]
  np.testing.assert_array_equal(asked_task._start.mask, expected)
  strokes[..., 1] = 0
  Image.fromarray(strokes, 'LA').save(tmp_path / 'empty.png')
  with pytest.raises(UserError, match='is white nowhere'):
    task.query(str(tmp_path / 'in.png'), 'a red circle', mask=str(tmp_path / 'empty.png'))


def test_a_loaded_model_draws_texts_from_their_seeds(trained, tmp_path, capsys):
  model = xmodal.load(trained[0])
  text = 'a red circle above a blue square'
  pictures = model(None, [text, text, 'a large blue cross'], seed=[1, 2, 1])
  assert all(isinstance(p, GeneratedImage) and p.image.shape == (32, 32, 3) for p in pictures)
  command = asked(trained[0], tmp_path, capsys, '--text', text, '--seed', 1)[2]
  assert np.abs(pictures[0].image.astype(int) - command).max() <= 1
  for one, other in ((0, 1), (0, 2)):
    assert (pictures[one].image != pictures[other].image).any()
  changed = model(Image.fromarray(command), text, strength=0.0)
  np.testing.assert_array_equal(changed.image, command)
  png = io.BytesIO(base64.b64decode(model.plain(changed)['png']))
  np.testing.assert_array_equal(np.asarray(Image.open(png)), command)
  with pytest.raises(UserError, match='^n means nothing to generation; its options: guidance'):
    model(None, text, n=2)
  with pytest.raises(UserError, match='^mask and strength change a picture: image F is wanted'):
    model(None, text, strength=0.5)
  mask = np.zeros((8, 8, 3), np.uint8)
  with pytest.raises(UserError, match='^mask is 8x8 pixels, image is 32x32'):
    model(command, text, mask=mask)


def test_a_file_of_texts_is_drawn_as_png_in_base64(trained, tmp_path, capsys):
  (tmp_path / 'texts.jsonl').write_text(
      '{"question": "a red circle"}\n{"question": "a zebra", "image_id": 7}\n')
  code = predict.main(['--checkpoint', str(trained[0]), '--input', str(tmp_path / 'texts.jsonl'),
                       '--guidance', '2'])
  out, err = capsys.readouterr()
  assert (code, err) == (0, '2 of 2 answered\n')
  lines = [json.loads(line) for line in out.splitlines()]
  for line in lines:
    assert Image.open(io.BytesIO(base64.b64decode(line.pop('png')))).size == (32, 32)
  assert lines == [{'question': 'a red circle'}, {
      'image_id': 7, 'question': 'a zebra', 'notes': ['words never seen in training: zebra']}]


def test_a_text_that_the_model_cannot_take_as_it_is_is_told_of(trained, tmp_path, capsys):
  assert 'no text: drawn without one' in asked(trained[0], tmp_path, capsys)[1]
  err = asked(trained[0], tmp_path, capsys, '--text', 'a red circle above a zebra')[1]
  assert 'words never seen in training: zebra' in err
  err = asked(trained[0], tmp_path, capsys, '--text', 'a red circle ' * 9)[1]
  assert f'the model reads {LENGTH}' in err


@pytest.mark.parametrize('arguments, words', [
    (['--guidance', '-1'], ['--guidance=-1', '0']), (['--n', '0'], ['--n=0', '1 or more']),
    (['--steps', '0'], ['--steps=0', '1 or more']),
    (['--image', '{picture}', '--strength', '1.5'], ['--strength=1.5', '0']),
    (['--image', '{picture}'], ['--mask', '--strength']),
    (['--mask', '{picture}'], ['--image']), (['--strength', '0.5'], ['--image']),
    (['--image', '{picture}', '--mask', '{small}'], ['16x16', '32x20', 'one size']),
    (['--image', '{picture}', '--mask', '/nowhere.png'], ['--mask /nowhere.png: no such file']),
], ids=lambda value: ' '.join(value))
def test_mistakes_of_asking_are_one_line(trained, tmp_path, capsys, arguments, words):
  Image.new('RGB', (32, 20)).save(tmp_path / 'picture.png')
  Image.new('RGB', (16, 16)).save(tmp_path / 'small.png')
  places = {'picture': tmp_path / 'picture.png', 'small': tmp_path / 'small.png'}
  out, err, _ = asked(trained[0], tmp_path, capsys, '--text', 'a red circle',
                      *(a.format(**places) for a in arguments), code=2)
  line, = err.splitlines()
  assert line.startswith('error: ') and not out
  for word in words:
    assert word in line


def test_options_and_files_that_a_task_does_not_take_are_one_line(trained, finished, capsys):
  for workdir, arguments, words in (
      (trained[0], ('--text', 'a red circle'), '--output is missing'),
      (trained[0], ('--text', 'a red circle', '--output', 'x.xyz'), 'x.xyz names no kind'),
      (finished, ('--text', 'what?'), '--image is missing'),
      (finished, ('--text', 'what?', '--steps', '5'), '--steps means nothing to vqa')):
    assert predict.main(['--checkpoint', str(workdir), *arguments]) == 2
    out, err = capsys.readouterr()
    assert words in err and len(err.splitlines()) == 1 and not out


@pytest.mark.parametrize('values, words', [
    (dict(data__image_size=34), 'config.data.image_size=34 does not divide into patches'),
    (dict(generation__predict='y'), "config.generation.predict='y'"),
    (dict(generation__sampler='rk4'), "config.generation.sampler='rk4'"),
    (dict(generation__patches='vit'), "config.generation.patches='vit'"),
    (dict(generation__guidance=-1.0), 'config.generation.guidance=-1.0'),
    (dict(generation__early_steps=-1), 'config.generation.early_steps=-1'),
    (dict(generation__steps=0), 'config.generation.steps=0'),
    (dict(generation__guidance_from=0.9, generation__guidance_to=0.1),
     'guidance_from=0.9: wanted at most'),
    (dict(model__denoiser__patch_size=0), 'patch_size=0: wanted 1 or more'),
    (dict(model__denoiser__patch_size=1), 'patch_size, found 1'),
    (dict(model__denoiser__num_heads=5), 'num_heads=5')], ids=lambda v: str(v)[:40])
def test_mistakes_of_a_config_are_told_before_anything_is_compiled(values, words):
  with pytest.raises(UserError, match=words):
    Plan(config(**values), 'unused')


@pytest.mark.parametrize('size', parts.SIZES)
def test_every_parameter_of_every_size_has_a_rule_and_no_large_one_stays_whole(size):
  sizes = parts.preset('denoiser', size)
  side = 8 * sizes['patch_size']
  mesh = types.SimpleNamespace(shape={'data': 1, 'fsdp': 8, 'tensor': 1})
  for patches in PATCHES:
    model = Denoiser((side, side), **sizes, patches=patches)
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)), jnp.zeros(1),
        jnp.zeros((1, 4, 64)), jnp.ones((1, 4), bool))
    for path, x in jax.tree_util.tree_leaves_with_path(shapes):
      axes = jax.tree.leaves(tuple(spec_for(path_name(path), x.shape, mesh)))
      assert x.size < 100_000 or 'fsdp' in axes, f'{path_name(path)} {x.shape} is whole everywhere'


# Scores


def test_scores_are_of_seen_and_unseen_names():
  c = config()
  train, test = (list(Drawings(split, size=200, without=without)) for split, without in
                 (('train', ('red circle',)), ('val', ())))
  tokenizer = train_tokenizer([e.captions[0] for e in train])
  task = Generation.from_data(c, tokenizer, train)
  unseen = ['red circle' in e.captions[0] for e in test]
  perfect = [GeneratedImage(e.image, e.image, 0.5) for e in test]
  scores = task.score(test, perfect)
  assert scores['main'] == scores['faithfulness'] == scores['two_objects'] == 1
  assert scores['loss'] == 0.5
  assert scores['examples/faithfulness/unseen'] == sum(unseen) > 0
  assert scores['frechet'] == pytest.approx(0, abs=1e-4)
  assert '100.0%' in task.table(scores) and 'no FID' in task.table(scores)
  blank = np.full_like(test[0].image, 200)
  spoiled = [GeneratedImage(blank if bad else e.image, e.image, 0.5)
             for e, bad in zip(test, unseen)]
  scores = task.score(test, spoiled)
  assert scores['faithfulness/unseen'] == 0 and scores['faithfulness/seen'] == 1
  assert scores['frechet'] > 1e-4
  features = task.encode(test[0], Placement(32, 32))
  assert features['captions'].shape == (1, LENGTH) and features['count'] == 1


def test_the_frechet_formula_is_that_of_scipy_and_the_closed_form():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 6, 6))
  a, b, means = a @ a.T, b @ b.T, rng.normal(size=(2, 6))
  theirs = (np.square(means[0] - means[1]).sum()
            + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real))
  assert frechet.frechet(means[0], a, means[1], b) == pytest.approx(theirs)
  # For commuting covariances: squared differences of standard deviations.
  assert frechet.frechet(np.zeros(3), np.diag([4.0, 9, 0]), np.ones(3), np.diag([1.0, 1, 0])
                         ) == pytest.approx(3 + 1 + 4)


def test_the_frechet_distance_tells_changed_pictures_from_others_of_their_kind():
  source = Drawings('val', size=800, image_size=32)
  pictures = [e.image for e in source]
  half, other = pictures[:400], pictures[400:]
  floor = frechet.frechet_distance(half, other)
  blurred = [np.asarray(Image.fromarray(x).resize((8, 8)).resize((32, 32))) for x in half]
  empty = [np.broadcast_to(x[:1, :1], x.shape) for x in half]
  for changed in (blurred, empty):
    assert frechet.frechet_distance(changed, other) > 3 * floor
  assert frechet.features(np.stack(half)).shape == (400, 24)
  least = [x[:frechet.LEAST_SIDE, :frechet.LEAST_SIDE] for x in half]
  assert np.isfinite(frechet.frechet_distance(least, least))


# Benchmarks


def test_quality_is_told_beside_its_floor_and_baselines(trained, capsys):
  assert quality.main(['--checkpoint', str(trained[0]), '--n', '30', '--train', '64', '--steps',
                       '2', '--guidance', '1', '3']) == 0
  out = capsys.readouterr().out
  rows = {line[:22].strip(): line[22:].split() for line in out.splitlines()[1:-1]}
  assert list(rows) == ['model, guidance 1', 'model, guidance 3', 'model without text',
                        'nearest caption', 'real pictures']
  assert rows['real pictures'][0] == '100.0%'
  assert rows['nearest caption'][2] == '0.0'  # it is in the training set
  frechets = {name: float(row[1]) for name, row in rows.items()}
  assert frechets['real pictures'] < frechets['model, guidance 3']
  assert quality.main(['--checkpoint', str(trained[0]), '--n', '1']) == 2
  assert '--n=1: wanted 2' in capsys.readouterr().err


def test_a_copy_is_at_distance_zero_and_captions_are_matched_by_words():
  rng = np.random.default_rng(0)
  known = rng.integers(0, 256, (5, 4, 4, 3), np.uint8)
  moved = known[[3, 1]].astype(np.float32)
  moved[1] += 10
  np.testing.assert_allclose(quality.nearest_distances(moved, known), [0, 10], atol=0.1)
  assert quality.nearest_captions(['a red circle'], ['a blue circle', 'red circle', 'a cat']) == [1]


@pytest.mark.parametrize('patches', PATCHES)
def test_flops_are_those_that_xla_counts(patches):
  model = Denoiser((32, 32), 4, 64, 96, 4, 1, 16, patches)
  inputs = (jnp.zeros((1, 32, 32, 3)), jnp.zeros(1), jnp.zeros((1, 14, 64)),
            jnp.ones((1, 14), bool))
  variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  counted = jax.jit(model.apply).lower(variables, *inputs).cost_analysis()['flops']
  # XLA also counts norms, softmax and the like.
  assert 0.85 * counted < bench.forward_flops(model, 14) < counted


def test_speed_is_told_of_training_and_drawing(capsys):
  tiny_sizes = ['--batch', '2', '--steps', '1', '--rounds', '1', '--sampler', 'euler']
  assert bench.main(tiny_sizes) == 0
  rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[2:]}
  assert rows.keys() == {'train', 'draw'}
  for seconds, examples, *_ in rows.values():
    assert float(examples) == pytest.approx(2 / float(seconds), rel=0.05)
  assert bench.main(['--rounds', '0']) == 2
  assert bench.looks('heun', 10, 3.0) == 38 and bench.looks('euler', 10, 1.0) == 10
