"""DIMAML's networks: layer tables, cells by hand, the two paths of the LSTM, and derivatives of every order."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from common.functional import classification_loss
from common.guard import check_derivatives
from common.initializers import fixup_
from common.networks import (
    Autoencoder,
    CharLSTM,
    FixupResNet18,
    autoencoder,
    bits_per_character,
    charlstm,
    fixup,
    make_network,
    reconstruction_loss,
)
from common.networks.charlstm import GATES
from tests.mutation import mutated, survives


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape, high=7, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def small_lstm(module=charlstm, **options):
    return module.CharLSTM(7, **{"embedding": 3, "hidden": 4, **options})


# --- Layer tables -----------------------------------------------------------------------------------------------------


def test_autoencoder_parameters():
    model, plain, small = Autoencoder(), Autoencoder(batch_norm=False), Autoencoder(32, width=16, code=10)
    assert size(model) == 1_569_859
    assert size(model) - size(plain) == 1440 == 2 * (32 + 64 + 128 + 256 + 128 + 64 + 32 + 16)
    convolutions = 25 * (3 * 32 + 32 * 64 + 64 * 128 + 128 * 256)
    transposed = 25 * (128 * 64 + 64 * 32 + 32 * 16) + 16 * 16 * 3 + 3
    assert size(plain) == convolutions + (9 * 256 * 64 + 64) + 64 * 9 * 128 + transposed
    # one pixel is left of 32: 128 channels to 10 numbers, 10 numbers to 64 channels
    assert (tuple(small.to_code.weight.shape), tuple(small.from_code.weight.shape)) == ((10, 128), (64, 10))
    # the learned tensors of the paper: those that are no normalisation's
    assert len(list(plain.parameters())) == 12


def test_lstm_parameters():
    models = {n: CharLSTM(n) for n in (52, 285)}
    for n, model in models.items():
        embedding, classifier = 128 * n, 256 * n + n
        assert size(model) == embedding + 4 * 256 * (128 + 256 + 1) + 4 * 256 * (256 + 256 + 1) + classifier
    assert size(models[52]) == 939_572


@pytest.mark.parametrize(("classes", "parameters"), [(100, 11_210_574), (200, 11_261_874)])
def test_fixup_resnet18_parameters(classes, parameters):
    model = make_network("fixup-resnet18", num_classes=classes)
    assert isinstance(model, FixupResNet18)
    assert size(model) == parameters
    # the scalars: four biases and a multiplier a block, one after the stem, one before the classifier
    assert sum(parameter.numel() == 1 for parameter in model.parameters()) == 8 * 5 + 2
    # the learned tensors of the paper: stem, conv1 of every block, three 1×1 convolutions
    assert len([p for n, p in model.named_parameters() if p.ndim == 4 and "conv2" not in n]) == 12


def test_names_do_not_depend_on_the_vocabulary():
    one, other = ({n: p.shape for n, p in CharLSTM(v).named_parameters()} for v in (52, 285))
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == [
        "embedding.weight", "classifier.weight", "classifier.bias",
    ]  # fmt: skip
    gates = [name for name in one if name.startswith("lstm.")]
    # 24 tensors a distribution is kept for, and the embedding's and the classifier's
    assert sorted(gates) == sorted(
        f"lstm.{layer}.{kind}.{gate}.{tensor}"
        for layer in (0, 1)
        for gate in GATES
        for kind, tensor in (("ih", "weight"), ("ih", "bias"), ("hh", "weight"))
    )


# --- Shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [32, 48, 64])
def test_images_come_back_in_their_size(image_size):
    model = Autoencoder(image_size, width=2, code=5, in_channels=1)
    x = randn(2, 1, image_size, image_size)
    sides = []
    for layer in [*model.encoder, *model.decoder]:
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            layer.register_forward_hook(lambda *call: sides.append(call[2].shape[-1]))
    assert model(x).shape == x.shape
    if image_size == 64:
        assert sides == [31, 15, 7, 3, 7, 15, 31, 64]
    assert model.encode(x).shape == (2, 5)


@pytest.mark.parametrize("image_size", [32, 64])
def test_resolutions_of_fixup(image_size):
    model = FixupResNet18(2, num_classes=5)
    sides = []
    for block in model.blocks:
        block.register_forward_hook(lambda *call: sides.append(call[2].shape[-1]))
    assert model(randn(2, 3, image_size, image_size)).shape == (2, 5)
    assert [side / image_size for side in sides] == [1, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 8, 1 / 8]
    assert {layer.negative_slope for layer in model.modules() if isinstance(layer, nn.LeakyReLU)} == {0.01}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Autoencoder(40), "Autoencoder: `image_size` must be a multiple of 16 from 32 on, got 40. Other"),
        (lambda: Autoencoder(16), "`image_size` must be a multiple of 16 from 32 on, got 16"),
        (lambda: Autoencoder(width=3), "`width` must be even and positive, and `code` at least 1, got 3 and 64"),
        (lambda: Autoencoder(code=0), "and `code` at least 1, got 32 and 0"),
        (lambda: CharLSTM(0), "CharLSTM: `vocabulary_size` must be at least 1, got 0"),
        (lambda: CharLSTM(5, layers=0), "CharLSTM: `layers` must be at least 1, got 0"),
        (lambda: CharLSTM(5, dropout=1.0), r"CharLSTM: `dropout` must lie in \[0, 1\), got 1.0"),
        (lambda: bits_per_character(small_lstm(), tokens(2, 1)), r"two characters a stream.*got \(2, 1\) and 1000"),
        (lambda: bits_per_character(small_lstm(), tokens(1, 9), chunk=0), r"got \(1, 9\) and 0"),
    ],
)
def test_wrong_sizes(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# --- By hand: checks that take the module, so that mutants of it can fail ---------------------------------------------


def slow_logits(model, x):
    """torch's own cells with the model's weights, one character after the other."""
    y = model.embedding.weight[x]
    for layer in model.lstm:
        cell = nn.LSTMCell(y.shape[-1], layer.hidden)
        with torch.no_grad():
            cell.weight_ih.copy_(torch.cat([getattr(layer.ih, gate).weight for gate in GATES]))
            cell.weight_hh.copy_(torch.cat([getattr(layer.hh, gate).weight for gate in GATES]))
            cell.bias_ih.copy_(torch.cat([getattr(layer.ih, gate).bias for gate in GATES]))
            cell.bias_hh.zero_()
        h = c = torch.zeros(len(x), layer.hidden)
        outputs = []
        for t in range(x.shape[1]):
            h, c = cell(y[:, t], (h, c))
            outputs.append(h)
        y = torch.stack(outputs, 1)
    return (y @ model.classifier.weight.T + model.classifier.bias).transpose(1, 2)


def check_cells(module):
    model = small_lstm(module).eval()
    with torch.no_grad():
        model.classifier.bias.normal_()
    x = tokens(3, 5)
    assert model(x).shape == (3, 7, 5)
    assert_close(model(x), slow_logits(model, x))


def check_both_paths(module):
    # training mode, and the same masks of dropout: values and first derivatives
    model, x, y = small_lstm(module, dropout=0.4), tokens(3, 6), tokens(3, 6, seed=1)
    values, gradients = [], []
    for fused in (False, True):
        model.fused = fused
        torch.manual_seed(5)
        loss = classification_loss(model, (x, y))
        values.append(loss)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        model.eval()
        values.append(model(x))
        model.train()
    assert_close(values[:2], values[2:])
    assert_close(gradients[0], gradients[1])
    assert not torch.allclose(values[0], cross_entropy(values[1], y))  # dropout was on


def check_continuation(module):
    for fused in (False, True):
        model, x = small_lstm(module, fused=fused).eval(), tokens(2, 9)
        first, state = model.continued(x[:, :4])
        second, last = model.continued(x[:, 4:], state)
        assert_close(torch.cat([first, second], -1), model(x))
        assert_close(last, model.continued(x)[1])


def check_bits(module):
    model, streams = small_lstm(module, dropout=0.5), tokens(3, 23)
    # as one sequence each, in the slow path, without dropout, and every character but the first is predicted
    log_p = slow_logits(model, streams[:, :-1]).log_softmax(1)
    expected = -log_p.gather(1, streams[:, None, 1:]).mean() / math.log(2)
    for chunk in (1, 5, 22, 1000):
        assert module.bits_per_character(model, streams, chunk=chunk) == pytest.approx(expected.item(), rel=1e-12)
    assert model.training
    assert not model.fused


def check_initial_weights(module):
    model = module.CharLSTM(7, embedding=3, hidden=400)
    for layer in model.lstm:
        for parameter in layer.parameters():
            assert parameter.abs().max() <= 1 / 20
            # of a uniform sample: a few standard errors of its deviation
            assert abs(parameter.std() * 20 * math.sqrt(3) - 1) < 3 / math.sqrt(parameter.numel())
    assert not model.classifier.bias.any()


LSTM_CHECKS = [check_cells, check_both_paths, check_continuation, check_bits, check_initial_weights]
EVALUATION = "with in_evaluation_mode(model):"
LSTM_MUTANTS = {
    "cell and output exchanged": ("i, f, g, o = (Wx", "i, f, o, g = (Wx"),
    "input and forget exchanged": ("c = f.sigmoid() * c + i.sigmoid()", "c = i.sigmoid() * c + f.sigmoid()"),
    "no tanh of the cells": ("h = o.sigmoid() * c.tanh()", "h = o.sigmoid() * c"),
    "the old cells' output": ("outputs.append(h)", "outputs.append(c)"),
    "no recurrence": ("(Wx + F.linear(h, U))", "Wx"),
    "state not carried on": ("None if state is None else state[number]", "None"),
    "states of another layer": ("else state[number]", "else state[0]"),
    "second bias": ("[b, torch.zeros_like(b)]", "[b, b]"),
    "targets not shifted": ("part[:, 1:], reduction", "part[:, :-1], reduction"),
    "windows overlap": ("first : first + chunk + 1]", "first : first + chunk + 2]"),
    "nats": (" / math.log(2)).item()", ").item()"),
    "mean over all characters": ("(streams.shape[1] - 1)) / math", "streams.shape[1]) / math"),
    "dropout in evaluation": (EVALUATION, "model.train()\n        if True:"),
    "mode not restored": (EVALUATION, "model.eval()\n        if True:"),
    "path not restored": ("model.fused = was_fused", "pass"),
    "dropout lost": ("x = self.dropout(x)", "pass"),
    "torch's default deviation": ("-1 / math.sqrt(after), 1 / math.sqrt(after)", "-1 / after, 1 / after"),
}


@pytest.mark.parametrize("check", LSTM_CHECKS)
def test_lstm(check):
    check(charlstm)


@pytest.mark.parametrize("mutant", LSTM_MUTANTS.values(), ids=LSTM_MUTANTS)
def test_every_mutant_of_the_lstm_is_caught(mutant):
    assert not survives(LSTM_CHECKS, mutated(charlstm, *mutant))


def check_block(module):
    for before, channels, stride in ((4, 4, 1), (4, 6, 2)):
        block = module.FixupBasicBlock(before, channels, stride, activation="tanh")
        scalars = {"bias_conv1": 0.3, "bias_activation1": -0.7, "bias_conv2": 1.1, "bias_activation2": -0.2}
        for name, value in scalars.items():
            nn.init.constant_(getattr(block, name).bias, value)
        nn.init.constant_(block.scale, 0.5)
        x = randn(2, before, 6, 6)
        y = block.conv2((block.conv1(x + 0.3) - 0.7).tanh() + 1.1)
        skip = x if stride == 1 else block.downsample(x + 0.3)
        assert_close(block(x), (0.5 * y - 0.2 + skip).tanh())


def check_weights(module):
    model = module.FixupResNet18(24)
    stds = {name: p.std().item() for name, p in model.named_parameters() if p.ndim == 4}
    expected = {
        "stem.0.weight": 1 / math.sqrt(3 * 27),  # torch's own, uniform over ±1/√27
        "blocks.0.conv1.weight": math.sqrt(2 / (9 * 24) / 8),
        "blocks.3.conv1.weight": math.sqrt(2 / (9 * 48) / 8),
        "blocks.6.conv1.weight": math.sqrt(2 / (9 * 192) / 8),
        "blocks.2.downsample.weight": math.sqrt(2 / 48),
        "blocks.7.conv2.weight": 0.0,
    }
    for name, std in expected.items():
        n = dict(model.named_parameters())[name].numel()
        assert stds[name] == pytest.approx(std, rel=4 / math.sqrt(2 * n))  # four standard errors
    assert [p.item() for p in model.parameters() if p.numel() == 1].count(1.0) == 8
    assert sum(p.item() for p in model.parameters() if p.numel() == 1) == 8
    assert not model.classifier.weight.any()
    assert not model.classifier.bias.any()
    assert model.classifier(randn(2, 192)).shape == (2, 10)
    with torch.no_grad():  # the forward pass reads them all
        assert not model(randn(2, 3, 8, 8)).any()
        model.classifier.weight.normal_()
        before = model(randn(2, 3, 8, 8))
        model.bias_classifier.bias.fill_(1.0)
        assert_close(model(randn(2, 3, 8, 8)), before + model.classifier.weight.sum(1))


FIXUP_CHECKS = [check_block, check_weights]
FIXUP_MUTANTS = {
    "shortcut of x itself": ("else self.downsample(shifted)", "else self.downsample(x)"),
    "branch of x itself": ("self.conv1(shifted)", "self.conv1(x)"),
    "identity of the shifted x": ("(x if self.downsample", "(shifted if self.downsample"),
    "bias before the multiplier": (
        "self.bias_activation2(self.scale * self.conv2(self.bias_conv2(y)))",
        "self.scale * self.bias_activation2(self.conv2(self.bias_conv2(y)))",
    ),
    "no factor of depth": ("math.sqrt(variance / len(blocks))", "math.sqrt(variance)"),
    "power of depth": ("math.sqrt(variance / len(blocks))", "math.sqrt(variance) / len(blocks)"),
    "fan-in": ("2 / (9 * block.conv1.out_channels)", "2 / (9 * block.conv1.in_channels)"),
    "classifier's bias lost": ("self.classifier(self.bias_classifier(", "self.classifier(("),
}


@pytest.mark.parametrize("check", FIXUP_CHECKS)
def test_fixup(check):
    check(fixup)


@pytest.mark.parametrize("mutant", FIXUP_MUTANTS.values(), ids=FIXUP_MUTANTS)
def test_every_mutant_of_fixup_is_caught(mutant):
    assert not survives(FIXUP_CHECKS, mutated(fixup, *mutant))


def test_the_initializer_differs_in_the_stem_alone():
    model = FixupResNet18(24)
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.blocks[1].scale.fill_(2.0)
    fixup_(model, generator=torch.Generator().manual_seed(3))
    for name, parameter in model.named_parameters():
        n, std = parameter.numel(), own[name].std().item() if own[name].numel() > 1 else 0.0
        if name == "stem.0.weight":
            std = math.sqrt(2 / (9 * 24))
        if std == 0.0:
            assert torch.equal(parameter, own[name])
        else:
            assert parameter.std().item() == pytest.approx(std, rel=6 / math.sqrt(2 * n))


def test_the_reconstruction_loss_is_a_mean_over_everything():
    model, x = nn.Linear(4, 4), randn(3, 4)
    expected = sum((model(x)[i, j] - x[i, j]) ** 2 for i in range(3) for j in range(4)) / 12
    assert_close(reconstruction_loss(model, x), expected)
    assert_close(reconstruction_loss(model, (x, torch.zeros(3))), expected)


def test_normalisation_stands_before_every_relu():
    kinds = [type(layer) for layer in [*Autoencoder(32, width=2).encoder, *Autoencoder(32, width=2).decoder]]
    down, up = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU], [nn.ConvTranspose2d, nn.BatchNorm2d, nn.ReLU]
    assert kinds == [*down * 4, nn.Unflatten, nn.BatchNorm2d, nn.ReLU, *up * 3, nn.ConvTranspose2d]
    model = Autoencoder(32, width=2)
    biases = [
        name
        for name, p in model.named_parameters()
        if p.ndim == 1 and not isinstance(_owner(model, name), nn.BatchNorm2d)
    ]
    assert biases == ["to_code.bias", "decoder.12.bias"]
    assert autoencoder.Autoencoder is Autoencoder


def _owner(model, name):
    return model.get_submodule(name.rpartition(".")[0])


# --- Derivatives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fused", "options"),
    [
        (False, {}),
        # the loop's own derivatives need no help, and a fixed mask of dropout is a function like any other
        (False, {"exact": False, "quantities": ("Hessian-vector product, forward", "third order")}),
        (False, {"seed": 3, "quantities": ("third order",)}),
        # the kernel is re-expressed: slower than the loop, but right
        (True, {"quantities": ("Hessian-vector product, forward", "third order")}),
    ],
    ids=["all", "as they are", "dropout", "fused"],
)
def test_derivatives_of_the_lstm(fused, options):
    model = small_lstm(fused=fused)
    # the default loss, as it stands
    report = check_derivatives(model, batch=(tokens(2, 3), tokens(2, 3, seed=1)), **options)
    assert report.agrees, report
    assert not any(check.note for check in report.checks.values()), report  # no fallback, to a loop or to reverse mode


@pytest.mark.parametrize("batch_norm", [False, True])
def test_derivatives_of_the_autoencoder(batch_norm):
    model = Autoencoder(32, width=2, code=3, batch_norm=batch_norm, in_channels=1)
    report = check_derivatives(model, reconstruction_loss, randn(4, 1, 32, 32))
    assert report.agrees, report


def test_derivatives_of_fixup():
    model = FixupResNet18(2, num_classes=3)
    with torch.no_grad():  # away from its zeros, where half of the network is cut off
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    report = check_derivatives(model, batch=(randn(2, 3, 8, 8), torch.tensor([0, 2])))
    assert report.agrees, report


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_lstm_on_a_gpu():
    model, x = CharLSTM(20, hidden=32).cuda().double(), tokens(4, 30, high=20).cuda()
    loop = model.eval()(x)
    model.fused = True
    assert_close(model(x), loop)  # without cuDNN's warning about the memory of the weights: warnings are errors
    model.fused = False
    assert check_derivatives(model, batch=(x, x.roll(-1, 1))).agrees
