"""Autograd functions that several test modules use."""

from torch.autograd import Function


class Cube(Function):
    """x³, right to every order in reverse mode, without a forward-mode formula."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, h):
        return 3 * ctx.saved_tensors[0] ** 2 * h
