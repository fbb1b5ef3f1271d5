"""Imports point one way, as in the README's map of the code."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1] / 'xmodal'
# From the bottom up: a package may import itself and earlier ones.
FREE = ('errors', 'paths', 'storage', 'downloads', 'atomic', 'strict_json', 'options', 'xla',
        'registry', 'word_patterns', 'target')
GROUND = ('data', 'metrics', 'sharding', 'models', 'pretrained', 'cost')
# Allowed imports between these.
AMONG = {('pretrained', 'models'), ('metrics', 'data')}
ABOVE = ('tasks', 'mixer', 'train')


def imports(path):
  """The packages and modules of xmodal that a file imports: 'data', 'errors'."""
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.ImportFrom) and node.module:
      if node.module == 'xmodal':
        yield from (alias.name for alias in node.names)
      elif node.module.startswith('xmodal.'):
        yield node.module.split('.')[1]
    elif isinstance(node, ast.Import):
      yield from (alias.name.split('.')[1] for alias in node.names
                  if alias.name.startswith('xmodal.'))


def files(package):
  # A package's __main__ is a command.
  return [path for path in sorted((ROOT / package).rglob('*.py')) if path.stem != '__main__']


def test_what_every_package_may_import_imports_nothing_else():
  for name in FREE:
    path = ROOT / f'{name}.py'
    assert set(imports(path)) <= set(FREE), f'{name}: {set(imports(path)) - set(FREE)}'


@pytest.mark.parametrize('package', GROUND)
def test_packages_on_the_ground_know_nothing_of_each_other(package):
  for path in files(package):
    for found in set(imports(path)) - {package, *FREE}:
      assert (package, found) in AMONG, f'{path.relative_to(ROOT)} imports {found}'


@pytest.mark.parametrize('package', ABOVE)
def test_packages_above_import_only_what_is_below(package):
  below = {*FREE, *GROUND, *ABOVE[:ABOVE.index(package) + 1]}
  if package == 'train':
    below.add('config')  # train's parts declare options there
  for path in files(package):
    assert set(imports(path)) <= below, f'{path.relative_to(ROOT)}: {set(imports(path)) - below}'


def test_nothing_below_imports_bundles_and_they_import_no_commands():
  # A bundle is written from a whole trained model.
  below = {*FREE, *GROUND, *ABOVE, 'bundle', 'config', 'predictor', '__version__'}
  for path in files('bundle'):
    assert set(imports(path)) <= below, f'{path.relative_to(ROOT)}: {set(imports(path)) - below}'


def test_nothing_but_commands_imports_commands():
  commands = {path.stem for path in ROOT.glob('*.py')} - {*FREE, 'config', '__init__', 'heap'}
  for package in (*GROUND, *ABOVE):
    for path in files(package):
      assert not commands & set(imports(path)), path


def test_only_the_command_line_and_benchmarks_know_of_the_server():
  """Nothing else imports it, so that only the server needs its packages."""
  for path in ROOT.rglob('*.py'):
    if path.relative_to(ROOT).parts[0] not in ('serve', 'bench'):
      assert 'serve' not in set(imports(path)), path
  for path in files('serve'):
    assert not {'bench', 'main', 'predict', 'predict_many', 'cli'} & set(imports(path)), path


def test_packages_of_the_server_are_imported_there_alone():
  web = {'fastapi', 'starlette', 'uvicorn', 'pydantic', 'h11', 'prometheus_client',
         'python_multipart'}
  for path in ROOT.rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
      names = ([node.module or ''] if isinstance(node, ast.ImportFrom)
               else [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
      used = web & {name.split('.')[0] for name in names}
      assert not used or path.is_relative_to(ROOT / 'serve'), f'{path}: {used}'


def test_tensorflow_and_torch_are_imported_where_they_are_used_alone():
  for path in ROOT.rglob('*.py'):
    tree = ast.parse(path.read_text(encoding='utf-8'))
    top = {alias.name.split('.')[0] for node in tree.body if isinstance(node, ast.Import)
           for alias in node.names} | {node.module.split('.')[0] for node in tree.body
                                       if isinstance(node, ast.ImportFrom) and node.module}
    if 'bench' not in path.parts:
      assert not top & {'tensorflow', 'tensorflow_datasets', 'datasets', 'torch',
                        'transformers'}, path
