"""Regression: answers a question about a picture with a number."""

from collections.abc import Mapping
import dataclasses
import json
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np
import optax

from xmodal.data.overview import Sampled, overview_of
from xmodal.data.texts import number_text
from xmodal.data.tokenizer import Tokenizer
from xmodal.errors import UserError
from xmodal.metrics import regression as metrics
from xmodal.options import Option
from xmodal.tasks import lengths, writing
from xmodal.tasks.described import WRITTEN, Described, written_field
from xmodal.tasks.drawing import card
from xmodal.tasks.task import TASKS, Task

# In standard deviations: smaller errors are squared, so that l_reg is smooth at 0.
_SMOOTH = 0.1
_SHOWN = ('MAE', 'RMSE', 'R2', 'within_10%', 'within_0.5', 'constant_MAE')

OPTIONS = {
    'generation_weight': Option(0.1, 'lambda of l_reg + lambda * l_gen; 0: no decoder.', low=0),
    'question_length': Option(24, 'Tokens of a question.', low=2),
    'number_length': Option(8, 'Tokens of a written number.', low=2),
    'beams': Option(1, 'Beams of the search for the written number; 1: greedy.', low=1,
                    may_change=True)}


@dataclasses.dataclass(frozen=True)
class Number:
  """A number that answers a question.

  Attributes:
    number: in the unit of the training numbers.
    written: (text, probability 0..1) of the decoder, the product over its tokens; None without a
      decoder.
  """

  number: float
  written: tuple[str, float] | None = None


