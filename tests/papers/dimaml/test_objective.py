"""L_auc and its meta-gradient: a naive unroll of everything, finite differences, closed forms; mutants that must die.

Numbers of invariants are those of the specification of DIMAML, section 9.
"""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from common.functional import parameters_of, pure_loss
from common.optimizers import adam, adamw, rmsprop, sgd
from common.types import NotFiniteError
from common.unroll import seed_of_step, training_step
from papers.dimaml import InitDistribution, Normal
from papers.dimaml import objective as module
from tests.mutation import mutated, survives
from tests.papers.models import assert_same_state, state_of
from tests.papers.networks import images, make, sequences

OPTIMIZERS = {
    "sgd": lambda: sgd(0.2),
    "momentum, decay": lambda: sgd(0.2, momentum=0.7, weight_decay=0.1),
    "nesterov": lambda: sgd(0.2, momentum=0.7, nesterov=True),
    "adam": lambda: adam(0.05, betas=(0.7, 0.9), eps=1e-3),
    "adamw": lambda: adamw(0.05, betas=(0.7, 0.9), eps=1e-3, weight_decay=0.3),
    "rmsprop": lambda: rmsprop(0.02, alpha=0.8, momentum=0.5, eps=1e-3),
}


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------- a problem, and all of it by hand
class Problem:
    """Laws of a small network, its training for N steps, held-out batches at a few of them."""

    def __init__(self, family="normal", optimizer="sgd", network="plain", N=3, V=(1, 3), dropout=False, **options):
        self.model, _ = make(network)
        if dropout:
            self.model = nn.Sequential(*self.model[:5], nn.Dropout(0.4), *self.model[5:])
        batches = sequences if network == "tied" else images
        self.train = [batches(seed, size=6) for seed in range(N)]
        self.validation = {t: batches(100 + t) for t in V}
        self.laws = InitDistribution.from_model(self.model, family, pieces=4)
        self.optimizer = OPTIMIZERS[optimizer]()
        self.train_loss = pure_loss(self.model, seed=0)
        self.loss = pure_loss(self.model)
        self.step = training_step(self.train_loss, self.optimizer, seed=11, **options)

    def objective(self, m, **options):
        return partial(
            m.loss_auc, step=self.step, loss=self.loss, train=self.train, validation=self.validation, **options
        )

    def ours(self, m, laws=None, *, antithetic=False, **options):
        laws = self.laws if laws is None else laws
        return m.meta_gradient(laws, self.model, self.objective(m, **options), seeded(), antithetic=antithetic)

    def drawn_by_hand(self, psi, *, mirrored=False):
        """θ = μ + σ z, or Q(u) knot by knot: nothing of the modules under test, and none of PLIF's."""
        generator, theta = seeded(), parameters_of(self.model)
        for name, own in theta.items():
            if f"{name}.mean" in psi:
                z = torch.randn(own.shape, generator=generator)
                theta[name] = psi[f"{name}.mean"] + psi[f"{name}.std"] * (-z if mirrored else z)
            elif f"{name}.bias" in psi:
                u = torch.rand(own.shape, generator=generator)
                x = 4 * (1 - u if mirrored else u)
                v, b, r = (psi[f"{name}.{field}"] for field in ("increments", "bias", "scale"))
                PL = b
                for k in range(4):  # each piece adds what of it lies below x
                    PL = PL + (1 + v[k].exp()).log() * (x - k).clamp(0, 1)
                theta[name] = (1 + r.exp()).log() * PL
        return theta

    def by_hand(self, *, mirrored=False):
        """One graph of everything."""
        psi = {name: leaf.clone().requires_grad_() for name, leaf in self.laws.parameters().items()}
        theta = self.drawn_by_hand(psi, mirrored=mirrored)
        inner, terms = self.optimizer.init(theta), []
        for t in range(len(self.train) + 1):
            if t in self.validation:
                terms.append(self.loss(theta, self.validation[t]))
            if t < len(self.train):
                g = torch.func.grad(partial(self.train_loss, seed=seed_of_step(11, t)))(theta, self.train[t])
                theta, inner = self.optimizer.update(theta, g, inner)
        L = sum(terms) / len(terms)
        return L.detach(), dict(zip(psi, torch.autograd.grad(L, list(psi.values())), strict=True))


