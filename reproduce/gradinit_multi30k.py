"""Can the original Transformer be trained without warm-up after GradInit, and over how wide a range of learning rates?

The Post-LN Transformer on German-English: its default initialisation, after GradInit, with the updates that GradInit
costs added, and with warm-up; beside it T-Fixup (no normalisation) and Pre-LN with warm-up. Each over a grid of peak
learning rates, then again with other seeds at its own best rate and at the one that is best with warm-up. The quick
preset leaves SGD out: at 0.1 and 0.3 its few updates teach no Post-LN arm as much as word frequencies.

    python -m reproduce.gradinit_multi30k [--preset smoke|quick|paper] [--data-dir FOLDER] [--output FOLDER]
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import sacrebleu
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from common.functional import parameters_of, pure_loss
from common.initializers import tfixup_, transformer_
from common.networks import Transformer
from common.precision import full_precision
from common.record import Run, device_name, device_of, write_environment
from common.training import TrainingConfig, train
from common.translation import translation_loss, translation_metrics
from common.types import Batch, NotFiniteError
from data import (
    BOS,
    EOS,
    EncodedPair,
    Subwords,
    TranslationData,
    bucketed_batches,
    encode_pairs,
    evaluation_text_batches,
    load_translation,
    train_subwords,
)
from papers.gradinit import gradinit, relative_gradient_variance
from reproduce.command import begin, end_well, make_progress, parse
from reproduce.gradinit_multi30k_report import (
    WITH_GRADINIT,
    WITH_WARMUP,
    best_learning_rate,
    print_report,
    save_figure,
    summarise,
)
from reproduce.scales import rescaled, save_scales

EXPERIMENT = "gradinit_multi30k"
OptimizerName = Literal["adam", "sgd"]


@dataclass(frozen=True)
class Arm:
    """One way to begin, and what is done besides."""

    name: str
    norm: Literal["post", "pre", "none"] = "post"
    gradinit: bool = False
    extra: bool = False
    """As many more updates as GradInit costs with the same seed."""
    warmup: bool = False
    carries_claim: bool = False
    on_grid: bool = False
    """Tried at every learning rate even where `whole_grid` is off."""


ARMS = (
    Arm("Post-LN", carries_claim=True, on_grid=True),
    Arm(WITH_GRADINIT, gradinit=True, carries_claim=True, on_grid=True),
    Arm(WITH_WARMUP, warmup=True, carries_claim=True, on_grid=True),
    Arm("Post-LN, longer", extra=True, carries_claim=True),
    Arm("Pre-LN, warm-up", norm="pre", warmup=True),
    Arm("T-Fixup", norm="none"),
)
"""In the order of work: an arm with `extra` needs to know what GradInit cost, one without a grid the best rates."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options. A preset sets them all; each can be overridden."""

    preset: Literal["smoke", "quick", "paper"] = "quick"
    """smoke: seconds. quick: minutes on two cores, a small Transformer. paper: the released recipe, for a GPU."""
    data: Literal["auto", "multi30k", "iwslt14", "reversed"] = "auto"
    """auto: Multi30k from the folder, the Hugging Face cache or the hub, or else embedded sentences to be reversed."""
    data_dir: Path | None = None
    """Folder that holds multi30k/train-*.parquet and so on. Default: the variable LEARNED_INIT_DATA."""
    output: Path | None = None
    """Run folder; one that was cut off is resumed. Default: a new one under runs/."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    quiet: bool = False
    """No progress on standard error."""

    train_sentences: int | None = None
    """Training pairs; None: all."""
    validation_sentences: int | None = None
    """Validation pairs; None: all."""
    test_sentences: int | None = None
    """Test pairs, on which BLEU is measured; None: all."""
    vocabulary_size: int = 10_000
    """Sub-words of both languages together. Ours."""
    max_length: int = 100
    """Sub-words of a sentence, special ones included; longer training pairs are left out, others cut."""

    dim: int = 512
    """Channels; released."""
    feedforward: int = 1024
    """Channels between the two layers of a network; released."""
    heads: int = 4
    """Attention heads; released."""
    layers: int = 6
    """Layers of the encoder, and of the decoder; released."""
    dropout: float = 0.3
    """Of embeddings and residual branches; released."""
    inner_dropout: float = 0.1
    """Of attention's weights and of hidden units; released."""

    eta: float = 1e-3
    """GradInit for Adam: look-ahead step; released, with a peak learning rate of 5e-4."""
    gamma: float = 1000.0
    """GradInit for Adam: bound on the gradient's l1 norm; released."""
    sgd_eta: float = 0.1
    """GradInit for SGD: normalised look-ahead step. Not released for translation; that of CIFAR-10."""
    sgd_gamma: float = 1.0
    """GradInit for SGD: bound on the gradient's l2 norm. As above."""
    meta_learning_rate: float = 2.5e-3
    """GradInit: τ; released."""
    steps: int = 780
    """GradInit: T; released."""
    meta_tokens: int = 6000
    """GradInit: tokens of a batch, of which S and S̃ are two thirds each; released."""
    variance_batches: int = 16
    """Minibatches over which the gradient's variance is taken, first seed. Ours."""

    optimizers: tuple[OptimizerName, ...] = ("adam", "sgd")
    """Each with its own grid."""
    learning_rates: tuple[float, ...] = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
    """Peak learning rates for Adam. 5e-4 is the released one; the grid is ours."""
    sgd_learning_rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
    """Peak learning rates for SGD with momentum 0.9. Ours."""
    whole_grid: bool = True
    """The grid for every arm; False: 'longer' runs only at the rates that are best for Post-LN and with warm-up, Pre-LN
    and T-Fixup only at the latter. Ours."""
    seeds: int = 3
    """Of the arms that carry the claim: at their own best learning rate and the one that is best with warm-up; the grid
    runs with the first."""
    updates: int = 100_000
    """Released, for IWSLT'14."""
    evaluations: int = 50
    """Validations in a run, evenly spaced. An arm with more updates is given whole intervals between them. Ours."""
    max_tokens: int = 4096
    """Tokens of a training batch; released."""
    label_smoothing: float = 0.1
    """In training and in GradInit; released."""
    weight_decay: float = 1e-4
    """Decoupled for Adam; released."""
    warmup: float = 0.04
    """Share of the updates that the warm-up arms warm up over: 4000 of 100 000."""
    beam: int = 5
    """Of the search for translations; released."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the training; initialisation is float32 always."""


