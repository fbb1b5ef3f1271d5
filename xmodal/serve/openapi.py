"""The OpenAPI document: what each route reads and answers, and where it wants the key."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from xmodal.serve.forms import Chat, Predict
from xmodal.serve.guard import NEEDS_KEY


def _object(required: str = '', **properties) -> dict[str, Any]:
  return {'type': 'object', 'required': required.split() or list(properties),
          'properties': properties}


def _list(items):
  return {'type': 'array', 'items': items}


def _one(value):
  return {'type': 'string', 'enum': [value]}


def _ref(name):
  return {'$ref': f'#/components/schemas/{name}'}


_TEXT, _NUMBER, _WHOLE, _YES = ({'type': kind} for kind in (
    'string', 'number', 'integer', 'boolean'))
_ANSWERS = {
    'Error': _object(error=_object(message=_TEXT, type=_TEXT, code=_TEXT)),
    'Status': _object(status=_TEXT),
    'Answer': _object('task', task=_TEXT, notes=_list(_TEXT)) | {
        'description': 'The line of xmodal predict --input: besides the task its own fields, such '
                       'as answer and probability, caption, found, pictures, texts or png.'},
    'Answers': _object(answers=_list(_ref('Answer'))),
    'Completion': _object(
        id=_TEXT, object=_one('chat.completion'), created=_WHOLE, model=_TEXT,
        choices=_list(_object(
            index=_WHOLE, message=_object(role=_one('assistant'), content=_TEXT),
            logprobs={'type': 'null'}, finish_reason=_one('stop')))),
    'Models': _object(
        object=_one('list'), name=_TEXT, limits={
            'type': 'object', 'additionalProperties': _NUMBER},
        data=_list(_object(
            id=_TEXT, object=_one('model'), created=_WHOLE, owned_by=_TEXT, draws=_YES,
            writes=_YES, ranks=_YES, reads_text=_YES, options=_list(_TEXT)))),
}
_STREAM = {'text/event-stream': {'schema': _TEXT}}


def body(form: str, *more: str) -> dict[str, Any]:
  """FastAPI's openapi_extra for a body that a route reads itself, as JSON or of other types."""
  return {'requestBody': {'required': True, 'content': dict.fromkeys(
      ('application/json', *more), {'schema': _ref(form)})}}


def answers(*names: str, streams: bool = False) -> dict[int | str, dict[str, Any]]:
  """FastAPI's `responses` of a route: one of these schemas, or events; and errors."""
  schema = _ref(names[0]) if len(names) == 1 else {'anyOf': [_ref(name) for name in names]}
  content = {'application/json': {'schema': schema}} | (_STREAM if streams else {})
  return {200: {'content': content}, 'default': {
      'description': 'Refused or failed', 'content': {'application/json': {
          'schema': _ref('Error')}}}}


def described(app: FastAPI, has_key: bool) -> dict[str, Any]:
  """The document; made once."""
  if app.openapi_schema is None:
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    parts = found.setdefault('components', {})
    schemas = parts.setdefault('schemas', {})
    schemas |= _ANSWERS
    for form in (Predict, Chat):
      schema = form.model_json_schema(ref_template='#/components/schemas/{model}')
      schemas |= {**schema.pop('$defs', {}), form.__name__: schema}
    if has_key:
      parts['securitySchemes'] = {'key': {'type': 'http', 'scheme': 'bearer'}}
      for path, operations in found['paths'].items():
        for operation in operations.values() if path.startswith(NEEDS_KEY) else ():
          operation['security'] = [{'key': []}]
    app.openapi_schema = found
  return app.openapi_schema
