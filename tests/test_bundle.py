"""A bundle answers as the model that it was exported from, without this package."""

import ast
import base64
import copy
import dataclasses
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import warnings

from flax.core import meta
import jax
import numpy as np
from PIL import Image
import pytest
import tiny
import yaml

import xmodal
from xmodal import export
from xmodal.bundle import convert, model_card, programs
from xmodal.bundle import model as loader
from xmodal.bundle.files import BundleError
from xmodal.bundle.precision import PRECISIONS, flat, nested
from xmodal.bundle.write import write
from xmodal.data.example import Example
from xmodal.data.open import open_source
from xmodal.data.pictures.decoded import DecodedPictures
from xmodal.data.scenes.crowds import Crowds
from xmodal.data.scenes.shapes import Shapes
from xmodal.errors import UserError
from xmodal.predictor import Predictor
from xmodal.train import build
from xmodal.trained import TrainedModel

EVERY = ('vqa', 'objects', 'detection', 'captioning', 'retrieval', 'regression', 'generation')
pytestmark = pytest.mark.filterwarnings('ignore:.* its end is left out')


def untrained(config):
  """A model with random parameters, as TrainedModel has one of a checkpoint."""
  config = build.resolve(config, {})
  scenes = Shapes('train', size=64, image_size=32)
  crowds = Crowds('train', size=64, image_size=32)
  examples = [dataclasses.replace(crowds[i], question=scenes[i].question, number=float(i % 7),
                                  answers=scenes[i].answers, captions=scenes[i].captions)
              for i in range(64)]
  made = object.__new__(Predictor)
  made.config, made.towers, made._step = config, {}, '/nowhere/run/checkpoints/7'
  made._decode = DecodedPictures()
  made.tokenizer, made.tasks = build.learn(config, examples)
  made.model = build.make_model(config, made.tokenizer, made.tasks)
  rng, batch = np.random.default_rng(0), made.batch([])
  made.variables = jax.tree.map(
      lambda x: (0.3 * rng.standard_normal(x.shape)).astype(x.dtype),
      jax.eval_shape(lambda: made.model.init(jax.random.key(0), batch, deterministic=True)))
  made._store('float32')
  model = object.__new__(TrainedModel)
  model._opened, model._predictor = made._decode, made
  return model


@pytest.fixture(scope='module')
def ours():
  return untrained(tiny.changed(
      mixer__tasks=EVERY, mixer__weights=(1.0,) * len(EVERY), data__keep_aspect=True,
      captioning__beams=2, detection__threshold=0.2))


@pytest.fixture(scope='module')
def bundle(ours, tmp_path_factory):
  folder = tmp_path_factory.mktemp('bundle') / 'all'
  write(str(folder), ours._predictor, platforms=('cpu',), sizes=(1, 4))
  return folder


@pytest.fixture(scope='module')
def model(bundle):
  return loader.load(bundle)


@pytest.fixture(scope='module')
def pictures():
  rng = np.random.default_rng(1)
  return [rng.integers(0, 256, size, np.uint8) for size in ((32, 32, 3), (50, 31, 3), (20, 70, 3))]


def assert_alike(found, wanted):
  """Equal but for probabilities and boxes, which may differ in the last bits of float32."""
  if isinstance(wanted, float):
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5)
  elif isinstance(wanted, dict):
    assert found.keys() == wanted.keys()
    for key in wanted:
      assert_alike(found[key], wanted[key])
  elif isinstance(wanted, list):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted):
      assert_alike(one, other)
  else:
    assert found == wanted


@pytest.mark.parametrize('task, text', [
    ('vqa', 'how many circles?'), ('objects', ''), ('captioning', ''),
    ('regression', 'how many shapes are there?'),
    ('detection', 'red circle. blue square; the square left of the circle. The red cross')])
