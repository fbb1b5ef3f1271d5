"""The commands: results, and one clear line for each user error."""

import io
import json
import os
import pathlib
import runpy
import shutil
import signal
import subprocess
import sys

from absl import flags
from absl.testing import flagsaver
import jax
import numpy as np
from PIL import Image
import pytest
import single
import tiny

from xmodal import config as configs
from xmodal import main, predict
from xmodal.data import order
from xmodal.data.example import Example
from xmodal.data.scenes.shapes import Shapes
from xmodal.errors import UserError
from xmodal.models import parts
from xmodal.train import build
from xmodal.train.logs import metrics
from xmodal.train.logs.report import Report
from xmodal.train.optimizer.schedules import make_schedule

ROOT = pathlib.Path(__file__).parents[1]
TINY = str(ROOT / 'tests' / 'tiny.py')


@pytest.fixture
def command(monkeypatch, capsys):
  """Runs xmodal.main on arguments in this process: (exit code, stdout, stderr)."""
  jax.devices()  # one, before a command could choose two: what it says must not hang on the order

  def run(*args):
    # The config's own flags are read from sys.argv.
    monkeypatch.setattr(sys, 'argv', ['main', *map(str, args)])
    capsys.readouterr()
    handler = signal.getsignal(signal.SIGTERM)
    try:
      with flagsaver.flagsaver(mode='train', workdir=None):
        code = main.main()
    finally:
      signal.signal(signal.SIGTERM, handler)
    return code, *capsys.readouterr()

  yield run
  flags.FLAGS.unparse_flags()


def assert_one_line_error(code, out, err, *words):
  assert code == 2 and out == ''
  line, = err.splitlines()
  assert line.startswith('error: ')
  for word in words:
    assert word in line


def python(*args):
  return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, cwd=ROOT)


# xmodal.main


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(command, tmp_path, finished_single,
                                                     monkeypatch, number):
  advance = Report.advance
  # The signal comes as step 2 is logged, while step 4 runs.
  monkeypatch.setattr(Report, 'advance', lambda self, step, metrics: (
      os.kill(os.getpid(), number) if step == 2 else advance(self, step, metrics)))
  code, out, _ = command('--config', TINY, '--workdir', tmp_path / 'run', *single.ARGUMENTS)
  assert code == 75 and 'stopped after step 4: saved' in out
  assert '4' in os.listdir(tmp_path / 'run' / 'checkpoints')
  monkeypatch.setattr(Report, 'advance', advance)
  code, out, _ = command('--config', TINY, '--workdir', tmp_path / 'run', *single.ARGUMENTS)
  assert code == 0 and 'resuming from step 4' in out
  lines, _ = metrics.read(str(tmp_path / 'run' / 'metrics.jsonl'))
  assert [line['step'] for line in lines if line['task'] == 'all'] == [1, 2, 3, 4, 5, 6]
  jax.tree.map(np.testing.assert_array_equal, single.restored(tmp_path / 'run'),
               single.restored(finished_single))


