"""Token numbers: ours, those of transformers and those of sentencepiece are the same."""

import io
import json

import numpy as np
import pytest
import sentencepiece
import transformers

from xmodal.data.shapes import Shapes
from xmodal.data.tokenizer import load_tokenizer, train_tokenizer
from xmodal.errors import UserError

TEXTS = [
    'how many red circles are there?', 'Is the LARGE square blue', 'a', '', ' two  spaces ', "it's",
    'naïve Straße ﬁn', '3.5 cm, 10:45', '(left)', 'red-green', '中文 и кириллица', '🙂', 'xylophone',
    'what\nnow\t?', '</s> inside', 'a' * 300]


@pytest.fixture(scope='module')
def questions():
  source = Shapes('train', size=300, image_size=32)
  return [source[i].question for i in range(300)]


@pytest.fixture(scope='module')
def learned(questions):
  return train_tokenizer(questions, vocab_size=300)


@pytest.fixture(scope='module')
def learned_folder(learned, tmp_path_factory):
  folder = tmp_path_factory.mktemp('tokenizer')
  learned.save(str(folder))
  return folder


@pytest.fixture(scope='module')
def sentences(questions):
  """A sentencepiece unigram model with T5's special numbers: its serialised bytes."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(questions * 3), model_writer=model, vocab_size=80, pad_id=0, eos_id=1,
      unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2)
  return model.getvalue()


@pytest.fixture(scope='module')
def t5_folder(sentences, tmp_path_factory):
  folder = tmp_path_factory.mktemp('t5')
  (folder / 'spiece.model').write_bytes(sentences)
  (folder / 'tokenizer_config.json').write_text(json.dumps({'tokenizer_class': 'T5Tokenizer'}))
  return folder


def rows(tokenizer, texts=TEXTS):
  length = int(tokenizer.lengths(texts).max())
  encoded = tokenizer.encode(texts, length)
  return [row[:n].tolist() for row, n in zip(encoded, tokenizer.lengths(texts))]


def test_a_learned_tokenizer_loads_in_transformers_with_the_same_numbers(learned, learned_folder):
  theirs = transformers.AutoTokenizer.from_pretrained(learned_folder)
  assert rows(learned) == theirs(TEXTS)['input_ids']
  assert (theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id) == (
      learned.pad_id, learned.eos_id, 2) == (0, 1, 2)
  assert len(theirs) == learned.vocab_size


def test_a_saved_tokenizer_comes_back(learned, learned_folder):
  assert rows(load_tokenizer(str(learned_folder))) == rows(learned)


def test_the_same_texts_give_the_same_vocabulary(questions, learned):
  assert rows(train_tokenizer(questions, vocab_size=300)) == rows(learned)
  assert learned.vocab_size <= 300


def test_decoding_gives_the_text_back(learned, questions):
  encoded = learned.encode(questions, int(learned.lengths(questions).max()))
  assert learned.decode(encoded) == [q.lower() for q in questions]


def test_decoding_stops_at_the_first_end_token(learned):
  red, blue = learned.encode(['red', 'blue'], 2)
  row = np.concatenate([red, blue, blue])
  assert learned.decode(row[None]) == ['red']


def test_unknown_signs_become_the_unknown_token(learned):
  assert 2 in learned.encode(['中'], 6)[0]
  assert 2 not in learned.encode(['is there a red circle?'], 20)[0]


def test_what_is_too_long_keeps_its_end_token(learned):
  text = 'how many small red circles are there?'
  whole = learned.encode([text], 40)[0]
  length = int(learned.lengths([text])[0])
  assert whole[length - 1] == learned.eos_id and not whole[length:].any()
  np.testing.assert_array_equal(learned.encode([text], length)[0], whole[:length])
  cut = learned.encode([text], 4)[0]
  np.testing.assert_array_equal(cut, [*whole[:3], learned.eos_id])
  np.testing.assert_array_equal(learned.encode([text], 1)[0], [learned.eos_id])


def test_a_t5_sentencepiece_file_gives_the_numbers_of_sentencepiece(t5_folder, sentences):
  theirs = sentencepiece.SentencePieceProcessor(model_proto=sentences)
  texts = [t for t in TEXTS if '</s>' not in t]  # a marker to the one, plain text to the other
  ours = load_tokenizer(str(t5_folder))
  assert rows(ours, texts) == [theirs.encode(t) + [theirs.eos_id()] for t in texts]
  assert (ours.pad_id, ours.eos_id) == (0, 1)
  known = ['how many red circles are there?', 'blue']
  assert ours.decode(ours.encode(known, 40)) == known


def test_a_tokenizer_json_of_transformers_loads_as_it_is(t5_folder, tmp_path):
  theirs = transformers.AutoTokenizer.from_pretrained(t5_folder)
  theirs.save_pretrained(tmp_path)
  assert (tmp_path / 'tokenizer.json').exists()
  ours = load_tokenizer(str(tmp_path))
  assert rows(ours) == theirs(TEXTS)['input_ids']
  assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize('files', [
    {}, {'tokenizer.json': '{"truncated'}, {'tokenizer_config.json': '{}'},
    {'tokenizer_config.json': '{"tokenizer_class": "T5Tokenizer"}'},
    {'spiece.model': 'not a model', 'tokenizer_config.json': '{"tokenizer_class": "T5Tokenizer"}'}],
    ids=lambda files: '+'.join(files) or 'empty')
def test_a_folder_without_a_usable_tokenizer_is_named_in_one_line(files, tmp_path):
  for name, text in files.items():
    (tmp_path / name).write_text(text)
  with pytest.raises(UserError, match=str(tmp_path)) as error:
    load_tokenizer(str(tmp_path))
  assert '\n' not in str(error.value)


def test_a_missing_folder_is_named():
  with pytest.raises(UserError, match='/nowhere'):
    load_tokenizer('/nowhere')


def test_a_tokenizer_without_an_end_token_is_refused(learned_folder, tmp_path):
  (tmp_path / 'tokenizer.json').write_bytes((learned_folder / 'tokenizer.json').read_bytes())
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(
      {'pad_token': '<pad>', 'eos_token': '[NEVER]'}))
  with pytest.raises(UserError, match=r"'\[NEVER\]' is not in its vocabulary"):
    load_tokenizer(str(tmp_path))
