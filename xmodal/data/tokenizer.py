"""Converts text to token ids and back, with tokenizer files in the HuggingFace layout."""

import collections
from collections.abc import Iterable, Mapping, Sequence
import itertools
import json
import os

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from xmodal import paths
from xmodal.data.merges import learn_merges
from xmodal.data.words import NORMALIZER, PRE_TOKENIZER, Words
from xmodal.errors import UserError
from xmodal.options import Option

_SPECIAL = {'pad_token': '<pad>', 'eos_token': '</s>', 'unk_token': '<unk>'}
# Usual names of these tokens if no file states them: published GPT-2 and BERT folders.
_USUAL_TOKENS = {'pad_token': ('<pad>', '[PAD]'), 'eos_token': ('</s>', '[SEP]', '<|endoftext|>')}
_TOKEN_KEYS = ('pad_token', 'eos_token', 'sep_token', 'unk_token')
# Contents of a tokenizer_config.json written by `Tokenizer.save`; the rest is in tokenizer.json.
_OUR_CLASS, _OUR_KEYS = 'PreTrainedTokenizerFast', {'tokenizer_class', *_SPECIAL}
_AT_ONCE = 1000  # words of a text that a vocabulary is learned from
_HIDDEN = '\U0010ffff'  # a noncharacter, which no text contains

OPTIONS = {
    'tokenizer': Option('', "Folder of a HuggingFace tokenizer; '': learned from the data."),
    'vocab_size': Option(8000, 'Largest vocabulary of a learned tokenizer.', low=1)}