PRESETS = {
    "smoke": Config(
        preset="smoke",
        train_sentences=120,
        validation_sentences=20,
        test_sentences=8,
        vocabulary_size=400,
        max_length=60,
        dim=16,
        feedforward=32,
        heads=2,
        layers=1,
        steps=4,
        meta_tokens=300,
        meta_learning_rate=0.05,
        variance_batches=2,
        learning_rates=(1e-3, 1e-2),
        sgd_learning_rates=(0.1,),
        whole_grid=False,
        seeds=2,
        updates=4,
        evaluations=2,
        max_tokens=300,
        warmup=0.25,
        beam=2,
    ),
    "quick": Config(
        preset="quick",
        train_sentences=6_000,
        validation_sentences=200,
        test_sentences=100,
        vocabulary_size=2_000,
        max_length=60,
        dim=64,
        feedforward=128,
        dropout=0.0,
        inner_dropout=0.0,
        steps=40,
        meta_tokens=600,
        # Ours, as are steps and meta_tokens: τT of the order of the released 1.95 at less cost than the training's.
        meta_learning_rate=0.04,
        variance_batches=8,
        # SGD is left out: at 0.1 and 0.3 this network learnt less than word frequencies, with warm-up and without
        optimizers=("adam",),
        learning_rates=(5e-4, 1e-3, 3e-3, 1e-2),
        whole_grid=False,
        updates=120,
        evaluations=4,
        max_tokens=600,
        warmup=0.2,
        beam=1,
    ),
    "paper": Config(preset="paper", precision="bfloat16"),
}


