"""Which data set a config means."""

from xmodal.config import IMAGE_SIZE
from xmodal.data import jsonl, shapes, vqa_rad, vqa_v2
from xmodal.data.example import Source
from xmodal.errors import UserError

_READERS = {'jsonl': jsonl.read_jsonl, 'vqa_v2': vqa_v2.read_vqa_v2,
            'vqa_rad': vqa_rad.read_vqa_rad}


def open_source(config, split: str, *, train: bool) -> Source:
  """Opens one split of the data set that config.data names.

  Args:
    config: the whole config.
    split: name of the split, as the source calls it.
    train: of the embedded data, whether to give the training number of examples.

  Raises:
    UserError: there is no such source, folder, file or split.
  """
  data = config.data
  if data.source == 'shapes':
    return shapes.Shapes(split, size=data.train_examples if train else data.eval_examples,
                         image_size=data.image_size or IMAGE_SIZE, seed=0)
  if data.source not in _READERS:
    raise UserError(f'config.data.source={data.source!r}: wanted one of '
                    f'{", ".join(["shapes", *_READERS])}')
  if not data.root:
    raise UserError(f'config.data.source={data.source!r} needs config.data.root, the folder of the '
                    'data')
  return _READERS[data.source](data.root, split)