def test_ctrl_c_is_heard_while_python_waits_and_the_second_ends_at_once():
  script = '\n'.join((
      'import hashlib', 'from xmodal.train.process import stop',
      'with stop.signals():', '  print("waiting", flush=True)',
      # Blocks like a compilation, which handles no signals either.
      '  hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)'))
  with subprocess.Popen([sys.executable, '-c', script], stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
    assert process.stdout.readline() == 'waiting\n'
    process.send_signal(signal.SIGINT)
    while 'stopping after the step in progress' not in (line := process.stderr.readline()):
      assert line, 'it ended and said nothing'
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130


def test_steps_are_told_before_evaluations_and_with_their_speed(command, tmp_path):
  code, out, _ = command('--config', TINY, '--workdir', tmp_path, '--config.train.log_every=3',
                         '--config.train.eval_every=3')
  assert code == 0 and '\nobjects\nF1 of names' in out and '\nvqa\n' in out
  told = [line.split(':')[0].split('  ')[0] for line in out.splitlines()
          if line.startswith(('step', 'evaluation'))]
  assert list(dict.fromkeys(told)) == ['step 3/6', 'evaluation at step 3', 'step 6/6',
                                       'evaluation at step 6']
  lines = map(json.loads, (tmp_path / 'metrics.jsonl').read_text().splitlines())
  rates = [line['examples_per_second'] for line in lines if 'examples_per_second' in line]
  assert len(rates) == 2 and min(rates) > 0


def test_eval_gives_the_scores_of_the_training(command, finished, tmp_path):
  workdir = shutil.copytree(finished, tmp_path / 'run')
  predictions = workdir / 'predictions_vqa_val.jsonl'
  expected = predictions.read_text()
  predictions.unlink()
  code, out, _ = command('--config', TINY, '--workdir', workdir, '--mode=eval')
  accuracy = json.loads((finished / 'final.json').read_text())['evaluation']['vqa']['accuracy']
  assert code == 0 and f'{accuracy:.1%}' in out.split('all ')[1]
  assert predictions.read_text() == expected


def test_eval_needs_no_training_data_and_no_answers(command, finished, tmp_path, own_data):
  folder, workdir = tmp_path / 'data', shutil.copytree(finished, tmp_path / 'run')
  shutil.copytree(own_data[0], folder)
  lines = map(json.loads, (folder / 'val.jsonl').read_text().splitlines())
  wanted = ('image', 'question', 'question_id')
  (folder / 'test.jsonl').write_text(
      ''.join(json.dumps({key: line[key] for key in wanted}) + '\n' for line in lines))
  for split in ('train', 'val'):
    (folder / f'{split}.jsonl').unlink()
  for place in (workdir, workdir / 'checkpoints' / '6'):  # as if trained on own data
    path = place / 'assets' / 'config.json'
    path.write_text(path.read_text().replace('"source": "shapes"', '"source": "jsonl"'))
  code, out, err = command('--config', TINY, '--workdir', workdir, '--mode=eval',
                           '--config.data.source=jsonl', f'--config.data.root={folder}',
                           '--config.data.eval_split=test')
  assert code == 0, err
  lines = (workdir / 'predictions_vqa_test.jsonl').read_text().splitlines()
  assert [json.loads(line)['question_id'] for line in lines] == list(range(20))


@pytest.mark.parametrize('part', ['metrics.jsonl', 'final.json.part', 'assets', 'samples'])
def test_a_folder_that_cannot_be_written_to_is_one_line(command, tmp_path, part):
  """A full disk raises the same class of error at the same places."""
  workdir = tmp_path / 'run'
  blocked = workdir / part
  if part == 'metrics.jsonl' or part == 'final.json.part':
    blocked.mkdir(parents=True)  # a folder where a file should be
  else:
    workdir.mkdir()
    blocked.write_text('a file where a folder should be')
  code, _, err = command('--config', TINY, '--workdir', workdir)
  assert code == 2
  line, = (line for line in err.splitlines() if line.startswith('error: '))
  assert str(blocked) in line and 'Traceback' not in err


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('*.py')), ids=lambda p: p.stem)
def test_every_config_holds_together(path):
  c = runpy.run_path(str(path))['get_config']()
  configs.check(c)
  assert build.task_weights(c).keys() == set(c.mixer.tasks)
  make_schedule(c.optimizer, c.train.steps)
  for tower in ('vision', 'cross'):  # T5's heads have a width of their own
    sizes = parts.fields(c.model, tower)
    if 'num_heads' in sizes:  # a ResNet has no heads
      assert sizes['hidden_dim'] % sizes['num_heads'] == 0


def test_help_lists_the_flags(command):
  code, out, _ = command('--help')
  assert code == 0
  assert all(f'--{flag}' in out for flag in ('config', 'workdir', 'mode', 'multihost'))


