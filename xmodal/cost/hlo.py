"""Reads a compiled program (HLO text): memory traffic of its kernels, and its collectives.

Loops count as often as they run, which XLA's own analysis does not do. A kernel reads its operands
and writes its results; of an array from which it takes slices, or into which it writes one, only
the slices count.
"""

from collections.abc import Iterator
import dataclasses
import math
import re

import numpy as np

_BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2,
          'f16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8,
          'c128': 16}
_ARRAY = re.compile(r'\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]')
_INSTRUCTION = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$')
_HEADER = re.compile(r'(?:ENTRY )?%?([\w.\-]+)[ (].*\{$')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r'(?:to_apply|calls|body|branch_computations|called_computations|'
                     r'(?:true|false)_computation)=\{?((?:%?[\w.\-]+(?:, )?)+)\}?')
# Kinds of collectives, without the suffixes of asynchronous ones.
COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute',
               'ragged-all-to-all', 'collective-broadcast')
_FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all',
         'opt-barrier', 'partition-id', 'replica-id', 'iota', 'domain', 'add-dependency'}
_BUFFER = 'custom_call_target="AllocateBuffer"'  # reserves memory, moves nothing
_FUSIONS = ('fusion', 'fusion-start')
_UPDATE = 'dynamic-update-slice'
_PRODUCTS = ('dot', 'convolution')
# Custom calls of cuBLAS and cuDNN that multiply matrices.
_LIBRARY = re.compile(r'custom_call_target="(__cublas|__cudnn|__onednn|__triton)')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction.

  Attributes:
    name: of its result.
    type: of its result, HLO text such as 'f32[2,3]{1,0}'.
    opcode: such as 'fusion'.
    operands: names.
    inside: the text in its parentheses.
    attributes: the text behind the operands.
    is_root: whether it is the result of its computation.
  """

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  inside: str
  attributes: str
  is_root: bool

  @property
  def called(self) -> list[str]:
    """Names of the computations that it runs."""
    return [name.strip().lstrip('%') for names in _CALLED.findall(self.attributes)
            for name in names.split(',')]


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective of one device.

  Attributes:
    kind: one of COLLECTIVES.
    bytes: of its result.
    times: how often a run of the program executes it.
    group: numbers of the devices of the first group, in the order of the mesh; () if the program
      does not say.
    in_condition: whether a loop executes it to decide if it goes on.
  """

  kind: str
  bytes: float
  times: int
  group: tuple[int, ...]
  in_condition: bool


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one run of a program moves on one device.

  Attributes:
    product_bytes: traffic of the kernels that multiply matrices (all products and convolutions).
    other_bytes: traffic of all other kernels.
    kernels: how many run.
    collectives: all, in the order of the text.
  """

  product_bytes: float
  other_bytes: float
  kernels: int
  collectives: tuple[Collective, ...]


def size(type_text: str) -> float:
  """Bytes of a type such as 'f32[2,3]{1,0}' or '(bf16[8], s32[])'."""
  return sum(_BYTES.get(kind, 1) * math.prod(map(int, filter(None, shape.split(','))))
             for kind, shape in _ARRAY.findall(type_text))


def cost(text: str) -> Cost:
  """Costs of a compiled program, `compiled.as_text()`."""
  computations, entry = _parse(text)
  products = others = 0.0
  kernels, collectives = 0, []
  for around, instruction, times, in_condition in _runs(computations, entry, 1, False):
    kind = instruction.opcode.removesuffix('-start')
    if kind in COLLECTIVES:
      collectives.append(Collective(kind, _result_bytes(instruction, kind), times,
                                    _group(instruction.attributes), in_condition))
      continue
    kernels += times
    moved = times * _traffic(instruction, around, computations)
    if _multiplies(instruction, computations):
      products += moved
    else:
      others += moved
  return Cost(products, others, kernels, tuple(collectives))


def _parse(text):
  """Computations by name, each its instructions by name, and the name of the entry."""
  computations, entry, current = {}, '', None
  for line in text.splitlines():
    if found := _INSTRUCTION.match(line):
      if current is not None:
        root, name, type_text, opcode, rest = found.groups()
        operands, attributes = _split_operands(rest)
        current[name] = Instruction(name, type_text, opcode,
                                    tuple(re.findall(r'%([\w.\-]+)', operands)), operands,
                                    attributes, bool(root))
    elif line.endswith('{') and not line.startswith((' ', 'HloModule')):
      if header := _HEADER.match(line):
        current = computations.setdefault(header[1], {})
        if line.startswith('ENTRY'):
          entry = header[1]
  return computations, entry


def _split_operands(rest):
  depth = 1
  for at, letter in enumerate(rest):
    depth += (letter == '(') - (letter == ')')
    if not depth:
      return rest[:at], rest[at + 1:]
  return rest, ''


def _runs(computations, name, times, in_condition) -> Iterator[tuple]:
  """The kernels and collectives that run: (the computation's instructions by name, the
  instruction, how often, whether in a condition)."""
  around = computations.get(name, {})
  for instruction in around.values():
    opcode = instruction.opcode
    if (opcode in _FREE or opcode.endswith(('-done', '-update'))
        or _BUFFER in instruction.attributes):
      continue
    if opcode == 'while':
      trips = _TRIPS.search(instruction.attributes)
      many = times * (int(trips[1]) if trips else 1)
      condition = re.search(r'condition=%?([\w.\-]+)', instruction.attributes)
      if condition:
        yield from _runs(computations, condition[1], many, True)
      for body in instruction.called:
        yield from _runs(computations, body, many, in_condition)
    elif opcode in ('call', 'conditional', 'async-start'):
      for called in instruction.called[:1]:
        yield from _runs(computations, called, times, in_condition)
    else:
      yield around, instruction, times, in_condition


def _result_bytes(instruction, kind):
  """Bytes of a collective's result; the type of an asynchronous one may hold its operands too."""
  if not instruction.opcode.endswith('-start'):
    return size(instruction.type)
  parts = _elements(instruction.type)
  if len(parts) > 1 and (kind != 'all-reduce' or parts[0].startswith('(')):
    return size(parts[1])
  return size(instruction.type)


