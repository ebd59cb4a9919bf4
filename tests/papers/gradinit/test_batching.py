"""Pairs of half-overlapping batches: sizes, overlap, consumption, restarts, errors; and mutants that must die."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from common import batches
from papers.gradinit import batching
from papers.gradinit.batching import batch_pairs
from tests.mutation import mutated, survives


def epoch(n: int, size: int, start: int = 0) -> list[torch.Tensor]:
    """Batches of numbered examples, the last one short where it does not divide."""
    return list(torch.arange(start, start + n).split(size))


def check_halves(module):
    # A = {0,1}, B = {2,3}, C = {4,5}; then S = {6,7} ∪ {8,9}, the next C = {10,11}
    pairs = module.batch_pairs(epoch(12, 4))
    S, other = next(pairs)
    assert S.tolist() == [0, 1, 2, 3]
    assert other().tolist() == [0, 1, 4, 5]
    S, other = next(pairs)
    assert S.tolist() == [6, 7, 8, 9]
    assert other().tolist() == [6, 7, 10, 11]


def check_unused_examples_are_not_drawn(module):
    pairs = module.batch_pairs(epoch(8, 4))
    next(pairs)
    assert next(pairs)[0].tolist() == [4, 5, 6, 7]
    assert next(pairs)[0].tolist() == [0, 1, 2, 3]  # and on into the next pass


def check_disjoint(module):
    S, other = next(module.batch_pairs(epoch(8, 4), "disjoint"))
    assert S.tolist() == [0, 1, 2, 3]
    assert other().tolist() == [4, 5, 6, 7]


def check_thirds(module):
    # N = 8: q = 2, S = [0, 4), S̃ = [2, 8); N = 9: q = 3, S = [0, 6), S̃ = [3, 9)
    pairs = module.batch_pairs([torch.arange(8), torch.arange(9)], "thirds")
    for S_end, start, N in ((4, 2, 8), (6, 3, 9)):
        S, other = next(pairs)
        assert S.tolist() == list(range(S_end))
        assert other().tolist() == list(range(start, N))


def check_a_short_tail_sits_out(module):
    pairs = module.batch_pairs(epoch(10, 4))  # 4, 4, 2
    seen = [next(pairs)[0].tolist() for _ in range(4)]
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
    for n, firsts in ((10, [[0, 1], [4, 5]]), (11, [[0, 1], [4, 5], [8, 9]])):  # two have no third, three have
        pairs = module.batch_pairs(epoch(n, 4), "thirds")
        assert [next(pairs)[0].tolist() for _ in range(2 * len(firsts))] == 2 * firsts


CHECKS = [check_halves, check_unused_examples_are_not_drawn, check_disjoint, check_thirds, check_a_short_tail_sits_out]
MUTANTS = {
    "overlap off by one": ("yield _part(batch, 0, n // 2)", "yield _part(batch, 0, n // 2 + 1)"),
    "second half again": ("yield _part(batch, n // 2, n)", "yield _part(batch, 0, n // 2)"),
    "no overlap": ('A if pairs == "halves" else next(stream)', "next(stream)"),
    "always overlap": ('A if pairs == "halves" else next(stream)', "A"),
    "order of the halves": ("yield _join(A, next(stream)), other", "yield _join(next(stream), A), other"),
    "drawn whether needed or not": (
        "yield _join(A, next(stream)), other",
        "S, T = _join(A, next(stream)), other()\n        yield S, lambda T=T: T",
    ),
    "quarter": ("q = N // 3", "q = N // 4"),
    "rounded up": ("q = N // 3", "q = -(-N // 3)"),
    "thirds of two": ("if N < 3 and begun:", "if N < 2 and begun:"),
    "thirds of four or more": ("if N < 3 and begun:", "if N < 4 and begun:"),
    "S of one third": ("yield _part(batch, 0, 2 * q)", "yield _part(batch, 0, q)"),
    "S̃ without overlap": ("_part(batch, q, N)", "_part(batch, 2 * q, N)"),
    "S̃ short of its tail": ("_part(batch, q, N)", "_part(batch, q, 3 * q)"),
}
STREAM_MUTANTS = {
    "tail used": ("                short = length\n                continue", "                short = length"),
    "size of the last": ("length if self.size is None else self.size", "length"),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_implementation_passes(check):
    check(batching)


@pytest.mark.parametrize("mutant", MUTANTS, ids=MUTANTS)
def test_every_mutant_is_caught(mutant):
    assert not survives(CHECKS, mutated(batching, *MUTANTS[mutant]))


@pytest.mark.parametrize("mutant", STREAM_MUTANTS, ids=STREAM_MUTANTS)
def test_every_mutant_of_the_stream_is_caught(mutant):
    module = mutated(batching, "for A in stream:", "for A in stream:")  # a copy, to be given another stream
    module.of_one_size = mutated(batches, *STREAM_MUTANTS[mutant]).of_one_size  # pyright: ignore[reportAttributeAccessIssue]
    assert not survives(CHECKS, module)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 7), st.lists(st.booleans(), min_size=1, max_size=12))
def test_sizes_overlap_and_order(half, whole, tail, needed):
    # invariant 15: what is drawn is the stream of halves in order, with nothing lost but a pass's short tail
    n = 2 * half
    tail = min(tail, n - 1)
    collection = epoch(whole * n + tail, n)
    pairs, drawn = batch_pairs(collection), []
    for is_needed in needed:
        S, other = next(pairs)
        assert len(S) == n
        drawn += S.tolist()
        if is_needed:
            S_tilde = other()
            assert len(S_tilde) == n
            assert S_tilde[:half].tolist() == S[:half].tolist()
            drawn += S_tilde[half:].tolist()
    assert len(drawn) == sum(3 * half if is_needed else n for is_needed in needed)
    expected = list(range(whole * n)) * (len(drawn) // (whole * n) + 1)
    assert drawn == expected[: len(drawn)]


@given(st.integers(1, 6), st.integers(2, 5), st.lists(st.booleans(), min_size=1, max_size=12))
def test_disjoint_pairs_share_nothing_and_use_twice_the_examples(half, whole, needed):
    # invariant 15
    n = 2 * half
    pairs, drawn = batch_pairs(epoch(whole * n, n), "disjoint"), []
    for is_needed in needed:
        S, other = next(pairs)
        assert len(S) == n
        drawn += S.tolist()
        if is_needed:
            S_tilde = other().tolist()
            assert len(S_tilde) == n
            assert not set(S_tilde) & set(S.tolist())
            drawn += S_tilde
    assert len(drawn) == n * sum(2 if is_needed else 1 for is_needed in needed)
    expected = list(range(whole * n)) * (len(drawn) // (whole * n) + 1)
    assert drawn == expected[: len(drawn)]


@given(st.lists(st.integers(3, 20), min_size=1, max_size=5))
def test_thirds_share_the_middle_one_and_use_every_example(sizes):
    # invariant 15: S = [0, 2q), S̃ = [q, N) of each batch, whatever its size
    ends = torch.tensor([0, *sizes]).cumsum(0)
    collection = [torch.arange(a, b) for a, b in pairwise(ends.tolist())]
    for batch, (S, other) in zip(collection, batch_pairs(collection, "thirds"), strict=False):
        q = len(batch) // 3
        S_tilde = other()
        assert len(S) == 2 * q
        assert len(S_tilde) == len(batch) - q
        assert len(set(S.tolist()) & set(S_tilde.tolist())) == q
        assert torch.equal(torch.cat([S, S_tilde]).unique(), batch)


def test_batches_of_any_nesting():
    batch = {"x": torch.arange(12).reshape(6, 2), "y": (torch.arange(6), "kept"), "n": 3}
    S, other = next(batch_pairs([batch, batch]))
    assert S["x"].shape == (6, 2)
    assert S["y"][1] == "kept"
    assert_close(other()["y"][0], torch.tensor([0, 1, 2, 0, 1, 2]))


def test_a_data_loader_is_gone_through_again():
    loader = DataLoader(TensorDataset(torch.arange(10)), batch_size=4, shuffle=True)
    pairs = batch_pairs(loader)
    seen = torch.cat([next(pairs)[0][0] for _ in range(6)])
    assert len(seen) == 24


@pytest.mark.parametrize(
    ("batches", "pairs", "message"),
    [
        ([torch.arange(5)], "halves", r"must hold an even number of examples, 2 or more, got 5"),
        ([torch.arange(1)], "halves", r"must hold an even number of examples, 2 or more, got 1"),
        ([torch.arange(4), torch.arange(2), torch.arange(4)], "halves", r"must be of one size, got 2 examples after 4"),
        ([torch.arange(4), torch.arange(6)], "halves", r"must be of one size, got 6 examples after 4"),
        (iter(epoch(8, 4)), "halves", r"`batches` must last for every step, got 2 batches"),
        (iter(epoch(8, 4)), "thirds", r"`batches` must last for every step, got 2 batches"),
        ([], "halves", r"`batches` must last for every step, got 0 batches"),
        ([torch.arange(2)], "thirds", r"needs batches of at least 3 examples, got 2"),
        ([torch.zeros(4, 3), torch.zeros(4, 5)], "halves", r"must be alike to be joined, got .*\[\(2, 3\)\].*\(2, 5\)"),
        ([torch.tensor(3)], "halves", r"must have the same first dimension"),
        ([{"x": torch.arange(4), "text": list("abcd")}], "halves", r"must be in tensors, got a list of 4"),
        (["text"], "thirds", r"must have the same first dimension"),
    ],
)
def test_batches_that_do_not_fit(batches, pairs, message):
    def draw():
        for _, (_, other) in zip(range(5), batch_pairs(batches, pairs), strict=False):
            other()

    with pytest.raises(ValueError, match=message):
        draw()
