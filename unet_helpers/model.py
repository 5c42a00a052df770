"""The U-Net, block by block: activations, double convolution, down, up with its skip connection, and the network.

Source: Ronneberger et al. 2015, arXiv:1505.04597. `UNet(1, 2, padding="valid", norm="none")` is the paper's network
but for its drop-out; the defaults are what is used today: padding that keeps the size, and batch normalisation.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn

from unet_helpers.config import ModelConfig, UserError, need, one_line
from unet_helpers.system import memory_format, read_tensors


class _PySiLUFunction(torch.autograd.Function):
    """Value and gradient written out by hand: x⁺ + x⁻ q with q = 1 / (1 + x⁻²), and q (2 q - 1).

    Left to autograd, `where(x < 0, x / (1 + x * x), x)` gives NaN for -inf, a NaN gradient for +inf, overflows in half
    precision from |x| = 256 on, and keeps intermediate results. Here q is 0 where x² overflows, and only x is kept.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        negative = _negative_part(x)
        return x.clamp(min=0) + (negative / (1 + negative * negative)).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        q = _negative_part(*ctx.saved_tensors).square().add_(1).reciprocal_()
        # (1 - x²) / (1 + x²)² = (2 - 1/q) q², which is 1 for x >= 0 too, where q = 1.
        return gradient * q.mul(2).sub_(1).mul_(q).to(gradient.dtype)


def _negative_part(x: torch.Tensor) -> torch.Tensor:
    """Return min(x, 0), in float32 at least, with the lowest finite number for -inf (as inf · 0 would be NaN)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.clamp(-torch.finfo(wide.dtype).max, 0)


class PySiLU(nn.Module):
    """x for x >= 0 and x / (1 + x²) below: a dip to -1/2 that fades as 1/x (github.com/AllenWrong/From-Scratch, 2023).

    In shape and (floating) dtype of the input; 0 at -inf, and NaN stays NaN. Gradient: 1, and (1 - x²) / (1 + x²)².
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the function's values."""
        return _PySiLUFunction.apply(x)


# None works in place, so that what a hook sees on the layer before is what that layer computed.
ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "gelu": nn.GELU, "silu": nn.SiLU, "mish": nn.Mish}
ACTIVATIONS["pysilu"] = PySiLU


def make_norm(norm: str, channels: int) -> nn.Module:
    """Return the normalisation layer for `channels` feature maps: `none`, `batch` or `group`."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        # A power of two, at most 8, that leaves two or more channels to a group: one at a single pixel has no spread.
        return nn.GroupNorm(max(1, math.gcd(16, channels) // 2), channels)
    return nn.Identity()


class DoubleConv(nn.Module):
    """Twice: 3×3 convolution, normalisation, activation. (B, in, H, W) -> (B, out, H, W), or H-4, W-4 if `valid`."""

    def __init__(self, in_channels: int, out_channels: int, padding="same", norm="batch", activation="relu"):
        super().__init__()
        # A normalisation subtracts the mean and adds its own offset, so a bias in front of it has no effect.
        options = {"kernel_size": 3, "padding": 1 if padding == "same" else 0, "bias": norm == "none"}
        self.conv1 = nn.Conv2d(in_channels, out_channels, **options)
        self.norm1 = make_norm(norm, out_channels)
        self.act1 = ACTIVATIONS[activation]()
        self.conv2 = nn.Conv2d(out_channels, out_channels, **options)
        self.norm2 = make_norm(norm, out_channels)
        self.act2 = ACTIVATIONS[activation]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the feature maps."""
        x = self.act1(self.norm1(self.conv1(x)))
        return self.act2(self.norm2(self.conv2(x)))


class Down(nn.Module):
    """One step down: 2×2 max pooling halves height and width, then a double convolution."""

    def __init__(self, in_channels: int, out_channels: int, **options):
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.conv = DoubleConv(in_channels, out_channels, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in, H, W) to (B, out, H/2, W/2), or H/2-4, W/2-4 if `valid`."""
        return self.conv(self.pool(x))


class Up(nn.Module):
    """One step up: double height and width, put the skip connection beside the result, then a double convolution.

    `transpose` learns the up-sampling (2×2, stride 2: every input pixel becomes four of its own). `bilinear`
    interpolates after a 1×1 convolution: the same as before it, as both are linear, for a quarter of the work.
    """

    def __init__(self, in_channels: int, out_channels: int, upsampling: str = "transpose", **options):
        super().__init__()
        if upsampling == "transpose":
            self.up = nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)
        else:
            mix = nn.Conv2d(in_channels, out_channels, kernel_size=1)
            self.up = nn.Sequential(mix, nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
        self.conv = DoubleConv(2 * out_channels, out_channels, **options)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """Join x (B, in, H, W) and skip (B, out, at least 2H, at least 2W): the skip's channels come first."""
        x = self.up(x)
        return self.conv(torch.cat([center_crop(skip, x.shape[-2:]), x], dim=1))


