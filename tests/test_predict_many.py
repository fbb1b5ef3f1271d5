"""xmodal predict with folders of pictures and files of questions."""

import json
import os
import shutil

from PIL import Image
import pytest

import xmodal
from xmodal import predict, predict_many
from xmodal.data.scenes.shapes import Shapes

QUESTION = 'how many circles?'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Forty pictures, more than a batch, one truncated and one in a subfolder."""
  folder = tmp_path_factory.mktemp('pictures')
  (folder / 'below').mkdir()
  source = Shapes('val', size=39, image_size=32)
  for i in range(39):
    Image.fromarray(source[i].image).save(folder / f'{i:02}.png')
  Image.fromarray(source[0].image).save(folder / 'below' / 'z.png')
  (folder / '07.png').write_bytes((folder / '07.png').read_bytes()[:60])
  (folder / 'notes.txt').write_text('no picture')
  return folder


@pytest.fixture
def command(finished, capsys):
  """Runs the command on the run: (exit code, stdout, stderr)."""
  def run(*arguments):
    capsys.readouterr()
    code = predict.main(['--checkpoint', str(finished), *map(str, arguments)])
    return code, *capsys.readouterr()
  return run


def written(path, *lines):
  path.write_text(''.join(
      (line if isinstance(line, str) else json.dumps(line)) + '\n' for line in lines))
  return path


def read(text):
  return [json.loads(line) for line in text.splitlines()]


def test_a_folder_gives_a_line_for_each_picture_and_goes_on_after_a_broken_one(
    command, folder, finished, tmp_path):
  output = tmp_path / 'answers.jsonl'
  code, out, err = command('--image', folder, '--text', QUESTION, '--output', output)
  assert (code, out, err) == (0, '', '39 of 40 answered; 1 with "error": cannot be read\n')
  assert os.listdir(tmp_path) == ['answers.jsonl']
  lines = read(output.read_text())
  names = [f'{i:02}.png' for i in range(39)] + ['below/z.png']
  assert [line['image'] for line in lines] == names
  broken = lines.pop(7)
  assert broken.keys() == {'image', 'question', 'error'} and '07.png: damaged' in broken['error']
  names.remove('07.png')
  model = xmodal.load(finished)
  answers = model.plain(model([folder / name for name in names], QUESTION, task='vqa'), 'vqa')
  assert lines == [{'image': name, 'question': QUESTION, **answer}
                   for name, answer in zip(names, answers)]


def test_a_task_without_text_takes_a_folder_to_stdout(command, folder):
  code, out, _ = command('--image', folder, '--task', 'objects')
  lines = read(out)
  assert code == 0 and len(lines) == 40
  assert lines[0].keys() == {'image', 'names'} and len(lines[0]['names']) == 10


def test_a_file_of_questions_is_answered_line_by_line(command, folder, tmp_path):
  """The fields of jsonl data, without answers; --text for lines without a question."""
  questions = written(
      folder / 'questions.jsonl',
      {'image': '01.png', 'question': ' what color is the circle? ', 'question_id': 7,
       'image_id': 'a', 'answers': ['red']}, '',  # a blank line
      {'image': '07.png', 'question': 'what?'}, {'image': 'nowhere.png', 'question': 'what?'},
      {'image': str(folder / '02.png'), 'question': 'what? ' * 20},
      {'image': 'below\\z.png', 'question': None})
  code, out, err = command('--input', questions, '--text', QUESTION)
  assert code == 0 and err == '3 of 5 answered; 2 with "error": cannot be read\n'
  first, broken, missing, long, last = read(out)
  assert first.keys() == {'image', 'question', 'question_id', 'image_id', 'answer', 'probability',
                          'written'}
  assert (first['question'], first['question_id'], first['image_id']) == (
      'what color is the circle?', 7, 'a')
  assert 'damaged' in broken['error'] and 'nowhere.png: cannot be read' in missing['error']
  assert 'the model reads 12' in long['notes'][0] and 'answer' in long
  assert last['image'] == 'below\\z.png' and last['question'] == QUESTION


def test_where_no_picture_can_be_read_the_exit_code_is_1(command, folder, tmp_path):
  output = tmp_path / 'answers.jsonl'
  questions = written(folder / 'broken.jsonl', {'image': '07.png', 'question': 'what?'})
  code, _, err = command('--input', questions, '--output', output)
  assert code == 1 and err.startswith('0 of 1 answered; 1 with "error"')
  assert 'error' in json.loads(output.read_text())


def test_names_that_are_not_utf8_are_written_with_their_bytes(command, folder, tmp_path):
  shutil.copy(folder / '01.png', tmp_path / os.fsdecode(b'gr\xf6n.png'))
  (tmp_path / os.fsdecode(b'\xdf.png')).write_text('no picture')
  output = tmp_path / 'answers.jsonl'
  assert command('--image', tmp_path, '--text', QUESTION, '--output', output)[0] == 0
  good, bad = read(output.read_text(encoding='utf-8'))
  assert good['image'] == r'gr\xf6n.png' and 'answer' in good
  assert bad['image'] == r'\xdf.png' and r'/\xdf.png: not a picture' in bad['error']


@pytest.mark.parametrize('line, words', [
    ('{"image": "01.png", "question": ', ':2: not JSON ('),
    ('["01.png"]', ":2: is ['01.png'], wanted one JSON object"),
    ({'question': 'what?'}, ':2: image is missing, wanted the path of a picture'),
    ({'image': 3, 'question': 'what?'}, ':2: image is 3, wanted text'),
    ({'image': '', 'question': 'what?'}, ":2: image is '', wanted the path of a file"),
    ({'image': '01.png', 'question': ['what?']}, ":2: question is ['what?'], wanted text"),
    ({'image': '01.png', 'question': 'what?', 'question_id': 0.5}, ':2: question_id is 0.5, want'),
    ({'image': '01.png', 'text': 'what?'}, ':2: question is empty; vqa wants the question'),
])
def test_a_bad_line_ends_it_before_anything_is_computed(
    command, folder, tmp_path, monkeypatch, line, words):
  monkeypatch.setattr(predict_many, 'answers', None)
  output = tmp_path / 'answers.jsonl'
  questions = written(folder / 'bad.jsonl', {'image': '01.png', 'question': 'what?'}, line)
  code, out, err = command('--input', questions, '--output', output)
  assert code == 2 and not out and not os.listdir(tmp_path)
  assert err.startswith(f'error: {questions}{words}') and err.count('\n') == 1


def test_answers_that_are_there_stay_unless_they_are_to_be_replaced(
    command, folder, tmp_path, monkeypatch):
  output = written(tmp_path / 'answers.jsonl', 'mine')
  questions = written(folder / 'one.jsonl', {'image': '01.png', 'question': 'what?'})
  with monkeypatch.context() as patch:
    patch.setattr(predict, 'Predictor', None)  # reported before a model is loaded
    for what in (('--input', questions), ('--image', folder, '--text', 'what?')):
      code, _, err = command(*what, '--output', output)
      assert code == 2 and err == (
          f'error: --output {output} is there already; give another, or take --overwrite\n')
  assert output.read_text() == 'mine\n'
  assert command('--input', questions, '--output', output, '--overwrite')[0] == 0
  assert json.loads(output.read_text())['image'] == '01.png'


@pytest.mark.parametrize('arguments, words', [
    (('--input', '/nowhere.jsonl'), '--input /nowhere.jsonl: no such file'),
    (('--input', '{empty}'), 'no questions in it; wanted one JSON object a line'),
    (('--image', '{folder}'), '--text is empty; vqa wants the question'),
    (('--image', '{folder}', '--text', 'what?', '--output', '/no/a.jsonl'), 'no such folder'),
    (('--image', '{folder}', '--text', 'what?', '--output', 'a.png'), 'named as a picture'),
    (('--image', '{folder}', '--text', 'what?', '--n', '2'), '--n means nothing to vqa'),
])
def test_a_mistake_is_one_line(command, folder, tmp_path, arguments, words):
  empty = written(tmp_path / 'empty.jsonl', '')
  code, out, err = command(*(a.format(folder=folder, empty=empty) for a in arguments))
  assert code == 2 and not out
  assert err.startswith('error: ') and words in err and err.count('\n') == 1


def test_lines_are_written_batch_by_batch(command, folder, tmp_path, monkeypatch):
  """Earlier answers are in the file if a later batch fails."""
  batches = predict_many.answers

  def fail_in_the_second(*args):
    for number, answer in enumerate(batches(*args)):
      if number == 32:
        raise KeyboardInterrupt
      yield answer

  monkeypatch.setattr(predict_many, 'answers', fail_in_the_second)
  output = tmp_path / 'answers.jsonl'
  assert command('--image', folder, '--text', QUESTION, '--output', output)[0] == 130
  assert os.listdir(tmp_path) == ['answers.jsonl.part']
  assert len(read((tmp_path / 'answers.jsonl.part').read_text())) == 32
