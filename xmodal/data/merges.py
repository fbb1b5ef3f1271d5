"""Byte-pair encoding (Sennrich et al., 2016) that goes on where a vocabulary ends."""

import collections
from collections.abc import Collection, Mapping
import heapq


def learn_merges(words: Mapping[tuple[str, ...], int], known: Collection[str],
                 most: int) -> list[tuple[str, str]]:
  """The pairs of pieces to join next, that which occurs most often first.

  Args:
    words: how often each occurs, by its pieces as the merges so far leave them.
    known: tokens that there are; no pair makes one of them again, for the merges of before, which
      go first, might then have more to join.
    most: how many pairs; fewer where all words are one piece before.
  """
  spelled, counts = [list(word) for word in words], list(words.values())
  totals, places = collections.Counter(), collections.defaultdict(set)
  for place, word in enumerate(spelled):
    for pair in zip(word, word[1:]):
      totals[pair] += counts[place]
      places[pair].add(place)
  queue = [(-total, pair) for pair, total in totals.items()]
  heapq.heapify(queue)
  made, merges = set(known), []
  while queue and len(merges) < most:
    total, pair = heapq.heappop(queue)
    if -total != totals[pair] or not total or ''.join(pair) in made:
      continue  # counted anew since
    merges.append(pair)
    made.add(''.join(pair))
    changed = set()
    for place in sorted(places[pair]):
      before, after = spelled[place], _joined(spelled[place], pair)
      for sign, word in ((-1, before), (1, after)):
        for other in zip(word, word[1:]):
          totals[other] += sign * counts[place]
          changed.add(other)
          if sign > 0:
            places[other].add(place)
      spelled[place] = after
    for other in changed:
      heapq.heappush(queue, (-totals[other], other))
  return merges


def _joined(word, pair):
  """A word with each occurrence of a pair as one piece, from the left."""
  pieces = []
  for piece in word:
    if pieces and (pieces[-1], piece) == pair:
      pieces[-1] += piece
    else:
      pieces.append(piece)
  return pieces
