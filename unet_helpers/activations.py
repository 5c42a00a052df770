"""The non-linearities a network can be built with, by name, and our own among them: PySiLU.

Below 0 it is a dip that reaches -1/2 at x = -1 and fades to 0 like 1/x: smooth at 0 and never quite dead on the
negative side, as SiLU is, but without an exponential.
"""

import torch
from torch import nn

from unet_helpers.config import need


class _PySiLUFunction(torch.autograd.Function):
    """Value and gradient written out by hand: x⁺ + x⁻ q with q = 1 / (1 + x⁻²), and q (2 q - 1).

    Left to autograd, `where(x < 0, x / (1 + x * x), x)` gives NaN for -inf and a NaN gradient for +inf, overflows in
    half precision from |x| = 256 on, and keeps several intermediate results for the backward pass. Here only the input
    is kept, nothing is computed in half precision, and q is 0 where x² overflows.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        negative = _negative_part(x)
        return x.clamp(min=0) + (negative / (1 + negative * negative)).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        q = _negative_part(x).square().add_(1).reciprocal_()
        # (1 - x²) / (1 + x²)² = (2 - 1/q) q², which is 1 for x >= 0 too, where q = 1.
        slope = q.mul(2).sub_(1).mul_(q)
        return gradient * slope.to(gradient.dtype)


def _negative_part(x: torch.Tensor) -> torch.Tensor:
    """Return min(x, 0), in float32 at least, with the lowest finite number for -inf (as inf · 0 would be NaN)."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return wide.clamp(-torch.finfo(wide.dtype).max, 0)


class PySiLU(nn.Module):
    """x for x >= 0 and x / (1 + x²) below, in shape and (floating) dtype of the input; 0 at -inf, and NaN stays NaN.

    The gradient is 1 for x >= 0 (both sides agree at 0) and (1 - x²) / (1 + x²)² below.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the function's values."""
        return _PySiLUFunction.apply(x)


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,  # slope .01 below 0
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "pysilu": PySiLU,
}


def make_activation(name: str) -> nn.Module:
    """Return a new activation module by its name in `ACTIVATIONS`; raise `UserError` for any other name.

    None of them works in place, so that what a hook sees on the layer before is what that layer computed.
    """
    need(name in ACTIVATIONS, "activation", name, f"one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()
