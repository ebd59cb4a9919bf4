"""`batch_norm="carried"`: running statistics along each training, in held-out losses and in the meta-gradient.

All of it by hand in `tests/normalised.py`; invariants 13, 14 and 20 of the specification of DIMAML, section 9.
"""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from common.batchnorm import fresh_statistics
from common.functional import parameters_of, pure_loss, tracking_loss
from common.networks import Autoencoder, reconstruction_loss
from common.optimizers import sgd
from common.unroll import training_step
from papers.dimaml import InitDistribution, algorithm, dimaml, objective
from tests.mutation import fails, mutated
from tests.normalised import Normalised, batch, by_hand
from tests.papers.models import assert_same_state, mlp, state_of

QUIET = {"progress": False}
INNER = sgd(0.4, momentum=0.6)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def model_with_statistics():
    """Whose own statistics, of some earlier training, are no part of it."""
    model = Normalised()
    for name, buffer in model.named_buffers():
        buffer.fill_(7 if "var" in name else 3)
    return model


def fresh(model):
    return {
        name: torch.ones_like(leaf) if name.endswith("var") else torch.zeros_like(leaf)
        for name, leaf in model.named_buffers()
        if leaf.is_floating_point()
    }


def auc_by_hand(theta, S, train, held_out, *, first_order=False):
    """L_auc, the last held-out loss and the training losses, in one graph of everything."""
    velocity, terms, trained = None, {}, []
    for t in range(len(train) + 1):
        if t in held_out:
            terms[t] = by_hand(theta, S, *held_out[t], training=False)[0]
        if t < len(train):
            L, S = by_hand(theta, S, *train[t], training=True, k=t)
            trained.append(L.detach())
            g = torch.autograd.grad(L, list(theta.values()), create_graph=True)
            g = {name: leaf.detach() if first_order else leaf for name, leaf in zip(theta, g, strict=True)}
            velocity = g if velocity is None else {name: 0.6 * velocity[name] + g[name] for name in g}
            theta = {name: theta[name] - 0.4 * velocity[name] for name in g}
    return sum(terms.values()) / len(terms), terms[max(terms)], sum(trained) / len(trained)


def batches():
    return [batch(k) for k in range(5)], {2: batch(20, size=4), 5: batch(21, size=4)}


# ------------------------------------------------------------------------------- L_auc
def auc(m, theta0, model, **options):
    step = training_step(tracking_loss(model, order=2), INNER)
    held_out = pure_loss(model, batch_norm="running", order=2)
    return m.loss_auc(theta0, step, held_out, *batches(), statistics=fresh_statistics(model), **options)


def check_auc(m):
    model = model_with_statistics()
    theta0 = {name: leaf.requires_grad_() for name, leaf in parameters_of(model).items()}
    L = auc(m, theta0, model)
    expected = auc_by_hand(theta0, fresh(model), *batches())[0]
    assert_close(L, expected, rtol=1e-12, atol=0)
    leaves = list(theta0.values())
    assert_close(torch.autograd.grad(L, leaves), torch.autograd.grad(expected, leaves), rtol=1e-8, atol=1e-11)


def test_the_area_is_that_of_a_naive_unroll():
    check_auc(objective)


def test_neither_the_interval_nor_the_memory_changes_a_bit():  # invariant 3
    model, results = model_with_statistics(), []
    for options in ({}, {"checkpoint_every": 1}, {"checkpoint_every": 3}, {"checkpoint_every": 4, "keep_on_cpu": True}):
        theta0 = {name: leaf.requires_grad_() for name, leaf in parameters_of(model).items()}
        L = auc(objective, theta0, model, **options)
        results.append([L.detach(), *torch.autograd.grad(L, list(theta0.values()))])
    for other in results[1:]:
        assert_close(other, results[0], rtol=0, atol=0)


def check_finite_differences(m):
    # invariants 2 and 13: through the laws, draws and batches frozen
    model = model_with_statistics()
    laws = InitDistribution.from_model(model)
    d = m.meta_gradient(laws, model, partial(auc, m, model=model), seeded())[1]
    generator = seeded(5)
    way = {name: torch.randn(leaf.shape, generator=generator) for name, leaf in laws.parameters().items()}

    def at(h):
        moved = laws.with_parameters({name: leaf + h * way[name] for name, leaf in laws.parameters().items()})
        return auc(m, parameters_of(model) | moved.sample(model, seeded()), model)

    with torch.no_grad():
        expected = (at(1e-6) - at(-1e-6)) / 2e-6
    assert_close(sum((d[name] * way[name]).sum() for name in d), expected, rtol=1e-6, atol=1e-8)