def test_dry_run_shows_everything_and_writes_nothing(command, tmp_path):
  code, out, _ = command('--config', TINY, '--workdir', tmp_path / 'run', '--mode=dry_run',
                         '--config.train.log_every=2')
  assert code == 0 and not (tmp_path / 'run').exists()
  lines = out.splitlines()
  rows = [line.split() for line in lines[1:lines.index('')]]
  sizes = [np.prod([int(side) for side in ' '.join(row[1:row.index('float32')]).split(' x ')
                    if side != 'scalar']) for row in rows]
  assert f'{int(sum(sizes)):,} parameters' in out
  assert any(row[0].startswith('backbone/vision_tower/') for row in rows)
  assert any(line.split()[:6] == ['image', '8', 'x', '32', 'x', '32'] for line in lines)
  assert lines[-1] == 'nothing was trained'


@pytest.mark.parametrize('arguments, words', [
    (['--config', TINY, '--config.trian.steps=3'], ['trian', 'did you mean "train"']),
    (['--config', TINY, '--config.mixer.data.objects.colour=red'],
     ['--config.mixer.data.objects.colour=red']),
    (['--config.seed=3', '--config', TINY], ['--config FILE', 'before']),
    (['--config', TINY, '--config.train.steps=many'], ['config.train.steps', 'many']),
    (['--config', TINY, '--mode=tarin'], ['tarin', 'dry_run']),
    (['--config', TINY, '--workdri=x'], ['workdri']),
    (['--config', TINY, 'train'], ['train']),
    (['--config', '/nowhere/vqa.py'], ["/nowhere/vqa.py (did you mean 'vqa'?)", 'vqa_rad']),
    (['--config', '/nowhere/vqa.py', '--config.seed=3'], ['/nowhere/vqa.py', 'vqa_rad']),
    (['--config', TINY, '--config.mesh.data=3'], ['config.mesh', 'data=3']),
    (['--config', TINY, '--config.train.accumulation=3'], ['batch_size=8', 'multiple of 3']),
    (['--config', TINY, '--config.train.batch_size=0'], ['batch_size=0']),
    (['--config', TINY, '--config.data.source=jsonl'], ['config.data.root']),
    (['--config', TINY, '--config.data.root=/nowhere'], ['/nowhere', 'shapes', 'jsonl']),
    (['--config', TINY, '--config.data.source=shaeps'], ['shaeps', 'jsonl']),
    (['--config', TINY, '--config.data.source=jsonl', '--config.data.root=/nowhere'], ['/nowhere']),
    (['--config', TINY, '--config.data.source=jsonl', '--config.data.root={empty}'],
     ['is empty', 'train.jsonl']),
    (['--config', TINY, '--config.data.eval_split=vla'], ['vla', 'val']),
    (['--config', TINY, '--config.mixer.tasks=("vqq", "objects")'], ['vqq', 'vqa']),
    (['--config', TINY, '--config.mixer.weights=(1.0,)'], ['config.mixer.weights']),
    (['--config', TINY, '--config.mixer.weights=("a", 1)'], ['config.mixer.weights', 'number']),
    (['--config', TINY, '--config.mixer.sampling=alternating',
      '--config.mixer.turns=("vision_tower", 20)'], ['config.mixer.turns', 'pairs']),
    (['--config', TINY, '--config.mixer.sampling=jiont'], ['jiont', 'round_robin']),
    (['--config', TINY, '--config.mixer.balance=pcgard'], ['pcgard', 'famo']),
    (['--config', TINY, '--config.mixer.data.objects.source=coco',
      '--config.mixer.data.objects.root=/nowhere'], ['data of objects', '/nowhere']),
    (['--config', TINY, '--config.mixer.data.objcts.root=x'], ['objcts', 'did you mean "objects"']),
    (['--config', TINY, '--config.mixer.data.objects.crowded=maybe'], ['crowded', 'maybe']),
    (['--config', TINY, '--config.train.eval_every=0'], ['config.train.eval_every=0']),
    (['--config', TINY, '--config.optimizer.warmup_steps=6'], ['warmup_steps=6', 'steps=6']),
    (['--config', TINY, '--config.model.text.tokenizer=/nowhere'], ['/nowhere']),
    (['--config', TINY, '--config.vqa.classifier=False', '--config.vqa.generation_weight=0'],
     ['both heads are off']),
    (['--config', TINY, '--mode=eval'], ['no checkpoint']),
    (['--config', TINY, '--config.vqa.question_length=0'], ['question_length=0', '2 or more']),
    (['--config', TINY, '--config.objects.max_names=0'], ['max_names=0']),
    (['--config', TINY, '--config.model.dropout_rate=1.5'], ['dropout_rate=1.5', '0 to 0.99']),
    (['--config', TINY, '--config.model.vision.name=t5'], ['t5', 'resnet, vgg or vit']),
    (['--config', TINY, '--config.model.attention=cudnn', '--config.model.dropout_rate=0.1'],
     ['cudnn', 'dropout_rate=0.1', 'xla']),
    (['--config', TINY, '--multihost'], ['--multihost', 'Slurm']),
], ids=lambda value: ' '.join(value[-2:]) if value and value[0].startswith('--') else '')
def test_a_mistake_is_one_line_and_nothing_is_written(command, tmp_path, arguments, words):
  (tmp_path / 'empty').mkdir()
  arguments = [a.replace('{empty}', str(tmp_path / 'empty')) for a in arguments]
  workdir = tmp_path / 'run'
  assert_one_line_error(*command(*arguments, '--workdir', workdir), *words)
  assert sorted(os.listdir(tmp_path)) == ['empty']


