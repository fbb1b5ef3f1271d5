"""xmodal.load: a trained model as a function; the tests of each task cover its queries."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest

import xmodal
from xmodal.data.pictures import images
from xmodal.data.scenes.shapes import Shapes
from xmodal.errors import UserError
from xmodal.tasks.vqa import Answer

QUESTION = 'how many circles?'


@pytest.fixture(scope='module')
def model(finished):
  return xmodal.load(finished)


@pytest.fixture(scope='module')
def examples():
  source = Shapes('val', size=20, image_size=32)
  return [source[i] for i in range(20)]


def assert_alike(ours, theirs):
  assert ours.answer == theirs.answer and ours.written[0] == theirs.written[0]
  np.testing.assert_allclose([p for _, p in ours.top], [p for _, p in theirs.top], rtol=1e-4)


def test_importing_it_imports_no_library():
  done = subprocess.run([sys.executable, '-c', (
      'import sys, xmodal\nxmodal.load\n'
      'print(sorted({"flax", "jax", "numpy", "PIL", "tensorflow"} & sys.modules.keys()))')],
      capture_output=True, text=True)
  assert done.stdout == '[]\n', done.stderr


@pytest.mark.filterwarnings('ignore:the question has')
def test_a_list_gives_the_answers_of_the_evaluation_and_of_each_alone(model, finished, examples):
  answers = model([e.image for e in examples], [e.question for e in examples], task='vqa')
  lines = [json.loads(line) for line in (finished / 'predictions_vqa_val.jsonl').open()]
  assert [a.answer for a in answers] == [line['answer'] for line in lines]
  assert [a.written[0] for a in answers] == [line['written'] for line in lines]
  for example, answer in zip(examples[:3], answers):
    alone = model(example.image, example.question, task='vqa')
    assert isinstance(alone, Answer)
    assert_alike(alone, answer)
  plain = model.plain(answers, 'vqa')
  assert plain[3] == {key: lines[3][key] for key in ('answer', 'probability', 'written')}


def test_lists_of_any_length_share_a_program(model, examples, caplog):
  pictures = [e.image for e in examples]
  model(pictures[:2], QUESTION, task='vqa')
  many = pictures * 2  # more than a batch
  with jax.log_compiles():
    answers = [model(some, QUESTION, task='vqa') for some in (pictures[:1], pictures[:5], many)]
  assert not [r for r in caplog.records if r.message.startswith('Compiling jit(')]
  assert [len(some) for some in answers] == [1, 5, 40]
  for some in answers[:2]:
    for ours, theirs in zip(some, answers[2]):
      assert_alike(ours, theirs)


def test_one_text_for_all_and_one_picture_for_all(model, examples):
  image, texts = examples[0].image, ['how many?', 'what color?', 'where is it?']
  for answer, text in zip(model(image, texts, task='vqa'), texts, strict=True):
    assert_alike(answer, model([image], [text], task='vqa')[0])
  assert model([], QUESTION, task='vqa') == []


def test_a_picture_is_a_path_pixels_or_one_of_pillow(model, examples, tmp_path):
  pixels = examples[0].image
  Image.fromarray(pixels).save(tmp_path / 'a.png')
  exif = Image.Exif()
  exif[0x0112] = 6  # rotated
  Image.fromarray(np.rot90(pixels).copy()).save(tmp_path / 'turned.png', exif=exif)
  clear = Image.fromarray(np.dstack([pixels, np.full((32, 32), 255, np.uint8)]))
  clear.putpixel((0, 0), (0, 0, 0, 0))
  np.testing.assert_array_equal(images.from_pillow(clear)[0, 0], 255)
  np.testing.assert_array_equal(images.from_pillow(Image.open(tmp_path / 'turned.png')), pixels)
  kinds = [pixels, tmp_path / 'a.png', str(tmp_path / 'a.png'), Image.open(tmp_path / 'a.png'),
           Image.open(tmp_path / 'turned.png'), tmp_path / 'turned.png']
  first, *others = model(kinds, QUESTION, task='vqa')
  for other in others:
    assert_alike(other, first)


def test_a_file_is_read_anew_in_each_call(model, tmp_path):
  path, found = tmp_path / 'a.png', []
  for colour in ('white', 'red'):
    Image.new('RGB', (32, 32), colour).save(path)
    for said in (model([path, path], task='objects')[1], model(path, task='objects')):
      found.append([probability for _, probability in said.names])
  assert found[0] == pytest.approx(found[1]) and found[2] == pytest.approx(found[3])
  assert found[0] != pytest.approx(found[2])


def test_the_first_task_is_asked_by_default(model, examples):
  first = examples[0]
  assert_alike(model(first.image, first.question), model(first.image, first.question, task='vqa'))


def test_a_task_without_a_dataclass_has_plain_values(model, examples):
  said = model(examples[0].image, task='objects')
  assert model.plain(said, 'objects')['names'][0]['name'] == said.names[0][0]


@pytest.mark.parametrize('arguments, options, words', [
    (('a.png', 'what?'), {'task': 'vqq'}, "was not trained on task 'vqq'; wanted one of vqa, obj"),
    (('/nowhere.png', 'what?'), {'task': 'vqa'}, '^/nowhere.png: cannot be read'),
    ((['/nowhere.png'] * 2, 'what?'), {'task': 'vqa'}, '^/nowhere.png: cannot be read'),
    ((None, 'what?'), {'task': 'vqa'}, '^image is None; vqa wants a picture'),
    ((3, 'what?'), {'task': 'vqa'}, '^image is a int; wanted a path, a PIL image or a NumPy'),
    ((np.zeros((4, 4)), 'what?'), {'task': 'vqa'}, r'^image: an array of float64 \[4, 4\]; wanted'),
    (('a.png', 3), {'task': 'vqa'}, '^text is 3; wanted text'),
    (('a.png',), {'task': 'vqa'}, '^text is empty; vqa wants the question'),
    ((['a.png'] * 2, ['what?'] * 3), {'task': 'vqa'}, '2 of image, 3 of text.; wanted lists of'),
    (('a.png', 'what?'), {'task': 'vqa', 'steps': 2}, '^steps means nothing to vqa; its options'),
])
def test_a_mistake_is_one_line(model, arguments, options, words):
  with pytest.raises(UserError, match=words) as error:
    model(*arguments, **options)
  assert '\n' not in str(error.value)


def test_what_is_left_out_of_a_text_is_warned_of(model, examples):
  with pytest.warns(UserWarning, match='the question has .* tokens, the model reads 12'):
    model(examples[0].image, QUESTION * 9, task='vqa')
  with pytest.warns(UserWarning, match=r'reads 12: its end is left out \(and 1 notes more\)$'):
    model([examples[0].image] * 3, [QUESTION * 8, QUESTION * 9, QUESTION], task='vqa')


def test_the_best_and_any_checkpoint_are_loaded(finished, tmp_path, examples):
  workdir = shutil.copytree(finished, tmp_path / 'run')
  (workdir / 'best.json').write_text('{"step": 3, "value": 0.5}')
  image = examples[0].image
  best, third, newest = (xmodal.load(folder)(image, QUESTION, task='vqa') for folder in (
      workdir / 'best', str(workdir / 'checkpoints' / '3'), workdir))
  assert best == third != newest
  with pytest.raises(UserError, match='no checkpoint in'):
    xmodal.load(os.path.join(tmp_path, 'nowhere'))
