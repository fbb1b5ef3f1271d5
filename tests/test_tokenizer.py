"""Token ids of ours, transformers and sentencepiece are the same."""

import io
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
import transformers

from xmodal.data.scenes.shapes import Shapes
from xmodal.data.tokenizer import load_tokenizer, train_tokenizer
from xmodal.errors import UserError

TEXTS = [
    'how many red circles are there?', 'Is the LARGE square blue', 'a', '', ' two  spaces ', "it's",
    'naïve Straße ﬁn', '3.5 cm, 10:45', '(left)', 'red-green', '中文 и кириллица', '🙂',
    'xylophone', 'what\nnow\t?', '</s> inside', 'a' * 300]


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
  """Serialised bytes of a sentencepiece unigram model with T5's special ids."""
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
  assert rows(learned) == theirs(TEXTS, split_special_tokens=True)['input_ids']
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
  texts = [*TEXTS, '<pad>', 'a <extra_id_0> b</s>', '<unk>']
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
  texts = [text for text in TEXTS if '</s>' not in text]  # special to one, text to the other
  assert rows(ours, texts) == theirs(texts)['input_ids']
  assert ours.vocab_size == len(theirs)


def byte_level(questions, special):
  """A byte-level BPE, as in GPT-2 and LLaMA 3."""
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.train_from_iterator(questions, trainers.BpeTrainer(
      vocab_size=400, special_tokens=special, show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  return backend


def gpt2(questions, folder):
  vocabulary = byte_level(questions, ['<|endoftext|>'])
  vocabulary.model.save(str(folder))
  (folder / 'config.json').write_text('{"model_type": "gpt2"}')
  return transformers.GPT2TokenizerFast.from_pretrained(folder)


def llama(questions, folder):
  backend = byte_level(questions, ['<unk>', '<s>', '</s>'])
  backend.post_processor = processors.TemplateProcessing(
      single='<s> $A', special_tokens=[('<s>', 1)])
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, bos_token='<s>', eos_token='</s>', unk_token='<unk>')


def bert(questions, folder):
  backend = tokenizers.Tokenizer(models.WordPiece(unk_token='[UNK]'))
  backend.normalizer = normalizers.BertNormalizer()
  backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  backend.train_from_iterator(questions, trainers.WordPieceTrainer(
      vocab_size=200, special_tokens=['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]'],
      show_progress=False))
  backend.model.save(str(folder))
  (folder / 'config.json').write_text('{"model_type": "bert"}')
  return transformers.BertTokenizerFast.from_pretrained(folder)


def as_saved(theirs, source, folder):
  theirs.save_pretrained(folder)


def names_in_the_older_file(theirs, source, folder):
  """As transformers 4 wrote them: each name in special_tokens_map.json, with its options."""
  theirs.save_pretrained(folder)
  names = {key: {'content': token, 'lstrip': False} for key, token in
           theirs.special_tokens_map.items()}
  (folder / 'special_tokens_map.json').write_text(json.dumps(names))
  (folder / 'tokenizer_config.json').write_text('{"pad_token": null, "model_max_length": 512}')


def no_names(theirs, source, folder):
  """As the first GPT-2 and BERT were published."""
  theirs.save_pretrained(folder)
  (folder / 'tokenizer_config.json').write_text('{"model_max_length": 512}')


def no_tokenizer_json(theirs, source, folder):
  for path in source.iterdir():
    (folder / path.name).write_bytes(path.read_bytes())


@pytest.mark.parametrize('kind, end, pad, files', [
    (kind, end, pad, files)
    for kind, end, pad in [
        (gpt2, '<|endoftext|>', None), (llama, '</s>', None), (bert, '[SEP]', '[PAD]')]
    for files in (as_saved, names_in_the_older_file, no_names, no_tokenizer_json)
    if (kind, files) != (llama, no_tokenizer_json)])
def test_a_tokenizer_without_pad_or_end_token_loads(kind, end, pad, files, questions, tmp_path):
  source, folder = tmp_path / 'source', tmp_path / 'folder'
  source.mkdir(), folder.mkdir()
  theirs = kind(questions, source)
  files(theirs, source, folder)
  ours = load_tokenizer(str(folder))
  wanted = [ids if ids[-1:] == [ours.eos_id] else ids + [ours.eos_id]
            for ids in theirs(TEXTS, split_special_tokens=True)['input_ids']]
  assert rows(ours) == wanted
  assert ours.eos_id == theirs.convert_tokens_to_ids(end)
  # A missing pad token gets an id that no text has.
  assert ours.pad_id == (len(theirs) if pad is None else theirs.convert_tokens_to_ids(pad))
  assert ours.vocab_size == len(theirs) + (pad is None)
  assert ours.decode(ours.encode(questions, 80)) == theirs.batch_decode(
      theirs(questions)['input_ids'], skip_special_tokens=True)

  ours.save(str(tmp_path / 'saved'))
  again = load_tokenizer(str(tmp_path / 'saved'))
  assert rows(again) == wanted
  assert (again.pad_id, again.eos_id, again.vocab_size) == (
      ours.pad_id, ours.eos_id, ours.vocab_size)
  saved = transformers.AutoTokenizer.from_pretrained(tmp_path / 'saved')
  assert saved(TEXTS)['input_ids'] == theirs(TEXTS)['input_ids']
  assert (saved.pad_token_id, saved.eos_token_id) == (ours.pad_id, ours.eos_id)


@pytest.mark.parametrize('kind, as_pad', [(gpt2, '<|endoftext|>'), (llama, '<unk>')])
def test_a_pad_token_that_texts_have_too_is_not_used(kind, as_pad, questions, tmp_path):
  """Otherwise the end token of an answer would have no loss."""
  theirs = kind(questions, tmp_path)
  theirs.pad_token = as_pad
  theirs.save_pretrained(tmp_path)
  ours = load_tokenizer(str(tmp_path))
  assert ours.pad_id == len(theirs) == ours.vocab_size - 1
  assert ours.eos_id == theirs.eos_token_id


def test_numbers_beyond_the_number_of_entries_fit_an_embedding(tmp_path):
  vocabulary = {'</s>': 0, '<pad>': 1, 'red': 9}
  tokenizers.Tokenizer(models.WordLevel(vocabulary, '</s>')).save(str(tmp_path / 'tokenizer.json'))
  ours = load_tokenizer(str(tmp_path))
  assert rows(ours, ['red']) == [[9, 0]]
  assert ours.vocab_size == 10


@pytest.mark.parametrize('files', [
    {}, {'tokenizer.json': '{"truncated'}, {'tokenizer_config.json': '{}'},
    {'tokenizer_config.json': '{"tokenizer_class": "T5Tokenizer"}'},
    {'spiece.model': 'not a model', 'tokenizer_config.json': '{"tokenizer_class": "T5Tokenizer"}'},
    {'vocab.json': '{"a', 'merges.txt': '', 'config.json': '{"model_type": "gpt2"}'}],
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


@pytest.mark.parametrize('name', ['tokenizer_config.json', 'special_tokens_map.json'])
@pytest.mark.parametrize('content', [
    b'{"pad_token": "<pa', b'["<pad>"]', b'{"pad_token": 3}', b'\xff\xfe{}'])
def test_a_broken_file_beside_a_tokenizer_is_named_in_one_line(
    name, content, learned_folder, tmp_path):
  (tmp_path / 'tokenizer.json').write_bytes((learned_folder / 'tokenizer.json').read_bytes())
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=name) as error:
    load_tokenizer(str(tmp_path))
  assert '\n' not in str(error.value)


# Files that take precedence over tokenizer.json


def folder_of(backend, folder, **files):
  """A folder with tokenizer.json, and JSON files by name (dots as __)."""
  backend.save(str(folder / 'tokenizer.json'))
  for name, content in files.items():
    (folder / f'{name}.json').write_text(json.dumps(content))
  return folder


def word_pieces(lowercase):
  words = '[PAD] [UNK] [CLS] [SEP] [MASK] the capital is paris The red . what'.split()
  backend = tokenizers.Tokenizer(models.WordPiece(
      {word: i for i, word in enumerate(words)}, unk_token='[UNK]'))
  backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
  backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  backend.post_processor = processors.BertProcessing(('[SEP]', 3), ('[CLS]', 2))
  return backend


_BERT = {'tokenizer_class': 'BertTokenizer', 'pad_token': '[PAD]', 'sep_token': '[SEP]',
         'cls_token': '[CLS]', 'unk_token': '[UNK]', 'mask_token': '[MASK]'}
_GPT2 = {'tokenizer_class': 'GPT2Tokenizer', 'eos_token': '<|endoftext|>',
         'unk_token': '<|endoftext|>'}


@pytest.mark.parametrize('kind, config, files', [
    ('bert', _BERT | {'do_lower_case': True}, {}), ('bert', _BERT | {'do_lower_case': False}, {}),
    ('bert', None, {}),  # only by config.json
    ('bert', _BERT | {'tokenizer_class': 'PreTrainedTokenizerFast', 'do_lower_case': True}, {}),
    ('bert', _BERT, {'added_tokens': {'redred': 13, '[NEW]': 14}}),
    ('bert', _BERT, {'special_tokens_map': {'additional_special_tokens': ['<red>']}}),
    ('bert', _BERT | {'added_tokens_decoder': {'13': {
        'content': 'paris the', 'special': False, 'lstrip': True, 'normalized': True}}}, {}),
    ('gpt2', _GPT2 | {'add_prefix_space': True}, {}), ('gpt2', _GPT2, {}),
    ('gpt2', {**_GPT2, 'tokenizer_class': 'PreTrainedTokenizerFast', 'add_prefix_space': True}, {}),
    ('gpt2', {**_GPT2, 'pad_token': '<pad>', 'split_special_tokens': False}, {}),
    ('gpt2', {**_GPT2, 'add_bos_token': True, 'bos_token': '<|endoftext|>'}, {})])
def test_other_files_are_followed_as_autotokenizer_does(
    kind, config, files, questions, tmp_path):
  backend = (word_pieces(lowercase=False) if kind == 'bert'
             else byte_level(questions, ['<|endoftext|>']))
  if config is not None:
    files = files | {'tokenizer_config': config}
  folder = folder_of(backend, tmp_path, config={'model_type': kind}, **files)
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  ours = load_tokenizer(str(folder))
  texts = ['The capital is Paris.', 'the red', 'red', 'redred <red> paris the', 'what is this?']
  wanted = [ids if ids[-1:] == [ours.eos_id] else [*ids, ours.eos_id]
            for ids in theirs(texts, split_special_tokens=True)['input_ids']]
  assert rows(ours, texts) == wanted
  ours.save(str(tmp_path / 'saved'))
  assert rows(load_tokenizer(str(tmp_path / 'saved')), texts) == wanted


# Special tokens in a text


def word_level(special):
  backend = tokenizers.Tokenizer(models.WordLevel(
      {word: i for i, word in enumerate([*special, 'red', '<', '>'])}, special[-1]))
  backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return backend


@pytest.mark.parametrize('make', ['learned', 't5', 'word_level', gpt2, bert, llama],
                         ids=lambda make: getattr(make, '__name__', make))
def test_special_tokens_in_a_text_are_text(
    make, learned, t5_folder, questions, tmp_path):
  if make == 'learned':
    ours = learned
  elif make == 't5':
    ours = load_tokenizer(str(t5_folder))
  elif make == 'word_level':
    word_level(['<pad>', '</s>', '<unk>']).save(str(tmp_path / 'tokenizer.json'))
    ours = load_tokenizer(str(tmp_path))
  else:
    make(questions, tmp_path).save_pretrained(tmp_path)
    ours = load_tokenizer(str(tmp_path))
  marks = ['</s>', '<pad>', '[SEP]', '[PAD]', '[CLS]', '[MASK]', '<extra_id_0>', '<|endoftext|>',
           '<s>']
  for mark in marks:
    for text in (mark, f'red {mark} red', f'{mark}{mark}'):
      row = rows(ours, [text])[0]
      assert not {ours.pad_id, ours.eos_id} & set(row[:-1]), text
      assert row[-1] == ours.eos_id and len(row) > len(rows(ours, [''])[0])


# Training on


OLD = ['what color is the circle', 'is the square red', 'how many circles are there'] * 3
NEW = ['is the lung clear', 'what shows the chest x-ray', 'is the chest clear, or not'] * 3


def test_a_grown_tokenizer_reads_what_it_knew_as_before_and_has_tokens_for_new_words(tmp_path):
  old = train_tokenizer(OLD)
  new = old.grown(NEW, 8000)
  assert {token: new.vocabulary[token] for token in old.vocabulary} == old.vocabulary
  np.testing.assert_array_equal(new.encode(OLD, 16), old.encode(OLD, 16))
  words = [' '.join(text.replace(',', ' , ').replace('-', ' - ').split()) for text in NEW]
  assert (new.lengths(NEW) <= [len(text.split()) + 2 for text in words]).all()
  assert old.lengths(NEW).sum() > 2 * new.lengths(NEW).sum()
  assert new.decode(new.encode(NEW, 16)) == NEW
  assert 2 in old.encode(NEW, 64) and 2 not in new.encode(NEW, 64)  # <unk>
  new.save(tmp_path)
  loaded = load_tokenizer(tmp_path)
  assert loaded.vocabulary == new.vocabulary
  np.testing.assert_array_equal(loaded.encode(NEW, 16), new.encode(NEW, 16))
  # It may grow again.
  assert loaded.grown(OLD + NEW, 8000).vocabulary == new.vocabulary


def test_a_full_tokenizer_grows_by_letters_alone():
  old = train_tokenizer(OLD, 30)
  new = old.grown(NEW, 30)
  letters = set(''.join(NEW)) - {' '} - set(old.vocabulary)
  assert new.vocabulary.keys() - old.vocabulary.keys() == letters
  np.testing.assert_array_equal(new.encode(OLD, 32), old.encode(OLD, 32))


@pytest.mark.parametrize('room', [10, 40, 120])
def test_what_is_learned_later_is_as_good_as_what_the_library_learns(questions, room):
  """Not equal: they order equally frequent pairs differently."""
  letters = train_tokenizer(questions, 3)
  size = letters.vocab_size + room
  ours, theirs = letters.grown(questions, size), train_tokenizer(questions, size)
  assert ours.vocab_size == theirs.vocab_size == size
  assert ours.lengths(questions).sum() <= 1.01 * theirs.lengths(questions).sum()