def test_a_mistake_ends_the_process_with_code_2():
  for word, module, *args in (
      ('/nowhere', 'xmodal.main', '--config', '/nowhere/vqa.py'),
      ('get_config', 'xmodal.main', '--config', ROOT / 'xmodal' / 'errors.py'),
      ('/nowhere', 'xmodal.predict', '--checkpoint', '/nowhere', '--image', TINY, '--text', 'q')):
    out = python('-m', module, *args)
    assert_one_line_error(out.returncode, out.stdout, out.stderr, word)


# Own data


@pytest.fixture(scope='module')
def own_data(tmp_path_factory):
  """The pictures and questions of the tiny run as a jsonl folder: in the third batch of training
  one picture is truncated, and one has a box outside."""
  folder = tmp_path_factory.mktemp('own')
  read = order.train_records(order.positions(2, 8), 64, seed=0)
  for split, count in (('train', 64), ('val', 20)):
    source = Shapes(split, size=count, image_size=32)
    lines = []
    for i in range(count):
      example, name = source[i], f'{split}_{i}.jpg'
      Image.fromarray(example.image).save(folder / name, quality=95)
      lines.append(json.dumps({
          'image': name, 'question': example.question, 'answers': example.answers,
          'question_id': i, 'question_type': example.question_type,
          'caption': example.captions,
          'objects': [{'name': o.name, 'box': (40, *o.box[1:]) if (split, i) == ('train', read[4])
                       else o.box} for o in example.objects]}))
    (folder / f'{split}.jsonl').write_text('\n'.join(lines) + '\n')
  broken = folder / f'train_{read[3]}.jpg'
  broken.write_bytes(broken.read_bytes()[:200])
  return folder, broken.name


def on_own_data(own_data, **values):
  return tiny.changed(data__source='jsonl', data__root=str(own_data[0]), **values)


def test_own_data_with_a_broken_picture_trains(own_data, tmp_path, capsys):
  told = tiny.train(tmp_path / 'run', on_own_data(own_data))
  assert told['step'] == 6 and told['evaluation']['vqa']['examples'] == 20
  reason, = told['unreadable_pictures']['train']
  assert own_data[1] in reason
  outside = told['boxes_outside']
  assert outside['train'] and all('inside 32 x 32' in line for line in outside['train'])
  assert not outside['eval']
  said = capsys.readouterr().out.splitlines()
  for line in (reason, *outside['train']):
    assert f'  {line}' in said
  lines = map(json.loads, (tmp_path / 'run' / 'predictions_vqa_val.jsonl').read_text().splitlines())
  assert [line['question_id'] for line in lines] == list(range(20))