def compare(m, *arguments, **options):
    problem = Problem(*arguments, **options)
    L, d = problem.ours(m)
    expected, slopes = problem.by_hand()
    assert_close(L, expected, rtol=1e-11, atol=0)
    assert not L.requires_grad
    assert_close(d, slopes, rtol=1e-8, atol=1e-12)


# ------------------------------------------------------------------------------- the meta-gradient (invariants 1, 2, 3)
def check_naive_unroll(m):
    compare(m, "normal", "momentum, decay", N=4, V=(0, 1, 4))
    compare(m, "plif", "adam", N=2, V=(2,))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("family", ["normal", "plif"])
def test_the_meta_gradient_is_that_of_a_naive_unroll(family, optimizer):
    compare(module, family, optimizer)


@pytest.mark.parametrize("network", ["batch norm", "layer norm", "tied"])
@pytest.mark.parametrize("family", ["normal", "plif"])
def test_it_is_so_for_norms_and_ties(family, network):
    compare(module, family, "momentum, decay", network)


def test_it_is_so_with_dropout():  # 12: the same masks on the way back
    compare(module, "normal", "adam", dropout=True)
    assert_close(Problem(dropout=True).ours(module), Problem(dropout=True).ours(module), rtol=0, atol=0)
    other = Problem(dropout=True)
    other.step = training_step(other.train_loss, other.optimizer, seed=12)
    assert abs(other.ours(module)[0] - Problem(dropout=True).ours(module)[0]) > 1e-4  # there are masks


def check_finite_differences(m, cases=(("normal", "adam", "batch norm"), ("plif", "momentum, decay", "layer norm"))):
    # invariant 2: noise, batches and dropout frozen; central differences are off by h² of a third derivative
    for family, optimizer, network in cases:
        problem = Problem(family, optimizer, network, dropout=network == "batch norm")
        _, d = problem.ours(m)
        psi = problem.laws.parameters()
        generator = seeded(5)
        way = {name: torch.randn(leaf.shape, generator=generator) for name, leaf in psi.items()}
        at = lambda h: problem.objective(m)(
            parameters_of(problem.model)
            | problem.laws.with_parameters({name: leaf + h * way[name] for name, leaf in psi.items()}).sample(
                problem.model, seeded()
            )
        )
        h = 1e-6
        with torch.no_grad():
            expected = (at(h) - at(-h)) / (2 * h)
        got = sum((d[name] * way[name]).sum() for name in d)
        assert_close(got, expected, rtol=1e-6, atol=1e-8)


def test_finite_differences():
    check_finite_differences(module)


def test_neither_the_interval_nor_a_repetition_changes_a_bit():  # invariant 3
    problem = Problem("plif", "adam", "batch norm", N=5, V=(2, 5), dropout=True)
    results = [problem.ours(module, checkpoint_every=m) for m in (None, None, 1, 2, 3, 5, 9)]
    for result in results[1:]:
        assert_close(result, results[0], rtol=0, atol=0)


# ------------------------------------------------------------------------------- closed forms (invariants 4, 15, 17)
A = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)


def quadratic(m, *, lr, N, V, first_order=False, antithetic=False):
    """½ Σ a_i w_i² by SGD, held out c_t Σ w_i: w_t = (1 − lr a)^t w_0, with w_0 = μ + σ z."""
    model = nn.Linear(3, 1, bias=False)
    laws = InitDistribution({"weight": Normal(torch.tensor(0.7), torch.tensor(0.3))})
    loss = lambda theta, scale: scale / 2 * (A * theta["weight"] ** 2).sum()
    held_out = lambda theta, c: c * theta["weight"].sum()
    step = training_step(loss, sgd(lr), first_order=first_order)
    objective = partial(m.loss_auc, step=step, loss=held_out, train=[1.0] * N, validation=V)
    generator = seeded()
    z = torch.randn((1, 3), generator=seeded())[0]
    L, d = m.meta_gradient(laws, model, objective, generator, antithetic=antithetic)
    return L, d, z


