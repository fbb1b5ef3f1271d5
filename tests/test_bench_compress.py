"""xmodal bench compress: its configs, its rows and its table."""

import types

import pytest
import tiny

from xmodal.bench import compress


def test_rows_hold_size_speed_and_score(finished):
  rows = {}
  for precision in ('float32', 'int8'):
    timed = compress.Timed(str(finished), precision)
    timed.answers(1)()
    rows[precision] = {**timed.numbers, 'ms_1': 2.0, 'ms_32': 4.0,
                       'scores': compress.score(str(finished), precision)}
  assert rows['int8']['megabytes'] < 0.4 * rows['float32']['megabytes']
  assert rows['int8']['program_megabytes'] < rows['float32']['program_megabytes']
  assert rows['int8']['parameters'] == rows['float32']['parameters']
  assert set(rows['int8']['scores']) == {'vqa', 'objects'}
  head, line, first, second = compress.table(rows).splitlines()
  assert head.count('|') == line.count('|') == first.count('|') == second.count('|')
  assert '2.00 (1.00) | 4.00 (1.00)' in second


def test_a_model_that_was_not_trained_has_no_scores():
  row = {'parameters': 10, 'megabytes': 1.0, 'program_megabytes': 2.0, 'ms_1': 1.0, 'ms_32': 1.0}
  assert compress.table({'float32': row}).splitlines()[0].endswith('32 pictures, ms |')


def test_a_share_that_pruning_cannot_reach_has_no_row(finished, tmp_path, capsys):
  options = types.SimpleNamespace(keep='0.01', rounded='', narrow=0, steps=2)
  assert compress._made(tiny.get_config(), str(finished), str(tmp_path), options) == {}
  assert 'no row for 0.01 of the parameters' in capsys.readouterr().out


def test_half_the_width(finished):
  c = compress.narrow(tiny.get_config(), str(finished), 7)
  assert (c.model.vision.hidden_dim, c.model.cross.num_heads, c.train.steps) == (8, 1, 7)
  assert c.train.teacher == str(finished) and c.train.start_from == ''


@pytest.mark.parametrize('arguments, wanted', [
    ([], 'wanted one of --checkpoint and --size'),
    (['--checkpoint', 'RUN', '--precisions', 'int3'], "--precisions: 'int3': wanted some of"),
])
def test_what_cannot_be_measured_is_one_line(finished, tmp_path, capsys, arguments, wanted):
  arguments = [str(finished) if one == 'RUN' else one for one in arguments]
  assert compress.main(['--workdir', str(tmp_path), *arguments]) == 2
  assert wanted in capsys.readouterr().err
