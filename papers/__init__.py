"""Every initialiser behind one call: the four papers' methods, and the baselines they are compared with.

    from papers import METHODS, initialize

    initialize(model, "gradinit", loss_fn, batches, gamma=1.0)

A paper's package is imported when its method is first used, not before.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from common.batches import of_one_size
from common.functional import (
    check_bare,
    check_devices,
    check_loss,
    classification_loss,
    parameters_of,
    put_back_,
    unchanged_on_error,
)
from common.initializers import INITIALIZERS
from common.options import check_whole
from common.precision import full_precision
from common.types import Batch, InitResult, Params, UserLoss

__all__ = ["METHODS", "Method", "initialize", "method_of"]

DIMAML_STEPS = {"inner_steps": 20, "meta_steps": 100}
"""A short run of DIMAML, where nothing is said; released: 200 to 600 inner steps, 1500 to 3000 meta-steps. Ours."""
DIMAML_EVALUATIONS = 4
"""How often each of its trainings is evaluated, where nothing is said; released: 5 to 9 times. Ours."""

_OF_THE_CALL = {"model", "loss_fn", "batches", "batch", "generator", "progress"}


@dataclass(frozen=True, kw_only=True)
class Method:
    """What there is to know of an initialiser before it is used.

    Attributes:
        name: What `initialize` calls it.
        title: What tables call it.
        summary: What it does, in one sentence.
        reference: Where it was published; empty for what is no publication's.
        needs_data: Whether `batches` must be given.
        is_learned: Whether it descends on an objective, and so has a history: the papers' methods.
    """

    name: str
    title: str
    summary: str
    reference: str = ""
    needs_data: bool = False
    is_learned: bool = False

    def options(self) -> tuple[str, ...]:
        """Names of the options it has beside `generator` and `progress`. A paper's package is imported for it."""
        if self.name == "default":
            return ()
        return tuple(name for name in inspect.signature(_function_of(self)).parameters if name not in _OF_THE_CALL)

    def check_options(self, names: Iterable[str]) -> None:
        """Every name must be one of `options`.

        Raises:
            TypeError: One is none.
        """
        known = self.options()
        for name in names:
            if name not in known:
                raise TypeError(
                    f"initialize: an option of {self.name!r} must be one of {', '.join(known) or '(it has none)'}, got "
                    f"{name!r}.{_meant(name, known)}"
                )


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="default",
            title="Default",
            summary="Leaves the model's own initialisation as it is.",
        ),
        Method(
            name="xavier",
            title="Xavier",
            summary="Draws weights with variance 2/(fan-in + fan-out); biases 0.",
            reference="Glorot & Bengio, AISTATS 2010",
        ),
        Method(
            name="kaiming",
            title="Kaiming",
            summary="Draws weights with variance 2/fan-in, which ReLU networks keep; biases 0.",
            reference="He et al., ICCV 2015",
        ),
        Method(
            name="torch_default",
            title="PyTorch default",
            summary="Draws what torch's own layers start from: weights and biases uniform within ±1/√fan-in.",
        ),
        Method(
            name="orthogonal",
            title="Orthogonal",
            summary="Draws matrices with orthonormal rows or columns; biases 0.",
            reference="Saxe et al., ICLR 2014",
        ),
        Method(
            name="delta_orthogonal",
            title="Delta-orthogonal",
            summary="Makes convolutions orthogonal at their centre tap and zero elsewhere.",
            reference="Xiao et al., ICML 2018",
        ),
        Method(
            name="lsuv",
            title="LSUV",
            summary="Rescales orthogonal weights layer by layer until outputs have variance 1 on the first batch.",
            reference="Mishkin & Matas, ICLR 2016",
            needs_data=True,
        ),
        Method(
            name="fixup",
            title="Fixup",
            summary="Scales residual branches down by their number and zeroes their last layers, in place of norms.",
            reference="Zhang et al., ICLR 2019",
        ),
        Method(
            name="tfixup",
            title="T-Fixup",
            summary="Scales a Transformer's weights by its depth, so that it needs neither layer norm nor warm-up.",
            reference="Huang et al., ICML 2020",
        ),
        Method(
            name="skipinit",
            title="SkipInit",
            summary="Sets the multiplier of every residual branch to zero; all else as Kaiming.",
            reference="De & Smith, NeurIPS 2020",
        ),
        Method(
            name="rezero",
            title="ReZero",
            summary="Sets the multiplier of every residual branch to zero; all else as Xavier.",
            reference="Bachlechner et al., UAI 2021",
        ),
        Method(
            name="metainit",
            title="MetaInit",
            summary="Tunes the norm of every weight so that the gradient changes little along a step of descent.",
            reference="Dauphin & Schoenholz, NeurIPS 2019",
            is_learned=True,
        ),
        Method(
            name="gradinit",
            title="GradInit",
            summary="Learns one scale a tensor from the loss after a first step of training.",
            reference="Zhu et al., NeurIPS 2021",
            needs_data=True,
            is_learned=True,
        ),
        Method(
            name="nio",
            title="NIO",
            summary="Learns one scale a tensor so that the gradients of single examples agree.",
            reference="Yang et al., NeurIPS 2022",
            needs_data=True,
            is_learned=True,
        ),
        Method(
            name="dimaml",
            title="DIMAML",
            summary="Learns the law of every tensor's weights through short trainings, and draws from it.",
            reference="DIMAML, AutoML workshop at ICML 2021",
            needs_data=True,
            is_learned=True,
        ),
    )
}
"""Every initialiser by name."""


