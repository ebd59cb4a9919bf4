r"""GradCosine: do the gradients of single examples point the same way? And how it asks that of the multipliers.

Letters: theta0 θ₀ the drawn parameters, m their multipliers (the paper's ω), theta = m ⊙ θ₀; g_i the gradient of group
i (an example, or a window of a batch), r_i = ‖g_i‖ over all tensors, u_i = g_i/r_i, ubar ū and gbar ḡ their means, GC
the mean cosine, GN the mean norm, GV the variance, J what is minimised, v_i = ∂J/∂g_i, gamma γ the bound on GN, w the
weight of the norm in J, d = ∂J/∂m. Shapes: n groups, K tensors. Gradients by name carry a leading dimension of n.

A gradient that is zero has no direction: u_i = 0, and no objective asks anything of it (v_i = 0).

Costs are counted in F, one forward pass of the whole batch; a backward pass is 2F.

Source: Yang, Wang, Yuan & Lin, "Towards Theoretically Inspired Neural Initialization Optimization", NeurIPS 2022, whose
text was at hand up to Eq. (3), and its released code.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from common.batches import length_of
from common.derivatives import Group, GroupMode, group_gradients, tape
from common.options import check_choice, check_number, check_whole
from common.scales import Branch, scaled
from common.tree import tree_add, tree_map, tree_vdot
from common.types import Batch, NotFiniteError, Params, PureLoss

Objective = Literal["gc", "gc_gn", "gc_gn_sqrt", "gv", "gv_gn", "gv_gn_sqrt"]
"""The released names. `gc` is the paper's; the one released configuration uses `gc_gn_sqrt`."""

OBJECTIVES = ("gc", "gc_gn", "gc_gn_sqrt", "gv", "gv_gn", "gv_gn_sqrt")
Coupling = Literal["independent", "shared"]


# ---------------------------------------------------------------------------------------------- what is measured
def group_norms(gradients: Params) -> Float[Tensor, "n"]:
    r"""r_i = ‖g_i‖₂ over every entry of every tensor. Its derivative at g_i = 0 is 0.

    Example:
        >>> group_norms({"w": torch.tensor([[3.0, 0.0], [0.0, 0.0]]), "b": torch.tensor([4.0, 0.0])})
        tensor([5., 0.])
    """
    return torch.linalg.vector_norm(_tensor_norms(gradients), dim=0)


def grad_cosine(gradients: Params, *, include_diagonal: bool = False) -> Float[Tensor, ""]:
    r"""GC: the mean cosine of two gradients, at a cost linear in n.

    with the diagonal:  1/n² Σ_ij cos(g_i, g_j) = ‖ū‖²                       (what Eq. (2) implies; in [0, 1])
    without:            1/(n(n−1)) Σ_{i≠j} cos(g_i, g_j) = (n²‖ū‖² − n₊) / (n(n−1))     (what the released code logs)

    with n₊ gradients that are not zero; the cosine with a zero gradient counts as 0.

    Args:
        gradients: g_i by name, each with a leading dimension of n.
        include_diagonal: Whether the n cosines of a gradient with itself count.

    Raises:
        ValueError: A single gradient, which has no other to agree with.

    Example:
        >>> grad_cosine({"w": torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])})  # of three pairs one agrees
        tensor(0.3333)

    Reference:
        Yang et al. 2022, Eq. (2) and (3).
    """
    r = group_norms(gradients)
    return _cosine(sum_of_units(gradients, r), r, include_diagonal)


def grad_norm(gradients: Params) -> Float[Tensor, ""]:
    r"""GN = 1/n Σ_i ‖g_i‖₂.

    Example:
        >>> grad_norm({"w": torch.tensor([[3.0, 4.0], [1.0, 0.0]])})
        tensor(3.)
    """
    return group_norms(gradients).mean()


def grad_variance(gradients: Params) -> Float[Tensor, ""]:
    r"""GV = 1/n Σ_i ‖g_i − ḡ‖²: the variance of the gradient, summed over coordinates, biased as in the released code.

    Example:
        >>> grad_variance({"w": torch.tensor([[3.0, 4.0], [1.0, 0.0]])})
        tensor(5.)
    """
    return torch.stack([(leaf - leaf.mean(0)).square().sum() / len(leaf) for leaf in gradients.values()]).sum()