def test_finite_differences():
    check_finite_differences(objective)


def test_rows_are_each_by_themselves():
    model = model_with_statistics()
    thetas = [{name: leaf + 0.1 * k for name, leaf in parameters_of(model).items()} for k in range(3)]
    S = [
        {name: leaf + k if leaf.is_floating_point() else leaf for name, leaf in fresh_statistics(model).items()}
        for k in range(3)
    ]
    stack = lambda trees: {
        n: torch.stack([t[n] for t in trees]) if trees[0][n].is_floating_point() else trees[0][n] for n in trees[0]
    }
    batches = [batch(k) for k in range(3)]
    loss, evaluate = tracking_loss(model), pure_loss(model, batch_norm="running")
    for shared in (False, True):
        x = batches[0] if shared else objective.stack_batches(batches)
        values, after = objective.losses_of_rows(loss, shared=shared, tracking=True)(
            stack(thetas), x, statistics=stack(S)
        )
        alone = [loss(thetas[k], batches[0 if shared else k], statistics=S[k]) for k in range(3)]
        assert_close(values, torch.stack([value for value, _ in alone]))
        assert_close(after, stack([statistics for _, statistics in alone]))
        held_out = objective.losses_of_rows(evaluate, shared=shared)(stack(thetas), x, statistics=after)
        alone = [evaluate(thetas[k], batches[0 if shared else k], statistics=alone[k][1]) for k in range(3)]
        assert_close(held_out, torch.stack(alone))
    rows = objective.stack_statistics(S[1], 2)
    assert_close(rows["twice.running_mean"], torch.ones(2, 4))
    assert rows["twice.num_batches_tracked"].ndim == 0


# ------------------------------------------------------------------------------- the loop
def sampler(generator):
    x = torch.randn(7, 6, 3, generator=generator) + 1
    batches = [(part, torch.arange(6) % 3) for part in x]
    return batches[:5], batches[5:]


def run(m, model, **options):
    told = {"task_sampler": sampler, "meta_steps": 2, "meta_lr": 0.0, "batch_norm": "carried", "generator": seeded()}
    return m.dimaml(model, inner=INNER, inner_steps=5, eval_every=3, first_evaluation=2, **(told | QUIET | options))


def check_loop(m, **options):
    # laws that do not move: every draw of two meta-steps starts from fresh statistics
    told = {"tasks": 2, "draws": 2} | options
    model, generator = model_with_statistics(), seeded()
    laws = InitDistribution.from_model(model)
    for entry in run(m, model, **told).history:
        psi = {name: leaf.clone().requires_grad_() for name, leaf in laws.parameters().items()}
        found, total = [], 0.0
        for _ in range(told["tasks"]):
            torch.randint(2**31, (), generator=generator)
            train, held_out = sampler(generator)
            for _ in range(told["draws"]):
                torch.randint(2**31, (), generator=generator)
                theta0 = parameters_of(model) | laws.with_parameters(psi).sample(model, generator)
                numbers = auc_by_hand(
                    {name: leaf if leaf.requires_grad else leaf.requires_grad_() for name, leaf in theta0.items()},
                    fresh(model), train, dict(zip((2, 5), held_out, strict=True)),
                    first_order=told.get("first_order", False),
                )  # fmt: skip
                total = total + numbers[0]
                found.append([value.item() for value in numbers])
        count = len(found)
        G = torch.autograd.grad(total / count, list(psi.values()))
        loss, last, trained = (sum(column) / count for column in zip(*found, strict=True))
        assert_close(entry["loss"], loss, rtol=1e-10, atol=0)
        assert_close(entry["last_loss"], last, rtol=1e-10, atol=0)
        assert_close(entry["train_loss"], trained, rtol=1e-10, atol=0)
        assert_close(entry["gradient_norm"], torch.cat([g.flatten() for g in G]).norm().item(), rtol=1e-7, atol=0)


def check_side_by_side(m):
    check_loop(m, vmap=True)
    check_loop(m, vmap=True, tasks=1)


@pytest.mark.parametrize("vmap", [False, True])
@pytest.mark.parametrize("first_order", [False, True])
def test_the_loop_is_that_of_naive_unrolls(vmap, first_order):
    check_loop(algorithm, vmap=vmap, first_order=first_order)


def test_one_task_side_by_side():
    check_side_by_side(algorithm)


def test_nothing_of_the_model_changes_or_counts():  # invariants 13 and 14
    model, other = model_with_statistics(), model_with_statistics()
    other.load_state_dict(model.state_dict())
    other.twice.running_var.fill_(0.5)
    for vmap in (False, True):
        before = state_of(model)
        results = [run(algorithm, each, meta_lr=0.1, vmap=vmap) for each in (model, other)]
        assert_same_state(model, before)
        assert results[0].history == results[1].history