def method_of(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: There is none; the message lists those that there are.
    """
    if name not in METHODS:
        raise ValueError(
            f"initialize: `method` must be one of {', '.join(METHODS)}, got {name!r}.{_meant(name, tuple(METHODS))}"
        )
    return METHODS[name]


def initialize(
    model: nn.Module,
    method: str,
    loss_fn: UserLoss = classification_loss,
    batches: Iterable[Batch] | None = None,
    *,
    generator: torch.Generator | None = None,
    progress: bool = True,
    **options: Any,
) -> InitResult:
    """Initialise `model` in place by any method of `METHODS`.

    The defaults are those of the method's own function (`papers.gradinit.gradinit`, `common.initializers.kaiming_`, …),
    where its options are explained. Beyond them:

    - "lsuv" uses the first of `batches`, and runs the model on it as the loss does.
    - "metainit" runs on `batches`, as the others do. Its paper's own way, noise with random labels, is
      `batches=None` with the option `input_shape`.
    - "dimaml" trains on tasks cut out of `batches`, each of them within one pass, its held-out batches after its
      training batches; where a pass is too short, both parts are gone through again and again. Unless told, it makes
      100 meta-steps of 20 inner steps, evaluated four times. Given `task_sampler`, that is used and `batches` is not.
      Then one draw from the learned laws is written.

    On any error the model is bit-identical to what was passed in: parameters, buffers, modes; after success buffers and
    modes are. The global random state is as before in either case.

    Args:
        model: Any bare `nn.Module`. Frozen tensors (`requires_grad` False) are never written.
        method: A name of `METHODS`.
        loss_fn: `loss_fn(model, batch)`, mean over examples. Cross-entropy of `model(x)` by default.
        batches: Batches on the model's device; a collection or DataLoader is gone through again and again. None where
            the method needs none (`Method.needs_data`).
        generator: Of all that the method itself draws (GradInit and NIO draw nothing); None: one of its own, seeded
            with 0.
        progress: Show a progress bar, where there is anything to wait for.
        **options: The method's own, see `Method.options`.

    Returns:
        `scales`: new norm over old norm of every tensor that was written (infinite where the old one was 0; 1 where
        both are); `history`: a dictionary a step of a learned method, else empty; `skipped`: what was left alone, with
        the reason.

    Raises:
        TypeError: A wrapped model (DDP, FSDP, DataParallel, `torch.compile`); an option that the method does not have.
        ValueError: An unknown method; a model or batches that the method cannot use.
        NotFiniteError, DerivativeError: From the papers' methods, as their functions say.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> sorted(initialize(model, "kaiming").scales)
        ['0.bias', '0.weight', '2.bias', '2.weight']
    """
    chosen = method_of(method)
    chosen.check_options(options)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"initialize: `generator` must be a torch.Generator, got {type(generator).__name__}.")
    check_bare(model, method)
    given = {} if generator is None else {"generator": generator}
    if method == "dimaml":
        return _dimaml(model, loss_fn, batches, generator, progress, options)
    if chosen.is_learned:
        function = _function_of(chosen)
        given = given if "generator" in inspect.signature(function).parameters else {}
        return function(model, loss_fn, batches, progress=progress, **given, **options)
    return _baseline(chosen, model, loss_fn, batches, generator or torch.Generator().manual_seed(0), options)


# ---------------------------------------------------------------------------------------------- which function
def _function_of(method: Method) -> Callable[..., Any]:
    """A baseline, or a paper's entry point: which is named after the paper."""
    if method.is_learned:
        return getattr(import_module(f"papers.{method.name}"), method.name)
    return INITIALIZERS[method.name]


def _meant(name: object, known: Sequence[str]) -> str:
    close = get_close_matches(str(name), known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


# ---------------------------------------------------------------------------------------------- baselines
def _baseline(
    method: Method,
    model: nn.Module,
    loss_fn: UserLoss,
    batches: Iterable[Batch] | None,
    generator: torch.Generator,
    options: dict[str, Any],
) -> InitResult:
    if method.name == "default":
        return InitResult({})
    own: Params = dict(model.named_parameters())
    versions = {name: leaf._version for name, leaf in own.items()}
    device = next((leaf.device for leaf in own.values()), torch.device("cpu"))
    with _undone(model) as before, full_precision(device):
        if method.name == "lsuv":
            check_loss(loss_fn, "lsuv")
            batch = _first(model, batches, loss_fn)
            if loss_fn is not classification_loss:
                options = {"forward": loss_fn} | options
            INITIALIZERS["lsuv"](model, batch, generator=generator, **options)
        else:
            INITIALIZERS[method.name](model, generator=generator, **options)
        # a version counts writes, also of the values that were there, and also through views
        written = [name for name, leaf in own.items() if leaf._version != versions[name]]
        frozen = [name for name in written if not own[name].requires_grad]
        if frozen and method.name == "lsuv":
            raise ValueError(
                f"lsuv: every tensor that it sets must be trainable, got the frozen {frozen[0]!r}: the layers behind "
                "it are scaled to what comes out of it. Unfreeze it until the model is initialised."
            )
        with torch.no_grad():
            for name in frozen:
                put_back_(own[name], before[name])
        written = [name for name in written if name not in frozen]
        scales = {name: _ratio(before[name], own[name].detach()) for name in written}
    return InitResult(scales, [], {name: _why(leaf) for name, leaf in own.items() if name not in written})


def _why(leaf: Tensor) -> str:
    if not leaf.requires_grad:
        return "frozen: requires_grad is False"
    return "of a kind that the method has no rule for: stays as it is"


def _first(model: nn.Module, batches: Iterable[Batch] | None, loss_fn: UserLoss) -> Batch:
    """The batch that LSUV measures on."""
    if batches is None:
        raise ValueError(
            "lsuv: `batches` must be given, got None: outputs are measured on the first of them. Pass a DataLoader."
        )
    for batch in batches:
        if loss_fn is classification_loss and not isinstance(batch, (tuple, list)):
            raise ValueError(
                f"lsuv: the default loss needs batches (x, y), got {type(batch).__name__}. Pass a collection of "
                "batches, or your own `loss_fn(model, batch)` for other batches."
            )
        check_devices(model, batch, "lsuv")
        return batch
    raise ValueError("lsuv: `batches` must hold a batch, got none. Likely cause: an iterator that is used up.")


def _ratio(old: Tensor, new: Tensor) -> float:
    long = torch.promote_types(new.dtype, torch.float32)  # float16's squares overflow
    start, after = (torch.linalg.vector_norm(leaf.to(long)).item() for leaf in (old, new))
    return after / start if start else math.inf if after else 1.0


@contextmanager
def _undone(model: nn.Module) -> Iterator[Params]:
    """The global random state afterwards as before; on an error the parameters as well, whose copies it gives.

    Buffers and modes no baseline changes, but for LSUV, which restores them itself.
    """
    parameters: Params = dict(model.named_parameters())
    before = parameters_of(model)
    devices = sorted({leaf.device.index for leaf in parameters.values() if leaf.device.type == "cuda"})
    # a DataLoader draws from the global generator
    with unchanged_on_error(parameters.values()), torch.random.fork_rng(devices):
        yield before


# ---------------------------------------------------------------------------------------------- DIMAML
def _dimaml(
    model: nn.Module,
    loss_fn: UserLoss,
    batches: Iterable[Batch] | None,
    generator: torch.Generator | None,
    progress: bool,
    options: dict[str, Any],
) -> InitResult:
    """Learn the laws, and draw from them once."""
    from papers.dimaml import dimaml, evaluation_steps

    generator = torch.Generator().manual_seed(0) if generator is None else generator
    options = _with_schedule(DIMAML_STEPS | options)
    if "task_sampler" not in options:
        if batches is None:
            raise ValueError(
                "dimaml: `batches` must be given, got None: the objective is training on real examples. Pass a "
                "DataLoader with drop_last=True, or `task_sampler`."
            )
        N = options["inner_steps"]
        evaluations = len(evaluation_steps(N, options["eval_every"], options.get("first_evaluation")))
        options["task_sampler"] = _tasks_of(batches, N, evaluations)
    laws = dimaml(model, loss_fn, generator=generator, progress=progress, **options)
    drawn = laws.initialize_(model, generator)
    return InitResult(drawn.scales, laws.history, drawn.skipped)


def _with_schedule(options: dict[str, Any]) -> dict[str, Any]:
    """Evaluations at even distances that end at the last step, where nothing is said."""
    if "eval_every" in options:
        return options
    check_whole("dimaml", inner_steps=options["inner_steps"])
    N = options["inner_steps"]
    every = max(1, -(-N // DIMAML_EVALUATIONS))
    return {"eval_every": every, "first_evaluation": N % every or min(every, N)} | options


def _tasks_of(batches: Iterable[Batch], N: int, evaluations: int) -> Iterator[tuple[list[Batch], list[Batch]]]:
    """Tasks of N training batches and the held-out ones, each within one pass, so that the two share no examples.

    What is left of a pass after its last whole task is not used. A pass that is too short for one is divided in the
    same proportion, and both parts are gone through again and again.
    """
    whole = of_one_size(batches, "dimaml", "Use drop_last=True.")
    count = N + evaluations
    tasks = 0
    while True:
        before, one_pass = tasks, iter(whole)
        while part := list(islice(one_pass, count)):
            if len(part) < count and tasks > before:
                break
            yield _divided(part, N, evaluations)
            tasks += 1
        if tasks == before:
            raise ValueError(
                f"dimaml: `batches` must last for every meta-step, ended after {tasks} tasks of {count} batches. Pass "
                "a collection or DataLoader (gone through again and again), or fewer `meta_steps`."
            )


def _divided(part: list[Batch], N: int, evaluations: int) -> tuple[list[Batch], list[Batch]]:
    if len(part) == N + evaluations:
        return part[:N], part[N:]
    if len(part) < 2:
        raise ValueError(
            f"dimaml: `batches` must hold two batches or more, one to train on and one held out, got {len(part)}. "
            "Use smaller batches, or pass `task_sampler`."
        )
    held_out = max(1, len(part) * evaluations // (N + evaluations))
    return list(islice(cycle(part[:-held_out]), N)), list(islice(cycle(part[-held_out:]), evaluations))
