"""Whatever a field of a published format holds, reading returns examples or fails in one line."""

import copy
import json
import pickle
import sys

from PIL import Image
import pytest

from xmodal.data import check, fields
from xmodal.data.sources.aokvqa import read_aokvqa
from xmodal.data.sources.clevr import read_clevr
from xmodal.data.sources.coco import read_coco
from xmodal.data.sources.gqa import read_gqa
from xmodal.data.sources.jsonl import read_jsonl
from xmodal.data.sources.karpathy import read_coco_karpathy
from xmodal.data.sources.okvqa import read_okvqa
from xmodal.data.sources.refcoco import read_refcoco
from xmodal.data.sources.visual_genome import read_visual_genome
from xmodal.data.sources.vizwiz import read_vizwiz
from xmodal.data.sources.vqa_rad import read_vqa_rad
from xmodal.data.sources.vqa_v2 import read_vqa_v2
from xmodal.errors import UserError
from xmodal.metrics.detection import coco_files, number_categories


def _nested(depth):
  value = []
  for _ in range(depth):
    value = [value]
  return value


# Near the depth at which parsing and printing a value fail.
_DEEP = _nested(sys.getrecursionlimit() - 120)
_ODD = [None, True, False, 0, 1, -1, 7.0, 1.5, 10**400, 1e300, float('nan'), float('inf'), '', ' ',
        '7', '\ud83d', 'a\0b', 'a\x1bb', 'a\nb', 'x' * 5000, '../..', [], [1], ['a'], {}, {'a': 1},
        [None], [[1, 2, 3, 4]], _DEEP]

_JSONL = {'train.jsonl': {
    'image': '7.jpg', 'image_id': 7, 'question': 'q?', 'answers': ['a'], 'question_id': 1,
    'question_type': 't', 'caption': ['c'], 'objects': [
        {'box': [1, 2, 3, 4], 'name': 'cat', 'ignore': False}],
    'expression': {'box': [1, 2, 3, 4], 'name': 'the cat'}, 'number': 3, 'reason': 'r',
    'made': False}}
_COCO = {
    'annotations/instances_train.json': {
        'images': [{'id': 7, 'file_name': '7.jpg', 'width': 60, 'height': 40}],
        'annotations': [
            {'id': 1, 'image_id': 7, 'category_id': 1, 'bbox': [1, 2, 3, 4], 'area': 12,
             'iscrowd': 0},
            {'id': 2, 'image_id': 7, 'category_id': 2, 'bbox': [1, 2, 3, 4]}],
        'categories': [{'id': 1, 'name': 'cat'}, {'id': 2, 'name': 'dog'}]},
    'annotations/captions_train.json': {
        'images': [{'id': 7, 'file_name': '7.jpg'}],
        'annotations': [{'id': 5, 'image_id': 7, 'caption': 'A cat.'}]}}
_VQA = {
    'v2_OpenEnded_mscoco_train2014_questions.json': {
        'questions': [{'question_id': 1, 'image_id': 7, 'question': 'Who?'}]},
    'v2_mscoco_train2014_annotations.json': {'annotations': [
        {'question_id': 1, 'image_id': 7, 'answer_type': 'other',
         'answers': [{'answer': 'a'}, {'answer': 'b'}]}]}}
_RAD = {'VQA_RAD Dataset Public.json': [
    {'qid': 1, 'qid_linked_id': 'x', 'phrase_type': 'freeform', 'image_name': '7.jpg',
     'question': 'Where?', 'answer': 'here', 'answer_type': 'OPEN'}]}
_GENOME = {
    'image_data.json': [{'image_id': 7, 'width': 60, 'height': 40}],
    'objects.json': [{'image_id': 7, 'objects': [
        {'object_id': 1, 'names': ['cat'], 'x': 1, 'y': 2, 'w': 3, 'h': 4}]}],
    'region_descriptions.json': [{'id': 7, 'regions': [
        {'region_id': 1, 'phrase': 'the cat', 'x': 1, 'y': 2, 'width': 3, 'height': 4}]}]}
_CLEVR = {'questions/CLEVR_train_questions.json': {'questions': [
    {'question_index': 1, 'image_filename': '7.jpg', 'question': 'Who?', 'answer': 'a',
     'program': [{'function': 'scene'}, {'function': 'exist'}]}]}}