def _elements(type_text):
  """The elements of a tuple's type; [type_text] for an array."""
  if not type_text.startswith('('):
    return [type_text]
  depth, begin, found = 0, 1, []
  for at, letter in enumerate(type_text):
    depth += (letter in '([{') - (letter in ')]}')
    if letter == ',' and depth == 1 or at == len(type_text) - 1:
      found.append(type_text[begin:at].strip())
      begin = at + 1
  return found


def _group(attributes):
  """The first of replica_groups={{0,1},{2,3}}, [2,4]<=[4,2]T(1,0) or mesh['a'=2,'b'=4] {'b'}."""
  if found := re.search(r'replica_groups=\{\{([\d,]*)\}', attributes):
    return tuple(map(int, found[1].split(',')))
  found = re.search(r'replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes)
  if not found:
    found = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
    axes = dict(re.findall(r"('[^']+')=(\d+)", found[1])) if found else {}
    along = re.findall(r"'[^']+'", found[2]) if found else []
    if not along or not set(along) <= set(axes):
      return ()
    numbers = np.arange(math.prod(map(int, axes.values()))).reshape([*map(int, axes.values())])
    return tuple(numbers[tuple(slice(None) if axis in along else 0 for axis in axes)].ravel()
                 .tolist())
  shape = tuple(map(int, found[3].split(',')))
  order = tuple(map(int, found[4].split(','))) if found[4] else range(len(shape))
  numbers = np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(-1, int(found[2]))
  return tuple(numbers[0].tolist())


def _multiplies(instruction, computations):
  if instruction.opcode in _PRODUCTS or _LIBRARY.search(instruction.attributes):
    return True
  return instruction.opcode in _FUSIONS and any(
      inner.opcode in _PRODUCTS for called in instruction.called
      for inner in computations.get(called, {}).values())


def _traffic(instruction, around, computations):
  """Bytes that a kernel reads and writes."""
  if instruction.opcode == 'dynamic-slice':
    return 2 * size(instruction.type)
  sizes = [size(around[name].type) if name in around else 0.0 for name in instruction.operands]
  if instruction.opcode == _UPDATE:
    return 2 * sizes[1]
  if instruction.opcode not in _FUSIONS or not instruction.called:
    return sum(sizes) + size(instruction.type)
  body = computations.get(instruction.called[0], {})
  return _read(body, sizes) + _written(body, instruction)


def _read(body, sizes):
  """Bytes that a fusion reads of operands of these sizes."""
  total = 0.0
  for parameter in body.values():
    if parameter.opcode != 'parameter':
      continue
    number, users = int(parameter.inside), _users(body, parameter.name)
    if users and all(user.opcode == 'dynamic-slice' and user.operands[0] == source
                     for user, source in users):
      total += sum(size(user.type) for user, _ in users)
    elif users and all(user.opcode == _UPDATE and user.operands[0] == source
                       for user, source in users):
      continue  # updated in place
    elif number < len(sizes):
      total += sizes[number]
  return total


def _users(body, name):
  """Instructions that use a value, looking through bitcasts: [(user, name it uses)]."""
  found = []
  for user in body.values():
    if name in user.operands:
      found += _users(body, user.name) if user.opcode == 'bitcast' else [(user, name)]
  return found


def _written(body, instruction):
  """Bytes that a fusion writes."""
  root = next((inner for inner in body.values() if inner.is_root), None)
  if root is None:
    return size(instruction.type)
  results = ([body[name] for name in root.operands if name in body] if root.opcode == 'tuple'
             else [root])
  total = 0.0
  for result in results:
    while result.opcode == 'bitcast' and result.operands[0] in body:
      result = body[result.operands[0]]
    if result.opcode == _UPDATE and result.operands[1] in body:
      total += size(body[result.operands[1]].type)
    else:
      total += size(result.type)
  return total
