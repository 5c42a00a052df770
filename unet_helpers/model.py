"""The U-Net, block by block: double convolution, down, up with its skip connection, and the network they make.

Ronneberger, Fischer and Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", 2015
(arXiv:1505.04597). `UNet(1, 2, padding="valid", norm="none")` is the paper's network exactly; the defaults are what is
used today: padding that keeps the size, and batch normalisation between every convolution and its activation.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from unet_helpers.activations import make_activation
from unet_helpers.config import ModelConfig, UserError, need


def make_norm(norm: str, channels: int) -> nn.Module:
    """Return the normalisation layer for `channels` feature maps: `none`, `batch` or `group`.

    The number of groups is a power of two that divides the channels, at most 8, and leaves at least two channels in
    each (a group of one channel at a single pixel would have nothing to normalise by).
    """
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
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
        self.act1 = make_activation(activation)
        self.conv2 = nn.Conv2d(out_channels, out_channels, **options)
        self.norm2 = make_norm(norm, out_channels)
        self.act2 = make_activation(activation)

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

    `transpose` learns the up-sampling (2×2, stride 2: every input pixel becomes four output pixels of its own).
    `bilinear` interpolates after a 1×1 convolution, which gives the same as the other way round (both are linear, and
    the weights of the interpolation add up to 1) for a quarter of the work.
    """

    def __init__(self, in_channels: int, out_channels: int, upsampling: str = "transpose", **options):
        super().__init__()
        if upsampling == "transpose":
            self.up = nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)
        else:
            self.up = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, kernel_size=1),
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            )
        self.conv = DoubleConv(2 * out_channels, out_channels, **options)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """Join x (B, in, H, W) and skip (B, out, at least 2H, at least 2W): the skip's channels come first."""
        x = self.up(x)
        skip = center_crop(skip, x.shape[-2:])
        return self.conv(torch.cat([skip, x], dim=1))


class UNet(nn.Module):
    """A U-Net with `len(widths)` levels: images (B, in_channels, H, W) to logits (B, num_classes, H', W').

    With padding `same`, H' = H and W' = W for any size: the image is extended at the bottom and on the right by
    repeating its last row and column until `stride` divides it, and the output is cut back. With `valid`, each output
    pixel has seen real pixels only and H' = `output_size(H)` is smaller: that of the largest fitting centre of the
    image, so `center_crop(mask, logits.shape[-2:])` is the matching target for any size.

    The settings are those of `config.ModelConfig`; dropout sets whole channels to 0 at the bottom during training.

    Attributes:
        stride: how many input pixels one pixel at the bottom stands for, along one side.
        border: by how many pixels the output is smaller on each side; 0 for `same`.
        receptive_field_radius: how far from an output pixel an input pixel may lie and still have a say in it
            (group normalisation's statistics, though, see the whole image).

    Raises:
        UserError: a setting is out of its range; or, in `forward`, an image is too small for `valid`.
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
        # The same sum, and 2^d - 1 more, as a pixel shares what it gets from below with its whole 2^d × 2^d block.
        # Interpolation looks one pixel further at each level below the first.
        self.receptive_field_radius = 7 * self.stride - 5 + (self.stride - 1 if upsampling == "bilinear" else 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        height, width = x.shape[-2:]
        if self.padding == "same":
            x = pad_to_multiple(x, self.stride)
        else:
            x = center_crop(x, [self.output_size(side) + 2 * self.border for side in (height, width)])
        x = self.stem(x)
        skips = []
        for down in self.downs:
            skips.append(x)
            x = down(x)
        x = self.dropout(x)
        for up in self.ups:
            x = up(x, skips.pop())
        return self.head(x)[..., :height, :width]

    def output_size(self, size: int) -> int:
        """Return the output's height (or width) for an input of that height (or width)."""
        if self.padding == "same":
            return size
        # b pixels out of the bottom become 2^d b - 4 (2^d - 1) on the way up, so outputs are 4 more than a multiple.
        output = (size - 2 * self.border - 4) // self.stride * self.stride + 4
        if output < 1:
            rule = f"at least {self.valid_input_size(1)} for valid padding and {len(self.downs) + 1} levels"
            raise UserError(f"an image side is {size} pixels, but it must be {rule}.")
        return output

    def valid_input_size(self, size: int) -> int:
        """Return the smallest input height (or width) that loses nothing to cropping and gives `size` or more out."""
        if self.padding == "same":
            return size
        return -((4 - size) // self.stride) * self.stride + 4 + 2 * self.border


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
    height, width = x.shape[-2:]
    if height % stride or width % stride:
        # Zeros would draw an edge there, and mirroring needs an image larger than what is added.
        x = F.pad(x, (0, -width % stride, 0, -height % stride), mode="replicate")
    return x


def initialise(module: nn.Module) -> None:
    """Draw a convolution's weights so that signals neither grow nor fade with depth (He et al., arXiv:1502.01852).

    In front of an activation, which keeps about half the signal's power, the variance is 2 / fan-in (ReLU's gain; the
    others' differ little). An up-convolution (each output pixel is fed by one pixel of each channel) and 1×1
    convolutions have no activation: 1 / fan-in. Biases start at 0.
    """
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        linear = isinstance(module, nn.ConvTranspose2d) or module.kernel_size == (1, 1)
        fan_in = module.in_channels if linear else module.in_channels * math.prod(module.kernel_size)
        nn.init.normal_(module.weight, std=math.sqrt((1 if linear else 2) / fan_in))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def build_model(config: ModelConfig) -> nn.Module:
    """Return the network `config` describes, with fresh weights: our `UNet`, or one of segmentation_models_pytorch.

    Both take images of any size and have `UNet`'s attributes. Raises `UserError` for a setting that cannot be met.
    """
    if config.architecture == "unet":
        own = ("in_channels", "num_classes", "widths", "padding", "norm", "activation", "upsampling", "dropout")
        return UNet(**{name: getattr(config, name) for name in own})
    from unet_helpers.pretrained import PretrainedNet  # here, because it takes seconds to import

    return PretrainedNet(config)


def count_parameters(model: nn.Module) -> int:
    """Return how many numbers training can change."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
