"""Do initial laws of a character language model, learned on one corpus, serve on another with another vocabulary?

Both ways between Penn Treebank and WikiText-2. On each, the learned laws (Normal and PLIF) are compared with what they
started from and with other initialisers, in bits per character after a tenth, a half and the whole of a training.

    python -m reproduce.dimaml_charlm [--preset smoke|quick|paper] [--data-dir FOLDER] [--output FOLDER]
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, count, islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.functional import classification_loss
from common.initializers import kaiming_
from common.networks import CharLSTM, bits_per_character
from common.optimizers import adam
from common.options import check_positive, check_whole
from common.training import TrainingConfig
from common.types import Batch, UserLoss
from data import (
    CharacterBatch,
    CharacterVocabulary,
    TextData,
    batchify,
    character_vocabulary,
    character_windows,
    load_text,
    sample_character_task,
)
from papers.dimaml import InitDistribution
from papers.metainit import metainit
from reproduce.dimaml import Bench, Learn, Learning, Options, Train, command, of_several, released_start
from reproduce.dimaml_report import LEARNED, Shown

EXPERIMENT = "dimaml_charlm"
DROP_AT = 0.8
"""As released: the learning rate falls to a tenth from epoch 80 of 100."""


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Options. A preset sets them all; each can be overridden."""

    data: Literal["auto", "corpora", "embedded"] = "auto"
    """corpora: Penn Treebank and WikiText-2, from the folder, the Hugging Face cache or the hub. embedded: the language
    documentation and some source code that CPython carries. auto: the corpora, or else what is embedded."""
    embedding: int = 128
    """Channels of the embedding: as released."""
    hidden: int = 256
    """Of both LSTM layers: as released."""
    dropout: float = 0.1
    """As released."""
    length: int = 100
    """Characters of a window: as released."""
    learning_rate: float = 1e-3
    """Of Adam, inner and outer: as released."""
    test_characters: int | None = None
    """Of the test text, from its beginning; None: all."""
    test_streams: int = 1
    """The test text is read as so many streams side by side; 1 as released, more are sooner done."""


PRESETS = {
    "smoke": Config(
        preset="smoke", embedding=4, hidden=6, length=8, learning_rate=1e-2, pieces=5,
        inner_steps=4, first_evaluation=2, eval_every=2, meta_steps=2, meta_lr_normal=1e-2, meta_lr_plif=1e-1,
        draws=2, antithetic=False, batch_size=4, held_out_batch_size=4, seeds=2, updates=1, evaluations=10,
        metainit_steps=2, metainit_batch_size=2, test_characters=400, test_streams=8, processes=1,
    ),
    "quick": Config(
        preset="quick", embedding=32, hidden=64, length=24, learning_rate=5e-3,
        inner_steps=30, first_evaluation=10, eval_every=10, meta_steps=40, meta_lr_normal=8e-3, meta_lr_plif=5e-2,
        draws=2, antithetic=False, batch_size=16, held_out_batch_size=16, seeds=5, updates=30, evaluations=10,
        metainit_steps=50, metainit_batch_size=4, test_characters=100_000, test_streams=64,
    ),
    "paper": Config(
        preset="paper", inner_steps=200, first_evaluation=40, eval_every=40, meta_steps=3000, meta_lr_normal=3e-4,
        meta_lr_plif=1e-3, draws=1, antithetic=False, batch_size=128, held_out_batch_size=128, seeds=10, updates=None,
        evaluations=100, metainit_steps=200, metainit_batch_size=128, processes=1,
    ),
}  # fmt: skip

