"""What a run learns from its data before the first step, kept for later runs on the same packs.

Vocabularies and notes need a pass over all examples, minutes for millions. For packs, whose content
has a name that never changes, they are kept in the user's cache. In a run of several processes, the
first learns them, and the others receive them.
"""

import base64
from collections.abc import Callable, Sequence
import hashlib
import io
import json
import os
import pathlib
import tempfile
import zipfile

import xmodal
from xmodal import atomic, paths
from xmodal.errors import UserError
from xmodal.mixer.feed import Feed
from xmodal.sharding import hosts
from xmodal.train import build
from xmodal.train.process import together

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
    if not hosts.several():
      return self._assets(learn)

    def as_text():
      tokenizer, tasks = self._assets(learn)
      with tempfile.TemporaryDirectory() as folder:
        build.save_assets(self._config, tokenizer, tasks, {}, folder)
        return base64.b64encode(_zipped(folder)).decode()

    # Process 0 reads them, too: what all have is then equal.
    content = base64.b64decode(together.from_lead(as_text))
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(io.BytesIO(content)) as file:
      file.extractall(folder)
      return build.load_assets(self._config, folder)

  def _assets(self, learn):
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
    return json.loads(together.from_lead(lambda: json.dumps(self._lines(make))))

  def _lines(self, make):
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


def _zipped(folder):
  """The files of a folder as the bytes of a zip file."""
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as written:
    for path in sorted(pathlib.Path(folder).rglob('*')):
      if path.is_file():
        written.write(path, path.relative_to(folder))
  return file.getvalue()


def _code():
  """A digest of the code that learns: a change of it may change what is learned."""
  digest = hashlib.sha256()
  root = pathlib.Path(xmodal.__file__).parent
  for folder in ('data', 'tasks', 'metrics'):
    for path in sorted((root / folder).rglob('*.py')):
      digest.update(path.read_bytes())
  return digest.hexdigest()
