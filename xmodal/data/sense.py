"""Senses (input modalities) beside pictures and text: encode an example into arrays of a batch.

    @SENSES.register('sensor')
    def encode(example):
      readings = (example.inputs or {}).get('sensor', np.zeros((10, 3), np.float32))
      return {'readings': readings}

A sense is a function (example) -> {name: array}, with the same shapes and dtypes for every example;
in a batch the arrays get a leading axis [B]. Its tower registers with slot='sensor' (see
models.parts); it is called with these arrays as keywords and `deterministic`, and returns a
models.stream.Stream. Tasks that use a sense name it in Task.senses.
"""

from xmodal.registry import Registry

SENSES = Registry('sense', 'senses of a task')
