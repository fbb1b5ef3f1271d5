"""Visual question answering: a classifier over an answer list, and a generated answer."""

from collections.abc import Sequence
import dataclasses
import json
import os

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from xmodal.data.overview import Sampled, overview_of
from xmodal.data.tokenizer import Tokenizer
from xmodal.errors import UserError
from xmodal.metrics import classification
from xmodal.metrics import vqa as vqa_metric
from xmodal.options import Option
from xmodal.tasks import imitation, lengths, writing
from xmodal.tasks.described import WRITTEN, Described, written_field
from xmodal.tasks.drawing import card
from xmodal.tasks.task import TASKS, Task
from xmodal.tasks.vqa.answers import commonest, make_answer_list
from xmodal.tasks.vqa.head import VQAHead

MAX_TARGETS = 10  # answers with a score that a question has: those of ten people

OPTIONS = {
    'classifier': Option(True, 'Whether to classify over the answer list.'),
    'generation_weight': Option(0.1, 'lambda of l_cls + lambda * l_gen; 0: no decoder.', low=0),
    'max_answers': Option(3129, "Maximum size of the answer list; 3129 is VQAv2's usual number.",
                          low=1),
    'question_length': Option(24, 'Tokens of a question.', low=2),
    'answer_length': Option(6, 'Tokens of a written answer.', low=2),
    'beams': Option(1, 'Beams of the search for the written answer; 1: greedy.', low=1,
                    may_change=True)}


@dataclasses.dataclass(frozen=True)
class Answer:
  """An answer of the model.

  Attributes:
    answer: the answer of the classifier if there is one, else of the decoder.
    top: (answer, probability 0..1) of up to five most probable answers of the answer list, best
      first; () without a classifier.
    written: (text, probability 0..1) of the decoder, the product over its tokens; None without a
      decoder.
  """

  answer: str
  top: tuple[tuple[str, float], ...] = ()
  written: tuple[str, float] | None = None

  @property
  def probability(self) -> float:
    """Probability of the answer."""
    return self.top[0][1] if self.top else self.written[1]