# ---------------------------------------------------------------------------------------------- data
@dataclass(frozen=True)
class Corpus:
    """Everything of the data that a run needs, as sub-words."""

    data: TranslationData
    subwords: Subwords
    train: list[EncodedPair]
    validation: list[EncodedPair]
    test: list[EncodedPair]
    unigram_loss: float
    """Validation loss, nats a token, of a model that knows nothing but how often each token occurs."""


def prepare(config: Config) -> Corpus:
    """Load, learn the sub-words from the training pairs, encode."""
    data = load_translation(
        config.data,
        data_dir=config.data_dir,
        train=config.train_sentences,
        validation=config.validation_sentences,
        test=config.test_sentences,
    )
    subwords = train_subwords(data, config.vocabulary_size)
    training = encode_pairs(subwords, data.train, config.max_length, overlong="drop")
    validation, test = (encode_pairs(subwords, part, config.max_length) for part in (data.validation, data.test))
    return Corpus(
        data, subwords, training, validation, test, unigram_loss(training, validation, subwords.vocabulary_size)
    )


def unigram_loss(training: Sequence[EncodedPair], validation: Sequence[EncodedPair], vocabulary_size: int) -> float:
    """−mean log p(token) with p from the training targets' counts, one added to each; EOS is a token like others."""
    counts = Counter(token for _, target in training for token in (*target, EOS))
    total = counts.total() + vocabulary_size
    tokens = [token for _, target in validation for token in (*target, EOS)]
    return -sum(math.log((counts[token] + 1) / total) for token in tokens) / len(tokens)


def endless_batches(corpus: Corpus, max_tokens: int, seed: int, device: torch.device) -> Iterator[Batch]:
    """Pass after pass over the training pairs, each in a new order: a function of the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from bucketed_batches(corpus.train, max_tokens, generator=generator, device=device)


# ---------------------------------------------------------------------------------------------- one unit of work
def loss_fn(config: Config) -> Callable[[nn.Module, Batch], Tensor]:
    return lambda model, batch: translation_loss(model, batch, label_smoothing=config.label_smoothing)


def initialise(config: Config, arm: Arm, seed: int, corpus: Corpus, device: torch.device) -> Transformer:
    """The arm's network as it starts, before GradInit: a function of its arguments alone."""
    model = Transformer(
        corpus.subwords.vocabulary_size,
        dim=config.dim,
        feedforward=config.feedforward,
        heads=config.heads,
        encoder_layers=config.layers,
        decoder_layers=config.layers,
        norm=arm.norm,
        dropout=config.dropout,
        attention_dropout=config.inner_dropout,
        activation_dropout=config.inner_dropout,
    )
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same weights on every device
    (tfixup_ if arm.norm == "none" else transformer_)(model, generator=generator)
    return model.to(device)


