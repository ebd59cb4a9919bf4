"""In which precision derivatives are taken: full, or double."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from common.types import Params


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Gradients on, autocast off, float32 products in float32, and all as before afterwards.

    Initialisers run in the parameters' own precision: no TF32 on a GPU, no bfloat16 inside a CPU's matrix products.
    """
    cudnn = torch.backends.cudnn
    with ExitStack() as stack:
        try:
            if (before := torch.get_float32_matmul_precision()) != "highest":
                stack.callback(torch.set_float32_matmul_precision, before)
                torch.set_float32_matmul_precision("highest")
            if device.type == "cuda":
                stack.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
                cudnn.allow_tf32 = False  # pyright: ignore[reportAttributeAccessIssue]
        except RuntimeError:  # set by the newer `fp32_precision`, with which the older switches refuse to be mixed
            backends: Any = torch.backends
            for switch in (backends.mkldnn.matmul, backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn):
                stack.callback(setattr, switch, "fp32_precision", switch.fp32_precision)
                switch.fp32_precision = "ieee"
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def check_precision(params: Params, caller: str) -> None:
    """Higher derivatives need the digits of float32 at least.

    Raises:
        ValueError: A parameter in a shorter type.
    """
    for name, leaf in params.items():
        if leaf.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{caller}: parameters must be float32 or float64, got {leaf.dtype} for {name!r}. "
                "Initialise in float32 and convert afterwards: higher derivatives need the digits."
            )


class in_float64(TorchFunctionMode):  # noqa: N801 (a context manager reads like a function)
    """A context in which code that asks for a shorter floating type gets float64.

    Models of Hugging Face, for one, cast to float32 inside of some layers whatever their input is. Values are the same
    within float32's precision; derivatives can then be compared with finite differences.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _SHORTENING:
            return args[0].double()
        args = tuple(_lengthened(value) for value in args)
        kwargs = {name: _lengthened(value) for name, value in (kwargs or {}).items()}
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.dtype in _SHORTER:  # what a factory makes in the default type
            return func(*args, **kwargs, dtype=torch.float64) if func in _FROM_NUMBERS else result.double()
        return result


_SHORTER = (torch.float32, torch.float16, torch.bfloat16)
_FROM_NUMBERS = (torch.tensor, torch.full, torch.arange, torch.linspace, torch.logspace)  # which they would round
_SHORTENING = (Tensor.float, Tensor.half, Tensor.bfloat16)


def _lengthened(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _SHORTER else value
