"""Detection: finds objects by their names, and the object of a referring expression.

Each query predicts one box. Its logit for a name is its match with the text tower's
embedding of that name, so any name can be queried, including names never trained
on. An expression ('the square left of the red circle') selects one of the same
boxes, by their content, their places and their relations.
"""

from collections.abc import Mapping
import copy
import dataclasses
import json
import os

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from xmodal import strict_json
from xmodal.data.example import Example, Object
from xmodal.data.overview import overview_of
from xmodal.data.pictures import images
from xmodal.data.pictures.placement import Placement, visible_objects
from xmodal.data.tokenizer import Tokenizer
from xmodal.errors import UserError
from xmodal.metrics import detection as metrics
from xmodal.models.names import Names, names_present, pad_names, sample_names
from xmodal.options import ABOVE_ZERO, Option
from xmodal.tasks import imitation
from xmodal.tasks.described import Described
from xmodal.tasks.detection.head import DetectionHead
from xmodal.tasks.detection.losses import LOSS_WEIGHTS, expression_losses, set_losses
from xmodal.tasks.drawing import boxes_card, card
from xmodal.tasks.objects import make_name_list
from xmodal.tasks.phrases import pattern, split_texts
from xmodal.tasks.task import TASKS, Task

_DRAWN = 640  # longer side of drawn pictures, in pixels
_MEANT = '#ffffff'
_NAME_ENDS = ' ?!\uff1f\uff01'  # of questions that name something
_SOMEWHERE = (0, 0, 1, 1)  # a placeholder for an unknown box, inside any picture
_PLACEMENT = ('width', 'height', 'across', 'down', 'left', 'top')

OPTIONS = {
    'max_names': Option(1000, 'Maximum number of names; the most frequent are kept.', low=1),
    'sampled_names': Option(256, 'Maximum number of names per training step: those of the batch '
                            'and randomly sampled absent ones. Evaluation uses all.', low=1),
    'max_objects': Option(100, 'Maximum number of objects per picture in training.', low=1),
    'queries': Option(0, 'Number of learned queries; 0: one query per image token.', low=0),
    'layers': Option(1, 'Decoder layers of learned queries.', low=1),
    'glimpse': Option(12, "Side, in cells, of the crop around a query's box that refines it; 0: no "
                      'refinement.', low=0),
    'expression_length': Option(16, 'Tokens of an expression.', low=2),
    'expression_weight': Option(1.0, 'Weight of the losses of expressions, relative to those of '
                                'names.', low=ABOVE_ZERO),
    'threshold': Option(0.5, 'Minimum score of the boxes that are shown.', low=0, high=1,
                        may_change=True)}


@dataclasses.dataclass(frozen=True)
class Detections:
  """Detections in a picture.

  Attributes:
    found: up to 100 detections of names, most probable first, also those with scores below
      config.detection.threshold (see Detection.plain for those shown to people).
    meant: the most probable box of each expression; its name is the expression's text.
  """

  found: tuple[metrics.DetectedBox, ...]
  meant: tuple[metrics.DetectedBox, ...] = ()


@TASKS.register('detection', options=OPTIONS, sharding=(
    (r'(objectness|(box|proposal)_change)/(kernel|bias)$', ()),
    (r'(query_embedding|reference_points)$', ())))
