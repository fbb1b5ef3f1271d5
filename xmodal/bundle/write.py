"""Writes a bundle: see README.md in this folder for what is in it."""

from collections.abc import Callable, Sequence
import contextlib
import hashlib
import importlib.metadata
import os
import shutil

import jax
from safetensors.numpy import save_file

import xmodal
from xmodal import atomic, storage, strict_json
from xmodal.bundle import convert, fields, files, model, model_card, pixels, programs
from xmodal.bundle.precision import PRECISIONS, flat
from xmodal.errors import UserError, did_you_mean
from xmodal.options import one_of
from xmodal.predictor import Predictor

WEIGHTS, ABOUT = 'weights.safetensors', 'bundle.json'
# By model.py; jax.export reads its files with flatbuffers, which jax does not install.
_NEEDED = ('jax', 'flatbuffers', 'numpy', 'tokenizers', 'pillow')


def check(output: str, precision: str, platforms: Sequence[str], sizes: Sequence[int],
          formats: Sequence[str] = ()) -> None:
  """Raises UserError for a folder that is there, or a value that is none of the known ones."""
  if storage.is_remote(output):
    storage.check_bucket(output)
  if storage.exists(output) and (not storage.is_dir(output) or storage.list_dir(output)):
    raise UserError(f'{output}: already exists; name a folder that is new or empty')
  for kind, values, known in (('--precision', [precision], PRECISIONS),
                              ('--platforms', platforms, programs.PLATFORMS)):
    for value in values:
      if value not in known:
        raise UserError(f'{kind} {value}: wanted {one_of(known)}{did_you_mean(value, known)}')
  if not sizes or min(sizes) < 1:
    raise UserError(f'--sizes {",".join(map(str, sizes))}: wanted batch sizes of 1 or more')
  convert.check(formats)


def write(folder: str, predictor: Predictor, *, tasks: Sequence[str] = (),
          precision: str = 'float32', platforms: Sequence[str] = ('cpu', 'cuda', 'tpu'),
          sizes: Sequence[int] = programs.SIZES, formats: Sequence[str] = (),
          tell: Callable[[str], None] = lambda line: None) -> None:
  """Writes a trained model as a folder that answers without this package.

  Args:
    folder: created completely or not at all; must not exist, or be empty.
    predictor: the model.
    tasks: names of its tasks; (): all.
    precision: how parameters are stored, a name in bundle.precision.PRECISIONS.
    platforms: what the programs run on, names from bundle.programs.PLATFORMS.
    sizes: batch sizes to answer with.
    formats: further formats of the programs, names from bundle.convert.CONVERTERS.
    tell: called with one line on each task.

  Raises:
    UserError: the folder is not empty, a name is unknown, or a task cannot be exported.
  """
  check(folder, precision, platforms, sizes, formats)
  names = list(dict.fromkeys(tasks)) or list(predictor.tasks)
  for name in names:
    programs.described(name, predictor.task(name))
  with contextlib.ExitStack() as closing:
    closing.callback(shutil.rmtree, f'{folder}.part', ignore_errors=True)
    part = closing.enter_context(atomic.written_folder(folder))
    os.mkdir(os.path.join(part, 'programs'))
    stored = PRECISIONS[precision].store(flat(predictor.variables))
    entries, used = {}, set()
    for name in names:
      program = programs.program_of(predictor, name, stored, PRECISIONS[precision], platforms,
                                    sorted(set(sizes)))
      entries[name] = _entry(name, program, part)
      used.update(program.weights)
      size = sum(map(len, program.serialised.values()))
      tell(f'{name}: {len(program.serialised)} program{"s"[:len(program.serialised) > 1]} of '
           f'{size / 2**20:.1f} MiB for {", ".join(platforms)}, {len(program.weights)} arrays')
      entries[name]['converted'] = _converted(name, program, predictor, stored, precision, formats,
                                              part, tell)
    save_file({name: stored[name] for name in sorted(used)}, os.path.join(part, WEIGHTS))
    os.chmod(os.path.join(part, WEIGHTS), 0o644)  # as the others; it makes a private one
    _write_rest(part, predictor)
    about = {
        'format': model.FORMAT, 'precision': precision, 'platforms': list(platforms),
        'versions': {'xmodal': xmodal.__version__, **versions()},
        'image_size': predictor.config.data.image_size,
        'pad_id': predictor.tokenizer.pad_id, 'eos_id': predictor.tokenizer.eos_id,
        'tasks': entries}
    _write(part, 'MODEL_CARD.md', model_card.card(predictor, about, stored))
    # Last, with what the others are.
    about['files'] = _files(part)
    _write(part, ABOUT, strict_json.dumps(about, ensure_ascii=False, indent=1) + '\n')


def versions() -> dict[str, str]:
  """Versions of the packages that a bundle needs."""
  return {name: importlib.metadata.version(name) for name in _NEEDED}


def _entry(name, program, part):
  """A task in bundle.json; its programs are written to the folder."""
  described, listed = program.described, []
  for sizes, data in program.serialised.items():
    end = '' if len(program.serialised) == 1 else f'-{sizes[0]}'
    file = f'programs/{name}{end}.stablehlo'
    with open(os.path.join(part, file), 'wb') as f:
      f.write(data)
    listed.append({'file': file, 'sizes': list(sizes)})
  return {
      'programs': listed, 'keep_aspect': program.keep_aspect,
      'inputs': {key: {'shape': list(dims), 'dtype': dtype}
                 for key, (dims, dtype) in program.inputs.items()},
      'query': dict(described.query), 'options': dict(described.options),
      'outputs': list(described.outputs), 'answer': [dict(field) for field in described.answer],
      'weights': list(program.weights)}


def _converted(name, program, predictor, stored, precision, formats, part, tell):
  """{format: where the task's program is, or why it is not}."""
  found = {}
  for kind in formats:
    os.makedirs(os.path.join(part, kind), exist_ok=True)
    run = programs.call(predictor, name, PRECISIONS[precision], ('cpu',))
    written, why = convert.convert(kind, run, stored, program.inputs, program.described.most,
                                   os.path.join(part, kind, name))
    found[kind] = {'reason': why} if why else {'file': os.path.relpath(written, part)}
    tell(f'{name}: not in {kind}, because {why}' if why else f'{name}: {kind} gives the numbers of '
         'JAX')
  return found


def _write_rest(part, predictor):
  for source in (model, fields, files, pixels):
    shutil.copyfile(source.__file__, os.path.join(part, os.path.basename(source.__file__)))
  _write(part, 'tokenizer.json', predictor.tokenizer.state)
  # What a person writes is text: "</s>" in a question is no end token.
  _write(part, 'tokenizer_reading.json', predictor.tokenizer.reading_state)
  lowest = {**versions(), 'jax': jax.__version__}
  _write(part, 'requirements.txt', ''.join(f'{name}>={lowest[name]}\n' for name in _NEEDED))


def _files(part):
  found = {}
  for folder, _, names in os.walk(part):
    for name in names:
      path = os.path.join(folder, name)
      with open(path, 'rb') as f:
        found[os.path.relpath(path, part)] = {
            'bytes': os.path.getsize(path), 'sha256': hashlib.file_digest(f, 'sha256').hexdigest()}
  return dict(sorted(found.items()))


def _write(part, name, text):
  with open(os.path.join(part, name), 'w', encoding='utf-8') as f:
    f.write(text)