def run_initialisation(
    config: Config, arm: Arm, optimizer: OptimizerName, seed: int, corpus: Corpus, device: torch.device,
    on_step: Callable[[dict[str, float]], None],
) -> dict[str, Any]:  # fmt: skip
    model = initialise(config, arm, seed, corpus, device)
    if not arm.gradinit:
        return {"seconds": 0.0}
    record: dict[str, Any] = {}
    if seed == 0:
        record["variance_before"] = variance_of(config, model, corpus, device)
    for_adam = {
        "step": "adam", "eta": config.eta, "gamma": config.gamma, "clip": None, "betas": (0.9, 0.98),
        "shared_second_moment": False,
    }  # fmt: skip
    for_sgd = {"step": "normalized_sgd", "eta": config.sgd_eta, "gamma": config.sgd_gamma}
    start = time.perf_counter()
    try:
        result = gradinit(
            model,
            loss_fn(config),
            endless_batches(corpus, config.meta_tokens, 900_000_000 + seed, device),
            steps=config.steps,
            lr=config.meta_learning_rate,
            bounds={"norm": (0.01, 100.0)},  # as released for translation
            pairs="thirds",
            on_step=on_step,
            progress=False,
            **(for_adam if optimizer == "adam" else for_sgd),
        )
    except NotFiniteError as error:  # a result
        return record | {"seconds": time.perf_counter() - start, "failed": str(error)}
    record |= {
        "seconds": time.perf_counter() - start,
        "scales": result.scales,
        "skipped": result.skipped,
        "history": result.history,
        "updates_worth": updates_worth(config, result.history),
    }
    if seed == 0:
        record["variance_after"] = variance_of(config, model, corpus, device)
    return record


def updates_worth(config: Config, history: list[dict[str, float]]) -> float:
    """What GradInit cost, in updates of training, by arithmetic on full batches: an update is three forward passes."""
    total, expected = 0.0, 0.0
    for entry in history:
        total += (9.0 if expected else 11.0) if entry["constraint"] else 6.0
        expected = entry["constraint"]
    return total / 3 * (2 / 3 * config.meta_tokens) / config.max_tokens


def extra_updates(config: Config, worth: float) -> int:
    """GradInit's cost in whole intervals between validations: the nearest number, and one at least."""
    interval = config.updates // config.evaluations
    return max(1, round(worth / interval)) * interval if worth > 0 else 0


def variance_of(config: Config, model: nn.Module, corpus: Corpus, device: torch.device) -> dict[str, float]:
    stream = endless_batches(corpus, config.max_tokens, 77, device)
    with full_precision(device):
        return relative_gradient_variance(
            pure_loss(model, loss_fn(config), exact=False),
            parameters_of(model),
            islice(stream, config.variance_batches),
        )


def run_training(
    config: Config, arm: Arm, optimizer: OptimizerName, learning_rate: float, seed: int, corpus: Corpus,
    device: torch.device, start: dict[str, Any], extra_updates: int, checkpoint: Path,
) -> dict[str, Any]:  # fmt: skip
    model = initialise(config, arm, seed, corpus, device)
    rescaled(model, start.get("scales", {}))
    steps = config.updates // config.evaluations
    recipe = TrainingConfig(
        epochs=config.evaluations + extra_updates // steps,
        learning_rate=learning_rate,
        optimizer="adamw" if optimizer == "adam" else "sgd",
        betas=(0.9, 0.98),
        weight_decay=config.weight_decay,
        schedule="linear",
        warmup=config.warmup if arm.warmup else 0.0,
        precision=config.precision,
    )
    validation = [batch for batch, _ in evaluation_text_batches(corpus.validation, 4096, device=device)]
    bleu = 0.0

    def translate_at_the_end(entry: dict[str, float]) -> None:
        """As long as the last checkpoint is there: on a GPU the beam takes minutes."""
        nonlocal bleu
        # a model that has learnt less than how often each word occurs has not been trained
        if entry["epoch"] == recipe.epochs and entry["validation_loss"] < corpus.unigram_loss:
            bleu = bleu_of(config, model, corpus, device)

    with torch.random.fork_rng():
        torch.manual_seed(seed)  # dropout's
        result = train(
            model,
            loss_fn(config),
            # a function of seed and part alone: every arm of a seed sees the same sentences in the same order
            lambda part: islice(endless_batches(corpus, config.max_tokens, 1_000_003 * seed + part, device), steps),
            lambda model: translation_metrics(model, validation),
            steps_per_epoch=steps,
            config=recipe,
            checkpoint=checkpoint,
            on_epoch=translate_at_the_end,
        )
    failed = result.diverged or not result.history[-1]["validation_loss"] < corpus.unigram_loss
    history = [{"updates": steps * int(entry["epoch"])} | entry for entry in result.history]
    return {
        "history": history,
        "diverged": result.diverged,
        "failed_run": failed,
        "seconds": result.seconds,
        "bleu": 0.0 if failed else bleu,
    }


