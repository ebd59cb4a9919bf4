"""The loss of translation against torch's cross-entropy and by hand: every check takes it, every mutant fails one."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from common.networks import Transformer
from common.translation import translation_loss, translation_metrics

PAD, BOS, EOS = 0, 1, 2
BATCH = {
    "source": torch.tensor([[5, 4, 3, EOS], [4, EOS, PAD, PAD]]),
    "target": torch.tensor([[BOS, 3, EOS, PAD, PAD, PAD], [BOS, 4, 5, 4, 3, EOS]]),
}


class Table(nn.Module):
    """Logits that depend on the last token alone: row i of a matrix after token i."""

    def __init__(self, n: int = 6) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(n, n, generator=torch.Generator().manual_seed(1)))

    def forward(self, source, target_in):
        return self.table[target_in]


# --- The loss ---------------------------------------------------------------------------------------------------------


def check_against_torch(loss):
    model = Table()
    for epsilon in (0.0, 0.1, 0.7):
        logits = model(None, BATCH["target"][:, :-1])
        expected = F.cross_entropy(
            logits.flatten(0, 1), BATCH["target"][:, 1:].flatten(), ignore_index=PAD, label_smoothing=epsilon
        )
        assert_close(loss(model, BATCH, label_smoothing=epsilon), expected)


def check_by_hand(loss):
    # n = 3, and of two places one is padding. After BOS p = (1/8, 1/8, 3/4), and EOS = 2 is right:
    # −0.9 ln ¾ − 0.1 · (2 ln ⅛ + ln ¾)/3
    model = Table(3)
    with torch.no_grad():
        model.table.copy_(torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, math.log(6)], [5.0, 1.0, 0.0]]))
    batch = {"source": None, "target": torch.tensor([[BOS, EOS, PAD]])}
    expected = -0.9 * math.log(3 / 4) - 0.1 * (2 * math.log(1 / 8) + math.log(3 / 4)) / 3
    assert_close(loss(model, batch), torch.tensor(expected))


def check_another_padding(loss):
    # 5 is padding now, and 0 a token like any other
    target = torch.tensor([[BOS, 0, 4, EOS], [BOS, 3, EOS, 5]])
    model = Table()
    places = [model.table[before].log_softmax(0)[after] for before, after in ((1, 0), (0, 4), (4, 2), (1, 3), (3, 2))]
    got = loss(model, {"source": None, "target": target}, label_smoothing=0.0, padding=5)
    assert_close(got, -torch.stack(places).mean())


def check_sentences_weigh_by_their_tokens(loss):
    model = Table()
    whole = loss(model, BATCH)
    each = [loss(model, {"source": None, "target": BATCH["target"][i : i + 1]}) for i in range(2)]
    assert_close(whole, (2 * each[0] + 5 * each[1]) / 7)  # 3 EOS; 4 5 4 3 EOS


CHECKS = [check_against_torch, check_by_hand, check_another_padding, check_sentences_weigh_by_their_tokens]


def by_cross_entropy(model, batch, label_smoothing=0.1, padding=PAD, *, given=slice(None, -1), wanted=slice(1, None)):
    logits, labels = model(batch["source"], batch["target"][:, given]), batch["target"][:, wanted]
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=padding, label_smoothing=label_smoothing
    )


def padding_in_the_mean(model, batch, label_smoothing=0.1, padding=PAD):
    labels = batch["target"][:, 1:]
    return by_cross_entropy(model, batch, label_smoothing, padding) * (labels != padding).double().mean()


def smoothed_over_the_others(model, batch, label_smoothing=0.1, padding=PAD):
    n = len(model.table)
    return by_cross_entropy(model, batch, label_smoothing * n / (n - 1), padding)


def mean_of_sentences(model, batch, label_smoothing=0.1, padding=PAD):
    rows = [{"source": None, "target": row[None]} for row in batch["target"]]
    return torch.stack([by_cross_entropy(model, row, label_smoothing, padding) for row in rows]).mean()


MUTANTS = {
    "no shift": lambda *a, **k: by_cross_entropy(*a, **k, given=slice(1, None)),
    "shift by two": lambda *a, **k: by_cross_entropy(*a, **k, given=slice(None, -2), wanted=slice(2, None)),
    "backwards": lambda *a, **k: by_cross_entropy(*a, **k, given=slice(1, None), wanted=slice(None, -1)),
    "padding counted": lambda m, b, label_smoothing=0.1, padding=PAD: by_cross_entropy(m, b, label_smoothing, -100),
    "padding in the mean": padding_in_the_mean,
    "padding always 0": lambda m, b, label_smoothing=0.1, padding=PAD: by_cross_entropy(m, b, label_smoothing),
    "smoothing lost": lambda m, b, label_smoothing=0.1, padding=PAD: by_cross_entropy(m, b, 0.0, padding),
    "another default": lambda m, b, label_smoothing=0.2, padding=PAD: by_cross_entropy(m, b, label_smoothing, padding),
    "smoothed over the others": smoothed_over_the_others,
    "mean of sentences": mean_of_sentences,
    "a sum": lambda m, b, **k: by_cross_entropy(m, b, **k) * (b["target"][:, 1:] != k.get("padding", PAD)).sum(),
    "sign": lambda *a, **k: -by_cross_entropy(*a, **k),
}


def fails(check, loss) -> bool:
    try:
        check(loss)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("check", CHECKS)
def test_loss(check):
    check(translation_loss)
    check(by_cross_entropy)  # what the mutants are mutants of


@pytest.mark.parametrize("mutant", MUTANTS)
def test_every_wrong_loss_is_caught(mutant):
    assert any(fails(check, MUTANTS[mutant]) for check in CHECKS)


def test_padding_has_no_gradient_and_no_effect():
    model = Transformer(6, dim=8, feedforward=12, heads=2, encoder_layers=1, decoder_layers=1).eval()
    wider = {side: F.pad(tokens, (0, 3), value=PAD) for side, tokens in BATCH.items()}
    gradients = [
        torch.autograd.grad(translation_loss(model, batch), list(model.parameters())) for batch in (BATCH, wider)
    ]
    for got, expected in zip(*gradients, strict=True):
        assert_close(got, expected)


def test_half_precision_logits_are_summed_in_single():
    class Half(Table):
        def forward(self, source, target_in):
            return super().forward(source, target_in).bfloat16()

    assert translation_loss(Half(), BATCH).dtype == torch.float32


# --- The metrics ------------------------------------------------------------------------------------------------------


def check_metrics(translation_metrics):
    class Checked(Table):
        def forward(self, source, target_in):
            assert not self.training
            return super().forward(source, target_in)

    model = Checked().train()
    # batches of 2 and 5 tokens, so that a mean of means differs from the mean
    given = [{"source": None, "target": BATCH["target"][i : i + 1]} for i in range(2)]
    pairs = [(1, 3), (3, 2), (1, 4), (4, 5), (5, 4), (4, 3), (3, 2)]
    log_p = [model.table[before].log_softmax(0)[after].item() for before, after in pairs]
    metrics = translation_metrics(model, given)
    assert metrics.keys() == {"validation_loss", "perplexity"}
    assert metrics["validation_loss"] == pytest.approx(-sum(log_p) / 7, rel=1e-12)
    assert metrics["perplexity"] == pytest.approx(math.prod(map(math.exp, log_p)) ** (-1 / 7), rel=1e-12)
    assert model.training
    translation_metrics(model.eval(), given)
    assert not model.training


def mean_of_batches(model, given):
    each = [translation_metrics(model, [batch])["validation_loss"] for batch in given]
    return {"validation_loss": sum(each) / 2, "perplexity": math.exp(sum(each) / 2)}


def with_smoothing(model, given):
    was = model.training
    loss = translation_loss(model.eval(), BATCH | {"source": None}).item()
    model.train(was)
    return {"validation_loss": loss, "perplexity": math.exp(loss)}


def in_bits(model, given):
    metrics = translation_metrics(model, given)
    return metrics | {"perplexity": 2 ** metrics["validation_loss"]}


def left_in_evaluation(model, given):
    return translation_metrics(model.eval(), given)


def test_metrics():
    check_metrics(translation_metrics)


@pytest.mark.parametrize("mutant", [mean_of_batches, with_smoothing, in_bits, left_in_evaluation])
def test_every_wrong_metric_is_caught(mutant):
    with pytest.raises(AssertionError):
        check_metrics(mutant)


def test_metrics_of_a_model_that_diverged():
    model = Table()
    with torch.no_grad():
        model.table.copy_(1e4 * torch.eye(6))  # certain that every token repeats
    metrics = translation_metrics(model, [{"source": None, "target": torch.tensor([[BOS, 3, EOS]])}])
    assert metrics == {"validation_loss": 1e4, "perplexity": math.inf}
    assert model.table.grad is None