def check_closed_form(m):
    for N, V in ((0, {0: 2.0}), (3, {3: 1.0}), (4, {1: 1.0, 2: -3.0, 4: 0.5}), (4, {0: 1.0, 4: 1.0})):
        L, d, z = quadratic(m, lr=0.3, N=N, V=V)
        weight = sum(c * (1 - 0.3 * A) ** t for t, c in V.items()) / len(V)
        assert_close(L, (weight * (0.7 + 0.3 * z)).sum())
        assert_close(d, {"weight.mean": weight.sum(), "weight.std": (weight * z).sum()})


def test_closed_form():
    check_closed_form(module)


def check_nothing_is_learned(m):
    # invariant 4: no step, or steps of length 0, leave the loss of θ₀ under the held-out batches
    for options in ({"N": 0, "V": (0,)}, {"N": 4, "V": (1, 2, 4)}):
        problem = Problem("plif", **options)
        problem.optimizer = sgd(0.0)
        problem.step = training_step(problem.train_loss, problem.optimizer, seed=11)
        L, d = problem.ours(m)
        psi = {name: leaf.clone().requires_grad_() for name, leaf in problem.laws.parameters().items()}
        theta = problem.drawn_by_hand(psi)
        expected = sum(problem.loss(theta, batch) for batch in problem.validation.values()) / len(problem.validation)
        assert_close(L, expected.detach(), rtol=1e-11, atol=0)
        slopes = torch.autograd.grad(expected, list(psi.values()))
        assert_close(d, dict(zip(psi, slopes, strict=True)), rtol=1e-8, atol=1e-12)


def test_no_step_and_no_learning_rate():
    check_nothing_is_learned(module)


def check_mean_of_scheduled_steps(m):
    # invariant 15: the mean of unrolls that are evaluated once each; another order of batches changes their terms alone
    problem = Problem("normal", "adam", N=4, V=(1, 2, 4))
    theta0 = parameters_of(problem.model)
    L = problem.objective(m)(theta0)
    alone = lambda t, batch: m.loss_auc(theta0, problem.step, problem.loss, problem.train, {t: batch})
    assert_close(L, sum(alone(t, batch) for t, batch in problem.validation.items()) / 3)
    a, b, c = problem.validation.values()
    problem.validation = {1: b, 2: a, 4: c}
    assert_close(problem.objective(m)(theta0) - L, (alone(1, b) - alone(1, a) + alone(2, a) - alone(2, b)) / 3)
    assert_close(m.loss_auc(theta0, problem.step, problem.loss, [], {0: a}), problem.loss(theta0, a))
    problem.validation = {4: a}
    now = problem.step.init(theta0)
    for batch in problem.train:
        now = problem.step(now, batch)
    assert_close(problem.objective(m)(theta0), problem.loss(now["params"], a))


def test_the_mean_of_the_scheduled_steps():
    check_mean_of_scheduled_steps(module)


def test_first_order_is_the_whole_gradient_of_a_linear_loss_and_of_no_other():  # invariant 17
    model = nn.Linear(3, 1, bias=False)
    laws = InitDistribution({"weight": Normal(0.7, 0.3)})
    linear = lambda theta, x: (theta["weight"] * x).sum()
    held_out = lambda theta, y: (theta["weight"] ** 2 * y).sum()
    results = []
    for first_order in (True, False):
        step = training_step(linear, sgd(0.3, momentum=0.5, weight_decay=0.1), first_order=first_order)
        objective = partial(module.loss_auc, step=step, loss=held_out, train=[A, 2 * A, A], validation={2: 1.0, 3: A})
        results.append(module.meta_gradient(laws, model, objective, seeded()))
    assert_close(*results, rtol=1e-12, atol=0)
    # of SGD on a quadratic the Jacobian without its Hessian is 1
    L, d, z = quadratic(module, lr=0.3, N=3, V={3: 1.0}, first_order=True)
    assert_close(L, ((1 - 0.3 * A) ** 3 * (0.7 + 0.3 * z)).sum())
    assert_close(d, {"weight.mean": torch.tensor(3.0), "weight.std": z.sum()})


