"""The retrieval task: training pairs, scores, queries and drawings."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from sklearn.metrics import top_k_accuracy_score
import tiny

import xmodal
from xmodal import predict, storage
from xmodal.data.example import Example
from xmodal.data.pictures.placement import Placement
from xmodal.data.pipeline import BadPictures, BatchMaker
from xmodal.data.scenes.shapes import Shapes
from xmodal.data.sources.jsonl import read_jsonl
from xmodal.data.tokenizer import train_tokenizer
from xmodal.errors import UserError
from xmodal.models.stream import Stream
from xmodal.predictor import Predictor
from xmodal.tasks.retrieval import task as retrieval
from xmodal.tasks.retrieval.task import Match, Ranking, Retrieval
from xmodal.train.plan import Plan

IMAGE = np.zeros((4, 4, 3), np.uint8)
CAPTIONS = ('a red circle', 'a blue square', 'two things', 'a dark green cross')


def config(**values):
  return tiny.changed(**{
      'mixer__tasks': ('retrieval',), 'mixer__weights': (1.0,), 'retrieval__embedding_dim': 16,
      'retrieval__caption_length': 24, **values})


@pytest.fixture(scope='module')
def tokenizer():
  return train_tokenizer(CAPTIONS, 60)


def of(tokenizer, *examples, **values):
  return Retrieval.from_data(config(**values), tokenizer, examples)


def described(*captions, **fields):
  return Example(IMAGE, captions=captions, **fields)


# Training pairs


def test_features_of_several_captions(tokenizer):
  task = of(tokenizer, described(*CAPTIONS[:2]), described(*CAPTIONS[:1]))
  encoded = task.encode(described('a red circle', ' ', image_id=5), Placement(4, 4))
  assert encoded['captions'].shape == (2, 24) and encoded['count'] == 1
  assert tokenizer.decode(encoded['captions']) == ['a red circle', '']
  assert task.weights(encoded)['contrastive'] == 1
  without = task.encode(Example(IMAGE), Placement(4, 4))
  assert without['count'] == task.weights(without)['contrastive'] == 0
  same, other = (task.encode(described('two things', image_id=i), Placement(4, 4)) for i in (5, 6))
  assert encoded['picture'] == same['picture'] != other['picture']


def test_an_unreadable_picture_is_no_negative(tokenizer, tmp_path):
  """Its captions would be negatives if they entered the batch."""
  (tmp_path / 'bad.png').write_bytes(b'no picture')
  source = [described('two things'), Example(str(tmp_path / 'bad.png'), captions=('a red circle',))]
  make = BatchMaker(source, {'retrieval': of(tokenizer, *source)}, (32, 32), BadPictures(2, 1.0))
  batch = make(np.array([0, 1, -1]), np.arange(3))
  assert batch['valid'].tolist() == [True, False, False]
  assert batch['retrieval']['count'].tolist() == [1, 0, 0]


def test_every_caption_gets_its_turn(tokenizer):
  """In training, one random caption of the example, never its padding."""
  examples = [described(*CAPTIONS), described(*CAPTIONS[:2])]
  task = of(tokenizer, *examples)
  features = jax.tree.map(
      lambda *x: np.stack(x), *[task.encode(e, Placement(4, 4)) for e in examples])
  towers = types.SimpleNamespace(
      vision=lambda: Stream(jnp.ones((2, 4, 8)), grid=(2, 2)),
      text=lambda tokens: Stream(jnp.ones((*tokens.shape, 8)), tokens != tokenizer.pad_id))
  head = task.head()
  variables = jax.jit(lambda: head.init(jax.random.key(0), towers, features, deterministic=True))()
  tokens = jax.jit(jax.vmap(lambda key: head.apply(
      variables, towers, features, deterministic=False, rngs={'dropout': key})['tokens']))(
          jax.random.split(jax.random.key(1), 60))
  taken = [set(tokenizer.decode(tokens[:, i])) for i in (0, 1)]
  assert taken == [set(CAPTIONS), set(CAPTIONS[:2])]


def test_what_cannot_be_trained_is_said(tokenizer):
  with pytest.raises(UserError, match="loss='hinge': wanted one of sigmoid, softmax"):
    of(tokenizer, described('a'), retrieval__loss='hinge')
  with pytest.raises(UserError, match='accumulation=2 .* micro-batch'):
    of(tokenizer, described('a'), train__accumulation=2)
  task = of(tokenizer, described('a'))
  with pytest.raises(UserError, match='none of 1 examples has "caption"'):
    task.survey([Example(IMAGE, question='what?')])
  cut, left = task.survey([described(*['a red circle'] * 6), described('a red circle. ' * 9)])
  assert cut.startswith('1 of 6 captions are longer than 24 tokens')
  assert left.startswith('1 captions beyond the first 5')


# A whole run


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(workdir, the task's scores in final.json)."""
  workdir = tmp_path_factory.mktemp('retrieval') / 'run'
  return workdir, tiny.train(workdir, config())['evaluation']['retrieval']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Twelve pictures and a text file."""
  folder = tmp_path_factory.mktemp('pictures')
  for i in range(12):
    Image.new('RGB', (30 + i, 20), (20 * i, 250 - 20 * i, 99)).save(folder / f'{i}.png')
  (folder / 'notes.txt').write_text('no picture')
  return folder


def test_scores_are_those_of_the_similarities(run):
  """scikit-learn's score on the model's vectors of each picture and text alone."""
  workdir, scores = run
  predictor = Predictor(str(workdir))
  source = Shapes('val', size=20, image_size=32)
  examples = [source[i] for i in range(20)]
  _, predictions = predictor(examples, 'retrieval')
  seen = np.stack([p.image for p in predictions])
  read = np.stack([p.captions[0] for p in predictions])
  assert len({e.captions for e in examples}) == 20
  for direction, similarity in (('image_to_text', seen @ read.T), ('text_to_image', read @ seen.T)):
    for k in (1, 5, 10):
      assert scores[f'{direction}/recall_at_{k}'] == pytest.approx(top_k_accuracy_score(
          np.arange(20), similarity, k=k, labels=np.arange(20)))
      assert scores[f'{direction}/chance_at_{k}'] == pytest.approx(k / 20)
  lines = [json.loads(line) for line in
           (workdir / 'predictions_retrieval_val.jsonl').read_text().splitlines()]
  similarity = seen @ read.T
  ranks = 1 + (similarity > np.diag(similarity)[:, None]).sum(1)
  assert [line['text_rank'] for line in lines] == ranks.tolist()
  assert lines[3]['captions'] == list(examples[3].captions)
  assert all(line['texts'][0]['right'] == (line['text_rank'] == 1) for line in lines)


def test_pictures_for_people_are_drawn(run):
  sheet = Image.open(run[0] / 'samples' / 'retrieval_val_0000006.png')
  assert sheet.width > 1000 and len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 50


def test_a_second_question_compiles_nothing_and_filled_up_texts_change_no_answer(
    run, folder, monkeypatch, caplog):
  predictor = Predictor(str(run[0]))

  def answer(text):
    task, examples = predictor.task('retrieval').query(str(folder / '3.png'), text)
    return task.join(examples, predictor(examples, task)[1]).texts

  first = answer('a red circle. a blue square. two things')
  with jax.log_compiles():
    answer('. '.join('abcdefgh'))
  assert not [r for r in caplog.records if r.message.startswith('Compiling')]
  monkeypatch.setattr(retrieval, 'program_size', lambda number: number)
  caplog.clear()
  with jax.log_compiles():
    plain = answer('a red circle. a blue square. two things')
  assert [r for r in caplog.records if r.message.startswith('Compiling')]
  assert [m.what for m in first] == [m.what for m in plain]
  np.testing.assert_allclose([m.similarity for m in first], [m.similarity for m in plain],
                             rtol=1e-5, atol=1e-6)


def ask(capsys, workdir, image, text, *more):
  code = predict.main(['--checkpoint', str(workdir), '--task', 'retrieval', '--image', str(image),
                       '--text', text, *more])
  out, err = capsys.readouterr()
  return code, [line.split(maxsplit=1) for line in out.splitlines()], err


def test_predict_orders_texts_and_pictures_by_similarity(run, folder, tmp_path, capsys):
  drawn = tmp_path / 'drawn.png'
  code, lines, _ = ask(capsys, run[0], folder / '3.png',
                       'a red circle. A blue square;  two things.', '--output', str(drawn))
  assert code == 0 and Image.open(drawn).width > 300
  assert {text for _, text in lines} == {'a red circle', 'A blue square', 'two things'}
  similarity = [float(number) for number, _ in lines]
  assert similarity == sorted(similarity, reverse=True)
  assert -1 <= similarity[-1] < similarity[0] <= 1

  code, found, _ = ask(capsys, run[0], folder, 'a red circle', '--output', str(drawn))
  assert code == 0 and Image.open(drawn).width > 300
  assert len(found) == 10 and len({path for _, path in found}) == 10
  assert [float(n) for n, _ in found] == sorted((float(n) for n, _ in found), reverse=True)
  # The similarity of a picture and a text is the same in both directions.
  of_text = {text: float(number) for number, text in lines}['a red circle']
  of_picture = {path: float(number) for number, path in found}.get(str(folder / '3.png'))
  assert of_picture is None or of_picture == pytest.approx(of_text, abs=2e-3)


def test_a_folder_of_a_bucket_is_searched(run, monkeypatch):
  task = Predictor(str(run[0])).task('retrieval')
  monkeypatch.setattr(storage, 'list_dir', lambda path: ['b.png', 'notes.txt', 'a.jpg'])
  _, examples = task.query('gs://bucket/folder', 'a red circle')
  assert [e.image for e in examples] == ['gs://bucket/folder/a.jpg', 'gs://bucket/folder/b.png']


def test_a_loaded_model_ranks_the_texts_or_pictures_of_a_list(run, folder, caplog):
  model = xmodal.load(run[0])
  paths = [folder / f'{i}.png' for i in range(12)]
  of_picture = model(paths[3], 'a red circle. a blue square')
  assert of_picture.texts == model(paths[3], ['a red circle', 'a blue square']).texts
  assert not of_picture.pictures and len(of_picture.texts) == 2
  ranking = model(paths, 'a red circle')
  assert sorted(m.what.image_id for m in ranking.pictures) == list(range(12))
  similarity = [m.similarity for m in ranking.pictures]
  assert similarity == sorted(similarity, reverse=True)
  of_text = {m.what: m.similarity for m in of_picture.texts}['a red circle']
  assert {m.what.image_id: m.similarity for m in ranking.pictures}[3] == pytest.approx(
      of_text, abs=1e-5)
  plain = json.loads(json.dumps(model.plain(ranking)))
  assert plain['pictures'][0] == {'image': ranking.pictures[0].what.image,
                                  'similarity': round(similarity[0], 4)}
  with jax.log_compiles():
    pixels = [np.asarray(Image.open(path)) for path in paths[:5]]
    again = {m.what.image_id: m.similarity for m in model(pixels, 'a red circle').pictures}
  assert not [r for r in caplog.records if r.message.startswith('Compiling jit(')]
  assert again[3] == pytest.approx(of_text, abs=1e-5)
  pairs = model(paths[:3], ['a red circle', 'a blue square. a cross', 'two things'])
  assert [len(one.texts) for one in pairs] == [1, 2, 1]
  with pytest.raises(UserError, match='^image is an empty list'):
    model([], 'a red circle')


def test_predict_says_what_is_wrong(run, folder, tmp_path, capsys):
  assert ask(capsys, run[0], folder / '3.png', '. ;')[::2] == (
      2, 'error: --text \'. ;\' says nothing; wanted texts with a full stop after each: "a red '
         'circle. a blue square."\n')
  code, _, err = ask(capsys, run[0], tmp_path, 'a red circle')
  assert code == 2 and 'no pictures in that folder' in err
  _, _, err = ask(capsys, run[0], folder, 'a red circle ' * 30)
  assert err.count('note: the text has') == 1 and 'the model reads 24' in err
  _, _, err = ask(capsys, run[0], folder, 'a red circle. a blue square.')
  assert err.count('note:') == 1 and 'not for each of its 2 parts' in err


def test_captions_on_lines_of_their_own_are_of_one_picture(tokenizer, tmp_path):
  """Two pictures with two captions, one per line, and one picture without any."""
  lines = []
  for name in 'abc':
    Image.new('RGB', (40, 30)).save(tmp_path / f'{name}.png')
    lines += [{'image': f'{name}.png', 'caption': f'{text} {name}'} for text in ('a', 'the')]
  lines[4:] = [{'image': 'c.png', 'question': 'what?', 'answers': ['c']}]
  (tmp_path / 'train.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  examples = read_jsonl(str(tmp_path), 'train')
  task = of(tokenizer, *examples)
  x, y = np.eye(2, dtype=np.float32)
  related = task.relate(examples, [Ranking(*pair) for pair in (
      (x, x[None]), (x, y[None]), (y, y[None]), (y, x[None]), (y, y[None]))])
  scores = task.score(examples, related)
  assert (scores['pictures'], scores['captions']) == (2, 4)
  assert scores['image_to_text/chance_at_1'] == scores['text_to_image/chance_at_1'] == 0.5
  # For each picture, one of its captions ties with one of the other's: a tie counts as a miss.
  assert [p.text_rank for p in related] == [2, 2, 2, 2, None]
  assert [p.picture_ranks for p in related] == [(1,), (2,), (1,), (2,), ()]
  encoded = [task.encode(e, Placement(40, 30))['picture'] for e in examples]
  assert encoded[0] == encoded[1] != encoded[2] == encoded[3]


def test_a_split_with_more_captions_than_training_has(tmp_path):
  """The training split sets the shapes of training steps; evaluation keeps all captions."""
  Image.new('RGB', (40, 30)).save(tmp_path / 'a.png')
  for split, caption in (('train', 'a cat'), ('val', ['a cat', 'cats', 'one cat'])):
    (tmp_path / f'{split}.jsonl').write_text(json.dumps({'image': 'a.png', 'caption': caption}))
  run = Plan(config(data__source='jsonl', data__root=str(tmp_path)), str(tmp_path / 'run'))
  record = np.array([0])
  assert run.batch['retrieval']['captions'].shape[1:] == (1, 24)
  assert run.maker('train')(record, record)['retrieval']['captions'].shape == (1, 1, 24)
  batch = run.maker('eval')(record, record)
  assert batch['retrieval']['captions'].shape == (1, 3, 24) and batch['retrieval']['count'] == 3


def test_a_caption_worded_as_a_right_one_is_right(tokenizer):
  """Three scenes, two with the same description: both are correct for it."""
  examples = [described('A cat.', image_id=0), described('a  cat.', image_id=1),
              described('a dog', image_id=2)]
  x, y = np.eye(2, dtype=np.float32)
  predictions = [Ranking(y, x[None]), Ranking(x, x[None]), Ranking(y, y[None])]
  task = of(tokenizer, *examples)
  related = task.relate(examples, predictions)
  # Picture 0 looks like the dog's, so both cats come after that; picture 1 has both before.
  assert [p.text_rank for p in related] == [2, 1, 1]
  # Picture 1 is right for both cats; for the dog, picture 0 is as similar as the right one.
  assert [p.picture_ranks for p in related] == [(1,), (1,), (2,)]
  assert related[0].pictures[0] == Match(examples[1], 1.0, True)
  scores = task.score(examples, related)
  assert scores['image_to_text/recall_at_1'] == scores['text_to_image/recall_at_1'] == (
      pytest.approx(2 / 3))
  assert scores['text_to_image/chance_at_1'] == pytest.approx((2 + 2 + 1) / 9)
  assert task.table(scores).splitlines()[1].split() == [
      'image', 'to', 'text', '66.7%', '100.0%', '100.0%', '1']
  assert task.headline(scores) == 'image to text R@1 66.7%, text to image R@1 66.7%'


def test_a_split_without_captions_is_not_scored(tokenizer):
  task, example = of(tokenizer, described('a')), Example(IMAGE, question='what?')
  prediction = Ranking(np.ones(2, np.float32), np.ones((1, 2), np.float32))
  related = task.relate([example], [prediction])
  assert task.score([example], related) == {} and task.headline({}) == ''
  assert task.record(example, related[0]) is None
  assert task.draw(example, IMAGE, related[0]).width > 300
