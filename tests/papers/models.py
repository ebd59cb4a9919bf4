"""Small models, and all of a model that an initialiser must leave as it was."""

from itertools import pairwise

import torch
from torch import nn
from torch.testing import assert_close


def mlp(*widths: int, activation: type[nn.Module] = nn.Tanh, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, h):
        return 3 * ctx.saved_tensors[0] ** 2 * h


class CubedOnce(nn.Module):
    """x³, declared to be differentiable once: torch takes its derivative for a constant."""

    def forward(self, x):
        return _Once.apply(x)


def state_of(model: nn.Module) -> list:
    """All that must not change: every tensor's bits, every flag, the global random state."""
    return [
        {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=False).items()},
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad for parameter in model.parameters()],
        torch.get_rng_state(),
    ]


def assert_same_state(model: nn.Module, before: list) -> None:
    assert_close(state_of(model), before, rtol=0, atol=0, equal_nan=True)