def norm_ratio(r: Float[Tensor, "n"]) -> Float[Tensor, ""]:
    r"""κ = max r_i / min r_i, which Eq. (3) wants small and the method leaves alone; infinite with a zero gradient."""
    return torch.where(r.min() > 0, r.max() / r.min(), torch.inf)


def objective_value(
    gradients: Params, objective: Objective = "gc", *, norm_weight: float = 1.0, include_diagonal: bool = False
) -> Float[Tensor, ""]:
    r"""J, to be minimised where GN ≤ γ.

    gc:  −GC        gc_gn:  −GC − w Σ r_i²        gc_gn_sqrt:  −GC − w Σ r_i
    gv:   GV        gv_gn:   GV − w Σ r_i²        gv_gn_sqrt:   GV − w Σ r_i

    Args:
        gradients: g_i by name, each with a leading dimension of n.
        objective: Its released name.
        norm_weight: w.
        include_diagonal: Of GC; a constant and a factor.

    Raises:
        ValueError: Another name.

    Example:
        >>> objective_value({"w": torch.tensor([[3.0, 4.0], [4.0, 3.0]])}, "gc_gn_sqrt", norm_weight=0.1)
        tensor(-1.9600)
    """
    check_choice("objective_value", "objective", objective, OBJECTIVES)
    J = (
        grad_variance(gradients)
        if is_variance(objective)
        else -grad_cosine(gradients, include_diagonal=include_diagonal)
    )
    return J - norm_weight * _norm_term(gradients, objective)


def cotangents(
    gradients: Params,
    objective: Objective | Literal["gn"] = "gc",
    *,
    seen: "Statistics | None" = None,
    norm_weight: float = 1.0,
    include_diagonal: bool = False,
) -> Params:
    r"""v_i = ∂J/∂g_i in closed form; ∂J/∂θ = Σ_i H_i v_i with H_i the Hessian of group i's loss.

    −GC:      −c/r_i · (ū − u_i ⟨u_i, ū⟩)        with c = 2/(n−1), or 2/n with the diagonal
     GV:       2/n · (g_i − ḡ)                    GN:      u_i / n
    −w Σ r:   −w u_i                             −w Σ r²:   −2w g_i

    ⟨v_i, g_i⟩ = 0 for GC: only directions matter.

    Args:
        gradients: g_i by name, of all groups or, with `seen`, of some; no derivative is taken of the result.
        objective: Which J; "gn" is the constraint.
        seen: ū, ḡ and n, of all groups. None: of `gradients`.
        norm_weight: w.
        include_diagonal: Of GC.

    Raises:
        ValueError: Another name, or a single gradient where GC leaves its diagonal out.
    """
    check_choice("cotangents", "objective", objective, (*OBJECTIVES, "gn"))
    seen = statistics([gradients]) if seen is None else seen
    r, n = group_norms(gradients), len(seen.r)
    inverse = _inverse(r)
    if objective == "gn":
        return tree_map(lambda leaf: _by_group(inverse / n, leaf) * leaf, gradients)
    if is_variance(objective):
        v = tree_map(lambda leaf, mean: 2 / n * (leaf - mean), gradients, seen.gbar)
    else:
        _check_count(n, "cotangents", include_diagonal)
        c = 2 / (n if include_diagonal else n - 1)
        # sums of products, which round less than torch's norms: ū holds a part u_i/n, of which nothing may be left
        along = torch.stack([(g * seen.ubar[name]).reshape(len(r), -1).sum(1) for name, g in gradients.items()]).sum(0)
        square = torch.stack([g.square().reshape(len(r), -1).sum(1) for g in gradients.values()]).sum(0)
        part = torch.where(square > 0, along / square, 0.0)  # ⟨g_i, ū⟩ / r_i²
        pull, back = c * inverse, c * inverse * part
        v = tree_map(lambda g, ubar: _by_group(back, g) * g - _by_group(pull, g) * ubar, gradients, seen.ubar)
    if objective.endswith("gn_sqrt"):
        return tree_map(lambda v, leaf: v - norm_weight * _by_group(inverse, leaf) * leaf, v, gradients)
    if objective.endswith("gn"):
        return tree_add(v, gradients, scale=-2 * norm_weight)
    return v