@torch.no_grad()
def bleu_of(config: Config, model: Transformer, corpus: Corpus, device: torch.device) -> float:
    """sacreBLEU of the test pairs' translations against the text as it stands."""
    translations: dict[int, str] = {}
    for batch, rows in evaluation_text_batches(corpus.test, 4096, device=device):
        longest = min(int(1.2 * batch["source"].shape[1]) + 10, config.max_length)  # released: 1.2 times, plus 10
        tokens = model.generate(batch["source"], bos=BOS, eos=EOS, max_length=longest, beam=config.beam)
        translations |= {row: corpus.subwords.decode(own.tolist()) for row, own in zip(rows, tokens, strict=True)}
    hypotheses = [translations[row] for row in range(len(corpus.test))]
    return sacrebleu.corpus_bleu(hypotheses, [[target for _, target in corpus.data.test]]).score


# ---------------------------------------------------------------------------------------------- the run
def check_config(config: Config) -> None:
    """Mistakes that would otherwise show after minutes of work."""
    positive = (
        "steps",
        "meta_learning_rate",
        "eta",
        "gamma",
        "sgd_eta",
        "sgd_gamma",
        "seeds",
        "updates",
        "evaluations",
    )
    for name in (*positive, "max_tokens", "meta_tokens", "beam", "layers"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{EXPERIMENT}: `{name}` must be positive, got {getattr(config, name)}.")
    if config.updates % config.evaluations:
        raise ValueError(
            f"{EXPERIMENT}: `updates` must be a multiple of `evaluations`, got {config.updates} and "
            f"{config.evaluations}."
        )
    if config.variance_batches < 2:
        raise ValueError(f"{EXPERIMENT}: `variance_batches` must be at least 2, got {config.variance_batches}.")
    if not 0 <= config.warmup <= 1:
        raise ValueError(f"{EXPERIMENT}: `warmup` must lie in [0, 1], got {config.warmup}: a share of the updates.")
    if not config.optimizers:
        raise ValueError(f"{EXPERIMENT}: `optimizers` must name one, got none.")
    for optimizer in config.optimizers:
        rates = rates_of(config, optimizer)
        if not rates or min(rates) <= 0:
            raise ValueError(
                f"{EXPERIMENT}: learning rates must be positive, one or more, got {rates} for {optimizer}."
            )
    device_of(config.device, EXPERIMENT)


def check_batches(config: Config, corpus: Corpus) -> None:
    """The longest pairs must fit into those of training and of GradInit."""
    for name in ("max_tokens", "meta_tokens"):
        try:
            bucketed_batches(corpus.train, getattr(config, name), generator=torch.Generator())
        except ValueError as error:
            raise ValueError(f"{EXPERIMENT}, `{name}`: {error}") from error


def rates_of(config: Config, optimizer: OptimizerName) -> tuple[float, ...]:
    return config.learning_rates if optimizer == "adam" else config.sgd_learning_rates


def run(config: Config) -> dict[str, Any]:
    """Everything: compute what the folder does not hold yet, then table, figure and summary from its records."""
    check_config(config)
    console = Console()
    device = device_of(config.device, EXPERIMENT)
    folder = begin(EXPERIMENT, config, console)
    corpus = prepare(config)
    write_environment(folder, corpus.data.record(), device)
    console.print(f"Data: {corpus.data.identity}.")
    console.print(
        f"{corpus.subwords.vocabulary_size:,} sub-words; {len(corpus.train):,} training pairs of at most "
        f"{config.max_length}. A model that knows word frequencies alone: {corpus.unigram_loss:.2f} nats a token."
    )
    console.print(f"Device: {device_name(device)}. Run folder: {folder.folder}")
    check_batches(config, corpus)
    with make_progress(quiet=config.quiet) as progress:
        compute(config, folder, corpus, device, progress)
    save_scales(folder, "optimizer", "gradinit")
    environment = {
        "data": corpus.data.identity,
        "device": device_name(device),
        "unigram_loss": corpus.unigram_loss,
        "model": f"{config.layers}+{config.layers} layers of {config.dim} channels, {config.updates} updates",
    }
    summary = summarise(folder.records, [arm.name for arm in ARMS], config.optimizers) | environment
    save_figure(folder.folder / "figure.png", folder.records, summary)
    folder.finish(summary)
    print_report(console, summary)
    console.print(f"Records, figure.png and scales.safetensors: {folder.folder}")
    return summary


def repeated(best: dict[tuple[str, str], float], optimizer: str, arm: Arm) -> tuple[float, ...]:
    """Learning rates where the grid is not run: the arm's own best, or else Post-LN's for 'longer'; and warm-up's."""
    own = best.get((optimizer, arm.name), best.get((optimizer, "Post-LN")) if arm.extra else None)
    return tuple(dict.fromkeys(rate for rate in (own, best.get((optimizer, WITH_WARMUP))) if rate is not None))


def compute(config: Config, folder: Run, corpus: Corpus, device: torch.device, progress: Progress) -> None:
    """Each unit of work is a function of the configuration, recorded when it is whole: so a run can be resumed."""
    work: list[tuple[int, OptimizerName, Arm]] = [
        (seed, optimizer, arm)
        for seed in range(config.seeds)
        for optimizer in config.optimizers
        for arm in ARMS
        if seed == 0 or arm.carries_claim
    ]
    bar = progress.add_task("starting", total=float(len(work)))
    best: dict[tuple[str, str], float] = {}
    for done, (seed, optimizer, arm) in enumerate(work, start=1):
        key = {"optimizer": optimizer, "arm": arm.name, "seed": seed}
        label = f"{arm.name}, {optimizer}, seed {seed}"
        progress.update(bar, description=f"{label}: initialise")
        start = folder.find(kind="initialisation", **key)
        if start is None:
            tick = lambda _: progress.advance(bar, 0.2 / config.steps)  # noqa: E731
            record = run_initialisation(config, arm, optimizer, seed, corpus, device, tick)
            start = folder.append({"kind": "initialisation"} | key | record)
        cost = folder.find(kind="initialisation", optimizer=optimizer, arm=WITH_GRADINIT, seed=seed) or {}
        if "failed" not in start and not (arm.extra and "failed" in cost):  # which leaves no cost to make up for
            extra = extra_updates(config, cost["updates_worth"]) if arm.extra else 0
            whole_grid = seed == 0 and (arm.on_grid or config.whole_grid)
            rates = rates_of(config, optimizer) if whole_grid else repeated(best, optimizer, arm)
            trained = []
            for rate in rates:
                progress.update(bar, description=f"{label}: train at {rate:g}")
                record = folder.find(kind="training", learning_rate=rate, **key)
                if record is None:
                    checkpoint = folder.folder / f"{optimizer}-{ARMS.index(arm)}-{seed}-{rate:g}.checkpoint"
                    record = folder.append(
                        {"kind": "training", "learning_rate": rate, "extra_updates": extra}
                        | key
                        | run_training(config, arm, optimizer, rate, seed, corpus, device, start, extra, checkpoint)
                    )
                progress.advance(bar, 0.7 / len(rates))
                trained.append(record)
            if whole_grid:
                best[optimizer, arm.name] = best_learning_rate(trained)
        progress.update(bar, completed=float(done))


def main() -> None:
    end_well(lambda: run(parse(PRESETS, __doc__ or "")))


if __name__ == "__main__":
    main()
