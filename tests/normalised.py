"""A network of batch norms of several kinds, and its loss and the statistics after by hand, in primitives."""

import torch
from torch import nn


class Normalised(nn.Module):
    """A norm that is used twice, one of cumulative averages, one that tracks nothing."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
        self.twice, self.cumulative = nn.BatchNorm1d(4, momentum=0.3), nn.BatchNorm1d(4, momentum=None, affine=False)
        self.free, self.drop = nn.BatchNorm1d(4, track_running_stats=False), nn.Dropout(dropout)

    def forward(self, x):
        x = self.twice(self.twice(self.first(x)).tanh())
        return self.head(self.drop(self.free(self.cumulative(x.tanh()).tanh())))


def by_hand(theta, S, x, y, *, training, k=0):
    """The loss of `Normalised` in primitives, and the statistics after; k batches were seen before."""
    S = dict(S)

    def norm(name, x, momentum, eps=1e-5):
        m, v = x.mean(0), ((x - x.mean(0)) ** 2).mean(0)
        if name == "free":
            pass
        elif training:
            S[f"{name}.running_mean"] = (1 - momentum) * S[f"{name}.running_mean"] + momentum * m
            S[f"{name}.running_var"] = (1 - momentum) * S[f"{name}.running_var"] + momentum * v * len(x) / (len(x) - 1)
        else:
            m, v = S[f"{name}.running_mean"], S[f"{name}.running_var"]
        x = (x - m) / (v + eps).sqrt()
        return x if name == "cumulative" else theta[f"{name}.weight"] * x + theta[f"{name}.bias"]

    x = x @ theta["first.weight"].T + theta["first.bias"]
    x = norm("twice", norm("twice", x, 0.3).tanh(), 0.3).tanh()
    x = norm("free", norm("cumulative", x, 1 / (k + 1)).tanh(), None)
    x = x @ theta["head.weight"].T + theta["head.bias"]
    return (x.logsumexp(1) - x[range(len(y)), y]).mean(), S


def batch(seed, size=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, generator=generator) + 1, torch.randint(3, (size,), generator=generator)
