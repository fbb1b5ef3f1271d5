"""Reads pickles without running the code that a pickle may hold."""

import pickle
from typing import Any

from xmodal import storage
from xmodal.data.sources.files import unreadable
from xmodal.errors import UserError


def read_plain_pickle(path: str) -> Any:
  """Reads a pickle of lists, tuples, dictionaries, text and numbers.

  A pickle is a program that may import and call anything; one that names a class or a function is
  refused. Text of Python 2 is taken as UTF-8.

  Raises:
    UserError: no such file, not a pickle, or one of other objects.
  """
  try:
    with storage.open_file(path, 'rb') as file:
      return _Plain(file, encoding='utf-8').load()
  except FileNotFoundError:
    raise UserError(f'{path}: no such file, wanted it as distributed') from None
  except OSError as error:
    raise unreadable(path, error) from None
  except UserError:
    raise
  except Exception as error:  # broken pickles raise exceptions of many types
    reason = ' '.join(str(error).split()) or type(error).__name__
    raise UserError(f'{path}: not a pickle of plain lists and dictionaries ({reason[:100]!r}); is '
                    'it the file as distributed?') from None


class _Plain(pickle.Unpickler):
  """An unpickler that finds no class and no function, so that it can call none."""

  def find_class(self, module, name):
    raise pickle.UnpicklingError(f'it names {module}.{name}, which is not read')
