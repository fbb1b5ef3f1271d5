"""What a run learns from its data before the first step, kept for later runs on the same packs.

Vocabularies and notes need a pass over all examples, minutes for millions. For packs, whose content
has a name that never changes, they are kept in the user's cache.
"""

from collections.abc import Callable, Sequence
import hashlib
import json
import os
import pathlib

import xmodal
from xmodal import atomic, paths
from xmodal.errors import UserError
from xmodal.mixer.feed import Feed
from xmodal.train import build

# Sections of the config that decide what is learned.
_SECTIONS = ('seed', 'data', 'mixer', 'plugins')
_LINES = 'lines.json'


class Learned:
  """The cache for some feeds and a config.

  Attributes:
    folder: of this data and config; None if nothing is kept.
  """

  def __init__(self, config, feeds: Sequence[Feed], names: Sequence[str]):
    """names: of the tasks."""
    self._config, self.folder = config, None
    # No feeds: nothing is learned, or not from them alone.
    prints = [getattr(source, 'fingerprint', None) for feed in feeds
              for source in feed.sources.values()]
    if not prints or None in prints or config.plugins or config.model.text.tokenizer or not (
        root := paths.cache('learned')):
      return
    decides = [xmodal.__version__, _code(), prints, config.model.size, config.model.text.to_json(),
               *(config[section].to_json() if hasattr(config[section], 'to_json')
                 else config[section] for section in (*_SECTIONS, *names))]
    key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:24]
    self.folder = os.path.join(root, key)

  def assets(self, learn: Callable[[], tuple]):
    """The tokenizer and tasks, read or learned: as build.learn returns them."""
    if self.folder is None:
      return learn()
    kept = os.path.join(self.folder, 'assets')
    if os.path.isdir(kept):
      try:
        return build.load_assets(self._config, kept)
      except (UserError, OSError):
        pass  # damaged: learned again
    tokenizer, tasks = learn()
    try:
      os.makedirs(self.folder, exist_ok=True)
      with atomic.written_folder(kept) as folder:
        build.save_assets(self._config, tokenizer, tasks, {}, folder)
    except OSError:
      pass  # a full disk: only the time is lost
    return tokenizer, tasks

  def lines(self, make: Callable[[], list[str]]) -> list[str]:
    """Notes on the data, read or made."""
    if self.folder is None:
      return make()
    path = os.path.join(self.folder, _LINES)
    try:
      with open(path, encoding='utf-8') as f:
        return list(map(str, json.load(f)))
    except (OSError, ValueError, TypeError):
      found = make()
    try:
      os.makedirs(self.folder, exist_ok=True)
      with atomic.written(path) as f:
        json.dump(found, f)
    except OSError:
      pass
    return found


def _code():
  """A digest of the code that learns: a change of it may change what is learned."""
  digest = hashlib.sha256()
  root = pathlib.Path(xmodal.__file__).parent
  for folder in ('data', 'tasks', 'metrics'):
    for path in sorted((root / folder).rglob('*.py')):
      digest.update(path.read_bytes())
  return digest.hexdigest()
