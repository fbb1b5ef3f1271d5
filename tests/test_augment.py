"""Pseudo-labels: which are kept, what is written, and training on them with human labels."""

import json
import os
import random

import numpy as np
from PIL import Image
import pytest
import tiny

from xmodal import augment, predict
from xmodal.data.check import check_folder
from xmodal.data.example import Example
from xmodal.data.made import Concatenated, made_notes
from xmodal.data.open import open_source
from xmodal.data.pictures import images
from xmodal.data.pictures.decoded import DecodedPictures
from xmodal.data.pipeline import sample
from xmodal.data.scenes.shapes import Shapes
from xmodal.data.sources.find_pictures import find_pictures
from xmodal.data.sources.jsonl import read_jsonl
from xmodal.errors import UserError
from xmodal.labeller import Labeller
from xmodal.metrics import captioning as captioning_metric
from xmodal.metrics.agreement import agrees
from xmodal.tasks import captioning, vqa
from xmodal.train.plan import Plan

# Agreement of answers with captions

SCENE = 'A small red circle, two large blue squares and a cross. A red circle is above a square.'
DESK = "A man's black dog sleeps under the wooden table. There are no cats."


@pytest.mark.parametrize('caption, question, answer, expected', [
    (SCENE, 'Is there a red circle?', 'yes', True),
    (SCENE, 'Is there a red circle?', 'no', False),
    (SCENE, 'Does the picture show a red square?', 'yes', False),  # words of two objects
    (SCENE, 'Does the picture show a red square?', 'no', True),
    (SCENE, 'Are there crosses?', 'Yes.', True),
    (SCENE, 'Is it a circle or a dog?', 'yes', None),
    (SCENE, 'Is it?', 'yes', None),
    (SCENE, 'How many squares do you see?', '2', True),
    (SCENE, 'How many blue squares are there?', 'two', True),
    (SCENE, 'What is the number of red circles?', '1', True),  # mentioned twice, one object
    (SCENE, 'How many circles are there?', '2', False),
    (SCENE, 'How many green things are there?', '0', True),
    (SCENE, 'How many green things are there?', '1', False),
    (DESK, 'How many cats are there?', '0', True),
    (DESK, 'Do you see a cat?', 'no', True),
    ('Dogs on a bed.', 'How many dogs are there?', '2', None),
    (SCENE, 'What color is the circle?', 'red', True),
    (SCENE, 'What color is the circle?', 'blue', False),
    (SCENE, 'Which shape does the red object have?', 'circle', True),
    (SCENE, 'What color is the triangle?', 'red', False),  # no such object
    (SCENE, 'What is the color?', 'red', None),
    (SCENE, 'Where is the circle relative to the square?', 'above', True),
    (SCENE, 'Where is the square relative to the circle?', 'above', None),
    (SCENE, 'Where is the circle?', 'top left', None),
    (SCENE, 'Which is more frequent, red or blue?', 'blue', None),
    (DESK, 'What is under the table?', 'a dog', True),
    (DESK, 'Whose dog is it?', 'man', True),
    ('', 'Is there a dog?', 'no', None),
])
def test_agreement(caption, question, answer, expected):
  assert agrees(question, answer, caption) is expected


def test_true_captions_agree_with_no_wrong_answer_and_contradict_no_right_one():
  source, rng = Shapes('val', size=400, image_size=32), random.Random(0)
  examples = [source[i] for i in range(len(source))]
  answers = {}
  for e in examples:
    answers.setdefault(e.question_type, set()).update(e.answers)
  agreed = 0
  for e in examples:
    wrong = rng.choice(sorted(answers[e.question_type] - set(e.answers)))
    assert agrees(e.question, wrong, e.captions[0]) is not True, (e.question, wrong, e.captions)
    right = agrees(e.question, e.answers[0], e.captions[0])
    assert right is not False, (e.question, e.answers, e.captions)
    agreed += bool(right)
  assert agreed > 200  # captions state no comparisons or positions


# What is kept