_GQA = {
    'train_balanced_questions.json': {'1': {
        'imageId': '7', 'question': 'Who?', 'answer': 'a',
        'types': {'structural': 'query', 'semantic': 'obj'}}},
    'train_sceneGraphs.json': {'7': {'width': 60, 'height': 40, 'objects': {
        '1': {'name': 'cat', 'x': 1, 'y': 2, 'w': 3, 'h': 4}}}}}
_OKVQA = {name.removeprefix('v2_'): content for name, content in _VQA.items()}
_OKVQA['mscoco_train2014_annotations.json'] = {'annotations': [
    {'question_id': 1, 'image_id': 7, 'question_type': 'one', 'answers': [{'answer': 'a'}]}]}
_AOKVQA = {'aokvqa_v1p0_train.json': [
    {'question_id': 'a', 'image_id': 7, 'question': 'Who?', 'direct_answers': ['a'],
     'difficult_direct_answer': False, 'rationales': ['r'], 'choices': ['a', 'b'],
     'correct_choice_idx': 1}]}
_VIZWIZ = {'Annotations/train.json': [
    {'image': '7.jpg', 'question': 'Who?', 'answer_type': 'other',
     'answers': [{'answer': 'a'}, {'answer': 'b'}]}]}
_KARPATHY = {'dataset_coco.json': {'images': [
    {'split': 'train', 'filename': '7.jpg', 'filepath': 'images', 'cocoid': 7,
     'sentences': [{'raw': 'A cat.'}, {'raw': 'Cats.'}]}]}}
_REFCOCO = {
    'refs(unc).p': [{'ann_id': 1, 'image_id': 7, 'split': 'train', 'sentences': [
        {'sent': 'the cat'}]}],
    'instances.json': _COCO['annotations/instances_train.json']}
_SETS = {
    'clevr': (_CLEVR, read_clevr, 'train'), 'gqa': (_GQA, read_gqa, 'train'),
    'okvqa': (_OKVQA, read_okvqa, 'train'), 'aokvqa': (_AOKVQA, read_aokvqa, 'train'),
    'vizwiz': (_VIZWIZ, read_vizwiz, 'train'), 'refcoco': (_REFCOCO, read_refcoco, 'train'),
    'karpathy': (_KARPATHY, read_coco_karpathy, 'train'),
    'jsonl': (_JSONL, read_jsonl, 'train'), 'coco': (_COCO, read_coco, 'train'),
    'vqa_v2': (_VQA, read_vqa_v2, 'train'), 'vqa_rad': (_RAD, read_vqa_rad, 'train+val'),
    'visual_genome': (_GENOME, read_visual_genome, 'train+val+test')}
_FOLDERS = ('', 'images', 'images/train', 'train', 'train2017', 'VG_100K', 'train2014',
            'VQA_RAD Image Folder')


def _places(value, path=()):
  """Paths of all values in a value, itself included."""
  yield path
  children = (value.items() if isinstance(value, dict) else
              enumerate(value) if isinstance(value, list) else ())
  for key, child in children:
    yield from _places(child, (*path, key))


def _with(content, path, value):
  if not path:
    return value
  content = copy.copy(content)
  content[path[0]] = _with(content[path[0]], path[1:], value)
  return content


def _write(root, contents):
  for name, content in contents.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(_pickled(content) if name.endswith('.p') else
                              json.dumps(content).encode())


def _pickled(content):
  limit = sys.getrecursionlimit()
  try:
    sys.setrecursionlimit(10 * limit)  # writing a nested value takes several calls a level
    return pickle.dumps(content)
  finally:
    sys.setrecursionlimit(limit)


@pytest.fixture
def folder(tmp_path):
  for name in _FOLDERS:
    (tmp_path / name).mkdir(parents=True, exist_ok=True)
    for file in ('7.jpg', '000000000007.jpg', 'COCO_train2014_000000000007.jpg'):
      Image.new('RGB', (60, 40)).save(tmp_path / name / file)
  return tmp_path


def _texts(example):
  things = [*(example.objects or ()), *filter(None, [example.expression])]
  ids = [i for i in (example.image_id, example.question_id) if isinstance(i, str)]
  names = [thing.name for thing in things]
  assert all(' '.join(name.split()) == name != '' for name in names)
  return [example.image, example.question, *example.answers, example.question_type,
          *example.captions, example.reason, *names, *ids]


