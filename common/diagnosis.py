"""Which layer an error comes from, and the way out."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb

from torch import nn

from common.convolution import mapped_problems
from common.types import DerivativeError

# What torch says where it cannot follow; what that means, and what to do instead.
_LIMITS: dict[str, str] = {
    r"setup_context": (
        "its autograd.Function is of the old form. Give it a static `setup_context`, and `forward` without `ctx`"
    ),
    r"once_differentiable": (
        "its autograd.Function is differentiable once only. Write its backward in differentiable operations, without "
        "`once_differentiable`"
    ),
    r"saved tensor hooks|use_reentrant": (
        "it recomputes activations (checkpointing), when the parameters of the call are gone. Turn activation "
        "checkpointing off; micro-batches bound memory instead"
    ),
    r"data pointer of Tensor that doesn't have storage": (
        "it reads values outside of torch (through numpy, most often), which torch.func cannot follow. Write "
        "it in torch's operations"
    ),
    r"forward AD with|ZeroTensors": "an operator in it has no forward-mode formula",
    r"leaf Variable that requires grad.*in-place|mutate a captured Tensor": (
        "it changes a tensor in place. Change a copy, or register the tensor as a buffer"
    ),
    r"derivative for .* is not implemented|backward.* not implemented for|not implemented for sparse|"
    r"not (twice )?differentiable|order derivatives": (
        "an operator in it has no derivative of this order. Write it in elementary operations"
    ),
}

# The same, under vmap: elsewhere these words are of other things.
_VMAP_LIMITS: dict[str, str] = {
    r"generate_vmap_rule": (
        "its autograd.Function has no rule for vmap. Set `generate_vmap_rule = True`, or use "
        "group_gradients(mode='loop') or 'auto'"
    ),
    r"\.item\(\) on a Tensor|data-dependent|dynamic shape|vmap: |inplace arithmetic.*vmap|[Bb]atching rule|"
    r"stack expects each tensor to be equal size": (
        "it does what vmap cannot follow (control flow or shapes that depend on data, most often). Use "
        "group_gradients(mode='loop') or 'auto'"
    ),
}


def way_out(message: str, *, mapped: bool = False) -> str | None:
    """What an error of torch's means for a layer, and what to do about it; None where it is not one of these."""
    for pattern, meaning in (_LIMITS | (_VMAP_LIMITS if mapped else {})).items():
        if re.search(pattern, message):
            return meaning
    return None


def label(name: str, module: nn.Module) -> str:
    return f"Layer {name!r} ({type(module).__name__})" if name else f"The model itself ({type(module).__name__})"


@contextmanager
def explained(model: nn.Module) -> Iterator[None]:
    """Errors of a forward pass of `model` name the layer that raised; torch's own limits become `DerivativeError`."""
    try:
        yield
    except DerivativeError:
        raise
    except Exception as error:
        where = _raising_layer(error, model)
        meaning = way_out(str(error), mapped=bool(mapped_problems())) if isinstance(error, RuntimeError) else None
        if meaning is not None:
            raise DerivativeError(f"{where or 'The loss function'}: {meaning}. Torch says: {error}") from error
        if where is not None:
            error.add_note(f"Raised in {where}.")
        raise


def _raising_layer(error: Exception, model: nn.Module) -> str | None:
    """The innermost module of `model` whose code was running."""
    names = {id(module): name.removeprefix("model").removeprefix(".") for name, module in model.named_modules()}
    del names[id(model)]  # the wrapper around model and loss
    found = None
    for frame, _ in walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and id(module) in names:
            found = label(names[id(module)], module)
    return found
