"""Registries: parts of one kind by name, from this package and from plugins.

A part registers where it is defined:

    @TASKS.register('counting', options={'most': Option(10, 'Highest count.', low=1)})
    class Counting(Task): ...

and is available once its module is imported. Modules of this package are imported when a registry
is first read; modules of a user's own package, when config.plugins names them.
"""

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import importlib
import pkgutil
import traceback
from typing import Any

from xmodal.errors import UserError, did_you_mean
from xmodal.options import Options


@dataclasses.dataclass(frozen=True)
class Part:
  """A registered part.

  Attributes:
    make: the class or function.
    options: the options that the part declares.
    facts: other declarations, specific to its kind.
  """

  make: Any
  options: Options
  facts: Mapping[str, Any]


_REGISTRIES: list['Registry'] = []
_PLUGINS = '--config.plugins='


class Registry(Mapping[str, Part]):
  """Parts by name."""

  def __init__(self, kind: str, key: str, *modules: str):
    """
    Args:
      kind: kind of its parts, such as 'task'.
      key: config key that names a part, such as 'config.mixer.tasks'.
      modules: modules that register parts when imported; for a package, all its modules.
    """
    self._kind, self._key, self._modules = kind, key, modules
    self._parts: dict[str, Part] = {}
    self._is_loaded = False

    _REGISTRIES.append(self)

  def register(self, name: str, options: Options | None = None, **facts: Any) -> Callable:
    """A decorator that registers a class or function under a name.

    Raises:
      UserError: another part has that name.
    """
    def add(made):
      there = self._parts.get(name)
      if there is not None and _origin(there.make) != _origin(made):
        raise UserError(f'{_origin(made)}: the {self._kind} {name!r} is registered by '
                        f'{_origin(there.make)}; give it another name')
      self._parts[name] = Part(made, dict(options or {}), facts)
      return made

    return add

  def options(self) -> Options:
    """The options of all parts.

    Raises:
      UserError: two parts declare the same key differently.
    """
    found: dict = {}
    for name, part in self.items():
      for key, option in part.options.items():
        if found.setdefault(key, option) != option:
          raise UserError(f'{self._kind} {name!r} declares {key!r}, which another {self._kind} '
                          'declares differently; give it another name')
    return found

  def __getitem__(self, name: str) -> Part:
    """The part of this name; UserError if there is none."""
    self._load()
    if name not in self._parts:
      near = did_you_mean(str(name), self._parts)
      raise UserError(f'{self._key}: no {self._kind} {name!r}{near}; wanted '
                      f'one of {", ".join(sorted(self._parts))}')
    return self._parts[name]

  def __contains__(self, name: object) -> bool:
    self._load()
    return name in self._parts

  def __iter__(self) -> Iterator[str]:
    self._load()
    return iter(sorted(self._parts))

  def __len__(self) -> int:
    self._load()
    return len(self._parts)

  def _load(self):
    if not self._is_loaded:
      self._is_loaded = True  # set first: its modules may read each other's parts
      for name in self._modules:
        module = importlib.import_module(name)
        for inside in pkgutil.iter_modules(getattr(module, '__path__', ())):
          importlib.import_module(f'{name}.{inside.name}')


def declared(fact: str) -> Iterator:
  """Yields the entries of a fact, a tuple, over all parts of all registries."""
  for registry in _REGISTRIES:
    for part in registry.values():
      yield from part.facts.get(fact, ())


def load_plugins(modules: tuple[str, ...]) -> None:
  """Imports the user's modules named in config.plugins, which register their parts.

  Raises:
    UserError: one is not found, or fails.
  """
  if modules:
    for registry in _REGISTRIES:  # before plugins, whose names must differ from theirs
      len(registry)
  for name in modules:
    try:
      importlib.import_module(name)
    except UserError:
      raise
    except Exception as error:  # a user's module may raise anything
      what = f'{type(error).__name__}: {" ".join(str(error).split())}'
      if isinstance(error, ModuleNotFoundError) and name.startswith(error.name or '\0'):
        raise UserError(f'config.plugins: {name!r} cannot be imported ({what}); wanted the name of '
                        'a module that Python finds from the current folder or PYTHONPATH'
                        ) from error
      place = traceback.extract_tb(error.__traceback__)[-1]
      raise UserError(f'config.plugins: {name!r} fails at {place.filename}:{place.lineno} ({what})'
                      ) from error


def import_plugins(arguments: Sequence[str]) -> list[str]:
  """Imports the modules that --config.plugins names; returns the other arguments.

  Raises:
    UserError: the value is no tuple of names, or see load_plugins.
  """
  others = []
  for argument in arguments:
    if not argument.startswith(_PLUGINS):
      others.append(argument)
      continue
    try:
      names = ast.literal_eval(argument.removeprefix(_PLUGINS))
    except (ValueError, SyntaxError):
      names = None
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
      raise UserError(f"{argument}: wanted names of modules, such as {_PLUGINS}('my_lab.task',)")
    load_plugins(tuple(names))
  return others


def _origin(made):
  return f'{made.__module__}.{made.__qualname__}'
