r"""Windows over a batch, and what two gradients agree on merely because their windows share examples.

Letters: B examples, D windows (`splits`), L = ⌊B/D⌋, r the overlap, a and b the sizes of two windows, o the examples
that they share, ρ' the signal: ‖𝔼g‖² over the variance of an example's gradient.

Source: the released code of Yang et al., NeurIPS 2022. The paper's own rule for windows was not at hand.
"""

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Literal

from scipy.optimize import root_scalar

from common.options import check_choice, check_number, check_whole

Rule = Literal["intended", "released"]


def windows(batch_size: int, splits: int, overlap: float = 0.0, *, rule: Rule = "intended") -> list[slice]:
    r"""D windows that cover a batch and reach into their neighbours.

    intended:  window i = [(i − r) L, (i + 1 + r) L)
    released:  window i = [(1 − r) L i, (1 + r) L (i + 1)), the first from 0: right for D = 2, else ever wider

    with ends cut to whole numbers and to the batch; the last window ends with the batch.

    Args:
        batch_size: B.
        splits: D, from 2 to B.
        overlap: r in [0, 1]: the share of L that a window takes of each neighbour. 0: a partition.
        rule: Which.

    Raises:
        TypeError: An option that is no number.
        ValueError: One out of range.

    Example:
        >>> windows(64, 4, 0.2)
        [slice(0, 19, None), slice(12, 35, None), slice(28, 51, None), slice(44, 64, None)]
    """
    check_whole("windows", smallest=2, batch_size=batch_size, splits=splits)
    check_choice("windows", "rule", rule, ("intended", "released"))
    if splits > batch_size:
        raise ValueError(
            f"windows: each window needs an example of its own, got {splits} windows of {batch_size} examples. "
            "Use larger batches or fewer `splits`."
        )
    check_number("windows", overlap=overlap)
    if not 0 <= overlap <= 1:
        raise ValueError(f"windows: `overlap` must lie in [0, 1], got {overlap}: a share of a window's own length.")
    L, B, D, r = batch_size // splits, batch_size, splits, overlap
    # int() cuts towards zero
    if rule == "released":
        starts = [int((1 - r) * L * i) for i in range(D)]
        ends = [int((1 + r) * L * (i + 1)) for i in range(D)]
    else:
        starts = [max(0, int((i - r) * L)) for i in range(D)]
        ends = [int((i + 1 + r) * L) for i in range(D)]
    return [
        slice(start, B if i == D - 1 else min(B, end)) for i, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]


def expected_cosine(groups: Sequence[slice], signal: float) -> float:
    r"""𝔼 GC (without its diagonal) of windows' mean gradients, for examples g = μ + ε of signal ρ' = ‖μ‖²/𝔼‖ε‖².

    (ρ' + o/(ab)) / √((ρ' + 1/a)(ρ' + 1/b)), averaged over pairs. It rises with the windows' sizes alone: values for
    different B, D and r cannot be compared.

    Args:
        groups: The windows, with known ends.
        signal: ρ' ≥ 0.

    Raises:
        ValueError: Fewer than two windows, or ρ' < 0.

    Example:
        >>> expected_cosine([slice(0, 1), slice(1, 2)], 1.0)  # single examples: ρ'/(1 + ρ')
        0.5
    """
    if len(groups) < 2:
        raise ValueError(f"expected_cosine: there must be two windows or more, got {len(groups)}.")
    if not signal >= 0:
        raise ValueError(f"expected_cosine: `signal` (ρ' = ‖μ‖²/𝔼‖ε‖²) must be 0 or more, got {signal}.")
    terms = []
    for first, second in permutations([range(group.start, group.stop) for group in groups], 2):
        a, b = len(first), len(second)
        o = max(0, min(first.stop, second.stop) - max(first.start, second.start))
        terms.append((signal + o / (a * b)) / ((signal + 1 / a) * (signal + 1 / b)) ** 0.5)
    return sum(terms) / len(terms)


def grad_cosine_floor(groups: Sequence[slice]) -> float:
    r"""The GC (without its diagonal) that shared examples alone produce: the mean of o/√(ab) over pairs of windows.

    Example:
        >>> round(grad_cosine_floor(windows(64, 4, 0.2, rule="released")), 4)  # the released run logs 0.2368
        0.2374
    """
    return expected_cosine(groups, 0.0)


def signal_of(grad_cosine: float, groups: Sequence[slice]) -> float:
    r"""ρ' from a measured GC: the inverse of `expected_cosine`; 0 at the floor and below, infinite at 1, NaN of NaN.

    Example:
        >>> round(signal_of(0.5, [slice(0, 1), slice(1, 2)]), 6)
        1.0
    """
    if grad_cosine <= grad_cosine_floor(groups):
        return 0.0
    if math.isnan(grad_cosine):
        return math.nan
    largest = 1e12
    if grad_cosine >= expected_cosine(groups, largest):
        return float("inf")
    search = root_scalar(
        lambda signal: expected_cosine(groups, signal) - grad_cosine, bracket=(0.0, largest), xtol=1e-12
    )
    return float(search.root)
