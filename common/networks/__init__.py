"""The papers' architectures: image classifiers by name; the Transformer, the auto-encoder and the character LSTM."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from common.networks.autoencoder import Autoencoder, reconstruction_loss
from common.networks.charlstm import CharLSTM, bits_per_character
from common.networks.densenet import DenseNet
from common.networks.fixup import FixupResNet18
from common.networks.layers import ACTIVATIONS, gain_of, make_activation
from common.networks.plain import PlainNet
from common.networks.resnet import ResNet
from common.networks.transformer import Transformer
from common.networks.vgg import VGG
from common.networks.wide_resnet import WideResNet

__all__ = [
    "ACTIVATIONS",
    "NETWORKS",
    "VGG",
    "Autoencoder",
    "CharLSTM",
    "DenseNet",
    "FixupResNet18",
    "PlainNet",
    "ResNet",
    "Transformer",
    "WideResNet",
    "bits_per_character",
    "gain_of",
    "make_activation",
    "make_network",
    "reconstruction_loss",
]

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "plain": PlainNet,
    "vgg19": VGG,
    "resnet20": ResNet,
    "resnet56": partial(ResNet, 56),
    "resnet110": partial(ResNet, 110),
    "wrn": WideResNet,
    "densenet100": DenseNet,
    "fixup-resnet18": FixupResNet18,
}

# Names that carry their own sizes: wrn-28-10, densenet-40-12, resnet-32, vgg-16, plain-20 or plain-20-32 (depth first).
_SIZED: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    r"wrn-?(\d+)-(\d+)": (WideResNet, ("depth", "widen")),
    r"densenet-?(\d+)-(\d+)": (DenseNet, ("depth", "growth")),
    r"resnet-?(\d+)": (ResNet, ("depth",)),
    r"vgg-?(\d+)": (VGG, ("depth",)),
    r"plain-?(\d+)(?:-(\d+))?": (PlainNet, ("depth", "width")),
}


def make_network(name: str, **options: Any) -> nn.Module:
    """A network by name, with the options of its class: `make_network("wrn-28-10", batch_norm=True)`.

    Without options every network is free of normalisation, has its skips, and uses ReLU (fixup-resnet18 a leaky one).
    The weights are drawn from the global generator, as by any constructor; `common.initializers` replaces them
    reproducibly.

    Raises:
        ValueError: The name is neither in `NETWORKS` nor a family with sizes, such as "wrn-16-4" or "resnet32".
    """
    if name in NETWORKS:
        return NETWORKS[name](**options)
    for pattern, (network, arguments) in _SIZED.items():
        if match := re.fullmatch(pattern, name):
            sizes = {argument: int(size) for argument, size in zip(arguments, match.groups(), strict=True) if size}
            return network(**sizes | options)
    raise ValueError(
        f"make_network: `name` must be one of {', '.join(NETWORKS)}, or carry sizes as wrn-28-10, densenet-40-12, "
        f"resnet-32, vgg-16 and plain-20-32 do, got {name!r}."
    )
