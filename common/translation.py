"""The loss of translation, by teacher forcing, and what is reported of it.

A batch is {"source": (b, s), "target": (b, t)}: sentences of tokens, each target from BOS to EOS, padded at their end.
The model sees the target up to a token, and is asked for that token: `model(source, target[:, :-1])` are logits
(b, t − 1, n) for the labels `target[:, 1:]`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from common.functional import in_evaluation_mode
from common.types import Batch


def translation_loss(model: nn.Module, batch: Batch, *, label_smoothing: float = 0.1, padding: int = 0) -> Tensor:
    r"""Mean cross-entropy a target token, padding not counted, against smoothed labels.

    −(1/T) Σ_y Σ_v q_y(v) log p(v), q_y(v) = (1 − ε)·[v = y] + ε/n, over the T labels y of the batch: EOS is one, BOS
    is none. Sentences weigh by their length, so this is not the mean of the sentences' own losses.

    Args:
        model: Maps source and target to logits, as `common.networks.Transformer` does.
        batch: One sentence pair or more.
        label_smoothing: ε, the share of the uniform distribution over all n tokens; 0.1 in GradInit's runs.
        padding: The token that is not counted.
    """
    log_p, labels = _log_probabilities(model, batch)
    smoothed = (1 - label_smoothing) * _at(log_p, labels) + label_smoothing * log_p.mean(-1)
    counted = labels != padding
    return -(smoothed * counted).sum() / counted.sum()


@torch.no_grad()
def translation_metrics(model: nn.Module, batches: Iterable[Batch], *, padding: int = 0) -> dict[str, float]:
    """`validation_loss` (nats a token, without smoothing) and `perplexity`, its exponential, in evaluation mode."""
    loss, count = [], []
    with in_evaluation_mode(model):
        for batch in batches:
            log_p, labels = _log_probabilities(model, batch)
            counted = labels != padding
            loss.append(-(_at(log_p, labels) * counted).double().sum())
            count.append(counted.sum())
    mean = torch.stack(loss).sum() / torch.stack(count).sum()
    return {"validation_loss": mean.item(), "perplexity": mean.exp().item()}


def _log_probabilities(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """log p of every token at every place of the target but the first, and the labels there."""
    source, target = batch["source"], batch["target"]
    logits = model(source, target[:, :-1])
    # in float32 at least: a vocabulary's sum of exponentials is too long for bfloat16
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.log_softmax(-1, dtype=dtype), target[:, 1:]


def _at(log_p: Tensor, labels: Tensor) -> Tensor:
    return log_p.gather(-1, labels[..., None]).squeeze(-1)
