"""Flickr30k (Young et al., TACL 2014): pictures with five captions each."""

from collections.abc import Iterator
import os

from xmodal import storage
from xmodal.data import fields
from xmodal.data.faults import Examples
from xmodal.data.fields import Complaint
from xmodal.data.sources.files import existing_folder, split_file
from xmodal.data.sources.jsonl import numbered_lines
from xmodal.data.sources.karpathy import captioned, read_karpathy
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError

_TOKENS = 'results_20130124.token'
_FOLDERS = ('flickr30k-images', 'flickr30k_images', 'images', '')


@SOURCES.register('flickr30k')
def read_flickr30k(root: str, split: str) -> Examples:
  """Reads the captions of a split, in Karpathy's file or in that of the authors.

  The folder holds dataset_flickr30k.json (here or in karpathy/), or results_20130124.token and
  {split}.txt, which lists a picture a line, with or without .jpg, as Flickr30k Entities does; and
  pictures in flickr30k-images/, flickr30k_images/, images/ or here. If both are there, Karpathy's
  file is read. Layout: DATA.md of dandelin/ViLT; github.com/BryanPlummer/flickr30k_entities.

  Args:
    root: the folder.
    split: 'train', 'val' or 'test', or another list.

  Returns:
    Examples, one a picture, with all of its captions; image_id is the picture's name. Faults are
    empty captions, which are left out.

  Raises:
    UserError: a file or picture is missing or invalid, or a picture is listed twice or without
      captions.
  """
  root = existing_folder(root, f'dataset_flickr30k.json, or {_TOKENS} and train.txt, and pictures '
                         f'in {_FOLDERS[0]}')
  tokens = os.path.join(root, _TOKENS)
  names = ('dataset_flickr30k.json', 'karpathy/dataset_flickr30k.json')
  if not storage.is_file(tokens) or any(storage.is_file(os.path.join(root, n)) for n in names):
    return read_karpathy(root, split_file(root, *names), (split,), _FOLDERS)
  path, captions = split_file(root, f'{split}.txt'), _read_tokens(tokens)
  chosen = {}
  for number, line in _lines(path):
    line = line.strip()
    name = line if line.endswith('.jpg') else f'{line}.jpg'
    if name in chosen or name not in captions:
      raise UserError(f'{path}:{number}: {fields.shown(line)} ' + (
          'is listed twice, wanted each picture once' if name in chosen else
          f'has no captions in {_TOKENS}, wanted the name of a picture'))
    chosen[name] = name, captions[name]
  if not chosen:
    raise UserError(f'{path}: lists no pictures, wanted a name a line')
  return captioned(root, tokens, chosen, _FOLDERS)


def _read_tokens(path: str) -> dict[str, list[str]]:
  """Name of a picture -> its captions, from lines such as '36979.jpg#0<tab>A man sits .'"""
  captions = {}
  for number, line in _lines(path):
    key, tab, caption = line.partition('\t')
    name, mark, _ = key.rpartition('#')
    if not (tab and mark and name):
      raise UserError(f'{path}:{number}: is {fields.shown(line)}, wanted NAME.jpg#NUMBER, a tab '
                      'and a caption')
    captions.setdefault(name, []).append(caption.strip())
  return captions


def _lines(path: str) -> Iterator[tuple[int, str]]:
  """(line number from 1, line) of the lines that are not blank."""
  for number, line in numbered_lines(path):
    try:
      yield number, fields.text(line.decode('utf-8'))
    except UnicodeDecodeError as error:
      raise UserError(f'{path}:{number}: byte {error.start + 1} is not UTF-8; is it the right file?'
                      ) from None
    except Complaint as complaint:
      raise UserError(f'{path}:{number}: {complaint}; is it the right file?') from None