def test_it_answers_as_the_model_does(ours, model, pictures, task, text):
  found = model(pictures, text, task=task)
  assert len(found) == 3
  assert_alike(found, ours.plain(ours(pictures, text, task=task), task))
  details = ours._predictor.task(task).details
  wanted = [details(prediction) for prediction in ours(pictures, text, task=task)]
  more = model(pictures, text, task=task, details=True)
  assert all(one.items() <= other.items() for one, other in zip(found, more))
  assert_alike([{key: one[key] for key in one.keys() - found[0].keys()} for one in more], wanted)
  if task == 'detection':
    assert len(more[0]['candidates']) > len(found[0]['found']) > 0
    assert [one['name'] for one in found[0]['meant']] == [
        'the square left of the circle', 'The red cross']


def test_it_ranks_as_the_model_does(ours, model, pictures):
  for image, text in ((pictures[0], 'a red circle. two things; No. 5 there'),
                      (pictures, 'a cross')):
    assert_alike(model(image, text, task='retrieval'),
                 ours.plain(ours(image, text, task='retrieval'), 'retrieval'))


def test_a_ranking_of_usual_size_compiles_nothing_after_the_warm_up(model, pictures, caplog):
  model.warm_up('retrieval')
  with jax.log_compiles():
    for number in (2, 8):
      model(pictures[0], [f'text {i}' for i in range(number)], task='retrieval')
    model(pictures[:2], 'a circle', task='retrieval')
    assert 'Compiling' not in caplog.text
    model(pictures[0], [f'text {i}' for i in range(9)], task='retrieval')
  assert 'Compiling' in caplog.text


def test_it_draws_as_the_model_does(ours, model, pictures):
  mask = np.zeros((50, 31, 3), np.uint8)
  mask[:25] = 255
  for image, options in ((None, {}), (None, {'steps': 3, 'guidance': 1.5, 'seed': 4}),
                         (pictures[1], {'mask': mask, 'strength': 0.7})):
    drawn = [np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB')).astype(int)
             for png in (model(image, 'a red circle', task='generation', **options)['png'],
                         ours.plain(ours(image, 'a red circle', task='generation', **options),
                                    'generation')['png'])]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1 and (drawn[0] != drawn[1]).mean() < 0.01


def test_sampled_captions_are_those_of_the_model(pictures, tmp_path):
  ours = untrained(tiny.changed(mixer__tasks=('captioning',), mixer__weights=(1.0,),
                                captioning__temperature=1.0, captioning__top_p=0.9))
  write(str(tmp_path / 'b'), ours._predictor, platforms=('cpu',), sizes=(4,))
  found = loader.load(tmp_path / 'b')(pictures)
  assert_alike(found, ours.plain(ours(pictures)))
  assert found[0]['caption'] != found[1]['caption']


def test_many_queries_are_answered_in_one_call(model, pictures):
  queries = [(pictures[0], 'red circle', {}), (b'no picture', 'red circle', {}),
             (pictures[1], 'blue square. cross', {'threshold': 0.0}), (pictures[2], '', {}),
             (pictures[2], 'red circle', {}), (pictures[2], 'red circle', {'threshold': 2})] * 3
  found = model.answer('detection', queries)
  assert_alike(found[0], model(pictures[0], 'red circle', task='detection'))
  assert len(found[2]['found']) > 5 and found[:6][0] == found[6:12][0]
  for place, words in ((1, 'image: cannot be read'), (3, "text '' names nothing"),
                       (5, 'threshold=2: wanted a number, 0 to 1')):
    assert isinstance(found[place], BundleError) and words in str(found[place])


