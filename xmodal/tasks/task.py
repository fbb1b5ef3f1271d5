"""What a task is: everything that is particular to it, in one object."""

import abc
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from PIL import Image

from xmodal.data.example import Example
from xmodal.data.pictures.placement import Placement
from xmodal.data.tokenizer import Tokenizer
from xmodal.errors import UserError
from xmodal.models.names import Names
from xmodal.registry import Registry

# All tasks by name. A task registers with the options of its section of the config, config.NAME.
TASKS = Registry('task', 'config.mixer.tasks', 'xmodal.tasks')


class Task(abc.ABC):
  """One thing the model learns to do.

  The trainer, the evaluator and `predict` know tasks by this interface only.
  Host side (numpy, no device): encode, decode, score, draw. Device side (pure
  JAX): the head's calls, weights, losses, progress.

  Attributes:
    name: how configs, metrics and the batch's features call it.
    needs: fields of Example that training needs filled.
    loss_weights: weight of each loss term in the task's loss.
    main_score: which number of `score` says how good it is, higher for better; '': it has none.
    takes_folders: whether `query` takes a folder of pictures for a picture.
    draws: whether its predictions are pictures; `query` then needs none (None).
    query_options: names of what `query` takes beside picture and text, each as a keyword.
  """

  name: str
  needs: tuple[str, ...]
  loss_weights: Mapping[str, float]
  main_score: str = ''
  takes_folders: bool = False
  draws: bool = False
  query_options: tuple[str, ...] = ()

  @abc.abstractmethod
  def encode(self, example: Example, placement: Placement) -> dict[str, np.ndarray]:
    """Features of one example, each of a fixed shape and dtype."""

  def vocabulary(self) -> Names | None:
    """Names that the task looks for in every picture, as numpy arrays; None: it looks for none.

    The head finds them as features['vocabulary'].
    """
    return None

  def sampled_vocabulary(self, features: Mapping[str, jax.Array], key: jax.Array) -> Names | None:
    """Those of `asked` that a training step learns from, by the features of its whole batch and a
    key for random choices, which is the same on every host (device side)."""
    return self.vocabulary()

  @abc.abstractmethod
  def head(self) -> nn.Module:
    """The part of the model that is the task's own.

    Called as head(towers, features, deterministic=...) it gives what the losses
    need; head.predict(towers, features) gives arrays [B, ...] for decode.
    `towers` is a models.backbone.SharedTowers.
    """

  @abc.abstractmethod
  def weights(self, features: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """How much each example counts in each loss term: float32 [B], 0 for not at all."""

  @abc.abstractmethod
  def losses(self, outputs: Any, features: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Loss of each example by term: float32 [B], finite wherever its weight is 0.

    features['vocabulary'] are the names of sampled_vocabulary, where the task has any.
    """

  def progress(self, outputs: Any, features: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The progress bar shows these beside the loss: float32 [B], averaged over what counts."""
    return {}

  @abc.abstractmethod
  def decode(self, arrays: Mapping[str, np.ndarray]) -> list[Any]:
    """Predictions for people, one an example, from what head.predict gave."""

  def relate(self, examples: Sequence[Example], predictions: Sequence[Any]) -> Sequence[Any]:
    """Predictions that hang on each other (a ranking, say), from those of a whole split.

    What score, draw, record and files are given.
    """
    return predictions

  def score(self, examples: Sequence[Example], predictions: Sequence[Any]) -> dict[str, float]:
    """The task's official metrics; {} if it has none."""
    return {}

  def headline(self, scores: Mapping[str, float]) -> str:
    """What to say of the scores on one line, in the middle of training; '' for nothing."""
    if 'accuracy' not in scores:
      return ''
    return f'accuracy {scores["accuracy"]:.1%} of {scores["examples"]}'

  def table(self, scores: Mapping[str, float]) -> str:
    """The scores as a table to be read on a terminal; '' if there is nothing to say."""
    return ''

  def draw(self, example: Example, pixels: np.ndarray, prediction: Any) -> Image.Image | None:
    """A picture of input (uint8 [H, W, 3]), prediction and truth; None if it has none."""
    return None

  def describe(self, prediction: Any) -> str:
    """A prediction in words, for the terminal."""
    return str(prediction)

  def notes(self, example: Example) -> list[str]:
    """What to tell a person whose example cannot be taken just as it is (a text too long, say)."""
    return []

  def record(self, example: Example, prediction: Any) -> dict[str, Any] | None:
    """One line of predictions.jsonl (plain JSON values); None if it has none."""
    return None

  def files(self, examples: Sequence[Example], predictions: Sequence[Any]) -> dict[str, Any]:
    """Predictions as other programs read them: {name of a JSON file: its content}."""
    return {}

  @property
  def copies(self) -> int:
    """How many times the work of one example `predict` does at once, at most: for each of its
    beams, captions, or pictures of guidance. Evaluation predicts as many fewer examples at once."""
    return 1

  def for_split(self, examples: Sequence[Example]) -> 'Task':
    """The task as these examples ask it (they may name more than training did).

    Its head has the same parameters.
    """
    return self

  def query(self, image: str, text: str) -> tuple['Task', list[Example]]:
    """What a person's text asks of a picture: the task that answers it, and the examples to give
    it; UserError if the text asks nothing, and the task needs a question. See takes_folders."""
    if 'question' in self.needs and not text.strip():
      raise UserError(f'--text is empty; {self.name} wants the question to ask of the picture')
    return self, [Example(image, question=text)]

  def join(self, examples: Sequence[Example], predictions: Sequence[Any]) -> Any:
    """One prediction of those for the examples that `query` gave."""
    return predictions[0]

  def survey(self, examples: Sequence[Example]) -> list[str]:
    """What to tell before training on these examples; UserError if they cannot be trained on."""
    if not any(e.has(*self.needs) for e in examples):
      # As they are called in files: jsonl has one "caption", or several of them.
      fields = ' and '.join(f'"{field}"'.replace('captions', 'caption') for field in self.needs)
      raise UserError(f'{self.name}: none of {len(examples)} examples has {fields}; add that to '
                      f'the data, or take {self.name!r} out of config.mixer.tasks')
    return []

  @classmethod
  def check_options(cls, own) -> None:
    """Raises UserError where options, config[name], do not fit together."""

  @classmethod
  @abc.abstractmethod
  def from_data(cls, config, tokenizer: Tokenizer, examples: Sequence[Example]) -> 'Task':
    """A task that learns its lists (of answers, say) from training examples.

    Args:
      config: the whole config; the task's own options are config[name].
      tokenizer: of the model's text tower.
      examples: from the training split.
    """

  @classmethod
  @abc.abstractmethod
  def from_files(cls, config, tokenizer: Tokenizer, folder: str) -> 'Task':
    """A task as `save` left it in a folder."""

  def labels(self) -> Mapping[str, Sequence[Hashable]]:
    """What the last axis of some of its parameters counts: {name of a layer of the head: a label
    for each place}. A run that begins with another's parameters finds its places by them."""
    return {}

  def save(self, folder: str) -> None:
    """Writes what the task learned from the data into a folder; one that learned nothing does not
    override it."""
    del folder