class Model:
  """A Predictor with given answers: {picture's name: (caption, probability)}, {question:
  (answer, probability)}."""

  def __init__(self, captions, answers):
    self.config, self.tokenizer = tiny.get_config(), self
    self.tasks = {'vqa': None} | ({'captioning': None} if captions else {})
    self._captions, self._answers = captions, answers
    self.asked = []

  def lengths(self, texts):
    return np.array([len(text.split()) for text in texts])

  def __call__(self, examples, task):
    assert len(examples) % predict.AT_ONCE == 0  # one program
    if task == 'captioning':
      return None, [captioning.Caption(*self._captions[os.path.basename(e.image)])
                    for e in examples]
    self.asked += [e.question for e in examples]
    return None, [vqa.Answer(answer, ((answer, probability),))
                  for answer, probability in (self._answers[e.question] for e in examples)]


ANSWERS = {'Is there a circle?': ('yes', 0.99), 'Is there a cross?': ('yes', 0.95),
           'What color is the circle?': ('red', 0.8), 'Where is the circle?': ('top left', 0.97),
           'Is there a square?': ('no', 0.9)}


@pytest.fixture
def pictures(tmp_path):
  """a.png, below/b.png and a file that is no picture."""
  folder = tmp_path / 'pictures'
  (folder / 'below').mkdir(parents=True)
  for name in ('a.png', 'below/b.png'):
    Image.new('RGB', (9, 7), 'red').save(folder / name)
  (folder / 'bad.jpg').write_text('no picture')
  (folder / 'notes.txt').write_text('no picture either')
  return folder


def labeller(model, questions=tuple(ANSWERS), per_picture=None, threshold=0.9, keep_unjudged=False):
  return Labeller(model, DecodedPictures(), questions, per_picture=per_picture, threshold=threshold,
                  keep_unjudged=keep_unjudged)


def test_what_is_sure_and_agrees_is_kept(pictures):
  # 0.5 ** (1 / 3) < 0.9 <= 0.8 ** (1 / 3): the threshold is on the mean per token.
  model = Model({'a.png': ('a red circle', 0.8), 'b.png': ('a red circle', 0.5)}, ANSWERS)
  one = labeller(model)
  lines = one.lines(find_pictures(str(pictures), '--images'))
  kept = {(os.path.basename(line['image']), line.get('question')): line for line in lines}
  assert kept.keys() == {(name, question) for name in ('a.png', 'b.png')
                         for question in ('Is there a circle?', 'Is there a square?')}
  assert kept['a.png', 'Is there a circle?'] == {
      'image': str(pictures / 'a.png'), 'question': 'Is there a circle?', 'answers': ['yes'],
      'caption': 'a red circle', 'made': True, 'made_by': {'answer': 0.99, 'caption': 0.9283}}
  assert kept['b.png', 'Is there a square?']['made_by'] == {'answer': 0.9}
  assert 'caption' not in kept['b.png', 'Is there a square?']
  tally = one.tally
  assert (tally.pictures, tally.captions, tally.examples) == (2, 1, 4)
  assert tally.given == {'yes': 4, 'no': 2, 'red': 2, 'top left': 2}
  assert tally.sure == {'yes': 4, 'no': 2, 'top left': 2}
  assert tally.kept == {'yes': 2, 'no': 2}
  assert tally.verdicts == {True: 4, False: 2, None: 2}
  reason, = tally.unreadable
  assert 'bad.jpg' in reason
  text = '\n'.join(augment.report(tally, 0.9, 'OUT/train.jsonl'))
  assert 'agrees with 4, contradicts 2 and says nothing of 2' in text and '1 more cannot' in text
  assert ['yes', '4', '4', '2'] in [line.split() for line in text.splitlines()]


def test_what_cannot_be_judged_is_kept_if_asked_for(pictures):
  paths = [str(pictures / 'a.png')]
  model = Model({'a.png': ('a red circle', 0.1)}, ANSWERS)
  lines = labeller(model, keep_unjudged=True).lines(paths)
  assert {line['question'] for line in lines} == {
      'Is there a circle?', 'Is there a square?', 'Where is the circle?'}
  lines = labeller(Model({}, ANSWERS), keep_unjudged=True).lines(paths)  # no captions: all unjudged
  assert {line['question'] for line in lines} == ANSWERS.keys() - {'What color is the circle?'}