def test_a_program_that_has_to_know_its_batch_is_one_for_each_size(ours, pictures, tmp_path,
                                                                   monkeypatch):
  def unknown(*args, **options):
    raise NotImplementedError('no size is open')

  monkeypatch.setattr(programs.export, 'symbolic_shape', unknown)
  write(str(tmp_path / 'b'), ours._predictor, tasks=('objects', 'retrieval'), platforms=('cpu',),
        sizes=(1, 2))
  assert sorted(os.listdir(tmp_path / 'b' / 'programs')) == [
      'objects-1.stablehlo', 'objects-2.stablehlo', 'retrieval-1.stablehlo',
      'retrieval-2.stablehlo']
  model = loader.load(tmp_path / 'b')
  assert_alike(model(pictures, task='objects'),
               ours.plain(ours(pictures, task='objects'), 'objects'))
  with pytest.raises(BundleError, match='9 texts; the program takes up to 8 at once'):
    model(pictures[0], [f'text {i}' for i in range(9)], task='retrieval')


# ---- the command, and a machine without this package

_BLOCKED = ('flax', 'optax', 'orbax', 'transformers', 'cv2', 'simplejpeg', 'tensorflow', 'xmodal',
            'torch', 'safetensors')
_ALONE = f'''
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path=None, target=None):
    if name.partition('.')[0] in {_BLOCKED}:
      raise ImportError(name + ' is blocked')
sys.meta_path.insert(0, Blocked())
'''


@pytest.fixture(scope='module')
def exported(finished, tmp_path_factory):
  folder = tmp_path_factory.mktemp('exported') / 'bundle'
  assert export.main(['--checkpoint', str(finished), '--output', str(folder), '--platforms',
                      'cpu,cuda,tpu', '--precision', 'bfloat16']) == 0
  return folder


def test_it_answers_where_no_other_package_is_installed(finished, exported, tmp_path):
  scene = open_source(tiny.get_config(), 'val', train=False)[0]
  Image.fromarray(scene.image).save(tmp_path / 'a.png')
  (tmp_path / 'sitecustomize.py').write_text(_ALONE)
  done = subprocess.run(
      [sys.executable, exported / 'model.py', '--image', 'a.png', '--text', 'how many circles?',
       '--task', 'vqa'], cwd=tmp_path, capture_output=True, text=True,
      env={**os.environ, 'PYTHONPATH': str(tmp_path)})
  assert done.returncode == 0, done.stderr
  model = xmodal.load(finished)
  wanted = model.plain(model(tmp_path / 'a.png', 'how many circles?', task='vqa'), 'vqa')
  found = json.loads(done.stdout)
  assert found.pop('probability') == pytest.approx(wanted.pop('probability'), abs=0.01)
  assert found['answer'] == wanted['answer']


def test_the_card_has_what_the_run_measured(finished, exported):
  text = (exported / 'MODEL_CARD.md').read_text()
  scores = json.loads((finished / 'final.json').read_text())['evaluation']
  assert f'| vqa | accuracy | {scores["vqa"]["accuracy"]:.4g} |' in text
  assert '| vqa | shapes | train | val | 64 | 20 |' in text and '6 of 6 steps of 8' in text
  head = yaml.safe_load(text.split('---')[1])
  assert head['pipeline_tag'] == 'visual-question-answering'
  # The run was measured in float32: a bundle in fewer bits does not claim its scores.
  assert 'model-index' not in head
  assert 'weights in float32; not measured again on this folder (bfloat16).' in text
  about = json.loads((exported / 'bundle.json').read_text()) | {'precision': 'float32'}
  head = yaml.safe_load(model_card.card(Predictor(str(finished)), about, {}).split('---')[1])
  for result in head['model-index'][0]['results']:
    assert all(scores[result['task']['name']][metric['type']] == metric['value']
               for metric in result['metrics'])
  assert str(finished.parent) not in text


def test_only_the_weights_that_a_program_reads_are_its_arguments(bundle):
  about = json.loads((bundle / 'bundle.json').read_text())['tasks']
  assert any('denoiser' in name for name in about['generation']['weights'])
  for task in EVERY[:-1]:
    assert not any('denoiser' in name for name in about[task]['weights']), task
  assert not any('vision_tower' in name for name in about['generation']['weights'])


