"""Recall@k and median rank of retrieval between pictures and captions.

As Flickr30k and COCO are evaluated (VSE++, arXiv:1707.05612, evaluation.py):
a picture counts once, however many captions it has; the rank of a picture query is
that of its best caption, and each caption is a query of its own. Two differences:
candidates as similar as the right one are ranked before it (stricter), and a caption
with the same words as a right one is right too (fairer: several pictures described
by the same words are equally right).
"""

import collections
from collections.abc import Hashable, Sequence
import dataclasses
import unicodedata

import numpy as np

RECALLS = (1, 5, 10)
# Similarities of float32 embeddings that differ by less count as equal.
_TIE = 1e-6
_CHUNK = 512  # queries ranked at once


@dataclasses.dataclass(frozen=True)
class Gallery:
  """The distinct pictures and captions, which are both queries and candidates.

  Attributes:
    picture_of: for each example, the number of its picture; None: it has no caption.
    captions_of: for each example, the numbers of its captions.
    pictures: for each picture, the index of the first example that shows it.
    captions: for each caption, (example, index in its captions).
    right_captions: for each picture, int64 [R], the numbers of captions that describe it.
    right_pictures: for each caption, int64 [R], the numbers of pictures it describes.
  """

  picture_of: list[int | None]
  captions_of: list[list[int]]
  pictures: list[int]
  captions: list[tuple[int, int]]
  right_captions: list[np.ndarray]
  right_pictures: list[np.ndarray]


def make_gallery(pictures: Sequence[Hashable], captions: Sequence[Sequence[str]]) -> Gallery:
  """Collects the distinct pictures and captions of examples, without uncaptioned pictures.

  Args:
    pictures: a key for each example, equal for the same picture.
    captions: the captions of each example. A caption that an earlier example of the same
      picture has is not counted again.
  """
  numbers, picture_from, caption_from, picture_of, captions_of = {}, [], [], [], []
  places = collections.defaultdict(dict)  # picture -> wording -> number of the caption
  pictures_with = collections.defaultdict(dict)  # wording -> pictures, as a set in order
  wordings = []  # of each caption
  captioned = {picture for picture, texts in zip(pictures, captions) if texts}
  for i, (picture, texts) in enumerate(zip(pictures, captions, strict=True)):
    if picture not in captioned:
      picture_of.append(None)
      captions_of.append([])
      continue
    if picture not in numbers:
      numbers[picture] = len(numbers)
      picture_from.append(i)
    number = numbers[picture]
    earlier, own = dict(places[number]), []
    for place, text in enumerate(texts):
      wording = _wording(text)
      if wording in earlier:
        own.append(earlier[wording])
        continue
      own.append(len(caption_from))
      places[number][wording] = len(caption_from)
      pictures_with[wording][number] = None
      caption_from.append((i, place))
      wordings.append(wording)
    picture_of.append(number)
    captions_of.append(own)
  worded = collections.defaultdict(list)
  for number, wording in enumerate(wordings):
    worded[wording].append(number)
  return Gallery(
      picture_of, captions_of, picture_from, caption_from,
      [np.array([c for wording in places[p] for c in worded[wording]])
       for p in range(len(numbers))],
      [np.array(list(pictures_with[wording])) for wording in wordings])


def _wording(text):
  # NFC: an accented letter may be one character or a letter with a combining mark.
  return ' '.join(unicodedata.normalize('NFC', text.lower()).split())


@dataclasses.dataclass(frozen=True)
class Ranks:
  """Candidates ranked by their similarity to queries.

  Attributes:
    ranks: int64 [Q], rank of the first right candidate, from 1.
    best: int64 [Q, K], the most similar candidates, best first.
    similarity: float32 [Q, K], the similarity of those.
  """

  ranks: np.ndarray
  best: np.ndarray
  similarity: np.ndarray


def rank(queries: np.ndarray, candidates: np.ndarray, right: Sequence[np.ndarray],
         best: int = 1) -> Ranks:
  """Ranks candidates for each query; wrong ones as similar as a right one go before it.

  A similarity that is not finite counts as the lowest, so that a right candidate with one comes
  last.

  Args:
    queries: float32 [Q, D], of unit length.
    candidates: float32 [N, D], of unit length.
    right: for each query, the numbers of its right candidates, at least one.
    best: K, number of most similar candidates to return (at most N).
  """
  best = min(best, len(candidates))
  parts = []
  for start in range(0, len(queries), _CHUNK):
    with np.errstate(invalid='ignore', over='ignore'):
      similarity = queries[start:start + _CHUNK] @ candidates.T
    similarity = np.where(np.isfinite(similarity), similarity, np.float32(-np.inf))
    is_right = np.zeros(similarity.shape, bool)
    for row, numbers in zip(is_right, right[start:start + _CHUNK]):
      row[numbers] = True
    truth = np.where(is_right, similarity, -np.inf).max(1, keepdims=True)
    ranks = 1 + (~is_right & (similarity >= truth - _TIE)).sum(1)
    top = np.argpartition(-similarity, best - 1, axis=1)[:, :best]
    order = np.argsort(-np.take_along_axis(similarity, top, axis=1), axis=1, kind='stable')
    top = np.take_along_axis(top, order, axis=1)
    parts.append((ranks, top, np.take_along_axis(similarity, top, axis=1)))
  return Ranks(*map(np.concatenate, zip(*parts)))


def recall_scores(ranks: np.ndarray, num_right: Sequence[int],
                  num_candidates: int) -> dict[str, float]:
  """Recall at 1, 5 and 10, their values at chance, and the median rank.

  Args:
    ranks: int [Q], rank of the first right candidate, from 1.
    num_right: number of right candidates for each query.
    num_candidates: number of candidates.

  Returns:
    recall_at_K and chance_at_K, 0..1, and median_rank (rounded down, as VSE++ does).
  """
  scores = {}
  for k in RECALLS:
    # Chance misses if all of the first k are wrong (hypergeometric).
    missed = [np.prod([max(num_candidates - r - i, 0) / (num_candidates - i)
                       for i in range(min(k, num_candidates))]) for r in num_right]
    scores |= {f'recall_at_{k}': float(np.mean(np.asarray(ranks) <= k)),
               f'chance_at_{k}': float(1 - np.mean(missed))}
  return scores | {'median_rank': float(np.floor(np.median(ranks)))}
