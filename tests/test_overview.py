"""Vocabularies and notes come from one pass over the examples, and packs keep what it found."""

import collections
import dataclasses
import json
import pickle
import random

import numpy as np
from PIL import Image
import pytest
import tiny
import tokenizers
from tokenizers import trainers

from xmodal.bench import data_size
from xmodal.data import pipeline
from xmodal.data.example import Example, Object
from xmodal.data.overview import Gathering, Overview, Ragged, Sampled, gathered, overview_of
from xmodal.data.pack import pack, records
from xmodal.data.sources import json_stream
from xmodal.data.sources.pack import read_pack
from xmodal.data.sources.visual_genome import read_visual_genome
from xmodal.data.texts import texts_of
from xmodal.data.tokenizer import Tokenizer, train_tokenizer
from xmodal.data.words import NORMALIZER, PRE_TOKENIZER, Words
from xmodal.tasks import lengths
from xmodal.tasks.vqa.answers import make_answer_list
from xmodal.train.plan import Plan

TEXTS = ['is it red?', 'Is it  RED', ' two', 'two ', '', ' ', "it's a t-shirt", 'é\u0301ß ﬁne',
         'a\tb\nc', '漢字 is?it', '\u3000x \u00a0y', '</s> <pad>', 'red red red?', '--']


def examples(count, seed=0):
  rng = random.Random(seed)
  names = ['cat', 'red  dog', 'Écran', 'gauche']
  return [Example(
      f'{i}.png', question=rng.choice(TEXTS), image_id=i,
      answers=tuple(rng.choices(['Yes', 'yes', 'no', 'a no', 't-shirt', 'a long answer it is'],
                                k=rng.choice([0, 1, 3, 10]))),
      captions=tuple(rng.choices(TEXTS, k=rng.randrange(3))), number=rng.choice([None, 0.25, 7]),
      expression=rng.choice([None, Object('the red cat', (0., 0., 2., 2.))]),
      objects=rng.choice([None, (), tuple(
          Object(rng.choice(names), (0., 0., 2., 2.), rng.random() < .2,
                 category_id=rng.choice([None, 3, 4])) for _ in range(rng.randrange(4)))]))
          for i in range(count)]


def facts(overview):
  """All that an overview has, its counts in their order."""
  found = {}
  for field in dataclasses.fields(overview):
    value = getattr(overview, field.name)
    if isinstance(value, Ragged):
      value = value.numbers.tolist(), value.lengths.tolist()
    found[field.name] = value.tolist() if isinstance(value, np.ndarray) else value
  return found | {name: list(found[name]) for name in ('words', 'names')} | {
      'counts': (found['words'], found['names'])}


def test_words_are_those_that_the_tokenizers_library_learns_from():
  words = Words()
  for text in TEXTS * 2:
    expected = [w for w, _ in PRE_TOKENIZER.pre_tokenize_str(NORMALIZER.normalize_str(text))]
    assert [words.words[number] for number in words.numbers(text)] == expected
  for size in (10, 40, 60, 90):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token='<unk>'))
    backend.normalizer, backend.pre_tokenizer = NORMALIZER, PRE_TOKENIZER
    backend.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(
        vocab_size=size, special_tokens=['<pad>', '</s>', '<unk>'], show_progress=False))
    learned = train_tokenizer(TEXTS * 3, size)
    assert json.loads(learned.state)['model'] == json.loads(backend.to_str())['model']
    of_words = learned.word_lengths(words.words)
    assert [1 + sum(of_words[n] for n in words.numbers(text)) for text in TEXTS
            ] == learned.lengths(TEXTS).tolist()


def test_an_overview_counts_what_the_examples_have():
  source = examples(400)
  found, words = overview_of(source), collections.Counter()
  for example in source:
    for text in texts_of(example):
      words.update(w for w, _ in PRE_TOKENIZER.pre_tokenize_str(NORMALIZER.normalize_str(text)))
  assert found.words == words and len(found) == 400
  assert found.names == collections.Counter(o.name for e in source for o in e.objects or ())
  assert found.num_objects == collections.Counter(
      len(e.objects) for e in source if e.objects is not None)
  for fields in (('question',), ('question', 'answers'), ('objects', 'expression'), ('eeg',)):
    assert found.count(*fields) == sum(e.has(*fields) for e in source)
  for number, example in enumerate(source):
    assert [found.answers[n] for n in found.given.row(number)] == list(example.answers)
  assert found.num_captions.tolist() == [len(e.captions) for e in source]
  assert found.numbers.tolist() == [e.number for e in source if e.number is not None]
  assert found.foreign is None