def test_too_many_broken_pictures_end_the_run(own_data, tmp_path):
  with pytest.raises(UserError, match=f'1 of 64 pictures cannot be read.*{own_data[1]}'):
    tiny.train(tmp_path / 'run', on_own_data(own_data, data__max_bad_share=0.0))


# xmodal.predict


@pytest.fixture(scope='module')
def moved(finished, tmp_path_factory):
  """A copy of a checkpoint's folder, without its run."""
  return shutil.copytree(finished / 'checkpoints' / '6', tmp_path_factory.mktemp('moved') / 'mine')


@pytest.fixture(scope='module')
def predictor(moved):
  return predict.Predictor(str(moved))


QUESTION = 'how many red circles are there?'


def test_predict_needs_the_checkpoint_folder_alone(moved, tmp_path, capsys):
  Image.fromarray(Shapes('test', size=1, image_size=32)[0].image).save(tmp_path / 'a.png')
  code = predict.main(['--checkpoint', str(moved), '--image', str(tmp_path / 'a.png'),
                       '--text', QUESTION, '--output', str(tmp_path / 'card.png')])
  out, err = capsys.readouterr()
  assert code == 0, err
  *answers, written = out.splitlines()
  shares = [float(line.split('%')[0]) for line in answers]
  assert len(shares) == 5 and shares == sorted(shares, reverse=True) and sum(shares) <= 100.3
  assert written.startswith('written: ')
  assert Image.open(tmp_path / 'card.png').width > 300


def test_a_task_without_a_question_needs_no_text(moved, tmp_path, capsys):
  Image.new('RGB', (9, 9)).save(tmp_path / 'a.png')
  arguments = ['--checkpoint', str(moved), '--image', str(tmp_path / 'a.png'), '--task', 'objects']
  assert predict.main(arguments) == 0 and '%' in capsys.readouterr().out
  assert predict.main([*arguments, '--text', 'what?']) == 0
  assert 'objects reads no text: --text is not used' in capsys.readouterr().err


def test_predictions_are_those_of_the_evaluation(predictor, finished):
  source = Shapes('val', size=20, image_size=32)
  _, predictions = predictor([source[i] for i in range(20)], 'vqa')
  lines = [json.loads(line) for line in (finished / 'predictions_vqa_val.jsonl').open()]
  assert [p.answer for p in predictions] == [line['answer'] for line in lines]
  np.testing.assert_allclose([p.top[0][1] for p in predictions],
                             [line['probability'] for line in lines], atol=1e-4)


def as_stored(kind, upright):
  """A picture (uint8 grey, as RGB) in one of the usual file formats."""
  grey = upright[..., 0]
  options = {}
  if kind == 'grey':
    image = Image.fromarray(grey)
  elif kind == '16 bit':
    image = Image.fromarray(grey.astype(np.uint16) * 257)
  elif kind == 'palette':
    image = Image.fromarray(upright).quantize(256)
  elif kind == 'transparent':
    image = Image.fromarray(np.dstack([upright, np.full_like(grey, 255)]))
  elif kind == 'cmyk':
    image, options = Image.fromarray(upright).convert('CMYK'), {'format': 'TIFF'}
  else:  # rotated, with an EXIF orientation
    image = Image.fromarray(np.rot90(upright).copy())
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {'exif': exif}
  stream = io.BytesIO()
  image.save(stream, **{'format': 'PNG', **options})
  return stream.getvalue()


