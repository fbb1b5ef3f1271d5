"""Tasks: one file each; a task's name is its file's."""

import importlib
import pkgutil

from xmodal.errors import UserError


def task_class(name: str):
  """The Task that the file xmodal/tasks/NAME.py calls TASK.

  Raises:
    UserError: there is no such file.
  """
  known = {module.name for module in pkgutil.iter_modules(__path__)}
  module = importlib.import_module(f'{__name__}.{name}') if name in known else None
  if not hasattr(module, 'TASK'):
    tasks = [n for n in sorted(known)
             if hasattr(importlib.import_module(f'{__name__}.{n}'), 'TASK')]
    raise UserError(f'config.mixer.tasks: no task {name!r}; wanted one of {", ".join(tasks)}')
  return module.TASK
