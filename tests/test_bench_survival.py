"""The benchmark of survival: a case that holds gives a row and code 0, a broken one code 1."""

from xmodal.bench.survival import __main__ as survival
from xmodal.bench.survival import launch


def test_a_case_that_holds_is_a_row(capsys):
  assert survival.main(['--cases', 'other_workdirs']) == 0
  row = capsys.readouterr().out.splitlines()[-1]
  assert row.startswith('| `other_workdirs` |') and '2: error: --workdir is DIR/run2' in row


def test_a_promise_that_does_not_hold_is_told(capsys, monkeypatch):
  def case(_):
    """It breaks."""
    raise launch.Broken('hung')

  monkeypatch.setitem(survival.CASES, 'kill', case)
  assert survival.main(['--cases', 'kill']) == 1
  assert capsys.readouterr().out.endswith('| `kill` | It breaks. | hung |  |  | **fails** |\n')
