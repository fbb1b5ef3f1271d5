"""config.train.profile: the trace holds the steps that it names, as JAX's own reader finds them."""

import shutil

import jax
import numpy as np
import pytest
import single

from xmodal.errors import UserError
from xmodal.train.plan import Plan


@pytest.fixture(scope='module')
def finished(finished_single):
  return finished_single


def traced(workdir):
  """({number of step}, names of all events) in the only trace of a workdir."""
  path, = (workdir / 'profile').rglob('*.xplane.pb')
  steps, names = set(), set()
  for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
    for event in (event for line in plane.lines for event in line.events):
      names.add(event.name)
      if event.name == 'train':
        steps.add(dict(event.stats)['step_num'])
  return steps, names


@pytest.fixture
def workdir(finished, tmp_path):
  """A copy of the finished run as after a kill at step 3."""
  workdir = shutil.copytree(finished, tmp_path / 'run')
  shutil.rmtree(workdir / 'checkpoints' / '6')
  return workdir


def test_the_trace_holds_the_steps_and_their_program(workdir, finished, capsys):
  single.train(workdir, single.changed(train__profile='2:5'))  # 2 and 3 were before the kill
  steps, names = traced(workdir)
  assert steps == {4, 5}
  assert any('train_step' in name for name in names)
  assert f'trace in {workdir}/profile' in capsys.readouterr().out
  # The run is the same as without it.
  jax.tree.map(np.testing.assert_array_equal, single.restored(workdir), single.restored(finished))


def test_a_range_before_the_resumed_step_is_noted(workdir, capsys):
  single.train(workdir, single.changed(train__profile='1:3'))
  assert "'1:3': no trace, as the run resumes after step 3" in capsys.readouterr().out
  assert not (workdir / 'profile').exists()


@pytest.mark.parametrize('text', ['a:b', '3', '3:', '5:2', '0:2', '3:7', '-1:2', '1:2:3', '１:２'])
def test_a_range_that_means_nothing_is_one_line(tmp_path, text):
  with pytest.raises(UserError, match='config.train.profile=.* 1 to config.train.steps=6') as error:
    Plan(single.changed(train__profile=text), str(tmp_path / 'run'))
  assert '\n' not in str(error.value) and not (tmp_path / 'run').exists()
