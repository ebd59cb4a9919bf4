"""An initialiser's scales in records: put back into a network, and saved as one file."""

import torch
from torch import nn

from common.functional import load_parameters_, parameters_of
from common.record import Run


def rescaled(model: nn.Module, scales: dict[str, float]) -> nn.Module:
    """An initialiser's result, again, from its record: the same multiplication that it ends with."""
    params = parameters_of(model)
    load_parameters_(model, {name: params[name] * params[name].new_tensor(scale) for name, scale in scales.items()})
    return model


def save_scales(folder: Run, group: str, method: str) -> None:
    """New norm over old for every tuned tensor: `group/arm/seed/tensor`, the group a key of the records."""
    scales = {
        f"{record[group]}/{record['arm']}/{record['seed']}/{name}": torch.tensor(scale)
        for record in folder.records
        for name, scale in record.get("scales", {}).items()
    }
    folder.save_tensors("scales", scales, {"format": "learned-init scales 1", "method": method})