NAMES = {
    "ptb": "Penn Treebank",
    "wikitext2": "WikiText-2",
    "pydoc": "CPython's documentation",
    "stdlib": "CPython's source code",
}
POSTER = {
    "wikitext2": (
        "PTB → WikiText-2, after those epochs",
        {
            "kaiming": (1.983, 1.843, 1.801),
            "orthogonal": (2.017, 1.849, 1.806),
            "metainit": (1.907, 1.819, 1.792),
            "dimaml-normal": (1.879, 1.812, 1.782),
            "dimaml-plif": (1.876, 1.810, 1.784),
        },
    ),
    "ptb": (
        "WikiText-2 → PTB, after those epochs",
        {
            "kaiming": (1.492, 1.377, 1.352),
            "orthogonal": (1.528, 1.383, 1.354),
            "metainit": (1.477, 1.382, 1.359),
            "dimaml-normal": (1.454, 1.372, 1.345),
            "dimaml-plif": (1.452, 1.369, 1.344),
        },
    ),
}
"""The poster's table; it gives no spread."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text as numbers, on the device."""

    data: TextData
    vocabulary: CharacterVocabulary
    train: Tensor
    validation: Tensor
    test: Tensor


# ---------------------------------------------------------------------------------------------- the experiment
class CharacterBench(Bench):
    name = EXPERIMENT
    baselines = ("kaiming", "he", "default", "orthogonal", "metainit")
    config: Config

    @classmethod
    def check(cls, config: Config) -> None:
        check_whole(
            EXPERIMENT, smallest=1, embedding=config.embedding, hidden=config.hidden, length=config.length,
            test_characters=1 if config.test_characters is None else config.test_characters,
            test_streams=config.test_streams,
        )  # fmt: skip
        if config.test_characters is not None and config.test_characters < 2 * config.test_streams:
            raise ValueError(
                f"{EXPERIMENT}: `test_characters` must be at least two for each of `test_streams`, got "
                f"{config.test_characters} for {config.test_streams}."
            )
        check_positive(EXPERIMENT, learning_rate=config.learning_rate)
        if not 0 <= config.dropout < 1:
            raise ValueError(f"{EXPERIMENT}: `dropout` must lie in [0, 1), got {config.dropout}.")

    @cached_property
    def corpora(self) -> dict[str, Corpus]:
        return {data.name: self._corpus(data) for data in load_pair(self.config)}

    def _corpus(self, data: TextData) -> Corpus:
        vocabulary = character_vocabulary(data.train)
        parts = (vocabulary.encode(text).to(self.device) for text in (data.train, data.validation, data.test))
        return Corpus(data, vocabulary, *parts)

    @property
    def pairs(self) -> Mapping[str, str]:
        first, second = self.corpora
        return {second: first, first: second}

    def record(self) -> dict[str, Any]:
        return of_several([corpus.data.record() for corpus in self.corpora.values()])

    def shown(self) -> Shown:
        config = self.config
        sizes = " and ".join(f"{len(corpus.train):,} characters of {NAMES[k]}" for k, corpus in self.corpora.items())
        return Shown(
            metric="bits_per_character",
            title="bits per character (test)",
            digits=3,
            names=NAMES,
            pairs=self.pairs,
            arms=(*self.baselines, *LEARNED),
            poster=POSTER,
            differs=(
                "The poster's are of another size: both corpora whole (about 5.1 and 10.9 million characters to train "
                "on), 256 channels, N = 200, 3000 meta-steps, 100 epochs of Adam at 1e-3, 10 runs, no spread given. "
                f"Ours: trained on {sizes}, {config.hidden} channels, N = {config.inner_steps}, {config.meta_steps} "
                f"meta-steps of {config.draws} draws, Adam at {config.learning_rate:g}."
            ),
        )

    # ------------------------------------------------------------------------------------------ learning
    def make_model(self, target: str) -> CharLSTM:
        config = self.config
        return CharLSTM(
            len(self.corpora[target].vocabulary),
            embedding=config.embedding,
            hidden=config.hidden,
            dropout=config.dropout,
        )

    def learning(self, unit: Learn) -> Learning:
        config, corpus = self.config, self.corpora[unit.source]
        model = self.make_model(unit.source).to(self.device)
        evaluations = config.held_out_batches

        def sampler(generator: torch.Generator) -> tuple[list[CharacterBatch], list[CharacterBatch]]:
            task = sample_character_task(
                corpus.train, train=config.inner_steps, validation=evaluations, batch_size=config.batch_size,
                validation_batch_size=config.held_out_batch_size, length=config.length, generator=generator,
                validation_ids=corpus.validation,
            )  # fmt: skip
            return task.train, task.validation

        return Learning(model, classification_loss, sampler, self.start(model, unit.family), adam(config.learning_rate))

    def start(self, model: CharLSTM, family: Literal["normal", "plif"]) -> InitDistribution:
        """As released: the embedding N(0, 1), LSTM tensors of scale 1/√hidden, the classifier by its own values."""
        known = {
            "embedding.*": released_start("normal", 1.0, family, self.config.pieces),
            "lstm.*": released_start("uniform", self.config.hidden**-0.5, family, self.config.pieces),
        }
        return InitDistribution.from_model(model, family, pieces=self.config.pieces, start=known)

    # ------------------------------------------------------------------------------------------ training
    def start_baseline(self, model: nn.Module, unit: Train, generator: torch.Generator) -> None:
        assert isinstance(model, CharLSTM)
        config = self.config
        if unit.arm == "kaiming":
            self.start(model, "normal").initialize_(model, generator)
        elif unit.arm == "he":
            kaiming_(model, generator=generator)
        elif unit.arm == "orthogonal":  # as released: each recurrent gate, the rest as torch has it
            for layer in model.lstm:
                for gate in layer.hh.layers():  # pyright: ignore
                    drawn = torch.empty(gate.weight.shape)  # where the generator is, whatever the model's device
                    with torch.no_grad():
                        gate.weight.copy_(nn.init.orthogonal_(drawn, generator=generator))
        elif unit.arm == "metainit":
            vocabulary = len(self.corpora[unit.target].vocabulary)
            noise = random_characters(vocabulary, config.metainit_batch_size, config.length, generator, self.device)
            metainit(model, classification_loss, noise, steps=config.metainit_steps, progress=False)

    def batches(self, target: str, seed: int, part: int) -> Iterator[Batch]:
        streams = batchify(self.corpora[target].train, self.config.batch_size)

        def passes() -> Iterator[Iterator[Batch]]:
            for number in count():
                generator = torch.Generator().manual_seed((seed * 1_000_003 + part) * 1_009 + number)
                yield character_windows(streams, self.config.length, generator=generator, full=True)

        return islice(chain.from_iterable(passes()), self.updates(target))

    def updates(self, target: str) -> int:
        if self.config.updates is not None:
            return self.config.updates
        # the fewest full windows that a pass with a random beginning can have
        return len(self.corpora[target].train) // self.config.batch_size // self.config.length - 1

    def recipe(self, model: nn.Module) -> tuple[UserLoss, TrainingConfig]:
        assert isinstance(model, CharLSTM)
        model.fused = True  # the same function, sooner
        config = self.config
        return classification_loss, TrainingConfig(
            epochs=config.evaluations, learning_rate=config.learning_rate, optimizer="adam", weight_decay=0.0,
            schedule="constant", drops=(DROP_AT,),
        )  # fmt: skip

    def evaluate(self, model: nn.Module, target: str) -> dict[str, float]:
        assert isinstance(model, CharLSTM)
        ids = self.corpora[target].test[: self.config.test_characters]
        return {"bits_per_character": bits_per_character(model, batchify(ids, self.config.test_streams))}


def load_pair(config: Config) -> tuple[TextData, TextData]:
    """Both corpora, or both embedded texts.

    Raises:
        FileNotFoundError: A corpus cannot be had, and either it was asked for or the other one is there.
    """
    if config.data == "embedded":
        return load_text("pydoc"), load_text("stdlib")
    first = load_text("auto" if config.data == "auto" else "ptb", data_dir=config.data_dir)
    second = "wikitext2" if first.name == "ptb" else "stdlib"
    return first, load_text(second, data_dir=config.data_dir)


def random_characters(
    vocabulary: int, batch_size: int, length: int, generator: torch.Generator, device: torch.device
) -> Iterator[CharacterBatch]:
    """Endless batches of characters drawn alike and independently: what MetaInit sees."""
    while True:
        ids = torch.randint(vocabulary, (batch_size, length + 1), generator=generator).to(device)
        yield ids[:, :-1], ids[:, 1:]


def main() -> None:
    command(CharacterBench, PRESETS, __doc__ or "")


if __name__ == "__main__":
    main()