class Tokenizer:
  """Encodes texts as fixed-length rows of token ids, each text closed by an end token.

  A special token written out in a text ("</s>") is ordinary text.

  Attributes:
    vocab_size: one more than the highest token id, special tokens included.
    pad_id, eos_id: ids of the padding and of the end-of-text token.
  """

  def __init__(self, backend: tokenizers.Tokenizer, pad_token: str, eos_token: str):
    """Wraps a `tokenizers` tokenizer; raises UserError if a token is unknown to it."""
    self._backend = backend
    self._eos_token = eos_token
    self._reader = _without_specials(backend, {pad_token, eos_token})
    # Not the number of entries: a vocabulary with gaps has higher ids.
    self.vocab_size = _size(backend)
    self.pad_id = self._number_of(pad_token)
    self.eos_id = self._number_of(eos_token)

  def _number_of(self, token: str) -> int:
    number = self._backend.token_to_id(token)
    if number is None:
      raise _unknown(token, self.vocab_size)
    return number

  @property
  def vocabulary(self) -> dict[str, int]:
    """Numbers of all tokens by their strings, special ones included."""
    return self._backend.get_vocab(with_added_tokens=True)

  @property
  def state(self) -> str:
    """The content of its tokenizer.json."""
    return self._backend.to_str()

  @property
  def reading_state(self) -> str:
    """As `state`, of the tokenizer that reads texts, in which no special token can be written."""
    return self._reader.to_str()

  def lengths(self, texts: Sequence[str]) -> np.ndarray:
    """Number of tokens of each text, including the end token: int64 [N]."""
    return np.array([len(ids) for ids in self._encode(texts)], np.int64)

  def word_lengths(self, words: Sequence[str]) -> np.ndarray | None:
    """Number of tokens of each word of xmodal.data.words, int64 [N]; a text has those of its words
    and an end token. None if this tokenizer divides texts otherwise."""
    state = json.loads(self._backend.to_str())
    parts = ((self._backend.normalizer, NORMALIZER), (self._backend.pre_tokenizer, PRE_TOKENIZER))
    if (state['model']['type'] != 'BPE' or not all(t['special'] for t in state['added_tokens'])
        or any((part and part.__getstate__()) != ours.__getstate__() for part, ours in parts)):
      return None
    model = self._reader.model
    return np.array([len(model.tokenize(word)) for word in words], np.int64)

  def encode(self, texts: Sequence[str], max_length: int) -> np.ndarray:
    """Token ids, int32 [N, max_length]; texts that are too long are cut before the end token."""
    rows = np.full((len(texts), max_length), self.pad_id, np.int32)
    for row, ids in zip(rows, self._encode(texts)):
      ids = ids if len(ids) <= max_length else ids[:max_length - 1] + [self.eos_id]
      row[:len(ids)] = ids
    return rows

  def _encode(self, texts):
    encoded = self._reader.encode_batch(list(texts))
    for ids in (e.ids for e in encoded):
      yield ids if ids and ids[-1] == self.eos_id else ids + [self.eos_id]

  def decode(self, tokens: np.ndarray) -> list[str]:
    """Decodes rows of token ids [N, L], each up to its first end token."""
    texts = []
    for row in np.asarray(tokens):
      ends = np.flatnonzero(row == self.eos_id)
      texts.append(row[:ends[0]].tolist() if ends.size else row.tolist())
    return [t.strip() for t in self._backend.decode_batch(texts, skip_special_tokens=True)]

  def grown(self, texts: Iterable[str], vocab_size: int) -> 'Tokenizer':
    """One that `train_tokenizer` might have gone on to, had it met these texts after its own.

    Its tokens keep their numbers. It reads a text of tokens alone that this one has as this one
    does, where this one had no more to join; words that this one spells in pieces become tokens.

    Args:
      texts: to learn from. Every letter in them becomes a token.
      vocab_size: most tokens, letters apart.
    """
    state = json.loads(self._backend.to_str())
    model, words = state['model'], collections.Counter()
    for text in texts:
      text = self._backend.normalizer.normalize_str(text)
      words.update(word for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(text))
    number = itertools.count(self.vocab_size)
    for letter in sorted({letter for word in words for letter in word} - model['vocab'].keys()):
      model['vocab'][letter] = next(number)
    spelled = tokenizers.Tokenizer.from_str(json.dumps(state)).model
    merges = learn_merges({tuple(piece.value for piece in spelled.tokenize(word)): count
                           for word, count in words.items()},
                          model['vocab'].keys(), vocab_size - len(model['vocab']))
    model['vocab'] |= {a + b: next(number) for a, b in merges}
    model['merges'] = [*_pairs(model['merges']), *merges]
    pad = self._backend.id_to_token(self.pad_id)
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(state)), pad, self._eos_token)

  def save(self, folder: str) -> None:
    """Writes a folder that `transformers.AutoTokenizer.from_pretrained` loads."""
    os.makedirs(folder, exist_ok=True)
    self._backend.save(os.path.join(folder, 'tokenizer.json'))
    names = {'pad_token': self._backend.id_to_token(self.pad_id), 'eos_token': self._eos_token}
    if self._backend.token_to_id(_SPECIAL['unk_token']) is not None:
      names['unk_token'] = _SPECIAL['unk_token']
    # The class that transformers uses for a bare `tokenizers` file. No maximum
    # length is stated: that depends on the model.
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', **names}
    with open(os.path.join(folder, 'tokenizer_config.json'), 'w', encoding='utf-8') as f:
      json.dump(config, f, indent=2)


def _size(backend):
  return 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)


def _unknown(token, size):
  return UserError(f'tokenizer: token {token!r} is not in its vocabulary of {size} entries; take a '
                   'tokenizer whose files name a pad and an end token')


def _without_specials(backend, named):
  """A copy of a tokenizer that reads special tokens in a text as ordinary text.

  `encode_special_tokens` (split_special_tokens of transformers) does not suffice for Unigram and
  WordLevel models, whose vocabulary has "</s>" too. So special tokens are renamed to strings that
  no text contains and keep their ids, as sentencepiece keeps its control symbols out of texts.

  Args:
    backend: tokenizer of the `tokenizers` library; unchanged.
    named: special tokens besides those that the tokenizer marks as special.
  """
  state = json.loads(backend.to_str())
  special = named | {added['content'] for added in state['added_tokens'] if added['special']}
  hidden = {token: _HIDDEN + token for token in special}
  for added in state['added_tokens']:
    added['content'] = hidden.get(added['content'], added['content'])
  model = state['model']
  if isinstance(model['vocab'], dict):
    model['vocab'] = {hidden.get(token, token): number for token, number in model['vocab'].items()}
  else:  # Unigram
    model['vocab'] = [(hidden.get(token, token), score) for token, score in model['vocab']]
  if model.get('unk_token') is not None:
    model['unk_token'] = hidden.get(model['unk_token'], model['unk_token'])
  if 'merges' in model:
    model['merges'] = [pair for pair in _pairs(model['merges'])
                       if special.isdisjoint((*pair, ''.join(pair)))]
  reader = tokenizers.Tokenizer.from_str(json.dumps(state))
  reader.encode_special_tokens = True
  return reader


