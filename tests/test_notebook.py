"""The notebooks run on workdirs of training, and show correct numbers."""

import itertools
import json
import os
import pathlib

import jax.numpy as jnp
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
import nbformat
import numpy as np
from PIL import Image
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, confusion_matrix
import tiny

from xmodal import config as configs
from xmodal.data.open import open_source
from xmodal.mixer.sampling.sampling import make_sampling
from xmodal.tasks.vqa import VQA, Answer
from xmodal.train import scoring
from xmodal.train.logs.report import Report
from xmodal.train.steps import resting
from xmodal.train.steps.gradient_agreement import compared

_REPOSITORY = pathlib.Path(__file__).parents[1]
_NOTEBOOK = _REPOSITORY / 'notebooks' / 'analyze_run.ipynb'
_MULTITASK = _REPOSITORY / 'notebooks' / 'multitask.ipynb'
_GENERATION = _REPOSITORY / 'notebooks' / 'generation.ipynb'
# Words in the section titles, in order.
_TITLES = ('curves', 'Scores', 'family', 'what', 'know', 'worst', 'written')


def _write_run(workdir, config, records, predictions):
  """Writes a run's files, except checkpoints and pictures; returns the examples."""
  workdir.mkdir()
  source = open_source(config, config.data.eval_split, train=False)
  examples = [source[record] for record in records]
  task = VQA(None, (), question_length=24, answer_length=6, generation_weight=0.1)
  configs.save(config, str(workdir / 'config.json'))
  report = Report(str(workdir), steps=config.train.steps, start=0, batch_size=8)
  for step in (10, 20):
    report.train(step, {'loss': 3.0 / step, 'vqa/cls': 2.0 / step, 'vqa/gen': 1.0 / step,
                        'vqa/accuracy': step / 30, 'gradient_norm': 1.0, 'skipped': 0.0,
                        'skipped_in_a_row': 0.0})
    scores = task.score(examples, predictions)
    report.write(step, 'eval', {f'vqa/{key}': value for key, value in scores.items()})
  report.close()
  scoring.write_predictions(
      str(workdir / 'predictions_vqa_val.jsonl'), task, records, examples, predictions)
  return examples


def _execute(workdir, *more_cells, path=_NOTEBOOK, allow_errors=False, **environment):
  """Executes a notebook on a workdir, with cells added at its end."""
  notebook = nbformat.read(path, as_version=4)
  notebook.cells += more_cells
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('XMODAL_WORKDIR', str(workdir))
    patch.setenv('PYTHONPATH', str(_REPOSITORY))
    for name, value in environment.items():
      patch.setenv(name, value)
    NotebookClient(
        notebook, kernel_name='python3', timeout=60, allow_errors=allow_errors,
        resources={'metadata': {'path': str(path.parent)}}).execute()
  return notebook


def _showing(expression):
  """A cell that prints a value of the notebook as JSON."""
  return nbformat.v4.new_code_cell(f'import json\nprint(json.dumps({expression}))')


def _text(cell):
  return ''.join(output.get('text', '') for output in cell.outputs)


def _sections(notebook):
  """Word of each title -> the code cell below."""
  titles = [i for i, cell in enumerate(notebook.cells)
            if cell.cell_type == 'markdown' and cell.source.startswith('## ')]
  assert len(titles) == len(_TITLES)
  for word, i in zip(_TITLES, titles):
    assert word in notebook.cells[i].source.splitlines()[0]
  return {word: notebook.cells[i + 1] for word, i in zip(_TITLES, titles)}


def _figures(cell):
  return sum('image/png' in output.get('data', {}) for output in cell.outputs)


