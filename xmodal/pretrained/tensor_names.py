"""Finds a tower's tensors in a file, and maps their names to the tower's own."""

from collections.abc import Iterable, Mapping
import dataclasses
import re

from xmodal.errors import UserError

# Tensors outside the tower's modules that change its outputs, so they cannot be ignored.
_CHANGES_OUTPUTS = re.compile(
    r'lora_|prefix_(encoder|tuning)|prompt_(encoder|embedding|token)|invertible_adapters')


@dataclasses.dataclass(frozen=True)
class TowerNames:
  """The names of a file's tensors.

  Attributes:
    files: the tower's name of a tensor -> the file's; names outside the tower's prefix map to
      themselves.
    inside: own names of the tensors under the tower's prefix, including its heads.
  """

  files: Mapping[str, str]
  inside: frozenset[str]

  def within(self, modules: Iterable[str]) -> list[str]:
    """Own names in these modules of the tower, and of adapters (such as LoRA) outside them.
    """
    return [name for name in self.inside
            if name.split('.')[0] in modules or _CHANGES_OUTPUTS.search(name)]


def tower_names(names: Iterable[str], family, tied: Mapping[str, tuple[str, ...]]) -> TowerNames:
  """Finds a tower among the tensors of a file, under any prefix.

  Args:
    names: names of all tensors.
    family: see families.FAMILIES.
    tied: own name -> other names that the same tensor may be saved under.

  Raises:
    UserError: there are several such towers, or a tensor occurs twice.
  """
  names = list(names)
  prefix = _prefix(names, family)
  inside = {}
  for name in (name for name in names if name.startswith(prefix)):
    own = name.removeprefix(prefix)
    for pattern, replacement in family.RENAMES:
      own = re.sub(pattern, replacement, own)
    if own in inside:
      raise UserError(f'tensors {inside[own]} and {name} are both {own}; leave one of them out')
    inside[own] = name
  files = {name: name for name in names if not name.startswith(prefix)} | inside
  own_names = set(inside)
  for own, others in tied.items():
    if own not in files and (other := next((o for o in others if o in files), None)):
      files[own] = files.pop(other)
      own_names = own_names - {other} | {own}
  return TowerNames(files, frozenset(own_names))


def _prefix(names, family):
  """The prefix of the tower's modules: the one under which most of them occur."""
  found = {}
  for name in names:
    parts = name.split('.')
    for i, part in enumerate(parts):
      if part in family.NAMESPACE:
        found.setdefault(''.join(f'{p}.' for p in parts[:i]), set()).add(part)
  most = max(map(len, found.values()), default=0)
  best = [prefix for prefix in found if len(found[prefix]) == most]
  if len(best) < 2:
    return best[0] if best else ''
  usual = [prefix for prefix in ('', *family.PREFIXES) if prefix in best]
  if not usual and most == 1 < len(family.NAMESPACE):  # chance matches in another model's names
    return ''
  if not usual:
    raise UserError(f'{len(best)} towers, under the prefixes {", ".join(sorted(best)[:4])}; '
                    'wanted one: leave out the others')
  return usual[0]
