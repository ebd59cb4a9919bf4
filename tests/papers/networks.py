"""Small random networks for derivative checks: smooth, with each norm, tied weights, attention, a recurrent layer."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

CLASSES = 3


def images(seed: int = 0, size: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 2, 5, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (size,), generator=generator)


def sequences(seed: int = 0, size: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (size,), generator=generator)


def conv(norm: nn.Module | None = None, activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        norm or nn.Identity(),
        activation(),
        nn.Conv2d(4, 3, 2),
        activation(),
        nn.Flatten(),
        nn.Linear(6, CLASSES),
    )


class Tied(nn.Module):
    """One matrix used in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(24, CLASSES)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(x))).tanh().flatten(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].flatten(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 4, bidirectional=True, batch_first=True), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0].flatten(1))


def weight_norm() -> nn.Module:
    return nn.Sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(24, 5)), nn.Tanh(), nn.Linear(5, CLASSES))


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, activation="gelu")
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(24, CLASSES))


NETWORKS = {
    "plain": (conv, images),
    "batch norm": (lambda: conv(nn.BatchNorm2d(4)), images),
    "layer norm": (lambda: conv(nn.LayerNorm([4, 3, 2])), images),
    "instance norm": (lambda: conv(nn.InstanceNorm2d(4, affine=True)), images),
    "group norm": (lambda: conv(nn.GroupNorm(2, 4)), images),
    "weight norm": (weight_norm, sequences),
    "tied": (Tied, sequences),
    "attention": (Attention, sequences),
    "transformer": (transformer, sequences),
    "lstm": (Recurrent, sequences),
}


def make(name: str, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A network with random parameters everywhere, biases and gains too, and its batch."""
    build, batch = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build().double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model, batch(seed)