def test_every_precision_gives_back_the_parameters(ours):
  parameters = flat(ours._predictor.variables)
  jax.tree.map(np.testing.assert_array_equal, nested(parameters), dict(ours._predictor.variables))
  for name in PRECISIONS:
    stored = PRECISIONS[name].store(parameters)
    restored = PRECISIONS[name].restore({key: jax.numpy.asarray(x) for key, x in stored.items()})
    assert restored.keys() == parameters.keys()
    for path, array in parameters.items():
      found = meta.unbox(restored[path])
      assert found.dtype == array.dtype
      most = {'float32': 0, 'bfloat16': 2**-8, 'int4': 1 / 13}.get(name, 1 / 250)
      assert np.abs(found - array).max() <= most * np.abs(array).max() + 1e-7, (name, path)


@pytest.mark.parametrize('precision', ['int8', 'int4'])
def test_a_bundle_in_integers_answers_as_the_model_in_integers(ours, tmp_path, precision):
  write(str(tmp_path / 'b'), ours._predictor, tasks=('vqa',), precision=precision,
        platforms=('cpu',), sizes=(2,))
  assert os.path.getsize(tmp_path / 'b' / 'weights.safetensors') < 0.45 * sum(
      x.nbytes for x in jax.tree.leaves(ours._predictor.variables))
  model = loader.load(tmp_path / 'b')
  integers = copy.copy(ours._predictor)
  integers._store(precision)
  task = integers.tasks['vqa']
  picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
  wanted = integers([Example(picture, question='what color is it?')], 'vqa')[1][0]
  found = model(picture, 'what color is it?', task='vqa')
  assert found['probability'] == pytest.approx(task.plain(wanted)['probability'], abs=1e-5)


def test_a_task_without_description_is_named(ours, tmp_path, monkeypatch):
  monkeypatch.setattr(type(ours._predictor.tasks['vqa']), 'described', lambda self: None)
  with pytest.raises(UserError, match="^task 'vqa' .* does not describe .* others with --tasks"):
    write(str(tmp_path / 'b'), ours._predictor)

  class Louder(type(ours._predictor.tasks['objects'])):
    def decode(self, arrays):
      return super().decode(arrays)[::-1]

  louder = object.__new__(Louder)
  louder.__dict__ |= ours._predictor.tasks['objects'].__dict__
  with pytest.raises(UserError, match="^task 'objects' .* does not describe"):
    programs.described('objects', louder)
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize('arguments, words', [
    (['--precision', 'float31'], "--precision float31: wanted .*did you mean 'float32'"),
    (['--platforms', 'cpu,gpu'], '--platforms gpu: wanted cpu, cuda, rocm or tpu'),
    (['--tasks', 'vqq'], "was not trained on task 'vqq'; wanted one of vqa, objects"),
    (['--sizes', '1,x'], '--sizes 1,x: wanted whole numbers'),
    (['--sizes', '0'], '--sizes 0: wanted batch sizes of 1 or more'),
    (['--dtype', 'bfloat16'], '--dtype means nothing for a whole model; .*--part'),
    (['--part', 'text', '--precision', 'int8'], '--precision means nothing for a tower'),
    (['--checkpoint', '/nowhere'], 'no checkpoint in /nowhere'),
    (['--output', '/tmp'], '/tmp: already exists')])
def test_a_mistake_on_the_command_line_is_one_line(finished, tmp_path, capsys, arguments, words):
  given = ['--checkpoint', str(finished), '--output', str(tmp_path / 'b'), *arguments]
  assert export.main(given) == 2
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert re.search(words, error), error
  assert not os.listdir(tmp_path)


