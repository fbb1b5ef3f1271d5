"""Confident captions and answers of a trained model for pictures, as xmodal/augment.py defines."""

import collections
from collections.abc import Iterator, Sequence
import dataclasses
import os
import random

from xmodal.data.example import Example
from xmodal.data.pictures.decoded import DecodedPictures
from xmodal.data.sources.files import is_utf8
from xmodal.metrics.agreement import agrees
from xmodal.predictor import AT_ONCE, Predictor


@dataclasses.dataclass
class Tally:
  """What there is to report.

  Attributes:
    pictures: those that could be read.
    unreadable: what is wrong with each of the others.
    captions: number kept.
    verdicts: of the answers that are sure: whether the caption agrees, or None.
    given, sure, kept: how often each answer was given, was sure, and is in the file.
    examples: lines of the file.
  """

  pictures: int = 0
  unreadable: list[str] = dataclasses.field(default_factory=list)
  captions: int = 0
  verdicts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  given: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  sure: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  kept: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  examples: int = 0


class Labeller:
  """Asks a model about pictures and keeps what it is sure of."""

  def __init__(self, predictor: Predictor, opened: DecodedPictures, questions: Sequence[str], *,
               per_picture: int | None, threshold: float, keep_unjudged: bool):
    """A labeller with an empty tally.

    Args:
      predictor: of a model with the task vqa if there are questions; it decodes by `opened`.
      opened: what pictures are opened with.
      questions: for each picture; () for captions alone.
      per_picture: how many of them of each picture, drawn at random; None: all.
      threshold: least probability, 0..1.
      keep_unjudged: whether answers are kept that the caption says nothing of.
    """
    self.tally = Tally()
    self._predictor, self._opened, self._questions = predictor, opened, tuple(questions)
    self._per_picture = min(per_picture or len(questions), len(questions))
    self._threshold, self._keep_unjudged = threshold, keep_unjudged

  def lines(self, paths: Sequence[str]) -> list[dict]:
    """Examples of some pictures, as jsonl has them but for "image": the picture's path.

    A caption that is kept is in each example of its picture.
    """
    wrong = {path: f'{path!a}: the name is not UTF-8, so that no .jsonl can hold it'
             for path in paths if not is_utf8(path)}
    wrong |= self._opened.open([path for path in paths if path not in wrong],
                               self._predictor.config.data.image_size)
    self.tally.unreadable += wrong.values()
    paths = [path for path in paths if path not in wrong]
    self.tally.pictures += len(paths)
    captions = self._captions(paths)
    lines = collections.defaultdict(list)
    for path, answer in self._answers(paths, captions):
      lines[path].append(answer)
    examples = []
    for path in paths:
      caption, probability = captions[path]
      about, made_by = {}, {}
      if caption and probability >= self._threshold:
        about, made_by = {'caption': caption}, {'caption': round(probability, 4)}
        self.tally.captions += 1
      for line in lines[path] or ([{}] if about else []):
        examples.append({'image': path, **line, **about, 'made': True,
                         'made_by': line.get('made_by', {}) | made_by})
    self.tally.examples += len(examples)
    return examples

  def _captions(self, paths) -> dict[str, tuple[str, float]]:
    """(caption, probability a token) of each picture; ('', 0) where the model writes none."""
    if 'captioning' not in self._predictor.tasks:
      return dict.fromkeys(paths, ('', 0.0))
    predictions = self._predict([Example(path) for path in paths], 'captioning')
    lengths = self._predictor.tokenizer.lengths([p.caption for p in predictions])
    return {path: (p.caption.strip(), p.probability ** (1 / length))
            for path, p, length in zip(paths, predictions, lengths.tolist())}

  def _answers(self, paths, captions) -> Iterator[tuple[str, dict]]:
    """The questions and answers that are kept, each with its picture."""
    examples = [Example(path, question=question) for path in paths for question in self._ask(path)]
    for example, prediction in zip(examples, self._predict(examples, 'vqa')):
      answer = prediction.answer.strip()
      self.tally.given[answer] += 1
      if not (answer and prediction.probability >= self._threshold):  # NaN is not sure either
        continue
      self.tally.sure[answer] += 1
      verdict = agrees(example.question, answer, captions[example.image][0])
      self.tally.verdicts[verdict] += 1
      if verdict or (verdict is None and self._keep_unjudged):
        self.tally.kept[answer] += 1
        yield example.image, {'question': example.question, 'answers': [answer],
                              'made_by': {'answer': round(prediction.probability, 4)}}

  def _ask(self, path):
    """The questions for a picture, the same on each call."""
    return random.Random(os.path.basename(path)).sample(self._questions, self._per_picture)

  def _predict(self, examples, task):
    """Predictions in batches of one size, so that one program serves them all."""
    if not examples:
      return []
    fillers = [examples[-1]] * (-len(examples) % AT_ONCE)
    return self._predictor([*examples, *fillers], task)[1][:len(examples)]