def test_equal_examples_may_be_added_at_once():
  one_by_one, at_once = Gathering(languages=True), Gathering(languages=True)
  for number, example in enumerate(examples(100)):
    at_once.add(example, 1 + number % 3)
    for _ in range(1 + number % 3):
      one_by_one.add(example)
  assert facts(at_once.overview()) == facts(one_by_one.overview())


def test_an_overview_is_read_as_it_was_written(tmp_path):
  source, gathering = examples(50), Gathering(languages=True)
  for example in source:
    gathering.add(example)
  found, path = gathering.overview(), tmp_path / 'overview'
  with open(path, 'wb') as f:
    found.save(f, 'these')
  kept = Overview.load(str(path), 'these')
  assert facts(kept) == facts(found)
  assert make_answer_list(Sampled(source, kept), 9) == make_answer_list(source, 9)
  assert Overview.load(str(path), 'others') is None
  path.write_bytes(path.read_bytes()[:-50])
  assert Overview.load(str(path), 'these') is None
  assert Overview.load(str(tmp_path / 'none'), 'these') is None


@pytest.mark.parametrize('divides_alike', [True, False])
def test_numbers_of_tokens_come_from_the_overview_as_from_the_texts(divides_alike, monkeypatch):
  if not divides_alike:
    monkeypatch.setattr(Tokenizer, 'word_lengths', lambda *_: None)
  source = examples(300)
  captions = [[text for text in e.captions if text.strip()] for e in source]
  tokenizer = train_tokenizer([text for e in source for text in texts_of(e)], 60)

  def counts(texts):
    return tokenizer.lengths(list(texts)).tolist()

  assert lengths.question_counts(tokenizer, source).tolist() == counts(
      e.question for e in source if e.question)
  for most in (1, 2, None):
    assert lengths.caption_counts(tokenizer, source, most).tolist() == counts(
        text for texts in captions for text in texts[:most])
  assert lengths.num_captions(overview_of(source)).tolist() == list(map(len, captions))


