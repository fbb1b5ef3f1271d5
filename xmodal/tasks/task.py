"""The interface of a task: everything specific to it, in one object."""

import abc
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float
import numpy as np
from PIL import Image

from xmodal.data.example import Example
from xmodal.data.overview import overview_of
from xmodal.data.pictures.placement import Placement
from xmodal.data.sense import SENSES
from xmodal.data.tokenizer import Tokenizer
from xmodal.errors import UserError
from xmodal.models.names import Names
from xmodal.registry import Registry
from xmodal.tasks.described import Described

# All tasks by name. A task registers with the options of its section of the config, config.NAME.
TASKS = Registry('task', 'config.mixer.tasks', 'xmodal.tasks')


class Task(abc.ABC):
  """A task that the model learns.

  The trainer, the evaluator and `predict` use tasks through this interface only.
  Host side (numpy, no device): encode, decode, score, draw. Device side (pure
  JAX): the head's calls, weights, losses, progress.

  Attributes:
    name: its key in configs, metrics and the batch's features.
    needs: fields of Example that training requires.
    loss_weights: weight of each loss term in the task's loss.
    main_score: key of the main metric in `score`, higher is better; '': none.
    takes_folders: whether `query` ranks: it accepts a folder or a list of pictures as image, or a
      list of texts as text.
    draws: whether its predictions are pictures; `query` then accepts image=None.
    senses: names of its inputs besides pictures and text, see data.sense.
    query_options: names of the additional keywords of `query`. One is 'progress': called with the
      number of steps of a prediction, it gives what the compiled program calls after each with the
      number of finished steps and a value for `unfinished`. It has to give equal functions, because
      each is a program of its own.
  """

  name: str
  needs: tuple[str, ...]
  loss_weights: Mapping[str, float]
  main_score: str = ''
  takes_folders: bool = False
  draws: bool = False
  senses: tuple[str, ...] = ()
  query_options: tuple[str, ...] = ()

  @abc.abstractmethod
  def encode(self, example: Example, placement: Placement) -> dict[str, np.ndarray]:
    """The features of one example, with fixed shapes and dtypes."""

  def vocabulary(self) -> Names | None:
    """The names to look for in every picture, as numpy arrays; None: no names.

    The head gets them as features['vocabulary'].
    """
    return None

  def shared(self) -> dict[str, Any]:
    """Features that all examples of a batch share (numpy), from `query`: no values of them make
    another program."""
    return {}

  def sampled_vocabulary(self, features: Mapping[str, Any], key: jax.Array) -> Names | None:
    """The names of `vocabulary` that a training step uses (device side).

    Args:
      features: of the whole batch.
      key: random key, equal on all hosts.
    """
    return self.vocabulary()

  @abc.abstractmethod
  def head(self) -> nn.Module:
    """The task-specific part of the model.

    head(towers, features, deterministic=...) returns the `outputs` of the losses;
    head.predict(towers, features) returns arrays [B, ...] for decode.
    `towers` is a models.joint.SharedTowers.
    """

  @abc.abstractmethod
  def weights(self, features: Mapping[str, Any]) -> dict[str, Float[Array, '*B']]:
    """Weight of each example in each loss term: float32 [B], 0 to exclude it.

    For the features of a single example, a scalar.
    """

  @abc.abstractmethod
  def losses(self, outputs: Any, features: Mapping[str, Any]
             ) -> dict[str, Float[Array, ' B']]:
    """Per-example losses by term: float32 [B], finite even if the weight is 0.

    features['vocabulary'] has the names of sampled_vocabulary, if the task has names.
    """

  def imitation(self, outputs: Any, taught: Any, features: Mapping[str, Any]
                ) -> dict[str, Float[Array, ' B']]:
    """Per-example losses of outputs against a teacher's, by term: float32 [B]; {}: none."""
    return {}

  def progress(self, outputs: Any, features: Mapping[str, Any]
               ) -> dict[str, Float[Array, ' B']]:
    """Metrics for the progress bar, beside the loss: float32 [B], averaged by weight."""
    return {}

  @abc.abstractmethod
  def decode(self, arrays: Mapping[str, np.ndarray]) -> list[Any]:
    """Converts the arrays of head.predict to predictions, one per example.

    Processes of a run exchange predictions and scores, so that both must be picklable.
    """

  def relate(self, examples: Sequence[Example], predictions: Sequence[Any]) -> Sequence[Any]:
    """Adds information that depends on the whole split (such as a ranking) to predictions.

    score, draw, record and files get the result.
    """
    return predictions

  def score(self, examples: Sequence[Example], predictions: Sequence[Any]) -> dict[str, float]:
    """The task's official metrics; {} if it has none."""
    return {}

  def headline(self, scores: Mapping[str, float]) -> str:
    """The scores in one line, for evaluations during training; '' for none."""
    if 'accuracy' in scores:
      return f'accuracy {scores["accuracy"]:.1%} of {scores["examples"]}'
    return f'{self.main_score} {scores[self.main_score]:.4g}' if self.main_score in scores else ''

  def table(self, scores: Mapping[str, float]) -> str:
    """The scores as a table for the terminal; '' for none."""
    return ''

  def draw(self, example: Example, pixels: np.ndarray, prediction: Any) -> Image.Image | None:
    """A picture of input (uint8 [H, W, 3]), prediction and ground truth, or None."""
    return None

  def describe(self, prediction: Any) -> str:
    """A prediction as text for the terminal."""
    return str(prediction)

  def notes(self, example: Example) -> list[str]:
    """Notes for the user if an example is not used as it is (such as a text that is too long)."""
    return []

  def record(self, example: Example, prediction: Any) -> dict[str, Any] | None:
    """One line of predictions.jsonl (plain JSON values), or None."""
    return None

  def files(self, examples: Sequence[Example], predictions: Sequence[Any]) -> dict[str, Any]:
    """Predictions in formats of other programs: {name of a JSON file: its content}."""
    return {}

  def plain(self, prediction: Any) -> dict[str, Any]:
    """A prediction as plain JSON values, for `record` and the answers of xmodal predict."""
    return {'answer': self.describe(prediction)}

  def details(self, prediction: Any) -> dict[str, Any]:
    """More about a prediction than `plain`, as plain JSON values, for a page that shows it."""
    return {}

  def unfinished(self, value: np.ndarray) -> Any:
    """What a step of a prediction shows: the pictures so far, uint8 [N, H, W, 3], or texts."""
    raise NotImplementedError(f'{self.name} has no steps')

  @property
  def batch_key(self) -> Hashable:
    """What `query` changed in the task: examples of tasks with equal keys can share a batch."""
    return None

  @property
  def copies(self) -> int:
    """Maximum number of copies of an example that `predict` processes at once (beams, captions,
    or pictures for guidance). Evaluation divides its batch size by this number."""
    return 1

  def for_split(self, examples: Sequence[Example]) -> 'Task':
    """The task adapted to these examples, which may have names that training lacked.

    Its head has the same parameters.
    """
    return self

  def query(self, image: str, text: str) -> tuple['Task', list[Example]]:
    """Converts a user's picture and text to a task and the examples to predict.

    Args:
      image: path of a picture, or a folder (see takes_folders).
      text: the user's text.

    Raises:
      UserError: the text is empty and the task needs a question.
    """
    if 'question' in self.needs and not text.strip():
      raise UserError(f'--text is empty; {self.name} wants the question to ask of the picture')
    return self, [Example(image, question=text)]

  def join(self, examples: Sequence[Example], predictions: Sequence[Any]) -> Any:
    """Joins the predictions of the examples from `query` into one."""
    return predictions[0]

  def survey(self, examples: Sequence[Example]) -> list[str]:
    """Notes for the user before training on these examples.

    They may be millions that are read from disk: xmodal.data.overview has what most notes need.

    Raises:
      UserError: no example has the fields in `needs`.
    """
    if not overview_of(examples).count(*self.needs):
      # The field's name in jsonl files is "caption".
      fields = ' and '.join(f'"{field}"'.replace('captions', 'caption') for field in self.needs)
      raise UserError(f'{self.name}: none of {len(examples)} examples has {fields}; add that to '
                      f'the data, or take {self.name!r} out of config.mixer.tasks')
    return []

  @classmethod
  def check_options(cls, own) -> None:
    """Raises UserError if options, config[name], do not fit together."""
    del own

  @classmethod
  @abc.abstractmethod
  def from_data(cls, config, tokenizer: Tokenizer, examples: Sequence[Example]) -> 'Task':
    """Creates the task, with its lists (such as answers) from training examples.

    Args:
      config: the whole config; the task's own options are config[name].
      tokenizer: of the model's text tower.
      examples: examples of the training split; see survey.
    """

  @classmethod
  @abc.abstractmethod
  def from_files(cls, config, tokenizer: Tokenizer, folder: str) -> 'Task':
    """Restores the task from a folder written by `save`."""

  def described(self) -> Described | None:
    """The task's inputs and outputs as data, for programs without its code; None: it cannot be
    described so. See xmodal/bundle/README.md."""
    return None

  def labels(self) -> Mapping[str, Sequence[Hashable]]:
    """What the last axis of some of its parameters counts: {name of a layer of the head: a label
    for each place}. A run that begins with another's parameters finds its places by them."""
    return {}

  @property
  def units(self) -> tuple[float, ...]:
    """What its numbers are relative to, such as a mean; models with other units do not compare."""
    return ()

  def save(self, folder: str) -> None:
    """Writes what from_data learned into a folder; the default writes nothing."""
    del folder


def senses_of(tasks: Mapping[str, Task]) -> dict[str, Callable[[Example], dict]]:
  """The tasks' senses besides pictures and text: {name: function that encodes an example}.

  Raises:
    UserError: a sense is unknown.
  """
  names = dict.fromkeys(name for task in tasks.values() for name in getattr(task, 'senses', ()))
  return {name: SENSES[name].make for name in names}
