"""Lists the keys of the config, with defaults and ranges: xmodal keys [SECTION].

--write FILE puts the keys of all sections into a guide, as Markdown tables between two marker
lines: xmodal keys --write configs/README.md.
"""

import argparse
import sys

from xmodal import atomic, errors
from xmodal import config as configs
from xmodal.errors import UserError
from xmodal.models import parts
from xmodal.options import Option, one_of
from xmodal.registry import load_plugins
from xmodal.train import evaluation

BEGIN = '<!-- keys: written by xmodal keys --write -->'
END = '<!-- end of keys -->'
_HEAD = '| key | default | values | may change | meaning |\n|---|---|---|---|---|\n'


def tables() -> str:
  """The keys of all sections as Markdown tables, the keys of config.evaluations.NAME included."""
  return '\n\n'.join(f'### config{path and "."}{path}\n\n{_HEAD}' + '\n'.join(
      _row(path, key, option) for key, option in options.items())
      for path, options in (configs.sections() | {'evaluations.NAME': evaluation.OPTIONS}).items())


def updated(text: str, name: str) -> str:
  """The text of a guide with the tables as they are now.

  Args:
    text: the guide.
    name: of its file, for the message.

  Raises:
    UserError: it lacks the marker lines.
  """
  before, begin, rest = text.partition(f'{BEGIN}\n')
  _, end, after = rest.partition(END)
  if not begin or not end:
    raise UserError(f'{name}: wanted the lines {BEGIN} and {END}, between which the tables go')
  return f'{before}{begin}\n{tables()}\n\n{end}{after}'


def main(argv=None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a mistake of the user's)."""
  parser = argparse.ArgumentParser(prog='xmodal keys', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('section', nargs='?', default='', help="such as 'optimizer'; all by default")
  parser.add_argument('--plugins', action='append', default=[], metavar='MODULE',
                      help='a module of config.plugins, to list its keys; may be repeated')
  parser.add_argument('--write', metavar='FILE', help='a guide to write the tables into')
  args = parser.parse_args(argv)
  return errors.command(lambda: _list(args), args.write or '')


def _list(args):
  load_plugins(tuple(args.plugins))
  if args.write:
    with open(args.write, encoding='utf-8') as f:
      text = updated(f.read(), args.write)
    with atomic.written(args.write) as f:
      f.write(text)
    return
  sections = [path for path in configs.sections() if path]
  if args.section and not any(f'{path}.'.startswith(f'{args.section}.') for path in sections):
    raise UserError(f'no section {args.section!r}{errors.did_you_mean(args.section, sections)}; '
                    f'wanted one of {", ".join(sections)}')
  print(configs.table(args.section and f'{args.section}.'))


def _row(path: str, key: str, option: Option) -> str:
  values, help_ = option.range(), option.help
  for section, choice, registry in configs.CHOICES:
    if (section, choice) == (path, key):
      values = ', '.join(registry)
    if path == section:
      help_ += _only_with(choice, [name for name in registry if key in registry[name].options],
                          len(registry))
  slot = path.removeprefix('model.')
  if slot in parts.slots():
    families = parts.families(slot)
    help_ += _only_with('name', [name for name in families if key in parts.PARTS[name].options],
                        len(families))
  values = values or {bool: 'True, False', str: 'text', tuple: 'tuple'}.get(option.type, 'number')
  change = 'yes' if option.may_change else ''
  return '| ' + ' | '.join([f'`{key}`', f'`{option.default!r}`', _plain(values), change,
                            _plain(help_)]) + ' |'


def _only_with(choice, owners, number):
  return f' Only with {choice}={one_of(owners)}.' if 0 < len(owners) < number else ''


def _plain(text: str) -> str:
  """Text in which Markdown finds no markup."""
  return ''.join(f'\\{letter}' if letter in '|*<' else letter for letter in text)


if __name__ == '__main__':
  sys.exit(main())
