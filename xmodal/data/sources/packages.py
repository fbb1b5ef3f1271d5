"""Optional packages that some sources read with."""

from collections.abc import Sequence
import importlib.util

from xmodal.errors import UserError


def need(source: str, modules: Sequence[str]) -> None:
  """Raises UserError if a module that a source reads with is not installed.

  Args:
    source: name of the source, which is also that of the extra with its packages.
    modules: top-level modules.
  """
  missing = [module for module in modules if importlib.util.find_spec(module) is None]
  if missing:
    raise UserError(f'config.data.source={source!r} needs {", ".join(missing)}, which is not '
                    f"installed; run: python -m pip install 'xmodal[{source}]'")