@TASKS.register('vqa', options=OPTIONS)
class VQA(Task):
  """Answers questions about pictures.

  loss = l_cls + lambda * l_gen: softmax cross-entropy against the answers'
  soft scores (several people may answer differently), and the T5 decoder's
  cross-entropy on the text of the most frequent answer.
  """

  name = 'vqa'
  needs = ('question', 'answers')
  main_score = 'accuracy'

  def __init__(self, tokenizer: Tokenizer, answers: Sequence[str], *, question_length: int,
               answer_length: int, classifier: bool = True, generation_weight: float = 0.0,
               beams: int = 1, dropout_rate: float = 0.0):
    """Creates the task for a fixed answer list.

    Args:
      tokenizer: tokenizer of questions and written answers.
      answers: the classifier's answers in the order of its logits.
      question_length: maximum number of tokens of a question, including its end token.
      answer_length: likewise for written answers.
      classifier: whether there is a classifier.
      generation_weight: lambda of the joint loss; 0: no decoder.
      beams: beams of the search for the written answer; 1: greedy.
      dropout_rate: dropout before the classifier's logits.
    """
    if not classifier and not generation_weight:
      raise UserError('vqa: both heads are off; set config.vqa.classifier=True or '
                      'config.vqa.generation_weight above 0')
    self.tokenizer = tokenizer
    self.answers = tuple(answers)
    self._index = {vqa_metric.answer_key(answer): i for i, answer in enumerate(self.answers)}
    self._question_length, self._answer_length = question_length, answer_length
    self._classifier, self._beams = classifier, beams
    self._dropout_rate = dropout_rate
    self.loss_weights = ({'cls': 1.0} if classifier else {}) | (
        {'gen': generation_weight} if generation_weight else {})

  # ---- host: features

  def encode(self, example, placement):
    del placement
    known = [(self._index[answer], score)
             for answer, score in vqa_metric.soft_scores(example.answers).items()
             if answer in self._index and score > 0]
    best = sorted(known, key=lambda pair: -pair[1])[:MAX_TARGETS]
    ids, scores = np.full(MAX_TARGETS, -1, np.int32), np.zeros(MAX_TARGETS, np.float32)
    for place, (index, score) in enumerate(best):
      ids[place], scores[place] = index, score
    text = commonest(example.answers) if example.answers else ''
    return {
        'question': self.tokenizer.encode([example.question], self._question_length)[0],
        'target_ids': ids,
        'target_scores': scores,
        'cls_weight': np.float32(bool(best)),
        'answer': self.tokenizer.encode([text], self._answer_length)[0],
        'gen_weight': np.float32(bool(text)),
    }

  def survey(self, examples):
    overview = overview_of(examples)
    examples = Sampled(examples, overview)
    said = super().survey(examples)
    answered = (overview.given.lengths > 0) & (overview.questions.lengths > 0)
    said += lengths.length_note(lengths.question_counts(self.tokenizer, examples), 'questions',
                                self._question_length, 'vqa.question_length')
    if 'gen' in self.loss_weights:
      said += self._cut_answers(overview, answered)
    if 'cls' in self.loss_weights:
      known = np.array([vqa_metric.answer_key(a) in self._index for a in overview.answers], bool)
      outside, total = int((answered & (overview.given.sums(known) == 0)).sum()), answered.sum()
      if outside == total:
        raise UserError(f'vqa: no answer of {outside} examples is among the {len(self.answers)} of '
                        'the answer list; train on data whose answers recur, or set '
                        'config.vqa.classifier=False to write answers instead')
      if outside:
        said.append(f'{outside} of {total} questions have no answer among the '
                    f'{len(self.answers)} of the answer list: the classifier cannot get them right')
    return said

  def _cut_answers(self, overview, answered):
    """As lengths.length_note, on the answers to write."""
    limit = self._answer_length
    counts = self.tokenizer.lengths([answer.strip() for answer in overview.answers])
    written_counts = np.zeros(int(answered.sum()), np.int64)
    # The others' answers are short, whichever is the commonest.
    perhaps = np.flatnonzero(overview.given.sums(counts > limit)[answered])
    texts = [commonest([overview.answers[number] for number in overview.given.row(row)])
             for row in np.flatnonzero(answered)[perhaps]]
    written_counts[perhaps] = self.tokenizer.lengths(texts)
    return lengths.length_note(written_counts, 'answers', limit, 'vqa.answer_length')

  @classmethod
  def from_data(cls, config, tokenizer, examples):
    return cls._make(config, tokenizer, make_answer_list(examples, config.vqa.max_answers))

  @classmethod
  def from_files(cls, config, tokenizer, folder):
    with open(os.path.join(folder, 'answers.json'), encoding='utf-8') as f:
      return cls._make(config, tokenizer, json.load(f))

  @classmethod
  def _make(cls, config, tokenizer, answers):
    own = config.vqa
    return cls(tokenizer, answers, question_length=own.question_length,
               answer_length=own.answer_length, classifier=own.classifier,
               generation_weight=own.generation_weight, beams=own.beams,
               dropout_rate=config.model.dropout_rate)

  def save(self, folder):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, 'answers.json'), 'w', encoding='utf-8') as f:
      json.dump(self.answers, f, ensure_ascii=False, indent=0)

  def labels(self):
    return {'answers': tuple(self._index)}

  # ---- device: model and losses

  @property
  def copies(self):
    return self._beams if 'gen' in self.loss_weights else 1

  def head(self):
    return VQAHead(num_answers=len(self.answers) if 'cls' in self.loss_weights else 0,
                   written='gen' in self.loss_weights, answer_length=self._answer_length,
                   pad_id=self.tokenizer.pad_id, eos_id=self.tokenizer.eos_id, beams=self._beams,
                   dropout_rate=self._dropout_rate)

  def weights(self, features) -> dict[str, Float[Array, '*B']]:
    return {term: features[f'{term}_weight'] for term in self.loss_weights}

  def losses(self, outputs, features) -> dict[str, Float[Array, ' B']]:
    losses = {}
    if 'cls' in self.loss_weights:
      log_probabilities = jax.nn.log_softmax(outputs['cls'].astype(jnp.float32))
      target = self._targets(features)
      target = target / jnp.maximum(target.sum(-1, keepdims=True), 1e-6)
      losses['cls'] = -(target * log_probabilities).sum(-1)
    if 'gen' in self.loss_weights:
      losses['gen'] = writing.token_loss(outputs['gen'], features['answer'],
                                         self.tokenizer.pad_id)
    return losses

  def imitation(self, outputs, taught, features) -> dict[str, Float[Array, ' B']]:
    found = {}
    if 'cls' in outputs and 'cls' in taught:
      found['cls'] = imitation.divergence(outputs['cls'], taught['cls'])
    if 'gen' in outputs and 'gen' in taught:
      found['gen'] = self.loss_weights['gen'] * imitation.divergence_of_text(
          outputs['gen'], taught['gen'], features['answer'], self.tokenizer.pad_id)
    return found

  def _targets(self, features):
    """The score of each answer of the list: float32 [B, A]."""
    # A comparison, not a scatter: it stays on the device that has its part of the answers.
    is_answer = features['target_ids'][..., None] == jnp.arange(len(self.answers))
    return jnp.where(is_answer, features['target_scores'][..., None], 0).sum(-2)

  def progress(self, outputs, features) -> dict[str, Float[Array, ' B']]:
    if 'cls' in self.loss_weights:
      right = features['target_ids'] == outputs['cls'].argmax(-1, keepdims=True)
      return {'accuracy': (features['target_scores'] * right).sum(-1)}
    tokens = features['answer']
    right = (outputs['gen'].argmax(-1) == tokens) | (tokens == self.tokenizer.pad_id)
    return {'accuracy': right.all(-1).astype(jnp.float32)}

  # ---- host: predictions

  def decode(self, arrays):
    count = len(next(iter(arrays.values())))
    written = top = None
    if 'tokens' in arrays:
      written = writing.read_texts(self.tokenizer, arrays)
    if 'top_index' in arrays:
      top = [tuple((self.answers[i], float(p)) for i, p in zip(*row))
             for row in zip(arrays['top_index'], arrays['top_probability'])]
    # Logits that are not finite have no order, so there is no answer.
    return [Answer(_answer(top[i]) if top else written[i][0], top[i] if top else (),
                   written[i] if written else None)
            for i in range(count)]

  def score(self, examples, predictions):
    pairs = [(e, p) for e, p in zip(examples, predictions) if e.answers]
    if not pairs:
      return {}
    right = [vqa_metric.vqa_accuracy(p.answer, e.answers) for e, p in pairs]
    groups = [e.question_type or 'all' for e, _ in pairs]
    labels = classification.classification_scores(
        [vqa_metric.answer_key(p.answer) for _, p in pairs],
        [vqa_metric.answer_key(commonest(e.answers)) for e, _ in pairs])
    scores = {'accuracy': float(np.mean(right)), 'examples': len(pairs),
              'label_accuracy': labels.pop('accuracy'), **labels}
    if pairs[0][1].top and pairs[0][1].written:
      scores['written_accuracy'] = float(np.mean(
          [vqa_metric.vqa_accuracy(p.written[0], e.answers) for e, p in pairs]))
    constants = classification.constant_baseline([e.answers for e, _ in pairs], groups)
    for group, (mean, number) in classification.accuracy_by_group(right, groups).items():
      scores |= {f'accuracy/{group}': mean, f'examples/{group}': number,
                 f'constant/{group}': constants[group][1]}
    return scores

  def table(self, scores):
    families = [key.removeprefix('constant/') for key in scores if key.startswith('constant/')]
    constant = sum(scores[f'constant/{f}'] * scores[f'examples/{f}'] for f in families)
    rows = [f'{"questions":<16}{"number":>8}{"accuracy":>10}{"best constant":>15}']
    for family in families if families != ['all'] else ():  # the data may have no question types
      rows.append(f'{family[:15]:<16}{scores[f"examples/{family}"]:>8}'
                  f'{scores[f"accuracy/{family}"]:>10.1%}{scores[f"constant/{family}"]:>15.1%}')
    rows.append(f'{"all":<16}{scores["examples"]:>8}{scores["accuracy"]:>10.1%}'
                f'{constant / max(scores["examples"], 1):>15.1%}')
    return '\n'.join(rows)

  def draw(self, example, pixels, prediction):
    lines = [(example.question, card.PLAIN)]
    colour = card.PLAIN
    if example.answers:
      right = vqa_metric.vqa_accuracy(prediction.answer, example.answers)
      colour = card.RIGHT if right >= 0.5 else card.WRONG
    share = f' ({prediction.top[0][1]:.0%})' if prediction.top else ''
    lines.append((f'model: {prediction.answer}{share}', colour))
    if prediction.top and prediction.written:
      lines.append((f'written: {prediction.written[0] or "(nothing)"}', card.PLAIN))
    if example.answers:
      lines.append((f'truth: {commonest(example.answers)}', card.PLAIN))
    return card.draw_card(card.shown(example, pixels), lines)

  def describe(self, prediction):
    lines = [f'{probability:7.1%}  {answer}' for answer, probability in prediction.top]
    if prediction.written:
      text, probability = prediction.written
      lines.append(f'written: {text or "(nothing)"} ({probability:.1%})')
    return '\n'.join(lines)

  def notes(self, example):
    length = int(self.tokenizer.lengths([example.question])[0])
    if length <= self._question_length:
      return []
    return [f'the question has {length} tokens, the model reads {self._question_length}: its end '
            'is left out']

  def record(self, example, prediction):
    if not example.question:
      return None
    line = {'question_id': example.question_id, 'question': example.question,
            'question_type': example.question_type, 'answers': list(example.answers)}
    return line | self.plain(prediction)

  def described(self):
    fields, outputs = [], ()
    if 'cls' in self.loss_weights:
      outputs += ('top_index', 'top_probability')
      fields.append({'kind': 'label', 'key': 'answer', 'labels': list(self.answers),
                     'index': 'top_index', 'probability': 'top_probability', 'decimals': 6})
    if 'gen' in self.loss_weights:
      if not fields:
        fields.append(written_field('answer', decimals=6))
      fields.append(written_field('written'))
      outputs += WRITTEN
    return Described(
        query={'kind': 'question', 'length': self._question_length},
        inputs={'question': (('b', self._question_length), 'int32')}, features=dict,
        outputs=outputs, answer=fields)

  def plain(self, prediction):
    line = {'answer': prediction.answer, 'probability': round(prediction.probability, 6)}
    if prediction.written:
      line['written'] = prediction.written[0]
    return line

  def details(self, prediction):
    return {'top': [[answer, round(probability, 6)] for answer, probability in prediction.top]}


def _answer(top):
  answer, probability = top[0]
  return answer if np.isfinite(probability) else ''