def check_antithetic(m):
    problem = Problem("plif", "momentum, decay")
    L, d = problem.ours(m, antithetic=True)
    pair = [problem.by_hand(mirrored=mirrored) for mirrored in (False, True)]
    assert_close(L, (pair[0][0] + pair[1][0]) / 2, rtol=1e-11, atol=0)
    assert_close(d, {name: (pair[0][1][name] + pair[1][1][name]) / 2 for name in d}, rtol=1e-8, atol=1e-12)
    # of a loss linear in θ₀ nothing of the noise is left
    weight = ((1 - 0.3 * A) ** 2).sum()
    L, d, _ = quadratic(m, lr=0.3, N=2, V={2: 1.0}, antithetic=True)
    assert_close(L, 0.7 * weight)
    assert_close(d, {"weight.mean": weight, "weight.std": torch.tensor(0.0)})


def test_antithetic_pairs():
    check_antithetic(module)


def test_the_generator_goes_on_as_after_one_draw():
    problem = Problem()
    generators = [seeded(), seeded(), seeded()]
    for generator, antithetic in zip(generators, (False, True), strict=False):
        module.meta_gradient(problem.laws, problem.model, problem.objective(module), generator, antithetic=antithetic)
    problem.laws.sample(problem.model, generators[2])
    assert all(torch.equal(g.get_state(), generators[2].get_state()) for g in generators)
    assert not torch.equal(generators[0].get_state(), seeded().get_state())


def check_adjoint_of_weights_alone(m):
    # what is measured and clipped is λ of the weights, not of momentum's buffers, which has one too
    problem = Problem(optimizer="momentum, decay")
    theta0 = {name: leaf.requires_grad_() for name, leaf in parameters_of(problem.model).items()}
    norms = {}
    L = problem.objective(m, on_adjoint=lambda t, norm: norms.__setitem__(t, norm))(theta0)
    slopes = torch.autograd.grad(L, list(theta0.values()))
    assert_close(norms[0], torch.nn.utils.get_total_norm(slopes))


def test_the_adjoint_is_that_of_the_weights():
    check_adjoint_of_weights_alone(module)


# ------------------------------------------------------------------------------- the schedule
def check_schedule(m):
    assert m.evaluation_steps(600, 50, 200) == [200, 250, 300, 350, 400, 450, 500, 550, 600]  # the auto-encoder's
    assert m.evaluation_steps(200, 40) == [40, 80, 120, 160, 200]
    assert m.evaluation_steps(7, 2, 1) == [1, 3, 5, 7]
    assert m.evaluation_steps(3, 3) == [3]
    assert m.evaluation_steps(0, 1, 0) == [0]


def test_the_schedule():
    check_schedule(module)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (10, 4),
            ValueError,
            r"every 4 steps from step 4 must end at `inner_steps`, got 10: .* A first step of 2 fits",
        ),
        ((10, 20), ValueError, r"every 20 steps from step 20 must end at `inner_steps`, got 10: .* step of 10 fits"),
        ((10, 5, 11), ValueError, r"from step 11 must end at `inner_steps`, got 10: .* A first step of 5 fits"),
        ((0, 5), ValueError, r"must end at `inner_steps`, got 0: .* A first step of 0 fits"),
        ((-1, 5), ValueError, r"evaluation_steps: `inner_steps` must be a whole number, 0 or more, got -1"),
        ((10, 0), ValueError, r"`eval_every` must be a whole number, 1 or more, got 0"),
        ((10, 5, -5), ValueError, r"`first` must be a whole number, 0 or more, got -5"),
        ((10, 2.5), ValueError, r"`eval_every` must be a whole number, 1 or more, got 2\.5"),
        ((10, "5"), TypeError, r"`eval_every` must be a number, got '5'"),
        ((10, 5, "a"), TypeError, r"`first` must be a number, got 'a'"),
    ],
)
def test_a_schedule_that_does_not_end_with_training_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        module.evaluation_steps(*arguments)


@pytest.mark.parametrize("N", range(12))
def test_the_first_evaluation_that_an_error_names_fits(N):
    for every in range(1, 14):
        try:
            module.evaluation_steps(N, every, N + 1)
        except ValueError as error:
            first = int(str(error).split("A first step of ")[1].split()[0])
            assert module.evaluation_steps(N, every, first)[-1] == N


