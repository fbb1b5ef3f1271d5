"""Retrieval: matches texts with pictures, by one vector for each (arXiv:2103.00020).

The vision and text towers are projected into one space, where a picture is close to
its captions. Pictures and texts are encoded separately, each only once.
"""

from collections.abc import Hashable, Sequence
import copy
import dataclasses
import json
import os
from typing import NamedTuple
import zlib

import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np
from PIL import Image

from xmodal import storage
from xmodal.data.example import Example
from xmodal.data.overview import Sampled, overview_of
from xmodal.data.pictures import images
from xmodal.data.tokenizer import Tokenizer
from xmodal.errors import UserError
from xmodal.metrics import retrieval as metrics
from xmodal.models.names import program_size
from xmodal.options import Option
from xmodal.tasks import imitation, lengths
from xmodal.tasks.described import Described
from xmodal.tasks.drawing import card
from xmodal.tasks.phrases import pattern, split_texts
from xmodal.tasks.retrieval.head import RetrievalHead
from xmodal.tasks.retrieval.losses import LOSSES, matching_pairs
from xmodal.tasks.task import TASKS, Task

_LISTED = 10  # pictures listed for a search in a folder
_DRAWN_TEXTS, _DRAWN_PICTURES = 3, 4
_DIRECTIONS = {'image_to_text': 'image to text', 'text_to_image': 'text to image'}

OPTIONS = {
    'loss': Option('sigmoid', 'Contrastive loss of all pairs: sigmoid (SigLIP) or softmax (CLIP).',
                   choices=tuple(LOSSES)),
    'embedding_dim': Option(256, 'Width of the space shared by pictures and texts.', low=1),
    'caption_length': Option(32, 'Tokens of a caption.', low=2),
    'max_captions': Option(5, 'Maximum number of captions per picture; COCO evaluates with 5.',
                           low=1)}


class Match(NamedTuple):
  """A text or a picture that is close to the query.

  Attributes:
    what: the text, or the picture's example: its `image` is the path or the pixels, its `image_id`
      the index in a list of pictures given by a user, from 0.
    similarity: cosine, -1..1.
    right: whether it is correct; None: unknown.
  """

  what: str | Example
  similarity: float
  right: bool | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Ranking:
  """Embeddings of a picture and its captions, and their closest matches.

  Attributes:
    image: float32 [D], of length 1; with several pictures of a user, that of the first.
    captions: float32 [C, D], likewise; the example's captions, then padding.
    texts: the closest texts to the picture, best first; all texts that a user gave.
    pictures: the closest pictures to the first caption, best first; all that a user gave.
    text_rank: rank of the first right text for the picture, from 1; None: not ranked.
    picture_ranks: rank of the first right picture for each caption, from 1; (): not ranked.
  """

  image: np.ndarray
  captions: np.ndarray
  texts: tuple[Match, ...] = ()
  pictures: tuple[Match, ...] = ()
  text_rank: int | None = None
  picture_ranks: tuple[int, ...] = ()