def test_a_caption_alone_is_an_example_and_an_empty_one_is_none(pictures):
  paths = find_pictures(str(pictures), '--images')
  model = Model({'a.png': ('a red circle', 0.8), 'b.png': (' ', 1.0)}, ANSWERS)
  model.lengths = lambda texts: np.array([3] * len(texts))
  line, = labeller(model, ()).lines(paths)
  assert line == {'image': str(pictures / 'a.png'), 'caption': 'a red circle', 'made': True,
                  'made_by': {'caption': 0.9283}}
  assert not model.asked


def test_each_picture_is_asked_its_share_of_the_questions_the_same_each_time(pictures):
  asked = []
  for _ in range(2):
    model = Model({}, ANSWERS)
    paths = find_pictures(str(pictures), '--images')
    labeller(model, per_picture=3, keep_unjudged=True).lines(paths)
    asked.append(model.asked[:6])
  assert asked[0] == asked[1]
  assert all(len(set(part)) == 3 for part in (asked[0][:3], asked[0][3:]))


def test_pictures_are_opened_once(pictures, monkeypatch):
  paths = find_pictures(str(pictures), '--images')
  decode, opened = images.decode, DecodedPictures()
  calls = []
  monkeypatch.setattr(images, 'decode', lambda *args: calls.append(args) or decode(*args))
  assert list(opened.open(paths, 32)) == [str(pictures / 'bad.jpg')]
  for _ in range(3):
    assert opened(str(pictures / 'a.png'), (32, 32)).stored_size == (7, 9)
  assert len(calls) == len(paths)
  filler = np.zeros((1, 1, 3), np.uint8)
  assert opened(filler, (32, 32)).pixels is filler


def test_questions_are_read_from_lines_and_from_examples(tmp_path):
  (tmp_path / 'q.txt').write_text('Is it?\n\n  What is it? \nIs it?\n')
  (tmp_path / 'train.jsonl').write_text(
      '\n'.join(json.dumps(line) for line in ({'question': 'Is it?'}, {'caption': 'x'},
                                              {'question': 'What is it?'}, {'question': 'Is it?'})))
  for name in ('q.txt', 'train.jsonl'):
    assert augment.read_questions(str(tmp_path / name)) == ['Is it?', 'What is it?']
  for text, words in (('{"question": "\\ud83d"}', 'wanted text without half characters'),
                      ('{"question": 5}', 'the question is 5, wanted text'),
                      ('{"question": ' + '[' * 100_000, 'maximum recursion depth')):
    (tmp_path / 'train.jsonl').write_text(text)
    with pytest.raises(UserError, match=f'train.jsonl:1: .*{words}'):
      augment.read_questions(str(tmp_path / 'train.jsonl'))


# Training with human labels, and the command


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
  """Eight unlabelled pictures, the last truncated, and questions about them."""
  folder = tmp_path_factory.mktemp('scenes')
  source = Shapes('test', size=8, image_size=32)
  for i in range(8):
    Image.fromarray(source[i].image).save(folder / f'{i}.png')
  broken = folder / '7.png'
  broken.write_bytes(broken.read_bytes()[:200])
  (folder / 'questions.txt').write_text(''.join(f'{source[i].question}\n' for i in range(5)))
  return folder


