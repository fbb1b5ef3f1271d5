"""The command `xmodal`, configs by name, and the contents of an installed xmodal."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

from absl import flags
from absl.testing import flagsaver
import pytest

import xmodal
from xmodal import cli, config_files, main
from xmodal.bench import harness
from xmodal.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))
# As pip writes it: sys.path starts with the folder of the script, not the current folder.
SCRIPT = 'import sys\nfrom xmodal.cli import main\nsys.exit(main())\n'


def run(*arguments, cwd=ROOT, path=ROOT):
  environment = {**os.environ, 'PYTHONPATH': str(path)}
  return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=environment,
                        capture_output=True, text=True)


@pytest.fixture
def command(monkeypatch, capsys):
  """Runs the command in this process: (exit code, stdout, stderr)."""
  def run(*arguments):
    monkeypatch.setattr(sys, 'argv', ['/bin/xmodal', *arguments])
    monkeypatch.setattr(sys, 'path', [*sys.path])
    return cli.main(), *capsys.readouterr()
  return run


# Subcommands


def modules_of(command):
  if command.module:
    return {command.module}
  return set().union(*map(modules_of, command.commands.values()))


def test_every_program_is_a_subcommand():
  programs = {
      '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__main__')
      for path in (ROOT / 'xmodal').rglob('*.py')
      if "\nif __name__ == '__main__':\n" in path.read_text(encoding='utf-8')}
  # bundle.model is run where a bundle lies.
  assert modules_of(cli.XMODAL) == programs - {'xmodal', 'xmodal.cli', 'xmodal.bundle.model'}


@pytest.mark.parametrize('arguments', [(), ('--help',), ('-h',)])
def test_help_lists_the_subcommands(command, arguments):
  code, out, err = command(*arguments)
  assert (code, err) == (0, '')
  for name, one in cli.XMODAL.commands.items():
    assert f'\n  {name} ' in out and one.sentence in out
  assert max(map(len, out.splitlines())) <= 100


def test_help_waits_for_no_library():
  done = run('-c', 'import sys\nfrom xmodal.cli import main\nsys.argv[1:] = ["--help"]\nmain()\n'
             'print(sorted({"absl", "flax", "jax", "numpy", "tensorflow"} & sys.modules.keys()))')
  assert done.returncode == 0 and done.stdout.splitlines()[-1] == '[]', done.stderr


def test_version(command):
  assert command('--version') == (0, f'xmodal {xmodal.__version__}\n', '')


@pytest.mark.parametrize('arguments, start', [
    (['trian'], "error: xmodal: no command 'trian' (did you mean 'train'?); wanted one of train, "),
    (['--config', 'vqa'], "error: xmodal: no command '--config'; wanted one of train, "),
    (['bench', 'data_'], "error: xmodal bench: no command 'data_' (did you mean 'data'?); "),
])
def test_an_unknown_subcommand_is_one_line(command, arguments, start):
  code, out, err = command(*arguments)
  assert (code, out) == (2, '') and err.startswith(start) and err.count('\n') == 1


def test_a_subcommand_runs_as_its_module_does(tmp_path):
  """Same exit code, output, memory settings of a restart, and modules of the current folder."""
  (tmp_path / 'bin').mkdir()
  script = tmp_path / 'bin' / 'xmodal'
  script.write_text(SCRIPT)
  (tmp_path / 'mine.py').write_text('def get_config(): return {}\n')
  (tmp_path / 'named.py').write_text(
      'import os, sys, mine\nfrom mine import get_config\n'
      'print(mine.__file__, sys.argv[1:], os.environ.get("MALLOC_MMAP_MAX_"))\n')
  arguments = ('--config', 'named.py', '--workdir', 'runs/a')
  ours = run(script, 'train', *arguments, cwd=tmp_path)
  module = run('-m', 'xmodal.main', *arguments, cwd=tmp_path)
  assert ours.returncode == module.returncode == 2
  assert ours.stdout == module.stdout and str(tmp_path / 'mine.py') in ours.stdout
  assert ours.stderr == module.stderr and 'get_config() returned a dict' in ours.stderr


@pytest.mark.filterwarnings('ignore:.*found in sys.modules')  # by other tests of this process
def test_usage_names_the_subcommand(command, capsys):
  for name in ('predict', 'serve', 'check', 'augment', 'keys', 'export', 'show'):
    with pytest.raises(SystemExit) as end:
      command(name, '--help')
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f'usage: xmodal {name} ')


# Configs by name


def test_a_file_comes_before_a_name_and_own_configs_before_shipped_ones(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  shipped = config_files.find('vqa')
  assert os.path.samefile(shipped, ROOT / 'configs' / 'vqa.py')
  (tmp_path / 'configs').mkdir()
  for name in ('vqa', 'mine'):
    (tmp_path / 'configs' / f'{name}.py').touch()
    assert config_files.find(name) == os.path.join('configs', f'{name}.py')
  (tmp_path / 'detection').mkdir()  # a folder is not a config
  assert os.path.samefile(config_files.find('detection'), ROOT / 'configs' / 'detection.py')
  (tmp_path / 'vqa').touch()
  assert config_files.find('vqa') == 'vqa'


@pytest.mark.parametrize('config, start', [
    ('vqq', "--config=vqq (did you mean 'vqa'?): wanted a Python file with get_config(), or one"),
    ('configs/vqa.py', "--config=configs/vqa.py (did you mean 'vqa'?): wanted a Python file"),
    ('x', '--config=x: wanted a Python file'), ('', '--config=: wanted a Python file')])
def test_an_unknown_name_is_one_line_with_those_there_are(tmp_path, monkeypatch, config, start):
  monkeypatch.chdir(tmp_path)
  for find in (config_files.find, harness.read_config):
    with pytest.raises(UserError) as error:
      find(config)
    line = str(error.value)
    assert line.startswith(start) and line.endswith(', '.join(CONFIGS)) and '\n' not in line


def test_benchmarks_take_names(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert 'retrieval' in harness.read_config('multitask_shared').mixer.tasks


@pytest.mark.parametrize('arguments', [['--config', 'vqa_rad'], ['--config=vqa_rad'],
                                       ['-config', 'vqa_rad']])
def test_a_run_of_a_named_config_is_in_runs(tmp_path, monkeypatch, arguments):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'argv', ['main', *arguments, '--config.seed=7'])
  monkeypatch.setattr(main, '_run', lambda *given: found.append(given) or 0)
  found = []
  with flagsaver.flagsaver():
    assert main.main() == 0
  flags.FLAGS.unparse_flags()
  (config, workdir, _), = found
  assert workdir == str(tmp_path / 'runs' / 'vqa_rad')
  assert config.seed == 7 and config.data.source == 'vqa_rad'


def test_an_argument_of_get_config_stays(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / 'sized.py').write_text(
      'from xmodal import config\n'
      'def get_config(size):\n  c = config.base()\n  c.model.size = size\n  return c\n')
  monkeypatch.setattr(sys, 'argv', ['main', '--config', 'sized:small'])
  monkeypatch.setattr(main, '_run', lambda *given: found.append(given) or 0)
  found = []
  with flagsaver.flagsaver():
    assert main.main() == 0
  flags.FLAGS.unparse_flags()
  (config, workdir, _), = found
  assert config.model.size == 'small' and workdir == str(tmp_path / 'runs' / 'sized')


# Installed


def test_a_wheel_holds_configs_command_and_license(tmp_path):
  source, folder = tmp_path / 'source', tmp_path / 'installed'
  source.mkdir()
  for name in ('setup.py', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, source)
  for name in ('xmodal', 'configs'):
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
  done = run('-m', 'pip', 'wheel', source, '--no-deps', '--no-build-isolation', '--quiet', '-w',
             tmp_path, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  wheel, = tmp_path.glob(f'xmodal-{xmodal.__version__}-*.whl')
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(folder)
  info = folder / f'xmodal-{xmodal.__version__}.dist-info'
  assert sorted(path.stem for path in (folder / 'xmodal' / 'configs').glob('*.py')) == CONFIGS
  assert sorted(path.name for path in (folder / 'xmodal' / 'serve' / 'page').iterdir()) == [
      'index.html', 'page.css', 'page.js']
  assert (info / 'licenses' / 'LICENSE').read_text() == (ROOT / 'LICENSE').read_text()
  assert 'License-Expression: Apache-2.0' in (info / 'METADATA').read_text(encoding='utf-8')
  assert 'xmodal = xmodal.cli:main' in (info / 'entry_points.txt').read_text()
  done = run('-c', 'from xmodal import config_files as c\nprint(c.find("vqa"), c.__file__)',
             cwd=tmp_path, path=folder)
  assert done.stdout.split() == [str(folder / 'xmodal' / name) for name in (
      'configs/vqa.py', 'config_files.py')], done.stderr


def test_pythons_that_are_missing_are_reported(tmp_path):
  done = subprocess.run(['bash', ROOT / 'launch' / 'python_versions.sh'], cwd=tmp_path,
                        env={**os.environ, 'PYTHONS': 'python3.0 nothing'},
                        capture_output=True, text=True)
  assert done.returncode == 2 and done.stderr.startswith('error: none of them found')
  assert done.stdout.splitlines() == [f'{name}: not found, not tested'
                                      for name in ('python3.0', 'nothing')]