def test_a_damaged_bundle_is_one_line(exported, tmp_path, monkeypatch):
  def broken(change):
    folder = pathlib.Path(shutil.copytree(exported, tmp_path / 'b', dirs_exist_ok=True))
    change(folder)
    with pytest.raises(BundleError) as error:
      loader.load(folder)('a.png', 'x', task='vqa')
    assert '\n' not in str(error.value)
    return str(error.value)

  def edit(folder, **values):
    path = folder / 'bundle.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

  def change(*keys, value=None):
    def changed(folder):
      about = part = json.loads((folder / 'bundle.json').read_text())
      for key in keys[:-1]:
        part = part[key]
      part[keys[-1]] = value
      (folder / 'bundle.json').write_text(json.dumps(about))
    return changed

  def flip(folder):
    data = bytearray((folder / 'weights.safetensors').read_bytes())
    data[-1] ^= 1
    (folder / 'weights.safetensors').write_bytes(data)

  assert 'format 2, this loader reads 1' in broken(lambda folder: edit(folder, format=2))
  assert 'programs for tpu, this machine has cpu' in broken(
      lambda folder: edit(folder, platforms=['tpu']))
  assert 'wanted' in broken(lambda f: os.truncate(f / 'weights.safetensors', 1000))
  assert 'its checksum differs' in broken(flip)
  assert 'missing' in broken(lambda f: (f / 'programs' / 'vqa.stablehlo').unlink())
  for content in ('[]', '{"format": 1}', 'null', '{"format": 1, "tasks": []}'):
    assert 'bundle.json: damaged' in broken(lambda f: (f / 'bundle.json').write_text(content))
  for keys, words in ((('files',), 'files: wanted dict'), (('tasks', 'vqa'), 'tasks.vqa.programs'),
                      (('tasks', 'vqa', 'weights'), 'tasks.vqa.weights: wanted list'),
                      (('files', 'model.py'), 'files.model.py.bytes: wanted int')):
    assert words in broken(change(*keys))
  assert 'bundle.json: No such file' in broken(lambda f: (f / 'bundle.json').unlink())
  folder = shutil.copytree(exported, tmp_path / 'c')
  monkeypatch.setattr(jax.export, 'deserialize', lambda data: 1 / 0)
  model = loader.load(folder)
  with pytest.raises(BundleError, match='vqa.stablehlo: jax .* cannot read it, made by jax'):
    model(np.zeros((4, 4, 3), np.uint8), 'how many?', task='vqa')


@pytest.mark.parametrize('arguments, options, words', [
    ((None, 'what?'), {'task': 'vqa'}, 'image is None; vqa wants a picture'),
    (('a.png', 3), {'task': 'vqa'}, 'text is 3; wanted text'),
    (('a.png', ' '), {'task': 'vqa'}, 'text is empty'),
    (('/nowhere.png', 'what?'), {'task': 'vqa'}, '/nowhere.png: cannot be read'),
    ((np.zeros((4, 4)), 'what?'), {'task': 'vqa'}, 'an array of float64'),
    (('a.png', 'what?'), {'task': 'vqq'}, "no task 'vqq'; wanted one of vqa"),
    (('a.png', 'what?'), {'task': 'vqa', 'steps': 2}, 'steps means nothing to vqa'),
    ((['a.png'], ['a', 'b']), {'task': 'vqa'}, '1 pictures, 2 texts'),
    ((None, 'x'), {'task': 'generation', 'strength': 0.5}, 'image is wanted, too'),
    ((np.zeros((4, 4, 3), np.uint8), 'x'), {'task': 'generation'}, 'a picture to change'),
    ((None, 'x'), {'task': 'generation', 'steps': 0}, 'steps=0: wanted a whole number, 1 or more'),
    ((None, 'x'), {'task': 'generation', 'steps': 2.5}, 'steps=2.5: wanted a whole number'),
    ((None, 'x'), {'task': 'generation', 'guidance': float('nan')}, 'guidance=nan: wanted')])
def test_a_mistake_in_a_query_is_one_line(model, arguments, options, words):
  with pytest.raises(BundleError) as error:
    model(*arguments, **options)
  assert words in str(error.value) and '\n' not in str(error.value)


