"""The ordinary training loop against one written out, and against itself interrupted."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from common.functional import classification_loss
from common.training import TrainingConfig, classification_metrics, learning_rate_at, make_optimizer, train

STEPS = 3  # an epoch


def make_model() -> nn.Module:
    random = torch.Generator().manual_seed(4)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=random)
    return model


def batches(epoch: int):
    random = torch.Generator().manual_seed(100 + epoch)
    for _ in range(STEPS):
        yield torch.randn(6, 5, generator=random), torch.randint(3, (6,), generator=random)


def evaluate(model: nn.Module) -> dict[str, float]:
    return classification_metrics(model, batches(99))


def run(model: nn.Module, config: TrainingConfig, **options):
    given = {"train_batches": batches, "evaluate": evaluate, "steps_per_epoch": STEPS} | options
    return train(model, given.pop("loss_fn", classification_loss), config=config, **given)


def numbers(history):
    """The history but for what a clock says."""
    return [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in history]


# ---------------------------------------------------------------------------------------------- the schedule
def check_schedule(learning_rate_at) -> None:
    # 20 steps, a tenth of them warm-up: 1/2, 2/2, then the cosine over 18 steps, from its top
    config = TrainingConfig(epochs=4, learning_rate=0.8, warmup=0.1)
    rates = [learning_rate_at(step, 20, config) for step in range(20)]
    assert rates[:3] == [0.4, 0.8, 0.8]
    assert rates[2 + 6] == pytest.approx(0.6, rel=1e-12)  # a third of the way: ½ (1 + cos 60°) = ¾
    assert rates[2 + 9] == pytest.approx(0.4, rel=1e-12)  # half of the way
    assert rates[2 + 12] == pytest.approx(0.2, rel=1e-12)  # two thirds: ¼
    # the last step is one short of zero: ½ (1 − cos 10°)
    assert rates[-1] == pytest.approx(0.4 * (1 - math.cos(math.pi / 18)), rel=1e-9)
    plain = TrainingConfig(epochs=4, learning_rate=0.8)
    assert learning_rate_at(0, 20, plain) == 0.8
    assert learning_rate_at(20, 20, plain) == pytest.approx(0, abs=1e-12)
    assert learning_rate_at(0, 1, TrainingConfig(epochs=1, learning_rate=0.8, warmup=1.0)) == 0.8


SCHEDULES = {
    "no warm-up": lambda step, total, c: c.learning_rate * 0.5 * (1 + math.cos(math.pi * step / total)),
    "warm-up from zero": lambda step, total, c: (
        learning_rate_at(step, total, c) - (c.learning_rate / (c.warmup * total) if step < c.warmup * total else 0)
    ),
    "off by one": lambda step, total, c: learning_rate_at(step + 1, total, c),
    "by epoch": lambda step, total, c: learning_rate_at(step - step % c.epochs, total, c),
    "to half": lambda step, total, c: c.learning_rate * (0.75 + 0.25 * math.cos(math.pi * step / total)),
}


def test_schedule():
    check_schedule(learning_rate_at)


@pytest.mark.parametrize("mutant", SCHEDULES)
def test_every_wrong_schedule_is_caught(mutant):
    with pytest.raises(AssertionError):
        check_schedule(SCHEDULES[mutant])


def check_other_schedules(learning_rate_at) -> None:
    # 20 steps, 4 of them warm-up: ¼ … 1 of 0.8, then 16 steps
    def rates(schedule: str, warmup: float = 0.2) -> list[float]:
        config = TrainingConfig(epochs=4, learning_rate=0.8, warmup=warmup, schedule=schedule)
        return [learning_rate_at(step, 20, config) for step in range(20)]

    rising = [0.2, 0.4, 0.6, 0.8]
    assert rates("constant") == pytest.approx([*rising, *[0.8] * 16], rel=1e-12)
    assert rates("linear") == pytest.approx([*rising, *(0.8 * left / 16 for left in range(16, 0, -1))], rel=1e-12)
    # √(W/t) with t counted from 1, so that the warm-up's last step is its first: t = 16 is half of t = 4
    assert rates("inverse_sqrt") == pytest.approx([*rising, *(0.8 * math.sqrt(4 / t) for t in range(5, 21))], rel=1e-12)
    assert rates("inverse_sqrt")[15] == pytest.approx(0.4, rel=1e-12)
    assert rates("constant", 0.0) == [0.8] * 20
    assert rates("linear", 0.0)[:2] == pytest.approx([0.8, 0.76], rel=1e-12)
    assert rates("inverse_sqrt", 0.0)[:4:3] == pytest.approx([0.8, 0.4], rel=1e-12)


def wrong(schedule: str, rate):
    """`learning_rate_at`, but for what follows the warm-up of one schedule: lr · rate(W, total, step)."""

    def mutant(step: int, total: int, config: TrainingConfig) -> float:
        warm = round(config.warmup * total)
        if config.schedule != schedule or step < warm:
            return learning_rate_at(step, total, config)
        return config.learning_rate * rate(warm, total, step)

    return mutant


OTHER_SCHEDULES = {
    "linear over all steps": wrong("linear", lambda W, total, step: 1 - step / total),
    "linear off by one": wrong("linear", lambda W, total, step: 1 - (step + 1 - W) / (total - W)),
    "constant falls": wrong("constant", lambda W, total, step: 1 - (step - W) / total),
    "no root": wrong("inverse_sqrt", lambda W, total, step: max(W, 1) / (step + 1)),
    "root off by one": wrong("inverse_sqrt", lambda W, total, step: math.sqrt(max(W, 1) / max(step, 1))),
    "root of all steps": wrong("inverse_sqrt", lambda W, total, step: 1 / math.sqrt(step + 1)),
    "root from the warm-up's end": wrong("inverse_sqrt", lambda W, total, step: 1 / math.sqrt(step + 1 - W)),
}


def test_other_schedules():
    check_other_schedules(learning_rate_at)


@pytest.mark.parametrize("mutant", OTHER_SCHEDULES)
def test_every_other_wrong_schedule_is_caught(mutant):
    with pytest.raises(AssertionError):
        check_other_schedules(OTHER_SCHEDULES[mutant])


def check_drops(learning_rate_at) -> None:
    # 20 steps: a tenth from step 6 on, a hundredth from step 15 on
    config = TrainingConfig(epochs=4, learning_rate=0.8, schedule="constant", drops=(0.3, 0.75))
    rates = [learning_rate_at(step, 20, config) for step in range(20)]
    assert rates == pytest.approx([0.8] * 6 + [0.08] * 9 + [0.008] * 5, rel=1e-12)
    # after a warm-up, and with another schedule: 4 steps, then a line over 16, from half of all steps on a tenth of it
    config = TrainingConfig(epochs=4, learning_rate=0.8, schedule="linear", warmup=0.2, drops=(0.5,))
    line = [0.2, 0.4, 0.6, 0.8, *(0.8 * left / 16 for left in range(16, 0, -1))]
    expected = [rate * (1 if step < 10 else 0.1) for step, rate in enumerate(line)]
    assert [learning_rate_at(step, 20, config) for step in range(20)] == pytest.approx(expected, rel=1e-12)
    # one within the warm-up counts there too
    config = TrainingConfig(epochs=4, learning_rate=0.8, schedule="constant", warmup=0.2, drops=(0.1,))
    rates = [learning_rate_at(step, 20, config) for step in range(5)]
    assert rates == pytest.approx([0.2, 0.4, 0.06, 0.08, 0.08], rel=1e-12)
    # 30/70 · 70 is not 30 in floating point: epochs 31 and 51 of 70 are the first at a lower rate
    config = TrainingConfig(epochs=70, learning_rate=1.0, schedule="constant", drops=(30 / 70, 50 / 70))
    for updates in (1, 7, 313):
        at = [learning_rate_at(step, 70 * updates, config) for epoch in (30, 50) for step in
              (epoch * updates - 1, epoch * updates)]  # fmt: skip
        assert at == pytest.approx([1, 0.1, 0.1, 0.01], rel=1e-12)


def dropped(rate):
    """`learning_rate_at` without drops, times what they make of it: rate(step, total, drops)."""
    return lambda step, total, config: (
        learning_rate_at(step, total, replace(config, drops=())) * rate(step, total, config.drops)
    )


DROPS = {
    "none": dropped(lambda step, total, drops: 1.0),
    "a step late": dropped(lambda step, total, drops: 0.1 ** sum(step > round(s * total) for s in drops)),
    "a step early": dropped(lambda step, total, drops: 0.1 ** sum(step + 1 >= round(s * total) for s in drops)),
    "rounded down": dropped(lambda step, total, drops: 0.1 ** sum(step >= int(s * total * (1 - 1e-9)) for s in drops)),
    "to a half": dropped(lambda step, total, drops: 0.5 ** sum(step >= round(s * total) for s in drops)),
    "once": dropped(lambda step, total, drops: 0.1 if any(step >= round(s * total) for s in drops) else 1.0),
    "at one step alone": dropped(lambda step, total, drops: 0.1 ** sum(step == round(s * total) for s in drops)),
    "not in the warm-up": lambda step, total, config: learning_rate_at(
        step, total, replace(config, drops=()) if step < config.warmup * total else config
    ),
    "of the steps after the warm-up": dropped(
        lambda step, total, drops: 0.1 ** sum(step >= round(0.2 * total + s * 0.8 * total) for s in drops)
    ),
}


def test_drops():
    check_drops(learning_rate_at)


@pytest.mark.parametrize("mutant", DROPS)
def test_every_wrong_drop_is_caught(mutant):
    with pytest.raises(AssertionError):
        check_drops(DROPS[mutant])


# ---------------------------------------------------------------------------------------------- the optimiser
# names of make_model: 0 linear, 1 BatchNorm, 3 linear
GROUPED = {"no_decay": ("1.*", "0.bias"), "lr_factors": (("3.bias", 0.1), ("*.bias", 0.5))}
DECAYED = {"0.weight": 1, "0.bias": 0, "1.weight": 0, "1.bias": 0, "3.weight": 1, "3.bias": 1}
FACTORS = {"0.weight": 1.0, "0.bias": 0.5, "1.weight": 1.0, "1.bias": 0.5, "3.weight": 1.0, "3.bias": 0.1}


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_optimisers_and_groups_by_their_formulas(optimizer):
    config = TrainingConfig(
        epochs=2,
        learning_rate=0.03,
        momentum=0.8,
        weight_decay=0.2,
        optimizer=optimizer,
        betas=(0.7, 0.95),
        schedule="linear",
        **GROUPED,
    )
    model, twin = make_model(), make_model()
    run(model, config)

    m = {name: torch.zeros_like(leaf) for name, leaf in twin.named_parameters()}
    v = copy.deepcopy(m)
    steps = [batch for epoch in range(2) for batch in batches(epoch)]
    for t, batch in enumerate(steps, 1):
        loss = classification_loss(twin, batch)
        gradients = dict(zip(m, torch.autograd.grad(loss, list(twin.parameters())), strict=True))
        with torch.no_grad():
            for name, leaf in twin.named_parameters():
                g, rate, decay = gradients[name], FACTORS[name] * 0.03 * (1 - (t - 1) / 6), 0.2 * DECAYED[name]
                if optimizer == "adamw":
                    leaf *= 1 - rate * decay
                else:
                    g = g + decay * leaf
                if optimizer == "sgd":
                    m[name] = 0.8 * m[name] + g
                    leaf -= rate * m[name]
                else:
                    m[name], v[name] = 0.7 * m[name] + 0.3 * g, 0.95 * v[name] + 0.05 * g**2
                    leaf -= rate * (m[name] / (1 - 0.7**t)) / ((v[name] / (1 - 0.95**t)).sqrt() + 1e-8)
    for name, leaf in twin.named_parameters():
        assert_close(dict(model.named_parameters())[name], leaf, rtol=1e-9, atol=1e-12)


def test_a_tied_parameter_is_meant_by_each_of_its_names():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    model["head"].weight = model["embedding"].weight
    config = TrainingConfig(epochs=1, no_decay=("head.weight",), lr_factors=(("head.w*", 0.5),), weight_decay=0.1)
    groups = make_optimizer(model, config).param_groups
    assert [(g["weight_decay"], g.get("lr_factor", 1), len(g["params"])) for g in groups] == [
        (0.0, 0.5, 1),
        (0.1, 1, 1),
    ]


def test_the_default_optimiser_is_one_group_of_plain_sgd():
    # a checkpoint of a plain run holds what it has always held
    model = make_model()
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    assert make_optimizer(model, TrainingConfig(epochs=1)).state_dict() == plain.state_dict()


@pytest.mark.parametrize("nesterov", [False, True])
def test_nesterovs_momentum_is_torchs(nesterov):
    config = TrainingConfig(
        epochs=2, learning_rate=0.03, momentum=0.8, nesterov=nesterov, weight_decay=0.2, schedule="constant",
        lr_factors=(("*.bias", 0.5),),
    )  # fmt: skip
    model, twin = make_model(), make_model()
    run(model, config)
    leaves = dict(twin.named_parameters())
    theirs = torch.optim.SGD(
        [
            {"params": [leaf for name, leaf in leaves.items() if not name.endswith("bias")], "lr": 0.03},
            {"params": [leaf for name, leaf in leaves.items() if name.endswith("bias")], "lr": 0.015},
        ],
        momentum=0.8, nesterov=nesterov, weight_decay=0.2,
    )  # fmt: skip
    by_hand = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    v: dict[str, torch.Tensor] = {}
    for batch in [batch for epoch in range(2) for batch in batches(epoch)]:
        theirs.zero_grad()
        classification_loss(twin, batch).backward()
        for name, leaf in leaves.items():  # v ← 0.8 v + g; u = v, or g + 0.8 v
            assert leaf.grad is not None
            g = leaf.grad + 0.2 * by_hand[name]
            v[name] = g if name not in v else 0.8 * v[name] + g
            u = g + 0.8 * v[name] if nesterov else v[name]
            by_hand[name] = by_hand[name] - (0.015 if name.endswith("bias") else 0.03) * u
        theirs.step()
    for name, leaf in model.named_parameters():
        assert_close(leaf, leaves[name], rtol=1e-9, atol=1e-12)
        assert_close(leaf.detach(), by_hand[name], rtol=1e-9, atol=1e-12)


def test_nesterovs_momentum_is_another_training():
    ends = []
    for nesterov in (False, True):
        model = make_model()
        run(model, TrainingConfig(epochs=1, nesterov=nesterov))
        ends.append(model[0].weight.detach())
    assert (ends[0] - ends[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "lion"}, r"TrainingConfig: `optimizer` must be one of 'sgd', 'adam', 'adamw', got 'lion'"),
        ({"schedule": "step"}, r"TrainingConfig: `schedule` must be one of 'cosine', .*, 'inverse_sqrt', got 'step'"),
        ({"precision": "bf16"}, r"TrainingConfig: `precision` must be one of 'float32', 'bfloat16', got 'bf16'"),
        ({"epochs": 0}, r"TrainingConfig: `epochs` must be a whole number, 1 or more, got 0"),
        ({"warmup": 2.0}, r"TrainingConfig: `warmup` must lie in \[0, 1\], got 2.0"),
    ],
)
def test_unknown_choices(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**({"epochs": 1} | options))


# ---------------------------------------------------------------------------------------------- the loop
@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_training_is_sgd_with_momentum_and_weight_decay(clip_norm):
    config = TrainingConfig(
        epochs=2, learning_rate=0.3, momentum=0.8, weight_decay=0.01, warmup=0.2, clip_norm=clip_norm
    )
    model, twin = make_model(), make_model()
    result = run(model, config)

    velocity = {name: torch.zeros_like(leaf) for name, leaf in twin.named_parameters()}
    losses, step = [], 0
    for epoch in range(2):
        losses.append([])
        for batch in batches(epoch):
            loss = classification_loss(twin, batch)
            losses[-1].append(loss.item())
            gradient = dict(zip(velocity, torch.autograd.grad(loss, list(twin.parameters())), strict=True))
            length = math.sqrt(sum(float((g**2).sum()) for g in gradient.values()))
            # torch's clip_grad_norm_ adds 1e-6 to the norm it divides by
            factor = 1.0 if clip_norm is None else min(1.0, clip_norm / (length + 1e-6))
            # the first of six steps is warm-up, the other five are the cosine
            rate = 0.3 if step == 0 else 0.15 * (1 + math.cos(math.pi * (step - 1) / 5))
            with torch.no_grad():
                for name, leaf in twin.named_parameters():
                    velocity[name] = 0.8 * velocity[name] + factor * gradient[name] + 0.01 * leaf
                    leaf -= rate * velocity[name]
            step += 1

    assert_close(model.state_dict(), twin.state_dict(), rtol=1e-9, atol=1e-12)
    assert [epoch["epoch"] for epoch in result.history] == [1, 2]
    means = [sum(epoch) / STEPS for epoch in losses]
    assert [epoch["train_loss"] for epoch in result.history] == pytest.approx(means, rel=1e-9)
    assert result.history[-1]["test_loss"] == pytest.approx(evaluate(twin)["test_loss"], rel=1e-9)
    assert result.seconds == sum(epoch["seconds"] for epoch in result.history) > 0
    assert not result.diverged


def test_epochs_are_reported_as_they_end():
    seen = []
    result = run(make_model(), TrainingConfig(epochs=3), on_epoch=lambda entry: seen.append(dict(entry)))
    assert seen == result.history


def test_the_model_trains_in_training_mode_and_in_the_layout_asked_for():
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).eval()
    x, y = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 2])

    def loss_fn(model, batch):
        assert model.training
        return classification_loss(model, batch)

    config = TrainingConfig(epochs=1, channels_last=True)
    run(model, config, loss_fn=loss_fn, train_batches=lambda _: [(x, y)], evaluate=lambda _: {}, steps_per_epoch=1)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_is_the_arithmetic_not_the_parameters():
    model = make_model().float()
    seen = []

    def loss_fn(model, batch):
        logits = model(batch[0].float())
        seen.append(logits.dtype)
        return nn.functional.cross_entropy(logits, batch[1])

    def evaluate(model):
        seen.append(model(torch.ones(2, 5, dtype=torch.float32)).dtype)
        return {}

    result = run(model, TrainingConfig(epochs=2, precision="bfloat16"), loss_fn=loss_fn, evaluate=evaluate)
    assert set(seen) == {torch.bfloat16}
    assert {leaf.dtype for leaf in model.parameters()} == {torch.float32}
    assert not result.diverged


# ---------------------------------------------------------------------------------------------- resuming
@pytest.mark.parametrize("stopped_in", [1, 2])
@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw", **GROUPED}], ids=["sgd", "adamw, groups"])
def test_a_resumed_run_is_bit_identical(tmp_path, stopped_in, options):
    config = TrainingConfig(epochs=4, learning_rate=0.2, warmup=0.2, clip_norm=1.0, **options)
    whole = make_model()
    expected = run(whole, config)

    def failing(epoch):
        for step, batch in enumerate(batches(epoch)):
            if (epoch, step) == (stopped_in, 1):
                raise KeyboardInterrupt
            yield batch

    path = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        run(make_model(), config, train_batches=failing, checkpoint=path)
    assert path.exists()
    begun, seen = [], make_model()
    result = run(seen, config, checkpoint=path, train_batches=lambda epoch: begun.append(epoch) or batches(epoch))

    assert begun == list(range(stopped_in, 4))  # the finished epochs are not run again
    assert numbers(result.history) == numbers(expected.history)
    for name, leaf in whole.state_dict().items():
        assert torch.equal(seen.state_dict()[name], leaf)
    assert list(tmp_path.iterdir()) == []  # a finished run needs no checkpoint


def test_a_resumed_run_drops_the_units_that_it_would_have_dropped(tmp_path):
    def dropping():
        return make_model().insert(3, nn.Dropout(0.5))

    def failing(epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        return batches(epoch)

    config, path = TrainingConfig(epochs=3), tmp_path / "state.pt"
    torch.manual_seed(0)
    expected = run(dropping(), config)
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        run(dropping(), config, train_batches=failing, checkpoint=path)
    torch.manual_seed(1)  # another process
    assert numbers(run(dropping(), config, checkpoint=path).history) == numbers(expected.history)


def test_a_run_goes_on_with_fewer_gpus_than_it_was_begun_on(tmp_path, monkeypatch):
    def failing(epoch):
        if epoch == 1:
            raise KeyboardInterrupt
        return batches(epoch)

    config, path = TrainingConfig(epochs=2), tmp_path / "state.pt"
    states = [torch.tensor([number], dtype=torch.uint8) for number in (1, 2)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    with pytest.raises(KeyboardInterrupt):
        run(make_model(), config, train_batches=failing, checkpoint=path)
    told = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", told.extend)
    assert len(run(make_model(), config, checkpoint=path).history) == 2
    assert told == states[:1]


@pytest.mark.parametrize("change", [{"momentum": 0.5}, {"epochs": 5}, {"no_decay": ("*bias",)}], ids=str)
def test_a_checkpoint_of_another_recipe_is_refused_and_kept(tmp_path, change):
    config, path = TrainingConfig(epochs=4), tmp_path / "state.pt"

    def failing(epoch):
        if epoch == 1:
            raise KeyboardInterrupt
        return batches(epoch)

    with pytest.raises(KeyboardInterrupt):
        run(make_model(), config, train_batches=failing, checkpoint=path)
    kept = path.read_bytes()
    message = rf"must be a checkpoint of the same recipe, got other values of {next(iter(change))}\. Delete it"
    with pytest.raises(OSError, match=message):
        run(make_model(), replace(config, **change), checkpoint=path)
    assert path.read_bytes() == kept


def test_an_epoch_without_a_batch_is_named():
    with pytest.raises(ValueError, match="`train_batches` must give batches, got none in epoch 1"):
        run(make_model(), TrainingConfig(epochs=2), train_batches=lambda epoch: batches(epoch) if epoch == 0 else [])


@pytest.mark.parametrize("name", ["no_decay", "lr_factors", "drops"])
def test_a_string_is_no_tuple_of_patterns(name):
    with pytest.raises(TypeError, match=rf"TrainingConfig: `{name}` must be a tuple, got the string '\*\.bias'"):
        TrainingConfig(epochs=1, **{name: "*.bias"})


def test_a_checkpoint_cut_off_while_written_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    save = torch.save
    saved = []

    def fail_second(state, file):
        saved.append(file)
        if len(saved) == 2:
            file.write_bytes(b"half a file")
            raise OSError("disk full")
        save(state, file)

    config = TrainingConfig(epochs=4)
    expected = run(make_model(), config)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail_second)
        with pytest.raises(OSError, match="disk full"):
            run(make_model(), config, checkpoint=path)
    assert numbers(run(make_model(), config, checkpoint=path).history) == numbers(expected.history)


# ---------------------------------------------------------------------------------------------- divergence, metrics
def test_divergence_is_a_result(tmp_path):
    factors = iter([1.0, 1.0, 1.0, 1.0, math.inf, 1.0])  # the fifth step is in the second epoch

    def loss_fn(model, batch):
        return next(factors) * classification_loss(model, batch)

    result = run(make_model(), TrainingConfig(epochs=4), loss_fn=loss_fn, checkpoint=tmp_path / "state.pt")
    assert result.diverged
    assert len(result.history) == 2  # the epochs that are left do not run
    assert math.isfinite(result.history[0]["train_loss"])
    assert not math.isfinite(result.history[1]["train_loss"])


def test_a_bound_on_the_training_loss():
    losses = [epoch["train_loss"] for epoch in run(make_model(), TrainingConfig(epochs=4)).history]
    above = run(make_model(), TrainingConfig(epochs=4, diverged_above=losses[0] - 1e-9))
    assert above.diverged
    assert len(above.history) == 1
    at = run(make_model(), TrainingConfig(epochs=4, diverged_above=max(losses)))
    assert not at.diverged
    assert len(at.history) == 4


def check_metrics(classification_metrics) -> None:
    # logits are the inputs; batches of 2 and 1, so that a mean of means differs from the mean
    class Identity(nn.Identity):
        def forward(self, x):
            assert not self.training
            return super().forward(x)

    three, zero = math.log(3), 0.0
    given = [
        (torch.tensor([[three, zero], [three, zero]]), torch.tensor([0, 0])),  # −ln ¾ each, both right
        (torch.tensor([[three, zero]]), torch.tensor([1])),  # −ln ¼, wrong
    ]
    model = Identity().train()
    metrics = classification_metrics(model, given)
    # `float()` of the logits is single precision, hence 1e-6
    assert metrics["test_loss"] == pytest.approx((2 * math.log(4 / 3) + math.log(4)) / 3, rel=1e-6)
    assert metrics["test_accuracy"] == pytest.approx(2 / 3, rel=1e-12)
    assert model.training
    classification_metrics(model.eval(), given)
    assert not model.training


def mean_of_means(model, given):
    each = [classification_metrics(model, [batch]) for batch in given]
    return {key: sum(metrics[key] for metrics in each) / len(each) for key in each[0]}


def left_in_evaluation(model, given):
    return classification_metrics(model.eval(), given)


def in_training_mode(model, given):
    model.train()
    given = [(model(x), y) for x, y in given]
    return classification_metrics(model, given)


def test_metrics():
    check_metrics(classification_metrics)


@pytest.mark.parametrize("mutant", [mean_of_means, left_in_evaluation, in_training_mode])
def test_every_wrong_metric_is_caught(mutant):
    with pytest.raises(AssertionError):
        check_metrics(mutant)


def test_evaluation_leaves_no_gradient_and_no_statistics_behind():
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    evaluate(model)
    assert all(torch.equal(leaf, before[name]) for name, leaf in model.state_dict().items())
    assert all(leaf.grad is None for leaf in model.parameters())
