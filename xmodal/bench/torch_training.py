"""How PyTorch's side is trained: AdamW after clipping, as ours."""

from collections.abc import Callable

import torch
from torch import nn


def make_optimizer(model: nn.Module, config, decays: Callable[[str, nn.Parameter], bool]
                   ) -> torch.optim.Optimizer:
  """AdamW, fused, of the parameters that are trained.

  Args:
    model: to be trained.
    config: config.optimizer.
    decays: of a parameter and its name, whether its weights decay.
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
  """What moves the parameters: loss -> (loss, norm of the gradients before clipping), which stay
  on the device."""
  def descend(loss):
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach(), norm

  return descend
