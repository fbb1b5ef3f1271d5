"""Answers as plain JSON values, from a program's outputs and what bundle.json says of them.

A bundle holds a copy of this file beside model.py.
"""

import base64
import io
import math

import numpy as np
from PIL import Image


def answer(fields, arrays, context, read):
  """One query's answer.

  Args:
    fields: 'answer' of a task in bundle.json: {'kind': ..., 'key': ..., more} of each part.
    arrays: the program's outputs for the query's rows: name -> [N, ...].
    context: the query's options, names, texts, the picture's placement, and `details`: whether the
      answer also has what a page shows (`top`, `candidates`).
    read: (token ids [T]) -> text.
  """
  found = {}
  for field in fields:
    found |= _KINDS[field['kind']](field, arrays, context, read)
  return found


def _label(field, arrays, context, read):
  top = [[field['labels'][i], round(float(chance), field['decimals'])]
         for i, chance in zip(arrays[field['index']][0], arrays[field['probability']][0])]
  label, probability = top[0]
  found = {field['key']: label if math.isfinite(probability) else '', 'probability': probability}
  return found | ({'top': top} if context['details'] else {})


def _text(field, arrays, context, read):
  answer = {field['key']: read(arrays[field['tokens']][0])}
  if 'decimals' in field or 'digits' in field:
    answer['probability'] = _rounded(float(np.exp(arrays[field['log_probability']][0])), field)
  return answer


def _number(field, arrays, context, read):
  value = float(np.float64(arrays[field['array']][0]) * field['std'] + field['mean'])
  return {field['key']: _rounded(value, field)}


def _ranked(field, arrays, context, read):
  chances = arrays[field['array']][0][:len(field['labels'])]
  order = np.argsort(-chances, kind='stable')[:field['most']]
  return {field['key']: [
      {'name': field['labels'][i], 'probability': _rounded(float(chances[i]), field)}
      for i in order]}


def _boxes(field, arrays, context, read):
  score, threshold = arrays[field['score']][0], context[field['threshold']]
  places = _pixels(arrays[field['box']][0], context['placement'])

  def named(least):
    best = {}
    # Each box has its most probable name; scores of -1 are names outside the query.
    for i in reversed(np.flatnonzero(score >= max(least, 0))):
      best[tuple(places[i])] = (float(score[i]), context['names'][arrays[field['name']][0][i]])
    found = sorted(best.items(), key=lambda item: -item[1][0])
    return [_box(name, chance, box) for box, (chance, name) in found]

  found = {field['key']: named(threshold)}
  return found | ({'candidates': named(0), 'threshold': threshold} if context['details'] else {})


def _meant(field, arrays, context, read):
  found = [_box(name, float(score), _pixels(box[None], context['placement'])[0])
           for name, score, box in zip(context['meant'], arrays[field['score']],
                                       arrays[field['box']])]
  return {field['key']: found} if found else {}


def _similarity(field, arrays, context, read):
  pictures, texts = arrays[field['image']], arrays[field['texts']]
  if 'pictures' in context:
    found = [('image', name, float(one @ text[0]))
             for name, one, text in zip(context['pictures'], pictures, texts)]
  else:
    found = [('text', text, float(value))
             for text, value in zip(context['texts'], texts[0] @ pictures[0])]
  return {f'{found[0][0]}s'.replace('images', 'pictures'): [
      {what: name, 'similarity': _rounded(value, field)}
      for what, name, value in sorted(found, key=lambda item: -item[2])]}


def _picture(field, arrays, context, read):
  png = io.BytesIO()
  Image.fromarray(arrays[field['array']][0]).save(png, 'PNG')
  return {field['key']: base64.b64encode(png.getvalue()).decode('ascii')}


_KINDS = {'label': _label, 'text': _text, 'number': _number, 'ranked': _ranked, 'boxes': _boxes,
           'meant': _meant, 'similarity': _similarity, 'picture': _picture}


def _rounded(value, field):
  return float(f'{value:.{field["digits"]}g}') if 'digits' in field else round(
      value, field['decimals'])


def _box(name, score, box):
  return {'name': name, 'score': round(score, 4), 'box': [round(side, 2) for side in box]}


def _pixels(boxes, placement):
  """Boxes of the input, 0..1, as (x, y, width, height) in pixels of the picture."""
  width, height, across, down = np.float32(placement).astype(float).tolist()
  x0, y0, x1, y1 = np.asarray(boxes, np.float64).T
  x0, x1 = (np.clip(x / across, 0, width) for x in (x0, x1))
  y0, y1 = (np.clip(y / down, 0, height) for y in (y0, y1))
  return np.stack([x0, y0, x1 - x0, y1 - y0], axis=-1).tolist()