class Detection(Task):
  """Predicts boxes with names, and the box of an expression."""

  name = 'detection'
  needs = ('objects',)
  main_score = 'mAP'

  def __init__(self, config, tokenizer: Tokenizer, learned: Mapping):
    """Creates the task for the names of the training examples; `with_names` changes them.

    Args:
      config: config.detection.
      tokenizer: tokenizer of names and expressions.
      learned: facts of the training examples, see from_data.
    """
    if 0 < config.queries < learned['max_objects']:
      raise UserError(f'config.detection.queries={config.queries}: wanted one at least for each of '
                      f'{learned["max_objects"]} objects in a picture; raise it, or lower '
                      'config.detection.max_objects')
    self._config, self._tokenizer, self._learned = config, tokenizer, learned
    self._trained, self.category_ids = frozenset(learned['names']), dict(learned['names'])
    weights = {'names': LOSS_WEIGHTS}
    if learned['expressions']:
      weights['expression'] = {t: w * config.expression_weight
                               for t, w in (LOSS_WEIGHTS | {'scores': 1.0}).items()}
    self.loss_weights = {f'{kind}_{term}': weight for kind, terms in weights.items()
                         for term, weight in terms.items()} | {'iou': 0.0}  # logged only

  @property
  def names(self) -> tuple[str, ...]:
    """The names to look for, in the order of the logits."""
    return tuple(self.category_ids)

  # ---- data and queries

  @classmethod
  def from_data(cls, config, tokenizer, examples):
    names = make_name_list(examples, config.detection.max_names)
    numbers = metrics.number_categories(names, examples)
    overview = overview_of(examples)
    most = max(overview.num_objects)
    return cls(config.detection, tokenizer, {
        'names': numbers,  # category ids in result files
        'max_objects': min(most, config.detection.max_objects),
        'expressions': overview.count('expression') > 0})

  @classmethod
  def from_files(cls, config, tokenizer, folder):
    with open(os.path.join(folder, 'names.json'), encoding='utf-8') as f:
      return cls(config.detection, tokenizer, json.load(f))

  def save(self, folder):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, 'names.json'), 'w', encoding='utf-8') as f:
      json.dump(self._learned, f, ensure_ascii=False, indent=1)

  def survey(self, examples):
    said = super().survey(examples)
    overview, most = overview_of(examples), self._learned['max_objects']
    counts = overview.num_objects
    if many := {number: times for number, times in counts.items() if number > most}:
      left_out = sum((number - most) * times for number, times in many.items())
      said.append(f'detection: {sum(many.values())} of {counts.total()} pictures have more than '
                  f'{most} objects (up to {max(many)}); training leaves out {left_out} of '
                  'theirs: config.detection.max_objects sets the limit')
    if (total := overview.names.total()) and total == overview.ignored:
      said.append(f'detection: all {total} objects are to be ignored (crowds, or too hard to '
                  'judge): none of them is learned from or scored')
    if rare := overview.names.keys() - self.category_ids:
      said.append(f'detection: {len(rare)} names are not among the {len(self.names)} trained on: '
                  f'{", ".join(sorted(rare)[:5])}{", ..." if len(rare) > 5 else ""}')
    return said

  def with_names(self, names: Mapping[str, int | str | None]) -> 'Detection':
    """The same task and parameters with other names to look for.

    Args:
      names: {name: category id in result files, or None to leave it out}.
    """
    other = copy.copy(self)
    other.category_ids = dict(names)
    return other

  def for_split(self, examples):
    """Looks for the trained names and those of the examples.

    If these share none, only for the latter: trained names would otherwise take the places of
    the most probable boxes.
    """
    trained = self._learned['names']
    present = set(overview_of(examples).names) or set(getattr(examples, 'categories', ()))
    old = [] if present and present.isdisjoint(trained) else list(trained)
    return self.with_names(metrics.number_categories(
        [*old, *sorted(present.difference(trained))], examples, known=trained))

  def query(self, image, text):
    parts = (part if part in self._trained else part.rstrip(_NAME_ENDS)
             for part in split_texts(text, self._trained))
    phrases = [part for part in dict.fromkeys(parts) if part]
    if not phrases:
      raise UserError(f'--text {text!r} names nothing; wanted names ("red circle. blue square.") '
                      'or an expression ("the square left of the red circle")')
    expressions = [part for part in phrases
                   if part.lower().startswith('the ') and part not in self._trained]
    if expressions and not self._learned['expressions']:
      raise UserError(f'--text: {expressions[0]!r} means one thing (it begins with "the"), and '
                      'this model learned from data without such texts; name what to find: '
                      '"dog. cat."')
    names = [part for part in phrases if part not in expressions]
    examples = [Example(image, expression=Object(part, _SOMEWHERE)) for part in expressions]
    task = self.with_names({name: i for i, name in enumerate(names, 1)})
    return task, examples or [Example(image)]

  # ---- host: features

  def encode(self, example, placement):
    most = self._learned['max_objects']
    boxes, names = np.zeros((most, 4), np.float32), np.full(most, -1, np.int32)
    index = {name: i for i, name in enumerate(self.category_ids)}
    wanted = [o for o in example.objects or () if o.name in index and not o.ignore]
    kept, places = visible_objects(wanted, placement)
    boxes[:len(kept)] = places[:most]
    names[:len(kept)] = [index[o.name] for o in kept[:most]]
    features = {'boxes': boxes, 'names': names, 'weight': np.float32(example.objects is not None),
                'placement': np.float32([getattr(placement, field) for field in _PLACEMENT])}
    if self._learned['expressions']:
      features['expression'] = self._encode_expression(example, placement)
    return features

  def _encode_expression(self, example, placement):
    expression = example.expression
    text = expression.name if expression else ''
    tokens = self._tokenizer.encode([text], self._config.expression_length)[0]
    if not text:
      tokens[:] = self._tokenizer.pad_id
    kept, boxes = visible_objects([expression] if expression else [], placement)
    # Box losses come from objects, and from an expression only if its object is not among them.
    alone = kept and all(o.box != expression.box for o in example.objects or ())
    return {'tokens': tokens, 'weight': np.float32(len(kept)),
            'box_weight': np.float32(bool(alone)),
            'box': boxes if kept else np.zeros((1, 4), np.float32)}

  def notes(self, example):
    if example.expression is None:
      return []
    length = int(self._tokenizer.lengths([example.expression.name])[0])
    if length <= self._config.expression_length:
      return []
    return [f'the text has {length} tokens, the model reads {self._config.expression_length}: its '
            'end is left out']

  # ---- device: model and losses

  def vocabulary(self):
    # Programs need at least one name, but a text may have only expressions.
    names = self.names or ('',)
    tokens = self._tokenizer.encode(names, int(self._tokenizer.lengths(names).max()))
    return Names(tokens, None if self.names else np.zeros(1, bool), end_token=False)

  def sampled_vocabulary(self, features, key):
    names = self.vocabulary()
    present = names_present(features['names'], len(names.tokens))
    return sample_names(names, present, self._config.sampled_names, key)

  def head(self):
    return DetectionHead(
        num_queries=self._config.queries, num_layers=self._config.layers,
        glimpse=self._config.glimpse, expressions=self._learned['expressions'],
        pad_id=self._tokenizer.pad_id)

  def weights(self, features) -> dict[str, Float[Array, '*B']]:
    # Weighted by the number of objects: a mean over all objects of the batch, as in DETR.
    count = (features['names'] >= 0).sum(-1) * features['weight']
    weights = {'names_scores': jnp.maximum(count, features['weight']), 'names_boxes': count,
               'names_overlap': count, 'iou': count}
    if self._learned['expressions']:
      expression = features['expression']
      weights |= {'expression_scores': expression['weight'],
                  'expression_boxes': expression['box_weight'],
                  'expression_overlap': expression['box_weight']}
    return weights

  def losses(self, outputs, features) -> dict[str, Float[Array, ' B']]:
    terms = set_losses(outputs['names'], features['boxes'], features['names'])
    losses = {f'names_{term}': terms[term] for term in LOSS_WEIGHTS} | {'iou': terms['iou']}
    if self._learned['expressions']:
      terms = expression_losses(outputs['expression'], features['expression']['box'][:, 0])
      losses |= {f'expression_{term}': terms[term] for term in LOSS_WEIGHTS}
    return losses

  def imitation(self, outputs, taught, features) -> dict[str, Float[Array, ' B']]:
    # A query that belongs to an image token is at one place in both; learned ones are compared by
    # their number, which pruning keeps.
    found, taught = outputs['names'], jax.lax.stop_gradient(taught['names'])
    if found.logits.shape != taught.logits.shape:
      return {}  # another number of queries
    logits, wanted = found.masked_logits(), taught.masked_logits()
    counts = True if found.counts is None else found.counts
    scores = jnp.where(counts, imitation.binary_divergence(logits, wanted), 0).sum((1, 2))
    chance = jax.nn.sigmoid(wanted).max(-1)
    boxes = (jnp.abs(found.boxes - taught.boxes).sum(-1) * chance).sum(-1)
    total = jnp.maximum(chance.sum(-1), 1)  # about the number of objects
    return {'names': scores / total, 'boxes': boxes / total}

  # ---- host: predictions

  def decode(self, arrays):
    predictions, names = [], self.names
    for i, numbers in enumerate(arrays['placement'].astype(float)):
      placement = Placement(**dict(zip(_PLACEMENT, numbers.tolist())))
      meant, real = (), arrays['score'][i] >= 0
      found = tuple(
          metrics.DetectedBox(names[k], tuple(box), float(score)) for k, box, score in zip(
              arrays['name'][i][real], placement.pixels(arrays['boxes'][i][real]).tolist(),
              arrays['score'][i][real]))
      if 'expression_box' in arrays:
        (box,) = placement.pixels(arrays['expression_box'][i][None]).tolist()
        meant = (metrics.DetectedBox('', tuple(box), float(arrays['expression_score'][i])),)
      predictions.append(Detections(found, meant))
    return predictions

  def score(self, examples, predictions):
    known = [(e, p) for e, p in zip(examples, predictions) if e.objects is not None]
    scores = {}
    if known:
      instances, results = metrics.coco_files(
          [e for e, _ in known], [p.found for _, p in known], self.category_ids)
      scores = metrics.coco_scores(instances, results)
      if unseen := set(self.names) - self._trained:
        for group, names in (('seen', self._trained), ('unseen', unseen)):
          group_scores = metrics.coco_scores(instances, results, names=sorted(names))
          scores |= {f'{key}_{group}': group_scores[key] for key in ('mAP', 'mAP50')
                     if key in group_scores}
      scores['examples'] = len(known)
    referred = [(e, p.meant[0]) for e, p in zip(examples, predictions)
                if e.expression and p.meant]
    if referred:
      right = metrics.referring_accuracy([m.box for _, m in referred],
                                         [e.expression.box for e, _ in referred])
      scores |= {'referring': float(np.mean(right)), 'referring_examples': len(referred)}
      groups = [e.question_type for e, _ in referred]
      for group in sorted(set(groups) - {''}):
        scores[f'referring/{group}'] = float(np.mean(
            [r for r, g in zip(right, groups) if g == group]))
    return scores

  def headline(self, scores):
    parts = [f'{label} {scores[key]:.1%}' for key, label in (
        ('mAP', 'mAP'), ('mAP50', 'mAP@.5'), ('mAP_unseen', 'mAP of unseen names'),
        ('referring', 'expressions')) if key in scores]
    return ', '.join(parts)

  def table(self, scores):
    rows = []
    names = [key.removeprefix('AP/') for key in scores if key.startswith('AP/')]
    if names:
      wide = min(max(max(map(len, names)), 9), 24)
      rows.append(f'{"name":<{wide}}{"AP@[.5:.95]":>13}{"AP@.5":>9}')
      for name in names:
        unseen = '' if name in self._trained else '  never trained on'
        rows.append(f'{name[:wide]:<{wide}}{scores[f"AP/{name}"]:>13.1%}'
                    f'{scores[f"AP50/{name}"]:>9.1%}{unseen}')
      for label, group in (('all', ''), ('trained', '_seen'), ('unseen', '_unseen')):
        if f'mAP{group}' in scores:
          rows.append(f'{label:<{wide}}{scores[f"mAP{group}"]:>13.1%}'
                      f'{scores[f"mAP50{group}"]:>9.1%}')
    if 'referring' in scores:
      kinds = [f'{key.removeprefix("referring/")} {value:.1%}' for key, value in scores.items()
               if key.startswith('referring/')]
      more = f' ({", ".join(kinds)})' if kinds else ''
      rows.append(f'expressions found at IoU .5: {scores["referring"]:.1%}{more}')
    return '\n'.join(rows)

  def files(self, examples, predictions):
    instances, results = metrics.coco_files(
        examples, [p.found for p in predictions], self.category_ids)
    return {'instances': instances, 'results': results}

  def record(self, example, prediction):
    line = {'image_id': example.image_id, **self.plain(prediction)}
    if example.objects is not None:
      line['objects'] = [{'name': o.name, 'box': list(o.box)} for o in example.objects]
    if example.expression and prediction.meant:
      line |= {'expression': example.expression.name, 'box': list(example.expression.box),
               'meant': _plain(prediction.meant[0])}
    return line

  def described(self):
    own, expressions = self._config, self._learned['expressions']
    rows, length = pad_names(self.vocabulary(), self._tokenizer.pad_id).tokens.shape
    inputs = {'names': (('k', length), 'int32'), 'counts': (('k',), 'bool')}
    outputs = ('score', 'name', 'boxes')
    fields = [{'kind': 'boxes', 'key': 'found', 'score': 'score', 'name': 'name', 'box': 'boxes',
               'threshold': 'threshold'}]
    if expressions:
      inputs['expression'] = (('b', own.expression_length), 'int32')
      outputs += ('expression_score', 'expression_box')
      fields.append({'kind': 'meant', 'key': 'meant', 'score': 'expression_score',
                     'box': 'expression_box'})

    def features(inputs):
      features = {'placement': jnp.zeros((inputs['image'].shape[0], 1)),  # states the batch
                  'vocabulary': Names(inputs['names'], inputs['counts'], end_token=False)}
      if expressions:
        features['expression'] = {'tokens': inputs['expression']}
      return features

    return Described(
        query={'kind': 'names', 'known': sorted(self._trained), 'length': length,
               'pattern': pattern(self._trained), 'strip': _NAME_ENDS,
               'expressions': own.expression_length if expressions else 0},
        inputs=inputs, features=features, outputs=outputs, answer=fields,
        least={'k': 8}, most={'k': rows},
        options={'threshold': {'default': own.threshold, 'low': 0, 'high': 1,
                               'help': 'Minimum score of the boxes that are shown.'}})

  def plain(self, prediction):
    line = {'found': [_plain(f) for f in self._shown(prediction)]}
    if meant := [_plain(f) for f in prediction.meant if f.name]:  # in evaluations it has none
      line['meant'] = meant
    return line

  def details(self, prediction):
    # Whatever the threshold, so that a page can change it.
    return {'candidates': [_plain(f) for f in _best_names(prediction.found)],
            'threshold': self._config.threshold}

  @property
  def batch_key(self):
    return self.names

  def join(self, examples, predictions):
    return Detections(predictions[0].found, tuple(
        dataclasses.replace(p.meant[0], name=e.expression.name)
        for e, p in zip(examples, predictions) if e.expression))

  @property
  def copies(self):
    sampled = min(len(self._trained), self._config.sampled_names)  # names of a training step
    return max(1, len(self.names) // max(1, sampled))

  def describe(self, prediction):
    return strict_json.dumps([_plain(f) for f in [*self._shown(prediction), *prediction.meant]],
                            ensure_ascii=False)

  def draw(self, example, pixels, prediction):
    # Boxes are in pixels of the stored picture, not of the model's input.
    pixels, (height, width) = images.load_within(example.image, _DRAWN)
    scale = np.array(pixels.shape[1::-1] * 2) / (width, height, width, height)
    colours = boxes_card.name_colours(self.names)
    found = [(f'{f.name} {f.score:.0%}', scale * f.box, colours[f.name])
             for f in self._shown(prediction)]
    lines, truths = [], [scale * o.box for o in example.objects or () if not o.ignore]
    for thing in prediction.meant if example.expression else ():
      text, colour = thing.name or example.expression.name, card.PLAIN
      if not thing.name:  # the ground truth is known
        right = metrics.referring_accuracy([thing.box], [example.expression.box])[0]
        colour = card.RIGHT if right else card.WRONG
      found.insert(0, (f'{"meant" if not thing.name else text} {thing.score:.0%}',
                       scale * thing.box, _MEANT))
      lines.append((f'meant: {text}', colour))
    if not found:
      lines.append(('nothing found', card.PLAIN))
    return boxes_card.draw_boxes_card(pixels, found, truths, lines)

  def _shown(self, prediction):
    """Detections above the threshold, each box with its most probable name."""
    return _best_names(f for f in prediction.found if f.score >= self._config.threshold)


def _best_names(found):
  """Each box with its most probable name, most probable first; `found` is in that order."""
  best = {f.box: f for f in reversed(list(found))}
  return sorted(best.values(), key=lambda f: -f.score)


def _plain(found):
  return {'name': found.name, 'score': round(found.score, 4),
          'box': [round(side, 2) for side in found.box]}