def test_the_loader_imports_what_a_bundle_needs_alone():
  folder = pathlib.Path(loader.__file__).parent
  found = set()
  for name in ('model', 'fields', 'files', 'pixels'):
    for node in ast.walk(ast.parse((folder / f'{name}.py').read_text())):
      if isinstance(node, ast.Import):
        found |= {alias.name.partition('.')[0] for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        found.add((node.module or '').partition('.')[0])
  assert found - set(sys.stdlib_module_names) == {
      'jax', 'numpy', 'PIL', 'tokenizers', 'fields', 'files', 'pixels'}


def test_a_long_text_is_cut_with_a_warning(model, pictures):
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    model(pictures[0], 'how many circles? ' * 9, task='vqa')
  assert any('the model reads 12: its end is left out' in str(one.message) for one in caught)


# Boxes of random parameters are many pictures wide: rounding in ONNX exceeds the tolerance.
@pytest.mark.parametrize('kind, tasks', [
    ('saved_model', ('vqa', 'retrieval')), ('saved_model', ('detection',)),
    ('onnx', ('vqa', 'retrieval'))])
def test_programs_in_other_formats_give_the_numbers_of_jax(ours, tmp_path, kind, tasks):
  pytest.importorskip({'onnx': 'jax2onnx', 'saved_model': 'tensorflow'}[kind])
  said = []
  write(str(tmp_path / 'b'), ours._predictor, tasks=tasks, platforms=('cpu',), sizes=(1,),
        formats=(kind,), tell=said.append)
  assert [f'{task}: {kind} gives the numbers of JAX' for task in tasks] == [
      line for line in said if kind in line]
  about = json.loads((tmp_path / 'b' / 'bundle.json').read_text())
  for task in tasks:
    file = about['tasks'][task]['converted'][kind]['file']
    assert file.startswith(f'{kind}/{task}') and (tmp_path / 'b' / file).exists()


def test_what_is_wrong_in_a_batch_is_refused_the_rest_named(ours, tmp_path, monkeypatch):
  def of_the_first_row(run, weights, inputs, most, path):
    file = pathlib.Path(f'{path}.onnx')
    file.touch()
    return str(file), lambda example: jax.tree.map(
        lambda x: np.repeat(np.asarray(x)[:1], len(x), 0), jax.jit(run)(weights, example))

  for kind in ('onnx', 'saved_model'):  # of batch 1, of any batch
    monkeypatch.setitem(convert.CONVERTERS, kind, of_the_first_row)
    monkeypatch.setitem(convert._NEEDED, kind, ())
  write(str(tmp_path / 'b'), ours._predictor, tasks=('objects',), platforms=('cpu',), sizes=(1,),
        formats=('onnx', 'saved_model'))
  about = json.loads((tmp_path / 'b' / 'bundle.json').read_text())
  assert about['tasks']['objects']['converted'] == {
      'onnx': {'file': 'onnx/objects.onnx'},
      'saved_model': {'reason': 'ValueError: its output present differs from that of JAX'}}
  assert 'onnx/objects.onnx' in about['files']
  assert not list((tmp_path / 'b' / 'saved_model').iterdir())


def test_what_cannot_be_converted_says_why(ours, tmp_path, monkeypatch):
  def broken(run, weights, inputs, most, path):
    raise KeyError('no such operation')

  monkeypatch.setitem(convert.CONVERTERS, 'saved_model', broken)
  said = []
  write(str(tmp_path / 'b'), ours._predictor, tasks=('objects',), platforms=('cpu',), sizes=(1,),
        formats=('saved_model',), tell=said.append)
  assert "objects: not in saved_model, because KeyError: 'no such operation'" in said
  monkeypatch.setitem(convert._NEEDED, 'onnx', ('no_such_package',))
  with pytest.raises(UserError, match='--format onnx needs no_such_package: pip install'):
    convert.check(['onnx'])