class UNet(nn.Module):
    """A U-Net with `len(widths)` levels: images (B, in_channels, H, W) to logits (B, num_classes, H', W').

    With padding `same`, H' = H and W' = W for any size: `pad_to_multiple` extends the image, and the output is cut
    back. With `valid`, each output pixel has seen real pixels only and H' = `output_size(H)` is smaller: that of the
    image's largest fitting centre, so `center_crop(mask, logits.shape[-2:])` is the matching target for any size.
    Raises `UserError` for a setting out of range (see `config.ModelConfig`) and for an image too small for `valid`.

    Attributes:
        stride: how many input pixels one pixel at the bottom stands for, along one side.
        border: by how many pixels the output is smaller on each side; 0 for `same`.
        receptive_field_radius: how far off an input pixel may lie that has a say in an output pixel (group norm aside).
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1,
        widths: Sequence[int] = (64, 128, 256, 512, 1024),
        padding: str = "same",
        norm: str = "batch",
        activation: str = "relu",
        upsampling: str = "transpose",
        dropout: float = 0.0,
    ):
        super().__init__()
        need(in_channels >= 1, "in_channels", in_channels, "at least 1")
        need(num_classes >= 1, "num_classes", num_classes, "1 (binary) or the number of classes")
        need(len(widths) >= 1 and min(widths) >= 1, "widths", widths, "one positive number a level")
        need(padding in ("same", "valid"), "padding", padding, "same or valid")
        need(norm in ("none", "batch", "group"), "norm", norm, "none, batch or group")
        need(upsampling in ("transpose", "bilinear"), "upsampling", upsampling, "transpose or bilinear")
        need(0 <= dropout < 1, "dropout", dropout, "at least 0 and below 1")
        need(activation in ACTIVATIONS, "activation", activation, f"one of {', '.join(ACTIVATIONS)}")

        steps = list(pairwise(widths))
        options = {"padding": padding, "norm": norm, "activation": activation}
        self.stem = DoubleConv(in_channels, widths[0], **options)
        self.downs = nn.ModuleList(Down(fine, coarse, **options) for fine, coarse in steps)
        self.dropout = nn.Dropout2d(dropout)
        self.ups = nn.ModuleList(Up(coarse, fine, upsampling, **options) for fine, coarse in reversed(steps))
        self.head = nn.Conv2d(widths[0], num_classes, kernel_size=1)
        self.apply(initialise)

        self.padding = padding
        self.stride = 2 ** len(steps)
        # Two 3×3 convolutions cost 2 pixels a side, and one pixel at level l is 2^l input pixels wide. Summed over the
        # way down, the bottom and the way up: 2 (2^d - 1) + 2 · 2^d + 2 (2^d - 1) = 6 · 2^d - 4, the paper's 92.
        self.border = 6 * self.stride - 4 if padding == "valid" else 0
        # That, and 2^d - 1 more, as a pixel shares what it gets from below with its whole 2^d × 2^d block, and as many
        # for interpolation, which looks one pixel further at each level below the first.
        self.receptive_field_radius = 7 * self.stride - 5 + (self.stride - 1 if upsampling == "bilinear" else 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        height, width = x.shape[-2:]
        if self.padding == "same":
            x = pad_to_multiple(x, self.stride)
        else:
            x = center_crop(x, [self.output_size(side) + 2 * self.border for side in (height, width)])
        skips = [self.stem(x)]
        for down in self.downs:
            skips.append(down(skips[-1]))
        x = self.dropout(skips.pop())
        for up in self.ups:
            x = up(x, skips.pop())
        return self.head(x)[..., :height, :width]

    def output_size(self, size: int) -> int:
        """Return the output's height (or width) for an input of that height (or width)."""
        if self.padding == "same":
            return size
        # b pixels out of the bottom become 2^d b - 4 (2^d - 1) on the way up, so outputs are 4 more than a multiple.
        output = (size - 2 * self.border - 4) // self.stride * self.stride + 4
        rule = f"at least {self.valid_input_size(1)} for valid padding and {len(self.downs) + 1} levels"
        need(output >= 1, "an image side", f"{size} pixels", rule)
        return output

    def valid_input_size(self, size: int) -> int:
        """Return the smallest input height (or width) that loses nothing to cropping and gives `size` or more out."""
        if self.padding == "same":
            return size
        return math.ceil((size - 4) / self.stride) * self.stride + 4 + 2 * self.border