@pytest.fixture(scope='module')
def shapes_run(tmp_path_factory):
  """(examples, predictions, notebook) of 40 answers, with three planted mistakes.

  Record 0 was not read; records 3, 11, 7 are wrong, most confident first; 5 is written differently.
  """
  workdir = tmp_path_factory.mktemp('shapes') / 'run'
  config = configs.base()
  config.data.eval_examples, config.train.steps = 41, 20
  records = list(range(1, 41))
  source = open_source(config, 'val', train=False)
  wrong = {3: 0.99, 11: 0.97, 7: 0.42}
  predictions = []
  for record in records:
    answer = 'purple haze' if record in wrong else source[record].answers[0]
    probability = wrong.get(record, 0.305 + record / 100)
    text = 'an elephant' if record == 5 else answer
    predictions.append(Answer(answer, top=((answer, probability),), written=(text, 0.5)))
  examples = _write_run(workdir, config, records, predictions)
  again = _sections(nbformat.read(_NOTEBOOK, as_version=4))['worst'].source
  return examples, predictions, _execute(
      workdir, _showing('[labels, confusion.tolist()]'),
      _showing('[sure.tolist(), right.tolist()]'), _showing('accuracies'),
      nbformat.v4.new_code_cell('for row in rows:\n  row["record"] -= 1\n' + again,
                                metadata={'tags': ['raises-exception']}))


def test_every_figure_is_drawn(shapes_run):
  cells = _sections(shapes_run[2])
  assert {word: _figures(cell) for word, cell in cells.items()} == {
      'curves': 1, 'Scores': 1, 'family': 1, 'what': 1, 'know': 1, 'worst': 1, 'written': 0}


def test_worst_mistakes_come_surest_first(shapes_run):
  examples, _, notebook = shapes_run
  lines = _text(_sections(notebook)['worst']).splitlines()
  assert [line.split()[:2] for line in lines] == [['3', '99.0%'], ['11', '97.0%'], ['7', '42.0%']]
  for line, record in zip(lines, (3, 11, 7)):
    example = examples[record - 1]
    assert line.endswith(
        f'{example.question}  model: purple haze  truth: {example.answers[0]}')


def test_answers_written_otherwise_are_listed(shapes_run):
  examples, _, notebook = shapes_run
  text = _text(_sections(notebook)['written'])
  assert 'decoder: 40 of 40 answers; different from the classifier: 1' in text
  assert 'classifier 100.0%, written 0.0%' in text
  (line,) = [line for line in text.splitlines() if 'an elephant' in line]
  assert line.endswith(examples[4].question)


def test_numbers_are_as_sklearn_has_them(shapes_run):
  examples, predictions, notebook = shapes_run
  (labels, confusion), (sure, right), accuracies = [
      json.loads(_text(cell)) for cell in notebook.cells[-4:-1]]
  truths, answers = [e.answers[0] for e in examples], [p.answer for p in predictions]
  assert set(labels) == {*truths, *answers}
  np.testing.assert_array_equal(confusion, confusion_matrix(truths, answers, labels=labels))
  expected_right, expected_sure = calibration_curve(
      [t == a for t, a in zip(truths, answers)], [p.top[0][1] for p in predictions], n_bins=10)
  np.testing.assert_allclose(right, expected_right)
  np.testing.assert_allclose(sure, expected_sure)
  for family in {e.question_type for e in examples}:
    members = [i for i, e in enumerate(examples) if e.question_type == family]
    assert accuracies[family] == pytest.approx([
        accuracy_score([truths[i] for i in members], [answers[i] for i in members]), len(members)])


def test_pictures_of_other_data_are_refused(shapes_run):
  (error,) = [o for o in shapes_run[2].cells[-1].outputs if o.output_type == 'error']
  assert "split 'val' is not the question answered" in error.evalue
  assert len(error.traceback) == 1