@pytest.mark.parametrize('kind', _SETS)
def test_no_value_breaks_the_reading(kind, folder):
  contents, read, split = _SETS[kind]
  ways = set()
  for file, content in contents.items():
    _write(folder, contents)
    good = list(read(str(folder), split))
    assert len(good) == 1
    for path in _places(content):
      for odd in _ODD:
        _write(folder, {file: _with(content, path, odd)})
        try:
          source = read(str(folder), split)
        except UserError as error:
          line = str(error)
          assert line.isprintable() and str(folder) in line, (path, odd)
          ways.add('stopped')
          continue
        faults = getattr(source, 'faults', ())
        assert all(line.isprintable() for line in faults), (path, odd)
        examples = list(source)
        ways.add('said' if faults else 'taken')
        # Only empty or null values are dropped silently.
        assert faults or odd in (None, [], {}) or _amount(examples) >= _amount(good), (path, odd)
        for text in (text for e in examples for text in _texts(e)):
          text.encode()
          assert '\0' not in text and '\x1b' not in text, (path, odd)
        names = sorted({o.name for e in examples for o in e.objects or ()})
        json.dumps(coco_files(examples, [()] * len(examples), number_categories(names, examples)),
                   allow_nan=False)
  assert ways >= {'stopped', 'taken'}


def _amount(examples):
  return sum(len(e.objects or ()) + len(e.answers) + len(e.captions) + bool(e.expression) + 1
             for e in examples)


@pytest.mark.parametrize('kind', _SETS)
@pytest.mark.parametrize('text', [
    '{"images": ' + '1' * 5000 + '}', '[' * 100_000, '{"a": ' * 50_000, '[{"id": "\x00"}]',
    '\ufeff', '[]', '{}', 'null', '3'])
def test_files_that_are_no_data_end_in_one_line(kind, text, folder):
  contents, read, split = _SETS[kind]
  for file in contents:
    _write(folder, contents)
    (folder / file).write_text(text, encoding='utf-8')
    if (file, text) == ('objects.json', '[]'):  # may be empty
      assert len(read(str(folder), split)) == 1
      continue
    with pytest.raises(UserError) as error:
      read(str(folder), split)
    assert str(error.value).isprintable() and file in str(error.value)


def test_ids_that_a_program_wrote_as_fractions_are_joined(folder):
  """As pycocotools joins them: 7.0 is the key 7."""
  of_coco = copy.deepcopy(_COCO)
  for record in of_coco['annotations/instances_train.json']['annotations']:
    record |= {'image_id': 7.0, 'category_id': float(record['category_id'])}
  of_coco['annotations/captions_train.json']['annotations'][0]['image_id'] = 7.0
  of_vqa = copy.deepcopy(_VQA)
  for content in of_vqa.values():
    for record in next(iter(content.values())):
      record |= {'image_id': 7.0, 'question_id': 1.0}
  for changed, kind in ((of_coco, 'coco'), (of_vqa, 'vqa_v2')):
    _, read, split = _SETS[kind]
    _write(folder, _SETS[kind][0])
    wanted = read(str(folder), split)
    _write(folder, changed)
    assert read(str(folder), split) == wanted and len(wanted) == 1


@pytest.mark.parametrize('change, said', [
    (lambda q, a: q.append(dict(q[0], question='Which?')),
     r'records 0 and 1 \(from 0\) both have question_id 1'),
    (lambda q, a: a.append(dict(a[0])), r'annotations.json: records 0 and 1 .* question_id 1'),
    (lambda q, a: a[0].update(image_id=8), 'question_id 1 is about image 8, and about image 7'),
    (lambda q, a: a[0].update(question_id='1'), '1 questions have no annotation'),
    (lambda q, a: q[0].update(image_id='7'), "record 0 .*: image_id is '7', wanted a whole number"),
    (lambda q, a: q[0].pop('image_id'), 'image_id is missing, wanted a whole number'),
    (lambda q, a: a[0].update(answers='yes'), "answers is 'yes', wanted a list"),
    (lambda q, a: a[0]['answers'].append({'answer': None}),
     "answers 3 has 'answer' that is None, wanted text or a number"),
    (lambda q, a: q[0].update(question='a\ud83d'), 'question is .*wanted text without half char'),
    (lambda q, a: q[0].update(question=['Who?']), r"question is \['Who\?'\], wanted text"),
])
def test_vqa_v2_files_that_do_not_fit_together_stop(change, said, folder):
  contents = copy.deepcopy(_VQA)
  change(*(next(iter(content.values())) for content in contents.values()))
  _write(folder, contents)
  with pytest.raises(UserError, match=said):
    read_vqa_v2(str(folder), 'train')