# ---------------------------------------------------------------------------------------------- what is asked of m
class Statistics(NamedTuple):
    """What a first pass over the groups keeps: nothing that grows with n but their norms.

    Attributes:
        r: r_i.
        ubar: ū.
        gbar: ḡ.
        shares: The mean over groups of ‖u_ik‖², each tensor k's share of the gradient; they sum to 1.
    """

    r: Float[Tensor, "n"]
    ubar: Params
    gbar: Params
    shares: Float[Tensor, "K"]

    def metrics(self, *, include_diagonal: bool = False) -> dict[str, Tensor]:
        """GC, GN, GV, κ and the shares by name, `share/…`."""
        n = len(self.r)
        return {
            "grad_cosine": _cosine(tree_map(lambda leaf: leaf * n, self.ubar), self.r, include_diagonal),
            "grad_norm": self.r.mean(),
            # E‖g‖² − ‖ḡ‖² loses digits where gradients nearly agree
            "grad_variance": (self.r.square().mean() - tree_vdot(self.gbar, self.gbar)).clamp(min=0),
            "norm_ratio": norm_ratio(self.r),
        } | {f"share/{name}": share for name, share in zip(self.gbar, self.shares.unbind(), strict=True)}


def statistics(chunks: Iterable[Params]) -> Statistics:
    """Pass 1, over gradients of some groups at a time."""
    norms: list[Tensor] = []
    units: Params = {}
    total: Params = {}
    squares: Tensor | None = None
    for gradients in chunks:
        of_tensors = _tensor_norms(gradients)
        r = torch.linalg.vector_norm(of_tensors, dim=0)
        own, summed = sum_of_units(gradients, r), tree_map(lambda leaf: leaf.sum(0), gradients)
        share = (of_tensors * _inverse(r)).square().sum(1)
        norms.append(r)
        units, total = (tree_add(units, own), tree_add(total, summed)) if units else (own, summed)
        squares = share if squares is None else squares + share
        del gradients  # before the next chunk's are computed
    r = torch.cat(norms)
    mean = partial(tree_map, lambda leaf: leaf / len(r))
    counted = _is_positive(r).sum().clamp(min=1)
    assert squares is not None
    return Statistics(r, mean(units), mean(total), squares / counted)


