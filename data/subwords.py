"""One vocabulary of sub-words for both languages, by byte-pair encoding."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data.translation import SentencePair, TranslationData

PAD, BOS, EOS, UNK = range(4)
"""What fills a batch up, begins a target, ends a sentence, and stands for a byte that training never saw."""

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")

EncodedPair = tuple[list[int], list[int]]
"""The sub-words of a sentence and of its translation, without BOS and EOS."""


@dataclass(frozen=True, eq=False)
class Subwords:
    """Sentences to sub-words and back.

    Attributes:
        tokenizer: Byte-level, so that spaces and punctuation survive the way there and back.
    """

    tokenizer: Tokenizer

    @property
    def vocabulary_size(self) -> int:
        """How many different ids there are, the four special ones among them."""
        return self.tokenizer.get_vocab_size()

    def encode(self, sentence: str) -> list[int]:
        """The ids of a sentence, without BOS and EOS. A special token's name inside it is text like any other."""
        # a space first: a word is then the same sub-word at the beginning and in the middle
        return self.tokenizer.encode(" " + sentence).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids up to the first EOS; PAD, BOS and UNK are left out."""
        text_ids = []
        for token in map(int, ids):
            if token == EOS:
                break
            if token not in (PAD, BOS, UNK):
                text_ids.append(token)
        return self.tokenizer.decode(text_ids, skip_special_tokens=False).removeprefix(" ")


def train_subwords(data: TranslationData, vocabulary_size: int) -> Subwords:
    """A joint vocabulary of source and target, learned from the training pairs alone, the same every time.

    Args:
        data: Of which only `train` is read.
        vocabulary_size: At most this many ids; fewer where the text has no more pairs to merge.

    Raises:
        ValueError: If the special tokens and the bytes of the text do not fit into `vocabulary_size`.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS[UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.encode_special_tokens = True  # else "<eos>" written in a sentence would end it
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocabulary_size, 0), special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    # source and target in turn; each begins with the space that `encode` puts there
    sentences = (" " + sentence for pair in data.train for sentence in pair)
    tokenizer.train_from_iterator(sentences, trainer)
    if tokenizer.get_vocab_size() > vocabulary_size:
        raise ValueError(
            f"train_subwords: `vocabulary_size` must be at least {tokenizer.get_vocab_size()} "
            f"(4 special tokens and every byte of the training text), got {vocabulary_size}."
        )
    return Subwords(tokenizer)


def encode_pairs(
    subwords: Subwords,
    sentences: Sequence[SentencePair],
    max_length: int | None = None,
    *,
    overlong: Literal["truncate", "drop"] = "truncate",
) -> list[EncodedPair]:
    """The ids of some sentence pairs, in their order.

    Args:
        subwords: The vocabulary.
        sentences: One split of a `TranslationData`.
        max_length: The longest a source (with EOS) or a target (with BOS and EOS) may be. None: any length.
        overlong: "truncate" cuts the end off what is longer, so that every pair stays in its place; "drop" leaves the
            whole pair out, for training only.

    Raises:
        ValueError: If `max_length` leaves no room for a sub-word, or `overlong` is neither of the two.
    """
    if max_length is not None and max_length < 3:
        raise ValueError(
            f"encode_pairs: `max_length` must be at least 3 (BOS, one sub-word, EOS), got {max_length}. "
            "None sets no bound."
        )
    if overlong not in ("truncate", "drop"):
        raise ValueError(f"encode_pairs: `overlong` must be 'truncate' or 'drop', got {overlong!r}.")
    encoded = []
    for source, target in ((subwords.encode(s), subwords.encode(t)) for s, t in sentences):
        if max_length is not None:
            if overlong == "drop" and (len(source) + 1 > max_length or len(target) + 2 > max_length):
                continue
            source, target = source[: max_length - 1], target[: max_length - 2]
        encoded.append((source, target))
    return encoded