def test_another_objective_than_with_batch_statistics():
    model = model_with_statistics()
    losses = {
        mode: run(algorithm, model, batch_norm=mode).history[0]["loss"] for mode in ("batch", "running", "carried")
    }
    assert len(set(losses.values())) == 3


def test_a_model_without_batch_norm_has_one_objective():
    model = mlp(3, 5, 3)
    for vmap in (False, True):
        runs = [run(algorithm, model, batch_norm=mode, meta_lr=0.1, vmap=vmap) for mode in ("batch", "carried")]
        assert runs[0].history == runs[1].history


def test_held_out_batches_of_one_example():
    # which have no statistics of their own
    one = lambda generator: (sampler(generator)[0], [(x[:1], y[:1]) for x, y in sampler(generator)[1]])
    with pytest.raises(ValueError, match=r"[Mm]ore than (1|one) value"):
        run(algorithm, Normalised(), task_sampler=one, batch_norm="batch")
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    history = run(algorithm, model, task_sampler=one).history
    assert math.isfinite(history[0]["gradient_norm"])


@pytest.mark.parametrize("vmap", [False, True])
def test_resumption(tmp_path, vmap):
    model = model_with_statistics()
    expected = run(algorithm, model, meta_steps=4, meta_lr=0.1, vmap=vmap)
    for steps in (2, 4):
        result = run(algorithm, model, meta_steps=steps, meta_lr=0.1, vmap=vmap, checkpoint=tmp_path / "state")
    assert result.history == expected.history
    assert_close(result.parameters(), expected.parameters(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"must be of the same run, but `batch_norm` differs: 'carried' there and 'ba"):
        run(algorithm, model, meta_steps=4, meta_lr=0.1, vmap=vmap, checkpoint=tmp_path / "state", batch_norm="batch")


@pytest.mark.parametrize("options", [{"truncate": 2}, {"clip_adjoint": 1e-3}, {"keep_every": 2}, {"antithetic": True}])
def test_other_options_beside_it(options):
    plain, other = (run(algorithm, model_with_statistics_of(1), **more).history[0] for more in ({}, options))
    assert (other["loss"] == plain["loss"]) == ("antithetic" not in options)
    assert (other["gradient_norm"] == plain["gradient_norm"]) == ("keep_every" in options)


def model_with_statistics_of(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_with_statistics()


def test_the_papers_auto_encoder():
    x = torch.randn(6, 4, 3, 32, 32, generator=seeded())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Autoencoder(32, width=2, code=3)
    runs = [
        dimaml(
            model, reconstruction_loss, [(list(x[:4]), list(x[4:]))], inner_steps=4, eval_every=2, meta_steps=2,
            meta_lr=1e-2, draws=2, batch_norm="carried", vmap=vmap, **QUIET,
        )
        for vmap in (False, True)
    ]  # fmt: skip
    assert_close(runs[0].parameters(), runs[1].parameters(), rtol=1e-6, atol=1e-9)
    assert runs[0].history[0]["gradient_norm"] > 0


# ------------------------------------------------------------------------------- mutants
AUC = {
    "statistics before the first step": ('{"statistics": state["statistics"]}', '{"statistics": statistics}'),
    "statistics as constants": (
        '{"statistics": state["statistics"]}', '{"statistics": tree_map(Tensor.detach, state["statistics"])}'
    ),
    "evaluated a step early": ("outer = {t: term", "outer = {t - 1: term"),
}  # fmt: skip
OWN = "=dict(fresh_statistics.__globals__['running_statistics'](model)))"
ROWS = "None if self.statistics is None else stack_statistics(self.statistics, len(rows))"
LOOP = {
    "the model's statistics": (check_loop, "=fresh_statistics(model))", OWN),
    "not carried side by side": (check_side_by_side, ROWS, "None"),
    "not carried in turn": (check_loop, "statistics=self.statistics,\n", "statistics=None,\n"),
    "evaluated in batch statistics": (check_loop, '"carried": ("batch", "running")', '"carried": ("batch", "batch")'),
    "first order where none is asked for": (
        check_side_by_side, "seeds[0], first_order=self.first_order", "seeds[0], first_order=True"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new"), AUC.values(), ids=AUC)
def test_every_mutant_of_the_area_is_caught(old, new):
    assert fails(check_auc, mutated(objective, old, new))


@pytest.mark.parametrize(("check", "old", "new"), LOOP.values(), ids=LOOP)
def test_every_mutant_of_the_loop_is_caught(check, old, new):
    assert fails(check, mutated(algorithm, old, new))