def _pairs(merges):
  """Merges as pairs, which files of other years write as texts."""
  return [merge.split(' ') if isinstance(merge, str) else merge for merge in merges]


def train_tokenizer(texts: Iterable[str], vocab_size: int = 8000) -> Tokenizer:
  """Learns a lower-casing byte-pair vocabulary (Sennrich et al., 2016) from a data set's own text.

  Frequent words become one token each, rare ones are split into pieces; the
  same texts always give the same vocabulary. Ids as in T5: pad 0, end 1,
  unknown 2.
  """
  words, counts = Words(), collections.Counter()
  for text in texts:
    counts.update(words.numbers(text))
  return tokenizer_of({words.words[number]: count for number, count in counts.items()}, vocab_size)


def tokenizer_of(counts: Mapping[str, int], vocab_size: int) -> Tokenizer:
  """As train_tokenizer, from how often each word of xmodal.data.words occurs."""
  backend = tokenizers.Tokenizer(models.BPE(unk_token=_SPECIAL['unk_token']))
  # The library counts words itself: they are given to it as often as they occur.
  backend.pre_tokenizer = pre_tokenizers.Split(' ', 'removed')
  trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(_SPECIAL.values()),
                                show_progress=False)
  backend.train_from_iterator(_repeated(counts), trainer)
  backend.normalizer, backend.pre_tokenizer = NORMALIZER, PRE_TOKENIZER
  backend.decoder = decoders.Metaspace()
  eos = _SPECIAL['eos_token']
  backend.post_processor = processors.TemplateProcessing(
      single=f'$A {eos}', special_tokens=[(eos, backend.token_to_id(eos))])
  return learned_tokenizer(backend)


def learned_tokenizer(backend: tokenizers.Tokenizer) -> Tokenizer:
  """A tokenizer of tokenizer_of, from its backend."""
  return Tokenizer(backend, _SPECIAL['pad_token'], _SPECIAL['eos_token'])


def _repeated(counts):
  """Texts of words with spaces between them, each word as often as counted. No word has a space."""
  text, room = [], _AT_ONCE
  for word, count in counts.items():
    while count:
      times = min(count, room)
      text.append(f'{word} ' * times)
      count, room = count - times, room - times
      if not room:
        yield ''.join(text)
        text, room = [], _AT_ONCE
  yield ''.join(text)


def load_tokenizer(folder: str) -> Tokenizer:
  """Loads any tokenizer from its HuggingFace files.

  `transformers.AutoTokenizer` reads them, because `tokenizer_config.json`, `added_tokens.json` and
  `config.json` may contradict `tokenizer.json`. `tokenizer.json` is read directly if it is the only
  file, or if `Tokenizer.save` wrote the others. Without an end token (BERT), the separator ends a
  text. A missing pad token (GPT-2, LLaMA) is added, with a new id.

  Raises:
    UserError: the folder holds no tokenizer, or one without vocabulary, or its
      files name a token that the vocabulary lacks.
  """
  folder = paths.local(folder, 'tokenizer')
  if not os.path.isdir(folder):
    raise UserError(f'tokenizer: no folder {folder}; give one that holds tokenizer.json')
  stated = {file: _read_object(os.path.join(folder, file)) for file in _OTHER_FILES
            if os.path.exists(os.path.join(folder, file))}
  path = os.path.join(folder, 'tokenizer.json')
  whole = os.path.exists(path)
  if whole and _is_self_contained(stated):
    backend, names = _load_alone(path, stated)
  else:
    backend, names = _load_any(folder, whole)
    if whole and (end := names['eos_token']) and not _is_known(end, _read_backend(path), stated):
      raise _unknown(end, _size(backend))
  backend.no_padding()
  backend.no_truncation()
  eos = names['eos_token'] or names['sep_token'] or _usual_token(backend, 'eos_token')
  pad = names['pad_token']
  # Padding is masked in the model and the loss, so the end token or a text token cannot serve.
  if pad in (None, eos, names['unk_token']):
    pad = _usual_token(backend, 'pad_token')
  return Tokenizer(backend, pad, eos)