def scale_gradients(
    loss: PureLoss,
    theta0: Params,
    scales: Params,
    batch: Batch,
    *,
    groups: Sequence[Group] | None = None,
    objective: Objective = "gc",
    gamma: float = float("inf"),
    coupling: Coupling = "independent",
    chunk_size: int | None = None,
    norm_weight: float = 1.0,
    include_diagonal: bool = False,
    grad_params: Sequence[str] | None = None,
    mode: GroupMode = "auto",
) -> tuple[Branch, Params, Params]:
    r"""d_b = ∂J/∂m_b for every multiplier: J = GN where GN > γ, else the objective.

    Two passes over the groups, `chunk_size` at a time. The first, without a graph, finds ū, ḡ and the norms; the second
    pulls each chunk's `cotangents` back. Exact; memory does not grow with n beyond a chunk. Where one chunk holds all
    groups its gradients serve both (the fused form).

    | form      | cost  | memory                                        |
    |-----------|-------|-----------------------------------------------|
    | streaming | 12F   | one chunk's graph and gradients, and two of θ |
    | fused     | 9F    | all groups' graphs and gradients              |
    | released  | 3(1 + 2n)F | n graphs of the whole batch              |

    (windows that overlap cost by their sizes' sum; with `coupling="shared"` it is the released cost a pass).

    Args:
        loss: L, pure, for any number of derivatives: the mean over examples; with `coupling="shared"` one value an
            example, shape (b,).
        theta0: θ₀: all parameters that are not frozen.
        scales: m_b, scalars by name, of the tensors that have one.
        batch: S.
        groups: Slices or index vectors of examples: n groups, which may overlap. None: each example is one.
        objective: J.
        gamma: γ ≥ 0. A GN equal to it goes to the objective.
        coupling: Whether each group is a forward pass of its own, with statistics of its own where a layer takes
            those of its batch, or one forward pass is shared (the released code).
        chunk_size: Groups at once; None: all.
        norm_weight: w.
        include_diagonal: Of GC.
        grad_params: Names of the tensors that g is of; None: all of θ₀.
        mode: How gradients of independent groups are computed: see `group_gradients`.

    Returns:
        The branch; d_b by name, scalars; and `grad_cosine`, `grad_norm`, `grad_variance`, `norm_ratio` and
        `share/NAME`, of which the first two are on the CPU, from the one synchronisation.

    Raises:
        TypeError: An option of another type.
        ValueError: Fewer than two groups, or an option out of range.
        NotFiniteError: A gradient that is not finite; the message names the tensors.

    Example:
        >>> loss = lambda theta, x: (theta["w"] * x).sum(1).square().mean() / 2  # g_i = x_i ⟨x_i, w⟩
        >>> theta0, m = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor(1.0)}
        >>> branch, d, metrics = scale_gradients(loss, theta0, m, torch.eye(2), gamma=1.0)  # GN = (1 + 2)/2
        >>> branch, d["w"], metrics["grad_cosine"]
        ('constraint', tensor(1.5000), tensor(0.))

    Reference:
        Yang et al. 2022, Algorithms 1 to 3; the released code.
    """
    check_choice("scale_gradients", "objective", objective, OBJECTIVES)
    check_choice("scale_gradients", "coupling", coupling, ("independent", "shared"))
    check_number("scale_gradients", gamma=gamma)
    if not gamma >= 0:
        raise ValueError(f"scale_gradients: `gamma` (the bound γ on GN) must be 0 or more, got {gamma}.")
    m = tree_map(lambda scale: scale.detach().requires_grad_(), scales)
    options = {"norm_weight": norm_weight, "include_diagonal": include_diagonal}
    mode = "shared" if coupling == "shared" else mode
    gradients_of = partial(group_gradients, loss, batch=batch, mode=mode, wrt=grad_params)
    chunks = _chunks(batch, groups, chunk_size, "scale_gradients")
    fused = gradients_of(scaled(theta0, m), groups=chunks[0]) if len(chunks) == 1 else None
    with torch.no_grad():
        theta = scaled(theta0, m)
        seen = statistics([fused] if fused else (gradients_of(theta, groups=part) for part in chunks))
        metrics = seen.metrics(include_diagonal=include_diagonal)
        metrics |= dict(zip(("grad_cosine", "grad_norm"), _at_hand(seen, metrics), strict=True))
    branch: Branch = "constraint" if metrics["grad_norm"] > gamma else "objective"
    which = "gn" if branch == "constraint" else objective
    d = tree_map(torch.zeros_like, m)
    for part in chunks:
        gradients = fused or gradients_of(scaled(theta0, m), groups=part)
        with torch.no_grad():
            v = cotangents(gradients, which, seen=seen, **options)
        d = tree_add(d, tape(gradients, m, v, keep=False))  # Σ_i ⟨v_i, ∂g_i/∂m⟩
        del gradients, v  # before the next chunk's are computed
    return branch, d, metrics


def forward_passes(groups: int, chunk_size: int, overlap: float = 0.0) -> float:
    """What `scale_gradients` of independent groups costs, in F, whichever branch is taken.

    Args:
        groups: n.
        chunk_size: Groups at once: if that is all of them, the form is the fused one.
        overlap: r of `windows` (intended), which an inner window takes of two neighbours and an outer one of one.

    Example:
        >>> forward_passes(4, 4), forward_passes(64, 32), round(forward_passes(4, 4, overlap=0.2), 6)
        (9.0, 12.0, 11.7)
    """
    return (9 if groups <= chunk_size else 12) * (1 + 2 * overlap * (1 - 1 / groups))