def test_own_data_without_families_or_written_answers(tmp_path):
  """Also: a relative root, ten annotators, many answers, $ signs, a running run."""
  data = tmp_path / 'data'
  data.mkdir()
  Image.new('RGB', (90, 40), 'teal').save(data / 'a.png')
  lines = [{'image': 'a.png', 'question': f'Is $x_{i} above $y^ or not? ' + 'Really? ' * (i % 30),
            'answers': [f'$thing {i}'] * 6 + ['other'] * 3 + ['rare']} for i in range(40)]
  lines.append({'image': 'a.png', 'question': 'Nobody answered this.'})
  (data / 'val.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  config = configs.base()
  config.data.source, config.data.root = 'jsonl', os.path.relpath(data, _REPOSITORY)
  # Answers of three annotators are right, of one partly right: neither is a worst mistake.
  answers = [f'$thing {i}' for i in range(36)] + ['other', 'rare', 'nonsense', 'nonsense', 'other']
  predictions = [Answer(answer, top=((answer, 0.5 + i / 100),))
                 for i, answer in enumerate(answers)]
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(_REPOSITORY)
    _write_run(tmp_path / 'run', config, range(41), predictions)
  with open(tmp_path / 'run' / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 30, "spl')
  notebook = _execute(tmp_path / 'run', _showing('[labels, int(confusion.sum())]'))
  cells = _sections(notebook)
  assert 'step 20 of 1000 (still running' in _text(notebook.cells[1])
  assert [_figures(cell) for cell in cells.values()] == [1, 1, 1, 1, 1, 1, 0]
  assert [line.split()[0] for line in _text(cells['worst']).splitlines()] == ['39', '38']
  assert 'decoder: 0 of 40 answers;' in _text(cells['written'])
  labels, total = json.loads(_text(notebook.cells[-1]))
  assert len(labels) == 25 and labels[-1] == '(other)' and total == 40


def test_a_run_of_other_tasks_shows_its_scores_and_says_what_it_lacks(tmp_path):
  config = configs.base()
  config.mixer.tasks, config.mixer.weights = ('regression', 'retrieval'), (1.0, 1.0)
  configs.save(config, str(tmp_path / 'config.json'))
  report = Report(str(tmp_path), steps=20, start=0, batch_size=8)
  for step in (10, 20):
    report.write(step, 'train', {'loss': 1.0, 'regression/reg': 1.0, 'regression/weight': 1.0})
    report.write(step, 'eval', {
        'regression/R2': step / 100, 'regression/R2/count': 0.5, 'regression/examples/count': 9,
        'retrieval/image_to_text/recall_at_1': 0.125})
  report.close()
  cells = _sections(_execute(tmp_path, allow_errors=True))
  assert _figures(cells['curves']) == _figures(cells['Scores']) == 1
  assert [line.split() for line in _text(cells['Scores']).splitlines()] == [
      ['regression,', 'step', '20'], ['R2', '0.2'], ['retrieval,', 'step', '20'],
      ['image_to_text/recall_at_1', '0.125']]
  (error,) = [output for output in cells['family'].outputs if output.output_type == 'error']
  assert f'about answers, and {tmp_path} is a run of regression + retrieval' in error.evalue


def test_no_run_is_one_line(tmp_path):
  with pytest.raises(CellExecutionError) as caught:
    _execute(tmp_path)
  assert caught.value.ename == 'UserError'
  assert f'no run in {tmp_path}' in caught.value.evalue
  assert caught.value.traceback.strip().endswith(f'error: {caught.value.evalue}')


def _write_multitask_run(workdir, steps, measure_every):
  """A run of three tasks in turns; returns the gradient products at each measurement."""
  tasks, rng = ('vqa', 'objects', 'detection'), np.random.default_rng(0)
  config = configs.base()
  config.mixer.tasks, config.mixer.weights = tasks, (1.0, 1.0, 1.0)
  config.mixer.sampling, config.train.steps = 'round_robin', steps
  workdir.mkdir()
  configs.save(config, str(workdir / 'config.json'))
  sampling = make_sampling(config, dict.fromkeys(tasks, 100))
  report = Report(str(workdir), steps=steps, start=0, batch_size=8)
  grams = []
  for step in range(1, steps + 1):
    metrics = {'loss': 3.0 / step, 'skipped': 0.0, **resting.of_steps(sampling, tasks, step)}
    for task in tasks:
      metrics |= {f'{task}/loss': 1.0 / step, f'{task}/weight': 1.0}
    if step % measure_every == 0:
      gradients = rng.normal(size=(3, 5))
      grams.append(gradients @ gradients.T)
      metrics |= {key: float(value) for key, value in compared(tasks, jnp.array(grams[-1])).items()}
    report.train(step, metrics)
  report.close()
  return grams


def test_a_run_of_several_tasks_is_looked_at(tmp_path):
  grams = _write_multitask_run(tmp_path / 'run', 12, 2)
  settings = [{'name': f'{tasks[0]} alone', 'tasks': tasks, 'together': len(tasks) > 1, 'steps': 9,
               'mean': dict.fromkeys(tasks, 0.5), 'final': dict.fromkeys(tasks, [0.4, 0.6])}
              for tasks in (['vqa'], ['objects'], ['vqa', 'objects'])]
  (tmp_path / 'results.json').write_text(json.dumps({'settings': settings}))
  notebook = _execute(
      tmp_path / 'run', _showing('[[*map(list, halves)], [*halves.values()]]'),
      _showing('{task: numbers[-1] for task, (_, numbers) in shares.items()}'), path=_MULTITASK,
      XMODAL_RESULTS=str(tmp_path / 'results.json'))
  cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert 'vqa + objects + detection: step 12 of 12, sampling round_robin' in _text(cells[0])
  assert [_figures(cell) for cell in cells[1:5]] == [1, 1, 1, 1]
  pairs, halves = json.loads(_text(cells[5]))
  assert pairs == list(map(list, itertools.combinations(('vqa', 'objects', 'detection'), 2)))
  scale = [np.sqrt(np.outer(np.diag(gram), np.diag(gram))) for gram in grams]
  cosines = np.array([(gram / size)[np.triu_indices(3, 1)] for gram, size in zip(grams, scale)])
  np.testing.assert_allclose(halves, np.stack([cosines[:3].mean(0), cosines[3:].mean(0)], 1),
                             rtol=1e-4, atol=1e-6)
  assert json.loads(_text(cells[6])) == pytest.approx(
      {'vqa': 1 / 3, 'objects': 1 / 3, 'detection': 1 / 3})


def test_a_run_that_has_compared_no_gradients_yet(finished):
  """A real run; all steps train all tasks, and no benchmark was run."""
  notebook = _execute(finished, path=_MULTITASK, XMODAL_RESULTS='nowhere.json')
  cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert [_figures(cell) for cell in cells[1:]] == [1, 0, 0, 0]
  assert 'no gradients compared yet: config.mixer.measure_every=100' in _text(cells[2])
  assert 'every step trains all tasks' in _text(cells[3])
  assert 'no results in nowhere.json' in _text(cells[4])


def test_what_a_model_draws_is_looked_at(tmp_path):
  tiny.train(tmp_path / 'run', tiny.changed(
      mixer__tasks=('generation',), mixer__weights=(1.0,), data__drawn=True, train__steps=2,
      train__eval_every=2, train__checkpoint_every=2))
  notebook = _execute(tmp_path / 'run', _showing('over_guidance'), path=_GENERATION,
                      XMODAL_CAPTIONS='3', XMODAL_STEPS='1')
  cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert '3 texts of val' in _text(cells[0])
  assert [_figures(cell) for cell in cells[1:4]] == [1, 1, 1]
  numbers = json.loads(_text(cells[4]))
  assert list(numbers) == ['1.0', '2.0', '3.0', '5.0']
  assert all(0 <= of['faithful'] <= 1 and of['diverse'] > 0 for of in numbers.values())


@pytest.mark.parametrize('path', [_NOTEBOOK, _MULTITASK, _GENERATION],
                         ids=['analyze_run', 'multitask', 'generation'])
def test_committed_without_outputs(path):
  for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
    assert not cell.get('outputs') and cell.get('execution_count') is None