def center_crop(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Cut the middle `size` = (height, width) out of the last two axes: feature maps, images and masks alike.

    Where an odd number has to go, one more goes at the bottom or on the right. Raises `UserError` if x is smaller.
    """
    top, left = ((have - want) // 2 for have, want in zip(x.shape[-2:], size, strict=True))
    if top < 0 or left < 0:
        raise UserError(f"cannot cut {size[0]}×{size[1]} pixels out of {x.shape[-2]}×{x.shape[-1]}")
    return x[..., top : top + size[0], left : left + size[1]]


def pad_to_multiple(x: torch.Tensor, stride: int) -> torch.Tensor:
    """Repeat the last row and column of (B, C, H, W) until `stride` divides height and width."""
    bottom, right = (-side % stride for side in x.shape[-2:])
    # Zeros would draw an edge there, and mirroring needs an image larger than what is added.
    return nn.functional.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x


def forward_whole(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits at the size of the images; for valid convolutions the image is first continued by mirroring."""
    images = images.contiguous(memory_format=memory_format(images.device))
    if not model.border:
        return model(images).float()
    height, width = images.shape[-2:]
    # What is left over comes last, so that every image and every tile starts on the same pooling grid.
    below, right = (model.valid_input_size(side) - side - model.border for side in (height, width))
    return model(mirror_border(images, model.border, right, model.border, below))[..., :height, :width].float()


def mirror_border(images: torch.Tensor, left: int, right: int, top: int, bottom: int) -> torch.Tensor:
    """Continue images (B, C, H, W) beyond their border by mirroring, as often as the border's width asks for."""
    sides = zip(images.shape[-2:], ((top, bottom), (left, right)), strict=True)  # torch's own mirrors only once
    rows, columns = (torch.from_numpy(np.pad(np.arange(side), pad, mode="reflect")) for side, pad in sides)
    return images[..., rows, :][..., columns]


class Ensemble(nn.Module):
    """Several networks as one, whose logits stand for the mean of their probabilities, at the size of the images."""

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        self.networks, self.padding, self.border = nn.ModuleList(networks), "same", 0
        self.stride = math.lcm(*(network.stride for network in networks))
        self.receptive_field_radius = max(network.receptive_field_radius for network in networks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (B, K, H, W)."""
        logits = torch.stack([forward_whole(network, x) for network in self.networks])
        return logits.sigmoid().mean(0).logit() if logits.shape[2] == 1 else logits.softmax(2).mean(0).log()


def initialise(module: nn.Module) -> None:
    """Draw a convolution's weights so that signals neither grow nor fade with depth (He et al., arXiv:1502.01852).

    In front of an activation, which keeps about half the power, the variance is 2 / fan-in (ReLU's gain; the others'
    differ little), else (1×1, and up-convolutions, where one pixel feeds each output pixel) 1 / fan-in. Biases are 0.
    """
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        linear = isinstance(module, nn.ConvTranspose2d) or module.kernel_size == (1, 1)
        gain, area = (1, 1) if linear else (2, math.prod(module.kernel_size))
        nn.init.normal_(module.weight, std=math.sqrt(gain / (module.in_channels * area)))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def build_model(config: ModelConfig) -> nn.Module:
    """Return `config`'s network, a `UNet` or `PretrainedNet`; `UserError` for a setting that cannot be met."""
    if config.architecture == "unet":
        own = ("in_channels", "num_classes", "widths", "padding", "norm", "activation", "upsampling", "dropout")
        model = UNet(**{name: getattr(config, name) for name in own})
    else:
        from unet_helpers.pretrained import PretrainedNet  # here, because it takes seconds to import

        model = PretrainedNet(config)
    if config.weights is not None:
        try:
            model.load_state_dict(read_tensors(Path(config.weights))[0])
        except RuntimeError as error:
            raise UserError(f"{config.weights}: does not fit the model that is set: {one_line(error)}") from None
    return model


def count_parameters(model: nn.Module) -> int:
    """Return how many numbers training can change."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
