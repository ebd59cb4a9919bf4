"""Sub-words and batches of sentence pairs, against a slow loop and the mistakes it must catch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data import (
    BOS,
    EOS,
    PAD,
    UNK,
    TranslationData,
    bucketed_batches,
    encode_pairs,
    evaluation_text_batches,
    load_translation,
    train_subwords,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- sub-words ----

TRAIN = (("Ein Mädchen, ein Hund.", "A girl, a dog."), ("Der Hund läuft  weg!", "The dog runs away!"))
TINY = TranslationData("tiny", TRAIN, (("ξξξ", "QQQ"),), (("ψ", "Z"),), "tiny", "a test")
SUBWORDS = train_subwords(TINY, 60)
ALPHABET = sorted(set("".join(s for pair in TRAIN for s in pair)))


@given(st.text(ALPHABET))
def test_text_survives_the_way_there_and_back(text):
    ids = SUBWORDS.encode(text)
    assert min(ids) > UNK
    assert max(ids) < SUBWORDS.vocabulary_size
    assert SUBWORDS.decode(ids) == SUBWORDS.decode([BOS, *ids, EOS, *ids, PAD]) == text


def test_only_the_training_text_counts_and_nothing_else_decides():
    other = TranslationData("tiny", TRAIN, (("a", "a"),), (("b", "b"),), "", "")
    again = train_subwords(other, 60)
    assert again.tokenizer.to_str() == SUBWORDS.tokenizer.to_str()
    assert SUBWORDS.vocabulary_size == 60
    # Q and ξ (two bytes) were never seen; after the space that begins every sentence
    assert SUBWORDS.encode("Qξ")[1:] == [UNK] * 3
    assert SUBWORDS.decode(SUBWORDS.encode("Qa Hund")) == "a Hund"


def test_a_word_is_the_same_everywhere():
    assert SUBWORDS.encode("Hund") == SUBWORDS.encode("Ein Hund")[len(SUBWORDS.encode("Ein")) :]


def test_the_name_of_a_special_token_is_text():
    marked = train_subwords(TranslationData("tiny", (("<eos><pad>", "<bos> <unk>"),), (), (), "", ""), 40)
    assert min(marked.encode("<eos><pad> <bos>")) > UNK
    assert marked.decode(marked.encode("<eos><pad> <bos>")) == "<eos><pad> <bos>"


def test_a_vocabulary_holds_the_alphabet_or_is_refused():
    with pytest.raises(ValueError, match=r"`vocabulary_size` must be at least (\d+) \(4 special .*, got 20") as caught:
        train_subwords(TINY, 20)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    assert train_subwords(TINY, least).vocabulary_size == least
    assert train_subwords(TINY, 10_000).vocabulary_size < 10_000  # the text has no more to merge


def test_encoding_cuts_or_drops_what_is_too_long():
    pairs = [("Hund", "dog"), ("Ein Mädchen, ein Hund.", "a"), ("a", "The dog runs away!")]
    whole = encode_pairs(SUBWORDS, pairs)
    assert whole == [(SUBWORDS.encode(source), SUBWORDS.encode(target)) for source, target in pairs]
    _, (long, _), (_, target) = whole
    # exactly full: the source has one special token, the target two
    assert encode_pairs(SUBWORDS, pairs[1:2], len(long) + 1, overlong="drop") == whole[1:2]
    assert encode_pairs(SUBWORDS, pairs[1:2], len(long), overlong="drop") == []
    assert encode_pairs(SUBWORDS, pairs[2:], len(target) + 2, overlong="drop") == whole[2:]
    assert encode_pairs(SUBWORDS, pairs[2:], len(target) + 1, overlong="drop") == []
    cut = encode_pairs(SUBWORDS, pairs, 4)
    assert cut == [(source[:3], target[:2]) for source, target in whole]
    with pytest.raises(ValueError, match=r"`max_length` must be at least 3 .*, got 2"):
        encode_pairs(SUBWORDS, pairs, 2)
    with pytest.raises(ValueError, match="`overlong` must be 'truncate' or 'drop', got 'keep'"):
        encode_pairs(SUBWORDS, pairs, 5, overlong="keep")


# ---- batches: checks that take the implementation ----


def rows_of(batch):
    return list(zip(batch["source"].tolist(), batch["target"].tolist(), strict=True))


def unpadded(row):
    return row[: row.index(EOS) + 1]


def numbered(*lengths):
    """Pairs of the given (source, target) lengths, each made of its own number."""
    return [([10 + n] * s, [10 + n] * t) for n, (s, t) in enumerate(lengths)]


def check_the_layout(batches):
    (batch,) = batches([([5, 6], [7]), ([8], [9, 10, 11])], 100, generator=seeded(), min_sentences=1)
    assert batch["source"].dtype == batch["target"].dtype == torch.int64
    assert sorted(rows_of(batch)) == [
        ([5, 6, EOS], [BOS, 7, EOS, PAD, PAD]),
        ([8, EOS, PAD], [BOS, 9, 10, 11, EOS]),
    ]


def check_the_cap_counts_special_tokens_and_both_sides(batches):
    # five tokens each: 4 + EOS, or BOS + 3 + EOS
    for lengths in ([(4, 2)] * 3, [(1, 3)] * 3):
        sizes = [
            sorted(
                len(batch["source"]) for batch in batches(numbered(*lengths), cap, generator=seeded(), min_sentences=1)
            )
            for cap in (15, 14, 9)
        ]
        assert sizes == [[3], [1, 2], [1, 1, 1]]


def check_every_pair_comes_once(batches):
    pairs = numbered(*[(1 + n % 5, 1 + n % 3) for n in range(17)])
    rows = [row for batch in batches(pairs, 20, generator=seeded(), min_sentences=1) for row in rows_of(batch)]
    assert sorted(unpadded(source) for source, _ in rows) == sorted([*source, EOS] for source, _ in pairs)
    assert sorted(unpadded(target) for _, target in rows) == sorted([BOS, *target, EOS] for _, target in pairs)


CHECKS = [check_the_layout, check_the_cap_counts_special_tokens_and_both_sides, check_every_pair_comes_once]


def slow_batches(pairs, max_tokens, *, generator, min_sentences, end=1, begin=1, count=None, left=False, short=0):
    """One slow loop, right by default, wrong in one way each."""

    def padded(rows):
        widest = max(map(len, rows))
        return torch.tensor([[PAD] * (widest - len(r)) + r if left else r + [PAD] * (widest - len(r)) for r in rows])

    count = count or (lambda batch: len(batch) * max(max(len(s) + 1, len(t) + 2) for s, t in batch))
    groups = []
    for pair in sorted(pairs, key=lambda pair: len(pair[1])):
        if not groups or count([*groups[-1], pair]) > max_tokens:
            groups.append([])
        groups[-1].append(pair)
    for group in groups[: len(groups) - short]:
        source = padded([s + [EOS] * end for s, _ in group])
        yield {"source": source, "target": padded([[BOS] * begin + t + [EOS] for _, t in group])}


def mutant(**mistake):
    return lambda *arguments, **options: slow_batches(*arguments, **options, **mistake)


MUTANTS = {
    "source without EOS": mutant(end=0),
    "EOS twice": mutant(end=2),
    "target without BOS": mutant(begin=0),
    "padded on the left": mutant(left=True),
    "last batch lost": mutant(short=1),
    "EOS not counted": mutant(count=lambda batch: len(batch) * max(max(len(s), len(t) + 2) for s, t in batch)),
    "BOS not counted": mutant(count=lambda batch: len(batch) * max(max(len(s), len(t)) + 1 for s, t in batch)),
    "target alone counted": mutant(count=lambda batch: len(batch) * max(len(t) + 2 for _, t in batch)),
    "source alone counted": mutant(count=lambda batch: len(batch) * max(len(s) + 1 for s, _ in batch)),
    "padding not counted": mutant(count=lambda batch: sum(max(len(s) + 1, len(t) + 2) for s, t in batch) - 1),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("implementation", [bucketed_batches, slow_batches])
def test_batches(check, implementation):
    check(implementation)


@pytest.mark.parametrize("wrong", MUTANTS.values(), ids=MUTANTS)
def test_every_mutant_is_caught(wrong):
    def fails(check):
        try:
            check(wrong)
        except (AssertionError, ValueError):  # a row without EOS has no index of it
            return True
        return False

    assert any(map(fails, CHECKS))


# ---- batches: properties ----

LENGTHS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=5, max_size=60)


@given(lengths=LENGTHS, least=st.integers(1, 5), spare=st.integers(0, 60), seed=st.integers(0, 99))
def test_an_epoch(lengths, least, spare, seed):
    pairs = numbered(*lengths)
    cap = least * max(max(s + 1, t + 2) for s, t in lengths) + spare
    batches = list(bucketed_batches(pairs, cap, generator=seeded(seed), min_sentences=least))
    rows = []
    for batch in batches:
        assert least <= len(batch["source"]) == len(batch["target"])
        assert len(batch["source"]) * max(batch["source"].shape[1], batch["target"].shape[1]) <= cap
        for row in (*batch["source"].tolist(), *batch["target"].tolist()):
            assert set(row[len(unpadded(row)) :]) <= {PAD}
            assert PAD not in unpadded(row)
        rows += [(unpadded(source)[:-1], unpadded(target)[1:-1]) for source, target in rows_of(batch)]
    assert len(pairs) - least < len(rows) <= len(pairs)
    remaining = list(pairs)
    for row in rows:
        remaining.remove(row)
    # whoever sits out is among the shortest
    shortest = min(max(len(s) + 1, len(t) + 2) for s, t in rows)
    assert all(max(len(s) + 1, len(t) + 2) <= shortest for s, t in remaining)


@given(lengths=LENGTHS, spare=st.integers(0, 60))
def test_evaluation_covers_all_and_says_where(lengths, spare):
    pairs = numbered(*lengths)
    cap = max(max(s + 1, t + 2) for s, t in lengths) + spare
    met = []
    for batch, indices in evaluation_text_batches(pairs, cap):
        assert len(indices) * max(batch["source"].shape[1], batch["target"].shape[1]) <= cap
        for (source, target), index in zip(rows_of(batch), indices, strict=True):
            assert (unpadded(source)[:-1], unpadded(target)[1:-1]) == pairs[index]
        met += indices
    assert sorted(met) == list(range(len(pairs)))
    longest = [max(len(pairs[index][0]) + 1, len(pairs[index][1]) + 2) for index in met]
    assert longest == sorted(longest, reverse=True)


def test_only_the_generator_decides_and_epochs_differ():
    pairs = numbered(*[(1 + n % 4, 1 + n % 3) for n in range(60)])
    state, generator = torch.get_rng_state(), seeded()
    first, second = ([rows_of(b) for b in bucketed_batches(pairs, 40, generator=generator)] for _ in range(2))
    assert first == [rows_of(batch) for batch in bucketed_batches(pairs, 40, generator=seeded())]
    # another order, and other companions too
    assert first != second
    assert {frozenset(map(str, batch)) for batch in first} != {frozenset(map(str, batch)) for batch in second}
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("n", "sizes"), [(9, [4, 5]), (10, [5, 5]), (8, [4, 4]), (6, [5])])
def test_a_small_last_batch_borrows_or_sits_out(n, sizes):
    # five pairs of four tokens fill a batch; of a sixth alone nothing can be made, for 5 + 1 < 2 · 4
    batches = bucketed_batches(numbered(*[(2, 2)] * n), 20, generator=seeded(), min_sentences=4)
    assert sorted(len(batch["source"]) for batch in batches) == sizes


def test_batches_that_cannot_be_made_are_refused_at_the_call():
    pairs = numbered((1, 1), (2, 8), (3, 3))
    with pytest.raises(ValueError, match=r"bucketed_batches: .* hold 3 of the .* number 1 with 10 tokens, got 29"):
        bucketed_batches(pairs, 29, generator=seeded())
    with pytest.raises(
        ValueError, match=r"evaluation_text_batches: .* hold 1 of the .* number 1 with 10 tokens, got 9"
    ):
        evaluation_text_batches(pairs, 9)
    with pytest.raises(ValueError, match=r"`pairs` must hold at least 4 \(`min_sentences`\), got 3"):
        bucketed_batches(pairs, 100, generator=seeded(), min_sentences=4)
    with pytest.raises(ValueError, match="`min_sentences` must be at least 1, got 0"):
        bucketed_batches(pairs, 100, generator=seeded(), min_sentences=0)
    assert list(evaluation_text_batches([], 9)) == []


# ---- together ----


def test_the_embedded_set_from_sentences_to_batches():
    data = load_translation("reversed")
    subwords = train_subwords(data, 500)
    assert subwords.vocabulary_size == 500
    assert all(subwords.decode(subwords.encode(s)) == s for pair in data.train for s in pair)
    batches = list(bucketed_batches(encode_pairs(subwords, data.train), 2048, generator=seeded()))
    assert sum(len(batch["source"]) for batch in batches) == len(data.train)
    # sentences of similar length together: a tenth of all places is padding, of a random grouping half
    real, places = (sum(f(t) for b in batches for t in b.values()) for f in (torch.count_nonzero, torch.numel))
    assert real / places > 0.85
