"""The server of xmodal.serve with the PyTorch reference as its model, for `xmodal bench serve`."""

import os

import numpy as np
import torch

from xmodal.bench.harness import num_threads
from xmodal.bench.torch_reference import Reference, parameters_for_ours
from xmodal.serve.trained_engine import TrainedEngine


def reference(config, tokenizer, task) -> Reference:
  """The reference of a run's config, with random parameters that depend on config.seed alone.

  Args:
    config: of a run that has the vqa task without a written answer.
    tokenizer: the run's.
    task: the run's vqa task.

  Raises:
    UserError: the reference has no such model.
  """
  torch.manual_seed(config.seed)
  return Reference(config, tokenizer.vocab_size, len(task.answers), tokenizer.pad_id)


def parameters(plan):
  """The reference's parameters for our model, from a train.plan.Plan."""
  model = reference(plan.config, plan.tokenizer, plan.tasks['vqa'])
  return parameters_for_ours(model, plan.model, plan.abstract.params)


class TorchEngine(TrainedEngine):
  """As TrainedEngine, with the reference in place of the compiled program of vqa."""

  def __init__(self, folder: str, sizes, precision: str = ''):
    super().__init__(folder, sizes or (), os.path.basename(folder), precision)
    torch.set_num_threads(num_threads())
    own = self._predictor
    self._model = reference(own.config, own.tokenizer, own.tasks['vqa']).eval()
    own.program = lambda task: self._predict

  @torch.inference_mode()
  def _predict(self, variables, batch):
    features = {'image': torch.from_numpy(batch['image']),
                'question': torch.from_numpy(np.asarray(batch['vqa']['question'], np.int64))}
    probability, index = torch.topk(self._model.logits(features).softmax(-1), 5)
    return {'vqa': {'top_index': index.numpy(), 'top_probability': probability.numpy()}}