def test_predict_takes_pictures_of_every_kind(predictor, tmp_path):
  grey = np.array(Image.fromarray(Shapes('test', size=1, image_size=32)[0].image).convert('L'))
  upright = np.repeat(grey[..., None], 3, axis=2)
  kinds = ('grey', '16 bit', 'palette', 'transparent', 'cmyk', 'turned')
  paths = [tmp_path / f'{number}.bin' for number in range(len(kinds))]
  for path, kind in zip(paths, kinds):
    path.write_bytes(as_stored(kind, upright))
  examples = [Example(image, question=QUESTION) for image in (upright, *map(str, paths))]
  # The batch size compiled above.
  pictures, predictions = predictor([*examples, *[examples[0]] * (20 - len(examples))], 'vqa')
  for kind, picture, prediction in zip(('plain', *kinds), pictures, predictions):
    assert np.abs(picture.astype(int) - upright).max() <= 1, kind
    np.testing.assert_allclose([p for _, p in prediction.top], [p for _, p in predictions[0].top],
                               atol=1e-3)


def predict_error(capsys, *args):
  code = predict.main(list(map(str, args)))
  out, err = capsys.readouterr()
  return code, out, err


def test_mistakes_of_predict_are_one_line(moved, tmp_path, capsys):
  (tmp_path / 'text.jpg').write_text('this is no picture')
  (tmp_path / 'empty').mkdir()
  Image.new('RGB', (9, 9)).save(tmp_path / 'a.png')
  good = {'checkpoint': moved, 'image': tmp_path / 'a.png', 'text': 'what?'}
  for change, word in (({'image': tmp_path / 'none.png'}, 'none.png'),
                       ({'image': tmp_path / 'text.jpg'}, 'text.jpg'),
                       ({'image': tmp_path / 'empty'}, 'no pictures in that folder'),
                       ({'input': tmp_path / 'a.png'}, 'one of --image and --input'),
                       ({'text': '  '}, '--text is empty'),
                       ({'checkpoint': tmp_path}, 'no checkpoint in'),
                       ({'task': 'detection'}, "'detection'; wanted one of vqa"),
                       ({'output': tmp_path / 'no' / 'card.png'}, 'no such folder')):
    arguments = [x for key, value in {**good, **change}.items() for x in (f'--{key}', value)]
    assert_one_line_error(*predict_error(capsys, *arguments), word)


def test_a_damaged_checkpoint_is_said_in_one_line(moved, tmp_path, capsys):
  folder = shutil.copytree(moved, tmp_path / 'copy')
  shutil.rmtree(folder / 'model' / 'd')
  Image.new('RGB', (9, 9)).save(tmp_path / 'a.png')
  arguments = ('--checkpoint', folder, '--image', tmp_path / 'a.png', '--text', 'what?')
  assert_one_line_error(*predict_error(capsys, *arguments), 'is damaged')


# Machines without TensorFlow


def test_steps_and_predictions_need_neither_tensorflow_nor_torch(moved, tmp_path):
  script = '\n'.join((
      'import sys',
      'sys.modules.update(tensorflow=None, torch=None)',
      'sys.path[:0] = sys.argv[1:3]',
      'import numpy as np, tiny',
      'from xmodal import predictor',
      'from xmodal.data.example import Example',
      'from xmodal.sharding.mesh import put_batch',
      'from xmodal.train.steps import state',
      'from xmodal.train.plan import Plan',
      'from xmodal.train.programs import compile_step',
      'run = Plan(tiny.get_config(), sys.argv[4])',
      'batch = run.maker("train")(np.arange(8), np.arange(8))',
      'before = state.create(run.init, run.abstract)',
      'after, metrics = compile_step(run)(before, put_batch(batch, run.mesh, 8))',
      'assert int(after.step) == 1 and np.isfinite(float(metrics["loss"]))',
      'example = Example(np.zeros((9, 9, 3), np.uint8), question="what?")',
      'print(predictor.Predictor(sys.argv[3])([example], "vqa")[1][0].answer)'))
  out = python('-c', script, ROOT, ROOT / 'tests', moved, tmp_path / 'run')
  assert out.returncode == 0, out.stderr[-2000:]
  answers = json.loads((moved / 'assets' / 'vqa' / 'answers.json').read_text())
  assert out.stdout.splitlines()[-1] in answers
