"""GQA as distributed."""

import published
import pytest

from xmodal.data import check
from xmodal.data.example import Example, Object
from xmodal.data.sources.gqa import read_gqa
from xmodal.errors import UserError

_QUESTION = {
    'semantic': [{'operation': 'select', 'dependencies': [], 'argument': 'sky (2486325)'}],
    'entailed': ['02930160'], 'equivalent': ['02930152'], 'question': 'Is the sky dark?',
    'imageId': '2354786', 'isBalanced': True, 'groups': {'global': None, 'local': '06-sky_dark'},
    'answer': 'yes', 'semanticStr': 'select: sky (2486325)->verify color: dark [0]',
    'annotations': {'answer': {}, 'question': {'2': '2486325'}, 'fullAnswer': {'2': '2486325'}},
    'types': {'detailed': 'verifyAttr', 'semantic': 'attr', 'structural': 'verify'},
    'fullAnswer': 'Yes, the sky is dark.'}
_GRAPH = {'width': 60, 'height': 40, 'objects': {
    '681267': {'name': 'banana', 'x': 1, 'y': 2, 'w': 30, 'h': 10, 'attributes': ['small'],
               'relations': [{'object': '681262', 'name': 'to the left of'}]},
    '681262': {'name': 'sky', 'x': 0, 'y': 0, 'w': 0, 'h': 9, 'attributes': [], 'relations': []}}}


def _gqa(root, questions, graphs=None, folder=''):
  files = {f'{folder}val_balanced_questions.json': questions, 'images/2354786.jpg': (60, 40)}
  if graphs is not None:
    files['sceneGraphs/val_sceneGraphs.json'] = graphs
  return published.write(root, files)


@pytest.mark.parametrize('folder', ['', 'questions1.2/', 'questions/'])
def test_questions_have_both_types(tmp_path, folder, capsys):
  root = _gqa(tmp_path, {'02930152': _QUESTION}, folder=folder)
  assert read_gqa(root, 'val') == [
      Example(f'{root}/images/2354786.jpg', 'Is the sky dark?', ('yes',), '02930152',
              'verify/attr', image_id='2354786')]
  assert check.main([root, '--source', 'gqa']) == 0
  assert 'val: 1 examples, 1 pictures, 0 boxes' in capsys.readouterr().out


def test_scene_graphs_are_objects_and_their_faults_are_listed(tmp_path):
  root = _gqa(tmp_path, {'02930152': _QUESTION, '3': _QUESTION | {'answer': None}},
              {'2354786': _GRAPH, '7': None})
  first, second = source = read_gqa(root, 'val')
  assert first.objects == (Object('banana', (1, 2, 30, 10)),) and first.objects is second.objects
  assert first.recorded_size == (60, 40) and second.answers == ()
  [fault] = source.faults
  assert "image '2354786': object '681262': box [0, 0, 0, 9] has no area" in fault


@pytest.mark.parametrize('questions, graphs, said', [
    ({}, None, 'wanted a list with at least one record'),
    ([_QUESTION], None, 'wanted questions by their ids'),
    ({'a\0': _QUESTION}, None, r"id is 'a\\x00', wanted text without control"),
    ({'1': _QUESTION | {'imageId': '8'}}, None, '1 of 1 pictures are not in .*images, such as 8.j'),
    ({'1': _QUESTION | {'types': 'verify'}}, None, "types is 'verify', wanted an object"),
    ({'1': _QUESTION | {'question': ''}}, None, "question is '', wanted text, not empty"),
    ({'1': _QUESTION}, [], 'wanted scene graphs by image'),
])
def test_mistakes_stop_in_one_line(tmp_path, questions, graphs, said):
  root = _gqa(tmp_path, questions, graphs)
  with pytest.raises(UserError, match=said):
    read_gqa(root, 'val')
  with pytest.raises(UserError, match='testdev_balanced_questions.json: no such file'):
    read_gqa(root, 'testdev')