@TASKS.register('regression', options=OPTIONS, sharding=((r'number/(kernel|bias)$', ()),))
class Regression(Task):
  """Answers questions with numbers.

  loss = l_reg + lambda * l_gen. l_reg is the smooth L1 loss (Girshick, 2015) of
  standardised numbers: the absolute difference in standard deviations of the training
  numbers, quadratic below 0.1. l_gen is the T5 decoder's cross-entropy on the number as
  text.
  """

  name = 'regression'
  needs = ('question', 'number')
  main_score = 'R2'

  def __init__(self, config, tokenizer: Tokenizer, mean: float, std: float,
               dropout_rate: float = 0.0):
    """Creates the task.

    Args:
      config: config.regression.
      tokenizer: tokenizer of questions and written numbers.
      mean, std: mean and standard deviation of the training numbers.
      dropout_rate: dropout before the output layer.
    """
    self._config, self._tokenizer = config, tokenizer
    self._mean, self._std, self._dropout_rate = mean, std, dropout_rate
    self.loss_weights = {'reg': 1.0} | (
        {'gen': config.generation_weight} if config.generation_weight else {})

  # ---- what is learned from the data

  @classmethod
  def from_data(cls, config, tokenizer, examples):
    numbers = overview_of(examples).numbers
    if not len(numbers):
      raise UserError(f'regression: none of {len(examples)} training examples has a number; it '
                      'needs the field "number" (of the embedded data: config.data.numbers=True)')
    # If all numbers are equal, the unit is 1.
    return cls(config.regression, tokenizer, float(numbers.mean()), float(numbers.std()) or 1.0,
               config.model.dropout_rate)

  @classmethod
  def from_files(cls, config, tokenizer, folder):
    with open(os.path.join(folder, 'numbers.json'), encoding='utf-8') as f:
      learned = json.load(f)
    return cls(config.regression, tokenizer, learned['mean'], learned['std'],
               config.model.dropout_rate)

  def save(self, folder):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, 'numbers.json'), 'w', encoding='utf-8') as f:
      json.dump({'mean': self._mean, 'std': self._std}, f)

  def survey(self, examples):
    examples = Sampled(examples, overview_of(examples))
    said = super().survey(examples)
    if examples.overview.count('question') == examples.overview.count(*self.needs):
      counts = lengths.question_counts(self._tokenizer, examples)
    else:  # some questions belong to other tasks
      counts = self._tokenizer.lengths([e.question for e in examples if e.has(*self.needs)])
    said += lengths.length_note(counts, 'questions', self._config.question_length,
                                'regression.question_length')
    if 'gen' in self.loss_weights:
      numbers, counts = np.unique(examples.overview.numbers, return_counts=True)
      tokens = self._tokenizer.lengths(list(map(number_text, numbers.tolist())))
      said += lengths.length_note(np.repeat(tokens, counts), 'written numbers',
                                  self._config.number_length, 'regression.number_length')
    return said

  # ---- host: features

  def encode(self, example, placement):
    del placement
    known = example.number is not None
    number = example.number if known else self._mean
    features = {
        'question': self._tokenizer.encode([example.question], self._config.question_length)[0],
        'number': np.float32((number - self._mean) / self._std), 'weight': np.float32(known)}
    if 'gen' in self.loss_weights:
      features['text'] = self._tokenizer.encode([number_text(number)],
                                                self._config.number_length)[0]
    return features

  def notes(self, example):
    length = int(self._tokenizer.lengths([example.question])[0])
    if length <= self._config.question_length:
      return []
    return [f'the question has {length} tokens, the model reads {self._config.question_length}: '
            'its end is left out']

  # ---- device: model and losses

  @property
  def copies(self):
    return self._config.beams if 'gen' in self.loss_weights else 1

  def head(self):
    return RegressionHead(
        number_length=self._config.number_length if 'gen' in self.loss_weights else 0,
        pad_id=self._tokenizer.pad_id, eos_id=self._tokenizer.eos_id, beams=self._config.beams,
        dropout_rate=self._dropout_rate)

  def weights(self, features) -> dict[str, Float[Array, '*B']]:
    return {term: features['weight'] for term in self.loss_weights}

  def losses(self, outputs, features) -> dict[str, Float[Array, ' B']]:
    losses = {'reg': optax.huber_loss(outputs['reg'], features['number'], delta=_SMOOTH) / _SMOOTH}
    if 'gen' in self.loss_weights:
      losses['gen'] = writing.token_loss(outputs['gen'], features['text'], self._tokenizer.pad_id)
    return losses

  @property
  def units(self):
    return self._mean, self._std

  def imitation(self, outputs, taught, features) -> dict[str, Float[Array, ' B']]:
    return {'reg': optax.huber_loss(outputs['reg'], jax.lax.stop_gradient(taught['reg']),
                                    delta=_SMOOTH) / _SMOOTH}

  def progress(self, outputs, features) -> dict[str, Float[Array, ' B']]:
    """Absolute error, in the unit of the numbers."""
    error = jnp.abs(outputs['reg'] - features['number']) * self._std
    return {'MAE': error * features['weight']}

  # ---- host: predictions

  def decode(self, arrays):
    numbers = (arrays['number'].astype(np.float64) * self._std + self._mean).tolist()
    written = writing.read_texts(self._tokenizer, arrays) if 'tokens' in arrays else None
    return [Number(number, written[i] if written else None)
            for i, number in enumerate(numbers)]

  def score(self, examples, predictions):
    known = [(e, p) for e, p in zip(examples, predictions) if e.number is not None]
    if not known:
      return {}
    numbers, truths = [p.number for _, p in known], [e.number for e, _ in known]
    scores = {**metrics.regression_scores(numbers, truths), 'examples': len(known)}
    if known[0][1].written:
      read = [(number, e.number) for e, p in known
              if (number := writing.read_number(p.written[0])) is not None]
      scores['written_share'] = len(read) / len(known)  # share of texts that are numbers
      if read:
        scores['written_MAE'] = metrics.regression_scores(*zip(*read))['MAE']
    kinds = [e.question_type or 'other' for e, _ in known]
    groups = metrics.scores_by_group(numbers, truths, kinds) if set(kinds) != {'other'} else {}
    return scores | {f'{name}/{group}': score for group, of_group in groups.items()
                     for name, score in of_group.items()}

  def headline(self, scores):
    if 'MAE' not in scores:
      return ''
    return (f'mean error {scores["MAE"]:.3g} ({scores["constant_MAE"]:.3g} when always predicting '
            f'the mean), {scores["within_10%"]:.1%} of {scores["examples"]} within 10%')

  def table(self, scores):
    groups = [key.removeprefix('examples/') for key in scores if key.startswith('examples/')]
    rows = [f'{"question":<16}{"number":>8}' + ''.join(f'{name:>13}' for name in _SHOWN)]
    for label, end in (*((group, f'/{group}') for group in groups), ('all', '')):
      cells = [(scores.get(f'{name}{end}'), '.1%' if name.startswith('within') else '.3g')
               for name in _SHOWN]
      rows.append(f'{label[:15]:<16}{scores[f"examples{end}"]:>8}' + ''.join(
          f'{"" if value is None else format(value, form):>13}' for value, form in cells))
    if 'written_MAE' in scores:
      rows.append(f'written: MAE {scores["written_MAE"]:.3g}; '
                  f'{scores["written_share"]:.1%} of the texts are numbers')
    return '\n'.join(rows)

  def record(self, example, prediction):
    if not example.question:
      return None
    line = {'question_id': example.question_id, 'question': example.question,
            'question_type': example.question_type, 'number': example.number}
    return line | self.plain(prediction)

  def described(self):
    length, written = self._config.question_length, 'gen' in self.loss_weights
    fields = [{'kind': 'number', 'key': 'predicted', 'array': 'number', 'mean': self._mean,
               'std': self._std, 'digits': 6}]
    return Described(
        query={'kind': 'question', 'length': length},
        inputs={'question': (('b', length), 'int32')}, features=dict,
        outputs=('number', *(WRITTEN if written else ())),
        answer=fields + ([written_field('written')] if written else []))

  def plain(self, prediction):
    line = {'predicted': float(f'{prediction.number:.6g}')}
    if prediction.written:
      line['written'] = prediction.written[0]
    return line

  def describe(self, prediction):
    line = number_text(prediction.number)
    if not prediction.written:
      return line
    text, probability = prediction.written
    return f'{line}\nwritten: {text or "(nothing)"} ({probability:.1%})'

  def draw(self, example, pixels, prediction):
    lines = [(example.question, card.PLAIN)]
    colour = card.PLAIN
    if example.number is not None:
      error = abs(prediction.number - example.number)
      near = error <= max(0.5, 0.1 * abs(example.number))
      colour = card.RIGHT if near else card.WRONG
    lines.append((f'model: {number_text(prediction.number)}', colour))
    if prediction.written:
      lines.append((f'written: {prediction.written[0] or "(nothing)"}', card.PLAIN))
    if example.number is not None:
      lines.append((f'truth: {number_text(example.number)}', card.PLAIN))
    return card.draw_card(card.shown(example, pixels), lines)


