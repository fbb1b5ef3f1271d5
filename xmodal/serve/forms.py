"""The forms of requests, as the OpenAPI document has them, and what they become."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, ValidationError

from xmodal.serve.bodies import parse_form, parse_json
from xmodal.serve.engine import Engine, Facts, Picture, Request
from xmodal.serve.limits import Limits, Refused, Room
from xmodal.serve.pictures import Opening, decoded, from_base64

_STRICT = ConfigDict(extra='forbid')
# Options by name: type, least and largest value. `mask` is a picture.
_NUMBERS = {'n': (int, 1, None), 'steps': (int, 1, None), 'seed': (int, 0, 2**31 - 1),
            'guidance': (float, 0, 100), 'strength': (float, 0, 1)}


class Ask(BaseModel):
  """One request of /v1/predict."""

  model_config = _STRICT
  task: Annotated[StrictStr | None, Field(description='one of the model; None: its first')] = None
  image: Annotated[StrictStr | None, Field(
      description='a picture file in base64, or as a data: URL')] = None
  images: Annotated[list[StrictStr] | None, Field(
      description='several, for a task that ranks them')] = None
  text: StrictStr = ''
  options: dict[str, Any] = {}
  details: Annotated[StrictBool, Field(
      description='also answers with what the web page shows')] = False


class Predict(Ask):
  """The body of /v1/predict: one request, or several in `requests`."""

  requests: list[Ask] | None = None
  stream: Annotated[StrictBool, Field(
      description='answers by server-sent events; one request only')] = False


class Message(BaseModel):
  """A message of a chat; `content` is a text, or parts of type text and image_url."""

  model_config = ConfigDict(extra='ignore')
  role: StrictStr
  content: StrictStr | list[dict[str, Any]] | None = None


class Chat(BaseModel):
  """The body of /v1/chat/completions. Settings of sampling are accepted and have no effect."""

  model_config = ConfigDict(extra='ignore')
  model: StrictStr
  messages: Annotated[list[Message], Field(min_length=1)]
  stream: StrictBool = False
  n: int | None = 1


NamedRequest = tuple[str, Request]  # the name of the task, and the request


class RequestReader:
  """Turns the body of one call into requests to the model's tasks. It decodes pictures, which may
  take long."""

  def __init__(self, engine: Engine, limits: Limits, hold: Callable[[int], None], room: Room):
    self._engine, self._limits = engine, limits
    self.opening = Opening(engine.image_size, limits, hold, room)

  def predict(self, body: bytes, content_type: str) -> tuple[list[NamedRequest], Predict]:
    """Requests of /v1/predict, from JSON or a form; Refused if they are wrong."""
    uploads: list[bytes] = []
    if content_type.lower().startswith('multipart/form-data'):
      value, uploads, mask = self._of_form(body, content_type)
    else:
      value, mask = parse_json(body, self._limits), None
    several = value.get('requests')
    if isinstance(several, list) and not 1 <= len(several) <= self._limits.requests:
      raise Refused(422, 'too_many_requests', f'{len(several)} requests in one call; wanted '
                    f'1 to {self._limits.requests}')
    form = validated(Predict, value)
    if form.requests is None:
      return [self._named(form, uploads, mask)], form
    if other := min(form.model_fields_set - {'requests'}, default=''):
      raise Refused(422, 'invalid', f'{other} stands beside requests; put it into each of them')
    return [self._named(one, [], None, f'requests[{place}].')
            for place, one in enumerate(form.requests)], form

  def _of_form(self, body, content_type):
    value, options, uploads, mask = {}, {}, [], None
    for name, is_file, content in parse_form(body, content_type):
      if name in ('image', 'images') and is_file:
        uploads.append(content)
      elif name == 'mask' and is_file:
        mask = content
      elif is_file or name not in ('task', 'text', 'options', 'details', 'stream'):
        raise Refused(422, 'invalid', f'the form has a part {name[:40]!r}; wanted image, mask '
                      '(both files), task, text, options, details, stream')
      else:
        try:
          value[name] = content.decode('utf-8')
        except UnicodeDecodeError:
          raise Refused(400, 'no_utf8', f'{name} is not UTF-8') from None
    if 'options' in value:
      options = parse_json(value['options'].encode(), self._limits)
    for name in ('details', 'stream'):
      if name in value:
        value[name] = value[name].lower() in ('true', '1', 'yes', 'on')
    return value | {'options': options}, uploads, mask

  def _named(self, form: Ask, uploads, mask, where='') -> NamedRequest:
    name, facts = self.task(form.task)
    if form.image is not None and form.images is not None:
      raise Refused(422, 'invalid', f'{where}image and {where}images are both given; wanted one')
    given = form.images if form.images is not None else [form.image] if form.image else []
    if len(given) + len(uploads) > self._limits.pictures:
      raise Refused(422, 'too_many_pictures', f'{len(given) + len(uploads)} pictures in one '
                    f'request; wanted up to {self._limits.pictures}')
    pictures = [from_base64(text, f'{where}image', self.opening) for text in given]
    pictures += [decoded(data, 'image', self.opening) for data in uploads]
    options = self._options(form.options, facts, mask, where)
    return name, self.request(facts, pictures, form.text, options, form.details, where)

  def task(self, name: str | None) -> tuple[str, Facts]:
    """A task of the model by its name, or its first; Refused (404) if there is none."""
    name = name or next(iter(self._engine.tasks))
    if name not in self._engine.tasks:
      raise Refused(404, 'no_task', f'the model has no task {name[:80]!r}; wanted one of '
                    f'{", ".join(self._engine.tasks)}')
    return name, self._engine.tasks[name]

  def request(self, facts: Facts, pictures: list[Picture], text: str, options: dict,
              details: bool, where: str = '') -> Request:
    """A request after the checks that need no model; Refused (422) if one fails."""
    if len(text) > self._limits.text:
      raise Refused(422, 'text_too_long', f'{where}text has {len(text):,} characters; wanted up to '
                    f'{self._limits.text:,}')
    if any('\ud800' <= letter <= '\udfff' for letter in text):
      raise Refused(422, 'invalid', f'{where}text has half a character (a lone surrogate)')
    if not pictures and not facts.draws:
      raise Refused(422, 'no_picture', f'{where}image is missing; the task wants a picture')
    return Request(tuple(pictures), text, options, details)

  def _options(self, given, facts, mask, where):
    options = {}
    highest = {'n': self._limits.drawn, 'steps': self._limits.steps}
    if mask is not None:
      given = given | {'mask': ''}
    for name, value in given.items():
      if name not in facts.options:
        wanted = ', '.join(facts.options) or 'none'
        raise Refused(422, 'no_option', f'{where}options: {name[:40]!r} means nothing to the task; '
                      f'its options: {wanted}')
      if name == 'mask':
        options[name] = decoded(mask, name, self.opening) if mask else from_base64(
            value if isinstance(value, str) else '', f'{where}mask', self.opening)
      elif name in _NUMBERS:
        kind, low, high = _NUMBERS[name]
        options[name] = _number(f'{where}options.{name}', value, kind, low,
                                high if high is not None else highest[name])
      elif isinstance(value, str | int | float):
        options[name] = value
      else:
        raise Refused(422, 'invalid', f'{where}options.{name} is a {type(value).__name__}; wanted '
                      'a text or a number')
    return options


def _number(where, value, kind, low, high):
  is_kind = isinstance(value, int) or (kind is float and isinstance(value, float))
  if isinstance(value, bool) or not is_kind or not low <= value <= high:
    wanted = 'a whole number' if kind is int else 'a number'
    raise Refused(422, 'invalid', f'{where} is {str(value)[:40]!r}; wanted {wanted} from {low} to '
                  f'{high}')
  return kind(value)


def validated(form: type[BaseModel], value: Any) -> Any:
  """A value as one of the forms; Refused (422) with its first mistake."""
  try:
    return form.model_validate(value)
  except ValidationError as error:
    first = error.errors(include_url=False, include_input=False)[0]
    where = '.'.join(str(part)[:40] for part in first['loc'])
    raise Refused(422, 'invalid', f'{where}: {first["msg"]}') from None
