"""The embedded scenes as a data source, config.data.source='shapes'."""

from xmodal.data.example import Source
from xmodal.data.scenes.crowds import Crowds
from xmodal.data.scenes.drawings import Drawings
from xmodal.data.scenes.numbers import Numbers
from xmodal.data.scenes.shapes import Shapes
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError
from xmodal.options import Option

OPTIONS = {
    'train_examples': Option(40_000, 'Scenes to train on.', low=1),
    'eval_examples': Option(2_100, 'Scenes to evaluate on.', low=1, may_change=True),
    'crowded': Option(False, 'Scenes of up to ten overlapping shapes and an expression for one.'),
    'numbers': Option(False, 'Scenes with questions answered by a number.'),
    'drawn': Option(False, 'Scenes of one or two shapes with a complete caption.'),
    'without': Option((), "Names such as 'red circle', kept out of training (crowded and drawn).")}

_KINDS = {'crowded': Crowds, 'numbers': Numbers, 'drawn': Drawings}


@SOURCES.register('shapes', options=OPTIONS, embedded=True)
def open_shapes(split: str, *, train: bool, image_size: int, train_examples: int,
                eval_examples: int, without: tuple[str, ...], **kinds: bool) -> Source:
  """Scenes of the kind whose option is true; by default scenes with questions (Shapes)."""
  chosen = [kind for kind in _KINDS if kinds[kind]]
  if len(chosen) > 1:
    raise UserError(f'config.data.{chosen[0]}=True and config.data.{chosen[1]}=True are two kinds '
                    'of scenes; set one of them to False')
  shared = dict(size=train_examples if train else eval_examples, image_size=image_size, seed=0)
  kind = chosen[0] if chosen else ''
  if kind in ('crowded', 'drawn'):
    return _KINDS[kind](split, **shared, without=tuple(without) if train else ())
  if without:
    raise UserError(f'config.data.without={tuple(without)}: nothing can be left out of the scenes '
                    'with questions; set config.data.crowded=True or config.data.drawn=True')
  return _KINDS.get(kind, Shapes)(split, **shared)