def _usual_token(backend, key):
  """The first usual token in the vocabulary; if it has none, one is added."""
  for token in _USUAL_TOKENS[key]:
    if backend.token_to_id(token) is not None:
      return token
  backend.add_special_tokens([_SPECIAL[key]])
  return _SPECIAL[key]


_OTHER_FILES = (
    'config.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json')


def _is_self_contained(stated):
  """Whether the files beside tokenizer.json, {name: content}, only add names of special tokens."""
  config = stated.get('tokenizer_config.json')
  if config is None:
    return not stated
  return (config.get('tokenizer_class') == _OUR_CLASS and config.keys() <= _OUR_KEYS
          and stated.keys() <= {'tokenizer_config.json', 'config.json'})


def _load_alone(path, stated):
  """(backend, {key: token or None}) of a tokenizer.json."""
  config = stated.get('tokenizer_config.json', {})
  return _read_backend(path), {key: config.get(key) for key in _TOKEN_KEYS}


def _read_backend(path):
  try:
    return tokenizers.Tokenizer.from_file(path)
  except Exception as error:  # the library raises bare Exceptions
    raise UserError(f'tokenizer: {path} cannot be read ({error}); copy it again') from error


def _is_known(token, backend, stated):
  """Whether the files give a token an id; transformers adds one for any token they name."""
  decoder = stated.get('tokenizer_config.json', {}).get('added_tokens_decoder') or {}
  added = [t.get('content') if isinstance(t, dict) else t for t in decoder.values()]
  return (backend.token_to_id(token) is not None or token in added
          or token in stated.get('added_tokens.json', {}))


def _read_object(path):
  """Reads a JSON object whose special tokens must be text, or objects with a text `content`."""
  try:
    with open(path, encoding='utf-8') as f:
      config = json.load(f)
  except (OSError, ValueError) as error:  # ValueError: not JSON, or not UTF-8
    raise UserError(f'tokenizer: {path} cannot be read ({error}); copy it again') from error
  if not isinstance(config, dict):
    raise UserError(f'tokenizer: {path} holds no JSON object; copy it again')
  for key in _TOKEN_KEYS:
    token = config.get(key)
    token = token.get('content') if isinstance(token, dict) else token
    if token is not None and not isinstance(token, str):
      raise UserError(f'tokenizer: {path} has {key} {token!r}; wanted text: copy it again')
  return config


def _load_any(folder, whole):
  """(backend, {key: token or None}) as transformers reads a folder.

  whole: whether it holds tokenizer.json.
  """
  from transformers import AutoTokenizer  # 5 s to import
  try:
    # If trust_remote_code were not set, it would prompt on the terminal.
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
  except Exception as error:  # of any type, including bare ones from `tokenizers`
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f'tokenizer: {folder} holds none that can be loaded ({reason}); wanted '
                    'tokenizer.json or spiece.model with tokenizer_config.json') from error
  backend = getattr(loaded, 'backend_tokenizer', None)
  # T5Tokenizer without its vocabulary file silently becomes a stub with little
  # more than its 100 sentinels.
  if backend is None or not whole and len(loaded) - len(loaded.all_special_ids) < 16:
    raise UserError(f'tokenizer: {folder} holds no vocabulary; wanted tokenizer.json or '
                    'spiece.model')
  return backend, {key: getattr(loaded, key) for key in _TOKEN_KEYS}