# ------------------------------------------------------------------------------- purity, errors
def test_no_held_out_batch_is_no_objective():
    step = training_step(lambda theta, _: theta["w"] ** 2, sgd(0.1))
    with pytest.raises(ValueError, match=r"loss_auc: `validation` must hold a held-out batch .*, got none"):
        module.loss_auc({"w": torch.tensor(2.0)}, step, lambda theta, _: theta["w"], [None], {})


@pytest.mark.parametrize("antithetic", [False, True])
def test_nothing_of_the_callers_changes(antithetic):  # invariant 14
    for network in ("batch norm", "tied"):
        problem = Problem("normal", "adam", network, dropout=network == "batch norm")
        before, laws = state_of(problem.model), {n: leaf.clone() for n, leaf in problem.laws.parameters().items()}
        problem.ours(module, antithetic=antithetic)
        assert_same_state(problem.model, before)
        assert_close(problem.laws.parameters(), laws, rtol=0, atol=0)
        assert not any(leaf.requires_grad for leaf in problem.laws.parameters().values())


def test_a_loss_that_is_not_finite_is_an_error_that_says_when():  # invariant 19
    problem = Problem(N=3, V=(1, 3))
    problem.train[1] = (problem.train[1][0] * math.nan, problem.train[1][1])
    before = state_of(problem.model)
    with pytest.raises(NotFiniteError, match=r"the outer loss must be finite, got nan after 3 of 3 steps"):
        problem.ours(module)
    assert_same_state(problem.model, before)


def test_captured_tensors_that_require_gradients_are_refused():
    problem = Problem()
    factor = torch.tensor(2.0, requires_grad=True)
    own = problem.loss
    problem.loss = lambda theta, batch: factor * own(theta, batch)
    with pytest.raises(
        ValueError, match=r"must get every tensor that requires a gradient by the state, but .*'factor'"
    ):
        problem.ours(module)


def test_a_loss_of_no_drawn_tensor_has_a_gradient_of_zero():
    problem = Problem()
    L, d = module.meta_gradient(problem.laws, problem.model, lambda theta0: torch.tensor(1.5), seeded())
    assert L == 1.5
    assert not any(leaf.any() for leaf in d.values())


# ------------------------------------------------------------------------------- mutants
CHECKS = [
    check_schedule,
    check_closed_form,
    check_antithetic,
    check_mean_of_scheduled_steps,
    check_adjoint_of_weights_alone,
    check_nothing_is_learned,
    check_naive_unroll,
]
DRAW = "theta0 = own | distribution.with_parameters(psi).sample(model, generator, antithetic=mirrored)"
MUTANTS = {
    "held-out loss at t, not at t + 1": ("outer = {t: term", "outer = {max(t - 1, 0): term"),
    "sum for mean": (" / len(validation)", ""),
    "mean over all steps": (" / len(validation)", " / max(len(train), 1)"),
    "the last evaluation lost": ("range(first, inner_steps + 1, eval_every)", "range(first, inner_steps, eval_every)"),
    "the first evaluation lost": ("range(first, inner", "range(first + eval_every, inner"),
    "always from the start": ("range(first, inner", "range(inner_steps % eval_every or eval_every, inner"),
    "the same batch for every evaluation": ("term(batch) for t", "term(next(iter(validation.values()))) for t"),
    "buffers' adjoint too": ('lambda state: state["params"]  # noqa', "lambda state: state  # noqa"),
    "laws not used": (DRAW, DRAW.replace("own | ", "") + " | own"),
    "draw detached": ("L = objective(theta0)", "L = objective(tree_map(Tensor.detach, theta0))"),
    "pair not mirrored": ("of_draw(mirrored=True)", "of_draw(mirrored=False)"),
    "mirror of other noise": ("        generator.set_state(noise)  # the same z for both\n", ""),
    "losses of a pair summed": ("return (L + L_mirrored) / 2", "return L + L_mirrored"),
    "loss of the first alone": ("return (L + L_mirrored) / 2", "return L"),
    "gradients of a pair summed": ("lambda leaf: leaf / 2", "lambda leaf: leaf"),
    "gradient of the first alone": ("tree_add(d, d_mirrored)", "tree_add(d, d)"),
}


def test_the_implementation_passes():
    for check in CHECKS:
        check(module)


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_every_mutant_is_caught(mutant):
    assert not survives(CHECKS, mutated(module, *mutant))
