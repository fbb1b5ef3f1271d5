"""Optimizer of the PyTorch references: gradient clipping, then AdamW, as for ours."""

from collections.abc import Callable

import torch
from torch import nn


def make_optimizer(model: nn.Module, config, decays: Callable[[str, nn.Parameter], bool]
                   ) -> torch.optim.Optimizer:
  """Fused AdamW over the trainable parameters.

  Args:
    model: the model to train.
    config: config.optimizer.
    decays: (name, parameter) -> whether weight decay applies.
  """
  groups = {True: [], False: []}
  for name, parameter in model.named_parameters():
    if parameter.requires_grad:
      groups[decays(name, parameter)].append(parameter)
  return torch.optim.AdamW(
      [{'params': parameters, 'weight_decay': config.weight_decay * decay}
       for decay, parameters in groups.items()],
      lr=config.learning_rate, betas=(config.b1, config.b2), eps=config.eps, fused=True)


def make_descent(model: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float) -> Callable:
  """Returns the update: loss -> (loss, gradient norm before clipping), both on the device."""
  def descend(loss):
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach(), norm

  return descend