@pytest.fixture
def packed(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  for split, count in (('train', 300), ('val', 10)):
    lines = []
    for i, example in enumerate(examples(count, seed=count)):
      Image.new('RGB', (32, 32)).save(tmp_path / f'{split}{i}.png')
      lines.append({'image': f'{split}{i}.png', 'question': example.question.strip() or 'what?',
                    'answers': list(example.answers) or ['yes'], 'number': i % 7,
                    'caption': [c for c in example.captions if c.strip()] or ['a thing'],
                    'objects': [{'name': o.name, 'box': list(o.box)}
                                for o in example.objects or ()]})
    (tmp_path / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  assert pack.main([str(tmp_path), '--output', str(tmp_path / 'pack')]) == 0
  return tmp_path / 'pack'


@pytest.mark.parametrize('tasks', [('vqa', 'objects'), ('captioning', 'retrieval', 'regression')])
def test_the_first_run_on_a_pack_reads_few_examples(packed, tasks, monkeypatch):
  reads, read = [], records.RecordReader.read
  monkeypatch.setattr(records.RecordReader, 'read', lambda *a: reads.append(1) or read(*a))

  def plan(**values):
    return Plan(tiny.changed(
        data__source='pack', data__root=str(packed), data__augment__mirror=True,
        mixer__tasks=tasks, mixer__weights=(1.0,) * len(tasks), **values), 'unused')

  with_it = plan()
  few = len(reads)
  for path in packed.glob('*-overview.zip'):
    path.unlink()
  without = plan(train__steps=7, seed=5)  # another place in the cache
  assert few < 150 and len(reads) > few + 300
  assert with_it.notes == without.notes
  assert with_it.tokenizer.state == without.tokenizer.state
  for name in tasks:
    assert with_it.tasks[name].labels() == without.tasks[name].labels()
    assert with_it.tasks[name].units == without.tasks[name].units
  assert read_pack(str(packed), 'train').overview is None


def test_a_pack_without_answers_is_not_searched_for_them(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  Image.new('RGB', (32, 32)).save(tmp_path / 'a.png')
  for split, answers in (('train', ['yes']), ('val', [])):
    (tmp_path / f'{split}.jsonl').write_text('\n'.join(json.dumps(
        {'image': 'a.png', 'question': f'is it {i}?', 'answers': answers}) for i in range(400)))
  assert pack.main([str(tmp_path), '--output', str(tmp_path / 'pack')]) == 0
  reads, read = [], records.RecordReader.read
  monkeypatch.setattr(records.RecordReader, 'read', lambda *a: reads.append(a[1]) or read(*a))
  plan = Plan(tiny.changed(data__source='pack', data__root=str(tmp_path / 'pack'),
                           mixer__tasks=('vqa',), mixer__weights=(1.0,)), 'unused')
  assert plan.evaluation.scored == [] and len(reads) < 300


def test_records_are_read_as_json_reads_them(tmp_path, monkeypatch):
  rows = [{'a': 'x"]},', 'b': [1, {'c': None}]}, 3, -1.5e3, 'é\n', [], {}, True, 12345]
  path = tmp_path / 'file.json'
  for chunk in (1, 2, 7, 1000):
    monkeypatch.setattr(json_stream, '_CHUNK', chunk)
    for indent in (None, 1):
      path.write_text(json.dumps(rows, indent=indent), encoding='utf-8-sig')
      assert list(json_stream.records(str(path))) == rows
      path.write_text(json.dumps({'info': {'n': rows}, 'rows': rows, 'more': 1}, indent=indent))
      assert list(json_stream.records(str(path), 'rows')) == rows
      path.write_text('{"rows": [] }')
      assert list(json_stream.records(str(path), 'rows')) == []


@pytest.mark.parametrize('text', [
    '', '[1, 2', '[1 2]', '[1,]', '[1] 2', '{"rows": [1]', '{"rows": [1],}', '{"rows": [1], 3: 4}',
    '{"rows": [1], "rows": [2]}', '{"other": [1]}', '{"rows": {}}', '{"rows": [nul]}', '\xff'])
def test_other_files_are_left_to_json(tmp_path, text):
  path = tmp_path / 'file.json'
  path.write_bytes(text.encode('latin-1'))
  with pytest.raises(json_stream.Irregular):
    list(json_stream.records(str(path), 'rows' if '{' in text else ''))




@pytest.mark.parametrize('without', ['', 'objects.json', 'region_descriptions.json'])
def test_the_overview_of_visual_genome_is_that_of_its_examples(tmp_path, without):
  data_size.write_regions(str(tmp_path), 40, 200)
  path = tmp_path / 'region_descriptions.json'
  regions = json.loads(path.read_text())
  del regions[3]  # a picture without any
  for number, phrase in ((5, 'Écran  d’or'), (7, ' a red-ish "cat" '), (7, 'x')):
    regions[number]['regions'][1]['phrase'] = phrase
  regions[9]['regions'] = regions[9]['regions'][:1]
  path.write_text(json.dumps(regions))
  content = json.loads((tmp_path / 'image_data.json').read_text())
  for key in ('width', 'height'):
    content[2].pop(key)
  (tmp_path / 'image_data.json').write_text(json.dumps(content))
  if without:
    (tmp_path / without).unlink()
  source = read_visual_genome(str(tmp_path), 'train+val+test')
  found, expected = source.overview, gathered([source[i] for i in range(len(source))])
  assert facts(found) == facts(expected)
  assert found.filled and len(found) == len(source) and pipeline.sample(source) is source
  assert 'overview' not in vars(pickle.loads(pickle.dumps(source)))


def test_made_up_files_of_visual_genome_are_read(tmp_path):
  data_size.write_regions(str(tmp_path), 40, 200)
  source = read_visual_genome(str(tmp_path), 'train+val+test')
  assert len(source) == 200 and not source.faults and len(source[0].objects) == 35
  assert len({example.expression.name for example in source}) > 20