class RegressionHead(nn.Module):
  """Predicts a number from the pooled picture and question, and generates it with the T5 decoder.

  Attributes:
    number_length: maximum length of a written number, in tokens; 0: no decoder.
    pad_id, eos_id: token ids.
    beams: beams of the search for the written number; 1: greedy.
    dropout_rate: dropout before the output layer.
  """

  number_length: int
  pad_id: int
  eos_id: int
  beams: int = 1
  dropout_rate: float = 0.0

  @nn.compact
  def __call__(self, towers, features: Mapping[str, Any], *, deterministic: bool
               ) -> dict[str, Array]:
    """Returns {'reg': float32 [B], standardised, 'gen': logits [B, T, V] if there is a decoder}."""
    fused = towers.fused(features['question'])
    pooled = fused.pooled
    hidden = nn.Dense(pooled.shape[-1], dtype=pooled.dtype, name='hidden')(pooled)
    hidden = nn.Dropout(self.dropout_rate)(nn.gelu(hidden), deterministic=deterministic)
    # Zero kernel: starts at the mean of the training numbers.
    number = nn.Dense(1, dtype=jnp.float32, name='number',
                      kernel_init=nn.initializers.zeros)(hidden)
    outputs = {'reg': number[:, 0]}
    if 'text' in features and self.number_length:
      outputs['gen'] = writing.teacher_forced_logits(towers, fused, features['text'], self.pad_id)
    return outputs

  def predict(self, towers, features: Mapping[str, Any]) -> dict[str, Array]:
    """Returns the standardised number, [B], and the generated text, see writing.write."""
    question = {'question': features['question']}  # without the target text
    arrays = {'number': self(towers, question, deterministic=True)['reg']}
    if self.number_length:
      arrays |= writing.write(towers, towers.fused(features['question']), self.number_length,
                              pad_id=self.pad_id, eos_id=self.eos_id, beams=self.beams)
    return arrays