@TASKS.register('retrieval', options=OPTIONS)
class Retrieval(Task):
  """Finds texts for pictures and pictures for texts.

  For a picture with several captions, each training step samples one.
  """

  name = 'retrieval'
  needs = ('captions',)
  loss_weights = {'contrastive': 1.0}
  main_score = 'image_to_text/recall_at_1'
  takes_folders = True

  def __init__(self, config, tokenizer: Tokenizer, num_captions: int):
    """Creates the task, with up to num_captions captions per picture; config: config.retrieval."""
    if config.loss not in LOSSES:
      raise UserError(f'config.retrieval.loss={config.loss!r}: wanted one of {", ".join(LOSSES)}')
    self._config, self._tokenizer, self._num_captions = config, tokenizer, num_captions
    self._searches = False  # whether a query searches a folder for pictures

  # ---- data and queries

  @classmethod
  def from_data(cls, config, tokenizer, examples):
    most = int(lengths.num_captions(overview_of(examples)).max(initial=1))
    return cls._make(config, tokenizer, min(most, config.retrieval.max_captions))

  @classmethod
  def from_files(cls, config, tokenizer, folder):
    with open(os.path.join(folder, 'captions.json'), encoding='utf-8') as f:
      return cls._make(config, tokenizer, json.load(f)['of_a_picture'])

  @classmethod
  def _make(cls, config, tokenizer, num_captions):
    if config.train.accumulation > 1:
      raise UserError(f'retrieval: with config.train.accumulation={config.train.accumulation} a '
                      'text would be compared only with the pictures of its micro-batch; set it to '
                      "1, and save memory by config.model.remat='full'")
    return cls(config.retrieval, tokenizer, num_captions)

  def save(self, folder):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, 'captions.json'), 'w', encoding='utf-8') as f:
      json.dump({'of_a_picture': self._num_captions}, f)

  def _with(self, num_captions, searches=False):
    other = copy.copy(self)
    other._num_captions, other._searches = num_captions, searches
    return other

  def for_split(self, examples):
    most = int(lengths.num_captions(overview_of(examples)).max(initial=1))
    return self._with(min(max(most, self._num_captions), self._config.max_captions))

  def survey(self, examples):
    examples = Sampled(examples, overview_of(examples))
    said, most = super().survey(examples), self._config.max_captions
    said += lengths.length_note(
        lengths.caption_counts(self._tokenizer, examples, most), 'captions',
        self._config.caption_length, 'retrieval.caption_length')
    if left := int(np.maximum(lengths.num_captions(examples.overview) - most, 0).sum()):
      said.append(f'{left} captions beyond the first {most} of a picture are left out: '
                  'config.retrieval.max_captions sets the limit')
    return said

  def query(self, image, text):
    texts = split_texts(text) if isinstance(text, str) else tuple(text)
    if not texts:
      raise UserError(f'--text {text!r} says nothing; wanted texts with a full stop after each: "a '
                      'red circle. a blue square."')
    if isinstance(image, (list, tuple)):
      if not image:
        raise UserError('--image is an empty list; wanted pictures to rank')
      return self._with(1, searches=True), [
          Example(picture, image_id=place, captions=(text.strip(),))
          for place, picture in enumerate(image)]
    if isinstance(image, str) and storage.is_dir(image):
      known = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
      names = sorted(n for n in storage.list_dir(image) if os.path.splitext(n)[1].lower() in known)
      if not names:
        raise UserError(f'--image {image}: no pictures in that folder; wanted some in a format '
                        'that Pillow opens, such as .jpg or .png')
      return self._with(1, searches=True), [
          Example(os.path.join(image, name), captions=(text.strip(),)) for name in names]
    return self._with(program_size(len(texts))), [Example(image, captions=texts)]

  def join(self, examples, predictions):
    if self._searches:
      found = [Match(e, float(p.image @ p.captions[0])) for e, p in zip(examples, predictions)]
      return dataclasses.replace(predictions[0], pictures=_best(found))
    (example,), (prediction,) = examples, predictions
    similarity = (prediction.captions @ prediction.image).tolist()
    return dataclasses.replace(
        prediction, texts=_best([Match(*pair) for pair in zip(example.captions, similarity)]))

  # ---- host: features

  def encode(self, example, placement):
    del placement
    texts = _captions(example)[:self._num_captions]
    tokens = np.full((self._num_captions, self._config.caption_length), self._tokenizer.pad_id,
                     np.int32)
    if texts:
      tokens[:len(texts)] = self._tokenizer.encode(texts, self._config.caption_length)
    key = _picture(example)
    key = key if isinstance(key, bytes) else repr(key).encode()
    return {'captions': tokens, 'count': np.int32(len(texts)),
            'picture': np.uint32(zlib.crc32(key)).astype(np.int32)}

  def notes(self, example):
    limit = self._config.caption_length
    parts = split_texts(' '.join(example.captions)) if self._searches else ()
    whole = [f'the folder is searched for the text as a whole, not for each of its {len(parts)} '
             'parts'] if len(parts) > 1 else []
    return whole + [f'the text has {length} tokens, the model reads {limit}: its end is left out'
                    for length in self._tokenizer.lengths(example.captions) if length > limit]

  # ---- device: model and losses

  @property
  def copies(self):
    return self._num_captions  # a training step encodes only one of them

  def head(self):
    return RetrievalHead(self._config.embedding_dim, self._config.loss)

  def weights(self, features) -> dict[str, Float[Array, '*B']]:
    return {'contrastive': (features['count'] > 0).astype(jnp.float32)}

  def losses(self, outputs, features) -> dict[str, Float[Array, ' B']]:
    valid = features['count'] > 0
    positive = matching_pairs(outputs['tokens'], features['picture'], valid)
    return {'contrastive': LOSSES[self._config.loss](outputs['logits'], positive, valid)}

  def imitation(self, outputs, taught, features) -> dict[str, Float[Array, ' B']]:
    return {'contrastive': imitation.divergence(outputs['logits'], taught['logits'])}

  def progress(self, outputs, features) -> dict[str, Float[Array, ' B']]:
    valid = features['count'] > 0
    positive = matching_pairs(outputs['tokens'], features['picture'], valid)
    best = jnp.where(valid, outputs['logits'], -jnp.inf).argmax(1, keepdims=True)
    right = jnp.take_along_axis(positive, best, axis=1)[:, 0]
    return {'accuracy': right.astype(jnp.float32)}

  # ---- host: predictions

  def decode(self, arrays):
    return [Ranking(*pair) for pair in zip(arrays['image'], arrays['captions'])]

  def relate(self, examples, predictions):
    captions = [_captions(e)[:self._num_captions] for e in examples]
    gallery = _gallery(examples, captions)
    if not gallery.pictures:
      return list(predictions)
    pictures = np.stack([predictions[i].image for i in gallery.pictures])
    texts = np.stack([predictions[i].captions[place] for i, place in gallery.captions])
    text_ranking = metrics.rank(pictures, texts, gallery.right_captions, _DRAWN_TEXTS)
    picture_ranking = metrics.rank(texts, pictures, gallery.right_pictures, _DRAWN_PICTURES)

    def closest(ranking, query, right, items):
      return tuple(Match(items(n), float(s), n in right[query])
                   for n, s in zip(ranking.best[query].tolist(), ranking.similarity[query]))

    def text(number):
      example, place = gallery.captions[number]
      return captions[example][place]

    related = []
    for prediction, picture, own in zip(predictions, gallery.picture_of, gallery.captions_of):
      if picture is not None:
        prediction = dataclasses.replace(
            prediction, text_rank=int(text_ranking.ranks[picture]),
            texts=closest(text_ranking, picture, gallery.right_captions, text))
      if own:
        prediction = dataclasses.replace(
            prediction, picture_ranks=tuple(picture_ranking.ranks[own].tolist()),
            pictures=closest(picture_ranking, own[0], gallery.right_pictures,
                             lambda number: examples[gallery.pictures[number]]))
      related.append(prediction)
    return related

  def score(self, examples, predictions):
    gallery = _gallery(examples, [_captions(e)[:self._num_captions] for e in examples])
    if not gallery.pictures:
      return {}
    ranks = {
        'image_to_text': [predictions[i].text_rank for i in gallery.pictures],
        'text_to_image': [predictions[i].picture_ranks[place] for i, place in gallery.captions]}
    right = {'image_to_text': gallery.right_captions, 'text_to_image': gallery.right_pictures}
    among = {'image_to_text': len(gallery.captions), 'text_to_image': len(gallery.pictures)}
    return {'pictures': len(gallery.pictures), 'captions': len(gallery.captions), **{
        f'{direction}/{key}': number for direction in _DIRECTIONS for key, number in
        metrics.recall_scores(ranks[direction], list(map(len, right[direction])),
                              among[direction]).items()}}

  def headline(self, scores):
    parts = [f'{label} R@1 {scores[f"{key}/recall_at_1"]:.1%}' for key, label in _DIRECTIONS.items()
             if f'{key}/recall_at_1' in scores]
    return ', '.join(parts)

  def table(self, scores):
    rows = [f'{"":<20}{"".join(f"R@{k}".rjust(8) for k in metrics.RECALLS)}{"median rank":>13}']
    for key, label in _DIRECTIONS.items():
      recalls, chances = ([f'{scores[f"{key}/{kind}_at_{k}"]:8.1%}' for k in metrics.RECALLS]
                          for kind in ('recall', 'chance'))
      rows += [f'{label:<20}{"".join(recalls)}{scores[f"{key}/median_rank"]:>13.0f}',
               f'{"  chance":<20}{"".join(chances)}']
    rows.append(f'of {scores["pictures"]} pictures and {scores["captions"]} captions; a '
                'caption with the words of a right one is right too')
    return '\n'.join(rows)

  def record(self, example, prediction):
    if prediction.text_rank is None:
      return None
    texts = [{**_plain(m), 'right': m.right} for m in prediction.texts]
    return {'image_id': example.image_id, 'captions': list(_captions(example)[:self._num_captions]),
            'text_rank': prediction.text_rank, 'picture_ranks': list(prediction.picture_ranks),
            'texts': texts}

  def described(self):
    length = self._config.caption_length
    return Described(
        query={'kind': 'texts', 'length': length, 'pattern': pattern()},
        inputs={'captions': (('b', 'c', length), 'int32')}, features=dict, most={'c': 8},
        outputs=('image', 'captions'),
        answer=[{'kind': 'similarity', 'image': 'image', 'texts': 'captions', 'decimals': 4}])

  def plain(self, prediction):
    return {key: [_plain(m) for m in matches] for key, matches in (
        ('texts', prediction.texts), ('pictures', prediction.pictures)) if matches}

  @property
  def batch_key(self):
    return self._num_captions, self._searches

  def describe(self, prediction):
    if prediction.pictures:
      return '\n'.join(
          f'{m.similarity:7.3f}  {m.what.image}' for m in prediction.pictures[:_LISTED])
    return '\n'.join(f'{m.similarity:7.3f}  {m.what}' for m in prediction.texts)

  def draw(self, example, pixels, prediction):
    colours = {None: card.PLAIN, True: card.RIGHT, False: card.WRONG}
    lines = [(f'{m.similarity:.2f} {m.what}', colours[m.right]) for m in prediction.texts]
    if prediction.text_rank is not None:
      lines.insert(0, (f'texts for this picture (a right one is number {prediction.text_rank}):',
                       card.PLAIN))
    found = [(images.load_within(m.what.image, card.WIDTH)[0], colours[m.right])
             for m in prediction.pictures[:_LISTED]]
    if self._searches:
      return card.add_lines(card.draw_grid(found), [(example.captions[0], card.PLAIN)])
    drawn = card.draw_card(card.shown(example, pixels),
                           lines or [('no caption to look for', card.PLAIN)])
    if not found:
      return drawn
    rank = f' (a right one is number {prediction.picture_ranks[0]})'
    return card.stack([drawn, card.add_lines(
        card.draw_grid(found), [(f'pictures for: {_captions(example)[0]}{rank}', card.PLAIN)])])


def _plain(match):
  what, similarity = match.what, round(match.similarity, 4)
  if isinstance(what, str):
    return {'text': what, 'similarity': similarity}
  return {'image': what.file_name or what.image_id,
          'similarity': similarity}


def _captions(example) -> tuple[str, ...]:
  return tuple(text for text in example.captions if text.strip())


def _picture(example) -> Hashable:
  """The identity of a picture: its id, or its file or pixels."""
  if example.image_id is not None:
    return 'id', example.image_id
  return example.picture


def _gallery(examples, captions):
  return metrics.make_gallery([_picture(e) for e in examples], captions)


def _best(matches: Sequence[Match]) -> tuple[Match, ...]:
  return tuple(sorted(matches, key=lambda m: -m.similarity))
