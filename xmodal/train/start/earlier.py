"""Opens an earlier run that a new run is initialised from."""

from collections.abc import Iterable, Mapping
import os

import jax

from xmodal import config as configs
from xmodal.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from xmodal.errors import UserError
from xmodal.train import build
from xmodal.train.checkpoints import checkpoint, damage, reading
from xmodal.train.process import together
from xmodal.train.start import settings
from xmodal.train.start.fits import ModelSpec, counts_tokens
from xmodal.train.start.pretrained import Tower, load_towers
from xmodal.train.towers import vision_tower


def open_earlier(train) -> 'EarlierRun | None':
  """Opens the run that config.train.start_from names; None if empty.

  Raises:
    UserError: the run is missing or damaged, or config.train.start_parts does not match it.
  """
  if train.start_from:
    return EarlierRun(train.start_from, train.start_parts)
  if train.start_parts:
    raise UserError(f'config.train.start_parts={train.start_parts!r} needs '
                    'config.train.start_from, the run to take them from')
  return None


class EarlierRun:
  """One checkpoint of a run, and the parameters to take from it.

  Attributes:
    folder: checkpoints/STEP, perhaps in a bucket.
    config: config of the run.
    is_average: whether the run kept a moving average, which then replaces its parameters.
    shapes: shape and dtype of all its variables, by (collection, path).
    taken: keys of the variables to take.
    towers: its pretrained towers with parameters to take, by part.
  """

  def __init__(self, name: str, pattern: str, key: str = 'config.train.start_from'):
    """See open_earlier; reads no arrays. key: of the config, for messages."""
    self.folder = together.agree(lambda: _find(name, key), lead=True)
    self._local = checkpoint.local_copy(self.folder)
    self._assets = os.path.join(self._local, checkpoint.ASSETS)
    self.config = configs.load(os.path.join(self._assets, 'config.json'))
    try:
      stored = reading.stored(self._local, 'model')
    except reading.Damaged as proof:
      raise _damaged(self.folder, proof) from proof
    self.is_average = any(item == 'ema' for item, *_ in stored)
    # Keys in a checkpoint: params/..., collections/NAME/... and ema/...
    self._keys = {}
    for key in stored:
      if key[0] == ('ema' if self.is_average else 'params'):
        self._keys['params', '/'.join(key[1:])] = key
      elif key[0] == 'collections':
        self._keys[key[1], '/'.join(key[2:])] = key
    self.shapes = {own: stored[key] for own, key in self._keys.items()}
    names = settings.select({path for _, path in self.shapes}, pattern, self.folder)
    self.taken = frozenset(key for key in self.shapes if key[1] in names)
    self._names = names
    there = load_towers(self._assets)
    self.towers: dict[str, Tower] = {part: tower for part, tower in there.items() if any(
        name.startswith(f'backbone/{part}_tower/') for name in names)}
    self._all_towers = there

  def resolve(self, config):
    """Fills in the config of the new run, see settings.resolve.

    Raises:
      UserError: a tower has two sources, or the sizes are incompatible.
    """
    settings.check_towers(config, self.config, self._names, self.towers)
    return settings.resolve(config, self.config, self._names, self.towers)

  def make_tokenizer(self, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Makes the new run's tokenizer if its config names none; same arguments as train_tokenizer.

    Returns the earlier run's tokenizer if any parameter with a token axis is taken; a learned
    tokenizer is extended with the new texts.
    """
    if not any(map(counts_tokens, self._names)):
      return train_tokenizer(texts, vocab_size)
    own = load_tokenizer(os.path.join(self._assets, 'tokenizer'))
    is_learned = not self.config.model.text.tokenizer and 'text' not in self._all_towers
    return own.grown(texts, vocab_size) if is_learned else own

  def spec(self) -> ModelSpec:
    """Spec of the run's model; UserError if its assets are damaged."""
    tokenizer, tasks = build.load_assets(self.config, self._assets)
    vision = vision_tower(self.config, {}, self._all_towers.get('vision'))
    return ModelSpec(vision, tokenizer, tasks)

  def read(self, wanted: Mapping[tuple[str, str], jax.ShapeDtypeStruct]) -> dict:
    """Reads the wanted variables, by (collection, path).

    Raises:
      UserError: they are damaged, or cannot be read.
    """
    try:
      found = reading.read_some(self._local, 'model', {
          self._keys[own]: struct for own, struct in wanted.items()})
    except reading.Damaged as proof:
      raise _damaged(self.folder, proof) from proof
    return {own: found[self._keys[own]] for own in wanted}


def _find(name, key):
  """The folder of an undamaged checkpoint."""
  try:
    folder = checkpoint.find(name)
    for item in ('model', checkpoint.ASSETS):
      path = os.path.join(checkpoint.local_copy(folder), item)
      # Assets written by an older version have no list.
      if item == 'model' or os.path.exists(os.path.join(path, damage.LIST)):
        if proof := damage.find_damage(path):
          raise _damaged(folder, f'{item}: {proof}')
  except OSError as error:
    raise UserError(f'{key}={name!r} cannot be read: {error.strerror or error}'
                    ) from error
  except UserError as error:
    raise UserError(f'{key}={name!r}: {error}') from error
  return folder


def _damaged(folder, proof):
  return UserError(f'checkpoint {folder} is damaged ({proof}); use another one of its run')