def measure(
    loss: PureLoss,
    theta: Params,
    batch: Batch,
    *,
    groups: Sequence[Group] | None = None,
    coupling: Coupling = "independent",
    chunk_size: int | None = None,
    include_diagonal: bool = False,
    grad_params: Sequence[str] | None = None,
    mode: GroupMode = "auto",
) -> Params:
    """GC, GN, GV, κ and each tensor's share, by the names that `scale_gradients` gives them; no graph is kept (3F).

    Raises:
        ValueError: Fewer than two groups, or an option out of range.
    """
    check_choice("measure", "coupling", coupling, ("independent", "shared"))
    mode = "shared" if coupling == "shared" else mode
    gradients_of = partial(group_gradients, loss, theta, batch, mode=mode, wrt=grad_params)
    with torch.no_grad():
        seen = statistics(gradients_of(part) for part in _chunks(batch, groups, chunk_size, "measure"))
        return seen.metrics(include_diagonal=include_diagonal)


# ---------------------------------------------------------------------------------------------- small parts
def is_variance(objective: str) -> bool:
    """Whether J has GV in the place of −GC."""
    return objective.startswith("gv")


def sum_of_units(gradients: Params, r: Float[Tensor, "n"]) -> Params:
    """Σ_i u_i = n ū, without a copy of the n gradients."""
    inverse = _inverse(r)
    return tree_map(lambda leaf: torch.tensordot(inverse, leaf, 1), gradients)


def _cosine(total: Params, r: Float[Tensor, "n"], include_diagonal: bool) -> Float[Tensor, ""]:
    """GC from Σ_i u_i."""
    n, square = len(r), tree_vdot(total, total)
    if include_diagonal:
        return square / n**2
    _check_count(n, "grad_cosine", include_diagonal)
    return (square - _is_positive(r).sum()) / (n * (n - 1))


def _check_count(n: int, caller: str, include_diagonal: bool) -> None:
    if n < 2 and not include_diagonal:
        raise ValueError(
            f"{caller}: there must be two gradients or more to compare, got {n}. Or pass include_diagonal=True."
        )


def _norm_term(gradients: Params, objective: str) -> Tensor:
    """Σ r_i, Σ r_i², or nothing."""
    if objective.endswith("gn_sqrt"):
        return group_norms(gradients).sum()
    if objective.endswith("gn"):
        return group_norms(gradients).square().sum()
    return next(iter(gradients.values())).new_zeros(())


def _tensor_norms(gradients: Params) -> Float[Tensor, "K n"]:
    """‖g_ik‖ of each tensor k of each group."""
    return torch.stack([torch.linalg.vector_norm(leaf.reshape(len(leaf), -1), dim=1) for leaf in gradients.values()])


def _is_positive(r: Float[Tensor, "n"]) -> Bool[Tensor, "n"]:
    return r > 0


def _inverse(r: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """1/r_i, and 0 where r_i = 0; with a derivative that is finite there."""
    positive = _is_positive(r)
    return torch.where(positive, 1 / torch.where(positive, r, 1.0), 0.0)


def _chunks(batch: Batch, groups: Sequence[Group] | None, size: int | None, caller: str) -> list[Sequence[Group]]:
    """The groups, `size` at a time."""
    if size is not None:
        check_whole(caller, smallest=1, chunk_size=size)
    if groups is None:
        length = length_of(batch, caller, "A gradient an example needs tensors that can be split.")
        groups = [slice(k, k + 1) for k in range(length)]
    if len(groups) < 2:
        raise ValueError(f"{caller}: there must be two groups or more to compare, got {len(groups)}.")
    size = len(groups) if size is None else size
    return [groups[k : k + size] for k in range(0, len(groups), size)]


def _by_group(values: Float[Tensor, "n"], like: Tensor) -> Tensor:
    """A number a group, shaped to multiply gradients."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _at_hand(seen: Statistics, metrics: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """GC and GN on the CPU, and the one check that everything is finite."""
    GC, GN = torch.stack([metrics["grad_cosine"], metrics["grad_norm"]]).cpu()
    if GC.isfinite() and GN.isfinite():
        return GC, GN
    broken = [name for name, leaf in seen.gbar.items() if not leaf.isfinite().all()]
    where = f", in {', '.join(broken[:3])}{' and others' if len(broken) > 3 else ''}" if broken else ""
    raise NotFiniteError(
        f"scale_gradients: every group's gradient must be finite, got a mean norm of {GN.item():g}{where}."
    )