def test_vqa_v2_answers_that_are_numbers_are_read_as_people_write_them(folder):
  contents = copy.deepcopy(_VQA)
  contents['v2_mscoco_train2014_annotations.json']['annotations'][0]['answers'] = [
      {'answer': answer} for answer in (2, 2.0, 0.5, 'two')]
  _write(folder, contents)
  [example] = read_vqa_v2(str(folder), 'train')
  assert example.answers == ('2', '2', '0.5', 'two')


def test_coco_captions_of_other_pictures_stop(folder):
  contents = copy.deepcopy(_COCO)
  of_captions = contents['annotations/captions_train.json']
  of_captions['images'] = [{'id': 7, 'file_name': 'sub\\7.jpg'}, {'id': 8, 'file_name': '8.jpg'}]
  _write(folder, contents)
  [example] = read_coco(str(folder), 'train')
  assert example.captions == ('A cat.',)
  of_captions['images'][0]['file_name'] = '9.jpg'
  _write(folder, contents)
  with pytest.raises(UserError, match="image 7 is '9.jpg', and '7.jpg' in the file of boxes"):
    read_coco(str(folder), 'train')


def test_visual_genome_joins_each_picture_once(folder):
  contents = copy.deepcopy(_GENOME)
  objects = contents['objects.json']
  objects[0]['objects'] = [{k: v for k, v in objects[0]['objects'][0].items() if k != 'object_id'}
                           for _ in range(2)]  # without ids, neither is a duplicate
  objects.append(copy.deepcopy(objects[0]))
  _write(folder, contents)
  [example] = source = read_visual_genome(str(folder), 'train+val+test')
  assert [o.name for o in example.objects] == ['cat', 'cat']
  assert list(source.faults) == [f'{folder}/objects.json: image_id 7 is listed twice, kept once']


def test_texts_that_are_none_are_named_and_the_rest_is_read(folder, capsys):
  contents = copy.deepcopy(_COCO)
  of_boxes, of_captions = contents.values()
  of_boxes['categories'][1]['name'] = 'dog\ud83d'
  of_captions['annotations'] += [{'id': 6, 'image_id': 7, 'caption': 'A \ud83d\ude00 \ud83d'},
                                 {'id': 7, 'image_id': 7, 'caption': 'A \ud83d\ude00'},
                                 {'id': 8, 'image_id': 7, 'caption': 'bell\x07'},
                                 {'id': 5, 'image_id': 7, 'caption': 'Again.'}]
  _write(folder, contents)
  [example] = source = read_coco(str(folder), 'train')
  assert [o.name for o in example.objects] == ['cat']
  assert example.captions == ('A cat.', 'A \U0001f600')
  said = [line.split('.json: ')[1] for line in source.faults]
  assert said == [
      r"categories[1]: name is 'dog\ud83d', wanted text without half characters (\ud800 to \udfff "
      'alone), left out', 'annotation 2: category_id 2 has no name, left out',
      "caption 6: is 'A \U0001f600 \\ud83d', wanted text without half characters (\\ud800 to "
      '\\udfff alone), left out',
      r"caption 8: is 'bell\x07', wanted text without control characters, left out",
      'caption 5: has the id of an earlier one, left out']
  assert check.main([str(folder), '--source', 'coco', '--split', 'train']) == 1
  assert capsys.readouterr().out.splitlines()[:5] == list(source.faults)


def test_jsonl_ids_that_occur_twice(folder):
  same = {'image': '7.jpg', 'image_id': 1, 'question_id': 4}
  lines = [{**same, 'question': 'Who?', 'answers': ['I']},
           {**same, 'question': 'Why?', 'answers': ['no']}]
  path = folder / 'train.jsonl'

  def read(*more):
    path.write_text('\n'.join(map(json.dumps, [*lines, *more])))
    return read_jsonl(str(folder), 'train')

  assert list(read().faults) == [
      f'{path}:2: question_id 4 is also that of line 1, wanted a unique one']
  # Retrieval and COCO's results identify pictures by it.
  with pytest.raises(UserError, match='3: image_id 1 is that of another picture in line 1'):
    read({'image': 'images/7.jpg', 'image_id': 1})


def test_shown_is_one_short_line():
  for value in _ODD:
    assert len(fields.shown(value)) <= 60 and fields.shown(value).isprintable()
  assert fields.shown(_nested(100_000)) == 'a list nested too deeply'
