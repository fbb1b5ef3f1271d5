"""Detection end to end: trained on crowded scenes, scored by pycocotools, then queried."""

import contextlib
import io
import json
import os

import jax
import numpy as np
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
import pytest
import tiny

import xmodal
from xmodal import predict
from xmodal import predictor as predictor_file
from xmodal.data.open import open_source
from xmodal.train import run as runs
from xmodal.train.plan import Plan

UNSEEN = 'red circle'


def config():
  return tiny.changed(
      mixer__tasks=('detection',), mixer__weights=(1.0,), data__crowded=True,
      data__without=(UNSEEN,), data__keep_aspect=True, data__eval_examples=30, train__steps=4,
      train__eval_every=4, train__checkpoint_every=4)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(workdir, the task's scores in final.json)."""
  workdir = tmp_path_factory.mktemp('detection') / 'run'
  return workdir, tiny.train(workdir, config())['evaluation']['detection']


def test_the_scores_are_those_of_pycocotools_on_the_files_written(run):
  workdir, scores = run
  with contextlib.redirect_stdout(io.StringIO()):
    truth = COCO(workdir / 'detection_val_instances.json')
    judge = COCOeval(truth, truth.loadRes(str(workdir / 'detection_val_results.json')), 'bbox')
    judge.evaluate(), judge.accumulate(), judge.summarize()
  assert scores['mAP'] == pytest.approx(judge.stats[0], abs=1e-12)
  assert scores['mAP50'] == pytest.approx(judge.stats[1], abs=1e-12)
  source = open_source(config(), 'val', train=False)
  assert len(truth.getAnnIds()) == sum(len(source[i].objects) for i in range(30))
  assert scores['examples'] == scores['referring_examples'] == 30
  assert {'mAP_seen', 'mAP_unseen', 'referring/relation'} <= scores.keys()


def test_results_are_as_the_server_takes_them(run):
  workdir, _ = run
  results = json.loads((workdir / 'detection_val_results.json').read_text())
  assert {line['image_id'] for line in results} == set(range(30))
  for line in results:
    assert line.keys() == {'image_id', 'category_id', 'bbox', 'score'}
    x, y, width, height = line['bbox']
    assert min(x, y, width, height) >= 0 and max(x + width, y + height) <= 32.01
    assert 0 <= line['score'] <= 1 and 1 <= line['category_id'] <= 24


def test_pictures_for_people_are_drawn(run):
  sheet = Image.open(run[0] / 'samples' / 'detection_val_0000004.png')
  assert sheet.width > 1000 and len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 50


@pytest.mark.parametrize('text,names', [
    ('red circle. purple cow', {'red circle', 'purple cow'}),
    ('the square left of the red circle. the cross',
     {'the square left of the red circle', 'the cross'}),
])
def test_predict_finds_what_a_text_names(run, tmp_path, capsys, text, names):
  picture, drawn = tmp_path / 'wide.png', tmp_path / 'found.png'
  Image.new('RGB', (300, 100), 'white').save(picture)
  arguments = ['--checkpoint', str(run[0]), '--task', 'detection', '--image', str(picture),
               '--text', text, '--output', str(drawn)]
  assert predict.main(arguments) == 0
  found = json.loads(capsys.readouterr().out)
  if text.startswith('the'):
    assert {f['name'] for f in found} == names
  for f in found:
    x, y, width, height = f['box']
    assert f['name'] in names and 0 <= f['score'] <= 1
    assert min(x, y) >= 0 and x + width <= 300.01 and y + height <= 100.01
  assert Image.open(drawn).width >= 300


@pytest.fixture(scope='module')
def predictor(run):
  return predict.Predictor(str(run[0]))


def answer(predictor, image, text):
  """All objects found in a picture, and the referred ones."""
  task, examples = predictor.task('detection').query(image, text)
  return task.join(examples, predictor(examples, task)[1])


def compiled(caplog, function, *args):
  """The result of a call, and the number of programs that JAX compiled."""
  caplog.clear()
  with jax.log_compiles():
    result = function(*args)
  return result, sum(record.message.startswith('Compiling jit(') for record in caplog.records)


def test_a_second_question_compiles_nothing(predictor, tmp_path, caplog):
  picture = str(tmp_path / 'a.png')
  Image.new('RGB', (30, 40), 'red').save(picture)
  assert compiled(caplog, answer, predictor, picture, 'red circle')[1] > 0
  for text in ('zebra. grey wolf. an emu', '. '.join('abcdefgh'),
               'the square left of the red circle', 'cat. the square'):
    found, programs = compiled(caplog, answer, predictor, picture, text)
    assert programs == 0, text
    asked = {part.strip() for part in text.split('.')}
    assert {f.name for f in (*found.found, *found.meant)} == asked
  assert compiled(caplog, answer, predictor, picture, '. '.join(map(str, range(9))))[1] == 1


def test_filled_up_names_change_no_answer(predictor, tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  picture, text = str(tmp_path / 'a.png'), 'red circle. zebra. blue square. the square. the cross'
  Image.fromarray(rng.integers(0, 256, (60, 40, 3), np.uint8)).save(picture)
  padded = answer(predictor, picture, text)
  monkeypatch.setattr(predictor_file, 'pad_names', lambda names, *_: names)
  plain = answer(predictor, picture, text)
  assert len(plain.found) == 3 * 16 and len(plain.meant) == 2  # every query with every name
  for ours, theirs in zip(padded.found + padded.meant, plain.found + plain.meant, strict=True):
    assert ours.name == theirs.name and ours.score == pytest.approx(theirs.score, rel=1e-5)
    np.testing.assert_allclose(ours.box, theirs.box, atol=1e-3)


def test_a_loaded_model_finds_what_each_text_names(run, caplog):
  model, source = xmodal.load(run[0]), open_source(config(), 'val', train=False)
  pictures = [source[i].image for i in range(4)]
  texts = ['red circle. zebra', 'the cross', 'the square left of the red circle. the cross',
           'red circle. zebra']
  found = model(pictures, texts)
  assert [len(one.meant) for one in found] == [0, 1, 2, 0]
  for picture, text, ours in zip(pictures, texts, found):
    alone, _ = compiled(caplog, model, picture, text)
    for a, b in zip(alone.found + alone.meant, ours.found + ours.meant, strict=True):
      assert a.name == b.name and a.score == pytest.approx(b.score, rel=1e-4, abs=1e-6)
      np.testing.assert_allclose(a.box, b.box, atol=1e-2)
  assert not compiled(caplog, model, pictures[1], 'an emu. cat')[1]
  model(pictures[:3], 'red circle')
  assert not compiled(caplog, model, pictures[:2], 'an emu. cat')[1]
  plain = json.loads(json.dumps(model.plain(found)))
  assert [line['name'] for line in plain[2]['meant']] == [
      'the square left of the red circle', 'the cross']
  assert 'meant' not in plain[0]


def test_predict_says_what_is_wrong_with_a_text(run, tmp_path, capsys):
  picture = tmp_path / 'a.png'
  Image.new('RGB', (30, 10)).save(picture)
  assert predict.main(['--checkpoint', str(run[0]), '--image', str(picture), '--text', '. .']) == 2
  assert 'names nothing' in capsys.readouterr().err


def _coco(folder, split, names, annotations, pictures=(11, 12)):
  """A split in COCO's layout; annotations: (picture, category number, box, iscrowd)."""
  os.makedirs(folder / split)
  for number in pictures:
    Image.new('RGB', (60, 40), 'red').save(folder / split / f'{number}.png')
  (folder / f'{split}.json').write_text(json.dumps({
      'images': [{'id': i, 'file_name': f'{i}.png', 'width': 60, 'height': 40} for i in pictures],
      'annotations': [{'id': i, 'image_id': image_id, 'category_id': category_id, 'bbox': box,
                       'iscrowd': crowd, 'area': box[2] * box[3]}
                      for i, (image_id, category_id, box, crowd) in enumerate(annotations, 1)],
      'categories': [{'id': number, 'name': name} for number, name in names.items()]}))
  return folder


def _of_ones_own(folder):
  return tiny.changed(
      mixer__tasks=('detection',), mixer__weights=(1.0,), data__source='coco',
      data__root=str(folder), data__eval_split='train', data__keep_aspect=True,
      train__batch_size=2, train__steps=2, train__eval_every=2, train__checkpoint_every=2)


@pytest.fixture(scope='module')
def own(tmp_path_factory):
  """Two pictures, one without any box, one with boxes that cannot be used: workdir, scores, what
  was printed."""
  folder, printed = tmp_path_factory.mktemp('own'), io.StringIO()
  _coco(folder, 'train', {90: 'brick'},
        [(11, 90, box, 0) for box in ([5, 5, 20, 10], [5, 5, 0, 9], [70, 5, 9, 9])])
  with contextlib.redirect_stdout(printed):
    final = tiny.train(folder / 'run', _of_ones_own(folder))
  return folder / 'run', final['evaluation']['detection'], printed.getvalue()


def test_data_of_ones_own_with_boxes_trains(own):
  workdir, scores, printed = own
  assert scores['examples'] == 2 and 'AP/brick' in scores
  assert 'box has no area, left out' in printed
  results = json.loads((workdir / 'detection_train_results.json').read_text())
  assert {(line['image_id'], line['category_id']) for line in results} == {(11, 90), (12, 90)}


def test_another_data_set_is_scored_by_its_own_names_and_numbers(own, tmp_path, capsys):
  """Its names are not in training; one of them has no counted truth."""
  folder = _coco(tmp_path, 'val', {0: 'tile', 90: 'slate', 7: 'never there'}, [
      (3, 0, [5, 5, 20, 10], 0), (3, 90, [0, 0, 50, 30], 1), (4, 0, [0, 0, 60, 40], 0)], (3, 4, 5))
  c = _of_ones_own(folder)
  c.data.eval_split = 'val'
  run = Plan(c, str(own[0]), 'eval')
  scores = runs.evaluate_newest(run)['detection']
  printed = capsys.readouterr().out
  assert '2 names are not among the 1 trained on: slate, tile' in printed
  assert scores['mAP'] == scores['mAP_unseen'] and 'mAP_seen' not in scores
  assert {key for key in scores if key.startswith('AP/')} == {'AP/tile'}
  assert 'never trained on' in run.evaluation.table({'detection': scores})
  path = own[0] / 'detection_val_results.json'
  assert {line['category_id'] for line in json.loads(path.read_text())} == {0, 90}
  with contextlib.redirect_stdout(io.StringIO()):
    truth = COCO(folder / 'val.json')  # as its owner has it
    judge = COCOeval(truth, truth.loadRes(str(path)), 'bbox')
    judge.evaluate(), judge.accumulate(), judge.summarize()
  assert scores['mAP'] == pytest.approx(judge.stats[0], abs=1e-12)
  assert scores['mAP50'] == pytest.approx(judge.stats[1], abs=1e-12)
  assert (own[0] / 'samples' / 'detection_val_0000002.png').exists()