@pytest.fixture(scope='module')
def made(scenes, tmp_path_factory):
  """The folder that the command writes for those pictures."""
  folder = tmp_path_factory.mktemp('made')
  lines = [{'image': os.path.relpath(scenes / f'{i}.png', folder), 'question': 'Is there a circle?',
            'answers': ['yes'], 'caption': 'A circle.', 'made': True, 'made_by': {'answer': 0.95}}
           for i in range(8)]
  (folder / 'train.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return folder


def config(made=(), **values):
  return tiny.changed(mixer__tasks=('vqa', 'captioning'), data__train_examples=8,
                      data__eval_examples=8, data__more=tuple(map(str, made)),
                      data__max_bad_share=0.2, captioning__caption_length=8,
                      vqa__generation_weight=0.0, train__steps=2, train__samples=0,
                      mixer__measure_every=0, **values)


@pytest.fixture(scope='module')
def trained(made, tmp_path_factory):
  """A run over eight human-labelled and eight pseudo-labelled examples, and its output."""
  workdir = tmp_path_factory.mktemp('trained') / 'run'
  patch = pytest.MonkeyPatch()
  patch.setattr(captioning_metric, 'meteor', lambda *_: None)  # its program starts slowly
  told = tiny.train(workdir, config([made]))
  patch.undo()
  return workdir, told


def test_a_run_trains_on_labelled_and_made_data(trained, scenes):
  _, told = trained
  # One epoch of both: it read the truncated picture, which only the pseudo-labelled data has.
  reason, = told['unreadable_pictures']['train']
  assert f'{scenes.name}/7.png' in reason
  assert told['evaluation']['vqa']['examples'] == 8 and not told['unreadable_pictures']['eval']


def test_a_run_says_how_much_was_made_and_evaluates_on_none_of_it(made):
  run = Plan(config([made]), 'unused')
  assert 'train: 8 of 16 examples were made by a model' in run.notes
  assert not any('eval' in note and 'made' in note for note in run.notes)
  train, held_out = (run.feeds[0].sources[use] for use in ('train', 'eval'))
  assert [train[i].made for i in range(16)] == [False] * 8 + [True] * 8
  assert [e.made for e in sample(train, 4)] == [False] * 4 + [True] * 8
  assert not any(held_out[i].made for i in range(len(held_out)))
  assert made_notes('eval', held_out) == []


def test_made_examples_cannot_be_evaluated_on(made):
  c = config(data__source='jsonl', data__root=str(made), data__eval_split='train')
  with pytest.raises(UserError, match="'train': 8 of 8 examples to evaluate on were made"):
    open_source(c, 'train', train=False)
  assert len(open_source(c, 'train', train=True)) == 8


def test_a_folder_of_made_data_that_is_not_there_is_named():
  with pytest.raises(UserError, match='config.data.more: no train.jsonl in ./nowhere'):
    open_source(config(['/nowhere']), 'train', train=True)


def test_joined_sources_keep_order_and_faults(tmp_path):
  Image.new('RGB', (9, 9)).save(tmp_path / 'a.png')
  lines = ({'image': 'a.png', 'made': True, 'made_by': 'me'},
           {'image': 'a.png', 'objects': [{'box': [1, 1, 0, 2], 'name': 'x'}]})
  (tmp_path / 'train.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  one, other = read_jsonl(str(tmp_path), 'train'), [Example('b'), Example('c')]
  both = Concatenated([other, one, other])
  assert [both[i] for i in range(len(both))] == [*other, *one, *other] == list(both)
  assert both.faults == one.faults != ()
  assert [e.made for e in both] == [False, False, True, False, False, False]


def test_made_is_a_known_key_and_has_to_be_true_or_false(tmp_path, caplog):
  Image.new('RGB', (9, 9)).save(tmp_path / 'a.png')
  (tmp_path / 'train.jsonl').write_text('{"image": "a.png", "made": true, "made_by": {"a": 1}}')
  assert read_jsonl(str(tmp_path), 'train')[0].made and not caplog.records
  (tmp_path / 'train.jsonl').write_text('{"image": "a.png", "made": "yes"}')
  with pytest.raises(UserError, match="made is 'yes', wanted true or false"):
    read_jsonl(str(tmp_path), 'train')


def test_the_command_writes_what_can_be_trained_on(trained, scenes, tmp_path, capsys):
  workdir = trained[0]
  output = tmp_path / 'out'
  arguments = ['--checkpoint', workdir, '--images', scenes, '--questions', scenes / 'questions.txt',
               '--output', output, '--threshold', 0, '--keep_unjudged', '--per_picture', 4]
  code = augment.main(list(map(str, arguments)))
  out, err = capsys.readouterr()
  assert code == 0, err
  assert any('7.png' in line for line in err.splitlines())
  assert os.listdir(output) == ['train.jsonl'] and '8 of 8 pictures' in out
  examples = read_jsonl(str(output), 'train')
  assert examples and all(e.made and e.captions for e in examples)
  asked = [e for e in examples if e.question]
  # The kept label is the answer of the model to that question alone.
  predictor = predict.Predictor(str(workdir))
  _, predictions = predictor([asked[0]] * predict.AT_ONCE, 'vqa')  # of the compiled batch size
  assert asked[0].answers == (predictions[0].answer,)
  made_by = [json.loads(line)['made_by'] for line in (output / 'train.jsonl').open()]
  assert all(it['checkpoint'] == str(workdir / 'checkpoints' / '2') for it in made_by)
  first = made_by[examples.index(asked[0])]
  np.testing.assert_allclose(first['answer'], predictions[0].probability, atol=1e-4)
  checked, = check_folder(str(output), ['train'])
  assert not checked.complaints and not checked.note
  train = open_source(config([output]), 'train', train=True)
  assert made_notes('train', train) == [
      f'train: {len(examples)} of {8 + len(examples)} examples were made by a model']


def test_mistakes_are_one_line_and_write_nothing(trained, scenes, tmp_path, capsys, monkeypatch):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'full').mkdir()
  for name, text in (('full/a', 'x'), ('bad.jsonl', '[1]\n'), ('empty.txt', '\n')):
    (tmp_path / name).write_text(text)
  good = {'checkpoint': trained[0], 'images': scenes, 'questions': scenes / 'questions.txt',
          'output': tmp_path / 'out'}

  def check(values, words):
    arguments = []
    for key, value in values.items():
      if value is not None:
        arguments += [f'--{key}'] + ([] if value is True else [str(value)])
    assert augment.main(arguments) == 2, values
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and words in line
    assert not (tmp_path / 'out').exists()

  for change, words in (
      ({'images': '/nowhere'}, 'no such folder'), ({'images': tmp_path / 'empty'}, 'no pictures'),
      ({'output': tmp_path / 'full'}, 'not an empty folder'), ({'threshold': 2}, '--threshold 2'),
      ({'limit': 0}, '--limit 0'), ({'per_picture': 0}, '--per_picture 0'),
      ({'questions': '/nowhere'}, 'no such file'),
      ({'questions': None}, 'wanted one of --questions'),
      ({'captions': True}, 'wanted one of --questions'),
      ({'questions': tmp_path / 'bad.jsonl'}, 'bad.jsonl:1'),
      ({'questions': tmp_path / 'empty.txt'}, 'no questions in it'),
      ({'checkpoint': tmp_path}, 'no checkpoint')):
    check({**good, **change}, words)
  monkeypatch.setattr(augment, 'Predictor', lambda *_: Model({}, {}))
  check(good, '--keep_unjudged')
  check({**good, 'questions': None, 'captions': True}, 'writes no captions; wanted captioning')
  model = Model({}, {})
  model.tasks = {'captioning': None}
  monkeypatch.setattr(augment, 'Predictor', lambda *_: model)
  check(good, 'answers no questions; wanted vqa')


def test_nothing_kept_is_said_and_leaves_no_file(trained, scenes, tmp_path, capsys, monkeypatch):
  model = Model({f'{i}.png': ('a red circle', 0.99) for i in range(2)}, {})
  monkeypatch.setattr(augment, 'Predictor', lambda *_: model)
  arguments = ['--checkpoint', trained[0], '--images', scenes, '--captions', '--threshold', 1,
               '--output', tmp_path / 'out', '--limit', 2]
  assert augment.main(list(map(str, arguments))) == 2
  out, err = capsys.readouterr()
  assert 'nothing was kept' in err and 'captions kept' in out
  assert os.listdir(tmp_path / 'out') == []
