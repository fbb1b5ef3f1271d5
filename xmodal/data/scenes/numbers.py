"""Embedded scenes for regression: how many, how wide, how far apart.

As in shapes.py, generated from a seed, with a scene graph for every picture.
"""

import math
import random
from typing import NamedTuple

from xmodal.data.example import Example, Object
from xmodal.data.scenes import questions as shape_questions
from xmodal.data.scenes import shapes
from xmodal.data.scenes.words import SIZES, THINGS, Thing, plural

MAX_THINGS = 5
# Half the width of a box, in units of the picture's side: sizes without a gap between them.
RADIUS = dict(zip(SIZES, ((0.08, 0.115), (0.115, 0.15))))


class NumberQuestion(NamedTuple):
  """A question whose answer is a number: its family, its text, and its descriptions of things."""

  family: str
  question: str
  named: tuple[Thing, ...]


class Numbers(shapes.Shapes):
  """A source of `size` scenes of up to 5 shapes, each with one question answered by a number.

  Record i is a pure function of (seed, split, i, image_size), and the scene is
  the same at every image_size but for its scale. The families are equally
  frequent: 'count', 0 to 5, uniformly distributed; 'width' of one shape and
  'distance' between the centres of two, both in percent of the picture's side, to
  one decimal. The text of a question reveals only its family, not its number.

  Args and raises: as shapes.Shapes.
  """

  def __getitem__(self, index: int) -> Example:
    """An Example with question, question_id, question_type, number and objects."""
    index = range(self._size)[index]
    rng, query, scene = self._layout(index)
    return Example(
        image=shapes.render(scene, rng),
        question=query.question,
        question_id=index,
        question_type=query.family,
        objects=tuple(Object(f'{o.color} {o.shape}', o.box) for o in scene.objects),
        number=_number(query, scene))

  def _layout(self, index):
    rng = random.Random(f'numbers/{self._seed}/{self._split}/{index}')
    query, things = rng.choice((_count, _width, _distance))(rng)
    plan = shape_questions.QuestionScene(query.family, query.question, '', '', things)
    return rng, query, shapes.lay_out(rng, plan, self._image_size, RADIUS)


def _number(query, scene):
  """The answer to a question, from the scene graph."""
  found = [[o for o in scene.objects if Thing(o.size, o.color, o.shape).matches(description)]
           for description in query.named]
  if query.family == 'count':
    return float(len(found[0]))
  if query.family == 'width':
    length = found[0][0].box[2]
  else:
    length = math.dist(found[0][0].center, found[1][0].center)
  return round(100 * length / scene.image_size, 1)


def _count(rng):
  kind = rng.choice([(), ('color',), ('shape',)])
  wording = rng.choice(['How many {} are there?', 'How many {} do you see?',
                        'What is the number of {}?'])
  wanted = rng.randint(0, MAX_THINGS)
  description = rng.choice(THINGS).keep(*kind)
  number = rng.randint(max(wanted, 1), MAX_THINGS) if kind else wanted
  things = _draw(rng, wanted, description, True) + _draw(rng, number - wanted, description, False)
  return NumberQuestion('count', wording.format(plural(description)), (description,)), things


def _width(rng):
  wording = rng.choice(['How wide is the {}?', 'What is the width of the {}?',
                        'What width does the {} have?'])
  target = rng.choice(THINGS)
  description = target.keep(*_kind(rng))
  things = (target, *_draw(rng, rng.randint(0, MAX_THINGS - 1), description, False))
  return NumberQuestion('width', wording.format(description), (description,)), things


def _distance(rng):
  wording = rng.choice(['How far is the {} from the {}?',
                        'What is the distance of the {} from the {}?',
                        'How far apart are the {} and the {}?'])
  kind = _kind(rng)
  first = rng.choice(THINGS)
  named = [first.keep(*kind)]
  second, = _draw(rng, 1, named[0], False)
  named.append(second.keep(*kind))
  others = [t for t in THINGS if not any(t.matches(n) for n in named)]
  things = (first, second, *rng.choices(others, k=rng.randint(0, MAX_THINGS - 2)))
  return NumberQuestion('distance', wording.format(*named), tuple(named)), things


def _kind(rng):
  return rng.choice([('color',), ('shape',), ('color', 'shape')])


def _draw(rng, number, description, matching):
  """Samples things that match a description, or that do not."""
  return tuple(rng.choices([t for t in THINGS if t.matches(description) == matching], k=number)
               if number else ())
