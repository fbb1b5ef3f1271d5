"""The guides name files, keys and commands that exist, and their tables of keys are up to date."""

import ast
import importlib
import pathlib
import re
import shlex
import sys

from absl import flags
from absl.testing import flagsaver
from ml_collections import ConfigDict
import pytest

from xmodal import cli, keys, main
from xmodal import config as configs

ROOT = pathlib.Path(__file__).parents[1]
GUIDES = [path for path in sorted(ROOT.rglob('README.md'))
          if not any(part.startswith('.') for part in path.relative_to(ROOT).parts)]
FOLDERS = ('configs', 'launch', 'notebooks', 'tests', 'xmodal')
every_guide = pytest.mark.parametrize('path', GUIDES, ids=lambda path: str(path.relative_to(ROOT)))


def read(path):
  return path.read_text(encoding='utf-8')


def commands(text):
  """The command lines in a guide, those in backticks included; continued lines are joined."""
  text = text.replace('\\\n', ' ')
  yield from re.findall(r'^ *(xmodal .*)', text, re.MULTILINE)
  yield from re.findall(r'`(xmodal [^`]*)`', text)


def test_guides_are_where_the_readme_says():
  linked = re.findall(r'\]\(([^)#]*README\.md)', read(ROOT / 'README.md'))
  assert {*linked, 'README.md'} == {str(path.relative_to(ROOT)) for path in GUIDES}


def test_the_readme_is_short():
  assert len(read(ROOT / 'README.md').splitlines()) <= 200


def anchors(path):
  """Anchors of the headings of a guide, as on GitHub."""
  text = re.sub(r'^```.*?^```', '', read(path), flags=re.DOTALL | re.MULTILINE)
  headings = re.findall(r'^#+ (.*)$', text, re.MULTILINE)
  return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@every_guide
def test_links_lead_somewhere(path):
  for link in re.findall(r'\]\(([^)]+)\)', read(path)):
    if re.match(r'https?://', link):
      continue
    file, _, anchor = link.partition('#')
    target = (path.parent / file).resolve() if file else path
    assert target.exists(), link
    assert not anchor or anchor in anchors(target), link


@every_guide
def test_paths_of_the_repository_exist(path):
  for text in re.findall(r'`([^`\s]+)`', read(path)):
    if re.fullmatch(rf'({"|".join(FOLDERS)})/[\w/.]*', text) and 'NAME' not in text:
      assert (ROOT / text).exists(), text


def known_keys(text):
  """All keys and sections of the config, with the keys that a guide's own code registers."""
  def walk(section, prefix=''):
    for key in section:
      yield f'{prefix}{key}'
      if isinstance(section[key], ConfigDict):
        yield from walk(section[key], f'{prefix}{key}.')

  sections = {'BALANCES': 'mixer', 'SOURCES': 'data'}
  own = re.findall(r"@(\w+)\.register\('(\w+)', options=\{'(\w+)': Option", text)
  return {*walk(configs.base()), *(name for _, name, _ in own),
          *(f'{sections.get(kind, name)}.{key}' for kind, name, key in own)}


@every_guide
def test_keys_exist(path):
  text = read(path)
  known = known_keys(text)
  given = re.findall(r'--config\.((?:[a-z]\w*)(?:\.\w+)*)', text)
  given += re.findall(r'`config\.((?:[a-z]\w*)(?:\.[a-z]\w*)*)(?:=[^`]*)?`', text)
  assert [key for key in given if key not in known and key != 'json'] == []  # config.json: a file


@every_guide
def test_commands_exist(path):
  for line in commands(read(path)):
    command = cli.XMODAL
    for word in line.split()[1:]:
      if not command.commands or not re.fullmatch(r'[a-z]\w*', word):
        break
      assert word in command.commands, line
      command = command.commands[word]


@every_guide
def test_training_commands_are_accepted(path, monkeypatch):
  for line in commands(read(path)):
    argv = shlex.split(line, comments=True)[1:]
    # Not: placeholders, modules and files that guides call by names of their own.
    if argv[0] != 'train' or re.search(r'NAME|my_lab|my/|\.\.\.|\[', line) or len(argv) == 1:
      continue
    monkeypatch.setattr(sys, 'argv', ['main', *argv[1:]])
    with flagsaver.flagsaver():
      configs.check(main._parse(sys.argv)[0])
    flags.FLAGS.unparse_flags()


@every_guide
def test_python_blocks_import_what_exists(path):
  for block in re.findall(r'```python\n(.*?)```', read(path), re.DOTALL):
    for node in ast.walk(ast.parse(block)):
      if isinstance(node, ast.ImportFrom) and node.module.startswith('xmodal'):
        module = importlib.import_module(node.module)
        for alias in node.names:
          if not hasattr(module, alias.name):
            importlib.import_module(f'{node.module}.{alias.name}')


@pytest.mark.parametrize('name', sorted(path.stem for path in (ROOT / 'configs').glob('*.py')))
def test_a_config_opens_with_its_command_and_its_data(name):
  text = ast.get_docstring(ast.parse(read(ROOT / 'configs' / f'{name}.py')))
  assert f'\n  xmodal train --config {name}' in text and '\nData: ' in text
  assert f'| `{name}` |' in read(ROOT / 'configs' / 'README.md')


def test_the_tables_of_keys_are_up_to_date():
  path = ROOT / 'configs' / 'README.md'
  text = read(path)
  assert keys.updated(text, str(path)) == text, 'run: xmodal keys --write configs/README.md'


def test_keys_are_listed_and_written(tmp_path, capsys):
  assert keys.main(['mesh']) == 0
  out = capsys.readouterr().out
  assert out.startswith('config.mesh\n  data = -1') and 'config.model' not in out
  assert keys.main(['mesj']) == 2
  assert "no section 'mesj' (did you mean 'mesh'?)" in capsys.readouterr().err
  guide = tmp_path / 'guide.md'
  guide.write_text('no markers\n')
  assert keys.main(['--write', str(guide)]) == 2
  guide.write_text(f'before\n{keys.BEGIN}\nold\n{keys.END}\nafter\n')
  assert keys.main(['--write', str(guide)]) == 0
  text = guide.read_text()
  assert text.startswith('before') and text.endswith('after\n') and 'old\n' not in text
  for key, option in configs.keys():
    assert f'| `{key.rpartition(".")[2]}` | `{option.default!r}` |' in text
  assert 'Only with balance=dwa.' in text and '(query\\|value)' in text
