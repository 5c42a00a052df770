import copy
import math
from fractions import Fraction
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unet_helpers.config import ModelConfig, UserError
from unet_helpers.metrics import probabilities
from unet_helpers.model import (
    ACTIVATIONS,
    DoubleConv,
    Down,
    Ensemble,
    PySiLU,
    UNet,
    Up,
    build_model,
    center_crop,
    count_parameters,
    make_norm,
    pad_to_multiple,
)
from unet_helpers.prediction import predict_logits

PAPER = {"in_channels": 1, "num_classes": 2, "padding": "valid", "norm": "none"}


def small(**changes) -> UNet:
    torch.manual_seed(0)
    return UNet(**{"in_channels": 3, "num_classes": 2, "widths": (4, 6, 8), **changes})


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("num_classes", [1, 4])
def test_an_ensemble_of_unlike_networks_averages_probabilities_also_tile_by_tile(num_classes, padding):
    shallow, deep = small(num_classes=num_classes, widths=(4, 8)), small(num_classes=num_classes, padding=padding)
    networks = [shallow.eval(), deep.eval()]
    x, joined = torch.randn(1, 3, 150, 97), Ensemble(networks)
    with torch.inference_mode():
        seen = x[..., :148, :96]
        border = deep.valid_input_size(96) - 96 - deep.border  # what lies below and on the right; above, deep.border
        continued = np.pad(seen, [(0, 0), (0, 0), *[(deep.border, border)] * 2], "reflect")
        logits = shallow(seen), deep(torch.from_numpy(continued))[..., :148, :96]
        mean = sum(map(probabilities, logits)) / 2
        torch.testing.assert_close(probabilities(joined(seen)), mean)
        whole, tiled = (probabilities(predict_logits(joined, x, tile)) for tile in (1000, 70))
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)


def valid_output_by_walking(size: int, levels: int) -> int:
    """Follow one side through the network; 0 if it does not get through, or if pooling meets an odd number."""
    for _ in range(levels - 1):
        size -= 4
        if size < 2 or size % 2:
            return 0
        size //= 2
    size -= 4
    for _ in range(levels - 1):
        size = 2 * size - 4
    return max(size, 0)


def reference_forward(state: dict, x: torch.Tensor, levels: int, padding: int, norm: str, upsampling: str):
    """The network written down a second time, straight from the paper's figure 1, on tensors alone."""

    def double(x, name):
        for i in (1, 2):
            x = F.conv2d(x, state[f"{name}.conv{i}.weight"], state.get(f"{name}.conv{i}.bias"), padding=padding)
            if norm == "batch":
                mean, var = (state[f"{name}.norm{i}.running_{what}"][None, :, None, None] for what in ("mean", "var"))
                weight, bias = (state[f"{name}.norm{i}.{what}"][None, :, None, None] for what in ("weight", "bias"))
                x = (x - mean) / torch.sqrt(var + 1e-5) * weight + bias
            x = x.clamp(min=0)
        return x

    x = double(x, "stem")
    skips = [x]
    for i in range(levels - 1):
        x = double(F.max_pool2d(x, 2), f"downs.{i}.conv")
        skips.append(x)
    skips.pop()
    for i in range(levels - 1):
        if upsampling == "transpose":
            x = F.conv_transpose2d(x, state[f"ups.{i}.up.weight"], state[f"ups.{i}.up.bias"], stride=2)
        else:
            x = F.interpolate(x, scale_factor=2, mode="bilinear")  # the other way round than the module does it
            x = F.conv2d(x, state[f"ups.{i}.up.0.weight"], state[f"ups.{i}.up.0.bias"])
        skip = skips.pop()
        cut = (skip.shape[-1] - x.shape[-1]) // 2
        x = double(torch.cat([F.pad(skip, [-cut] * 4), x], 1), f"ups.{i}.conv")
    return F.conv2d(x, state["head.weight"], state["head.bias"])


def randomise(model: nn.Module) -> nn.Module:
    """Give every parameter and running statistic a value of its own, so that none can be mistaken for another."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.dtype.is_floating_point and tensor.ndim == 1:
            tensor.uniform_(-0.5, 1.0, generator=generator)
    return model


# ---- the paper


def test_the_papers_network_maps_572_to_388():
    with torch.device("meta"):
        model = UNet(**PAPER)
        assert model(torch.zeros(1, 1, 572, 572)).shape == (1, 2, 388, 388)
    assert (model.border, model.stride) == (92, 16)
    assert model.output_size(572) == 388
    assert model.valid_input_size(388) == 572


def test_the_papers_parameter_count_by_hand():
    conv = lambda inputs, outputs, side: inputs * outputs * side**2 + outputs  # noqa: E731
    total = conv(1, 64, 3) + conv(64, 64, 3)
    for fine in (64, 128, 256, 512):
        coarse = 2 * fine
        total += conv(fine, coarse, 3) + conv(coarse, coarse, 3)
        total += conv(coarse, fine, 2) + conv(coarse, fine, 3) + conv(fine, fine, 3)
    total += conv(64, 2, 1)
    with torch.device("meta"):
        model = UNet(**PAPER)
    assert total == 31_030_658
    assert count_parameters(model) == total
    assert (
        sum(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in model.modules()) == 23
    )  # the paper says so


def test_parameter_count_with_batch_normalisation_by_hand():
    # convolutions without bias, 2 numbers per channel and normalisation, up-convolution and head with bias
    by_hand = 3 * 4 * 9 + 4 * 4 * 9 + 2 * (4 + 4)
    by_hand += 4 * 6 * 9 + 6 * 6 * 9 + 2 * (6 + 6)
    by_hand += 6 * 4 * 4 + 4 + 8 * 4 * 9 + 4 * 4 * 9 + 2 * (4 + 4)
    by_hand += 4 * 1 + 1
    assert count_parameters(small(num_classes=1, widths=(4, 6), norm="batch")) == by_hand


def test_count_parameters_leaves_frozen_ones_out():
    layer = nn.Linear(3, 2)
    assert count_parameters(layer) == 8
    layer.bias.requires_grad_(False)
    assert count_parameters(layer) == 6


# ---- against a second implementation


@pytest.mark.parametrize("upsampling", ["transpose", "bilinear"])
@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize(("padding", "size"), [("same", 40), ("valid", 60)])
def test_output_equals_a_second_implementation(padding, size, norm, upsampling):
    model = randomise(small(padding=padding, norm=norm, upsampling=upsampling)).double().eval()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    expected = reference_forward(model.state_dict(), x, 3, int(padding == "same"), norm, upsampling)
    assert expected.abs().std() > 1e-3
    torch.testing.assert_close(model(x), expected)


def test_the_skips_channels_come_first():
    up = Up(4, 2, padding="same", norm="none", activation="relu")
    with torch.no_grad():
        for parameter in up.parameters():
            parameter.zero_()
        up.conv.conv1.weight[0, :2, 1, 1] = 1  # looks at the first two of the four joined channels only
        up.conv.conv2.weight[0, 0, 1, 1] = 1
    below, skip = torch.rand(1, 4, 3, 3), torch.rand(1, 2, 6, 6)
    torch.testing.assert_close(up(below, skip)[:, 0], skip.sum(1))


def test_down_halves_by_the_maximum():
    down = Down(1, 1, padding="same", norm="none", activation="relu")
    with torch.no_grad():
        for conv in (down.conv.conv1, down.conv.conv2):
            conv.weight.zero_()
            conv.bias.zero_()
            conv.weight[0, 0, 1, 1] = 1
    x = torch.tensor([[1.0, 2, 5, 0], [4, 3, 0, 0], [0, 0, 0, 9], [7, 0, 8, 0]])[None, None]
    assert down(x)[0, 0].tolist() == [[4, 5], [7, 9]]


# ---- sizes


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from(["transpose", "bilinear"]))
@settings(max_examples=25, deadline=None)
def test_same_padding_takes_any_size_and_gives_it_back(height, width, upsampling):
    with torch.device("meta"):
        model = UNet(2, 3, (2, 2, 2, 2), upsampling=upsampling).eval()
        assert model(torch.zeros(2, 2, height, width)).shape == (2, 3, height, width)
    assert model.output_size(height) == height == model.valid_input_size(height)


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
@pytest.mark.parametrize("size", [(1, 1), (67, 45), (3, 50), (17, 16)])
def test_odd_sizes_give_finite_numbers(size, norm):
    model = small(norm=norm).eval()
    assert model(torch.randn(1, 3, *size)).isfinite().all()


def test_padding_repeats_the_border_and_multiples_are_left_alone():
    x = torch.randn(2, 3, 5, 8)
    padded = pad_to_multiple(x, 4)
    assert padded.shape == (2, 3, 8, 8)
    assert torch.equal(padded[:, :, :5], x)
    assert torch.equal(padded[:, :, 5:], x[:, :, 4:].expand(-1, -1, 3, -1))
    assert pad_to_multiple(padded, 4) is padded


def test_a_padded_image_gives_what_the_padded_image_cropped_gives():
    model = small().eval()
    x = torch.randn(1, 3, 13, 10)
    by_hand = torch.cat([x, x[..., -1:, :].repeat(1, 1, 3, 1)], 2)
    by_hand = torch.cat([by_hand, by_hand[..., -1:].repeat(1, 1, 1, 2)], 3)
    torch.testing.assert_close(model(x), model(by_hand)[..., :13, :10])


@given(st.integers(1, 5), st.integers(1, 700))
@settings(max_examples=100, deadline=None)
def test_valid_sizes_are_those_of_walking_through_the_network(levels, size):
    with torch.device("meta"):
        model = UNet(1, 1, (1,) * levels, padding="valid")
    fits = [s for s in range(1, 900) if valid_output_by_walking(s, levels)]
    assert model.valid_input_size(1) == fits[0]
    wanted = min(s for s in fits if valid_output_by_walking(s, levels) >= size)
    assert model.valid_input_size(size) == wanted
    if size < fits[0]:
        with pytest.raises(UserError, match=rf"{size} pixels, but it must be at least {fits[0]} for valid padding"):
            model.output_size(size)
    else:
        assert model.output_size(size) == valid_output_by_walking(max(s for s in fits if s <= size), levels)


@pytest.mark.parametrize("size", [(44, 60), (45, 63), (47, 44)])
def test_valid_padding_uses_the_centre_of_sizes_that_do_not_fit(size):
    model = small(padding="valid", norm="none")
    x = torch.randn(1, 3, *size)
    out = model(x)
    assert out.shape[-2:] == tuple(model.output_size(side) for side in size)
    fitting = center_crop(x, [side // 4 * 4 for side in size])  # 44 and 60 fit; so does every multiple of 4 from 44 on
    assert torch.equal(out, model(fitting))


def test_valid_output_lies_in_the_middle_so_that_a_centrally_cropped_mask_matches():
    # A network that hands its input through the first skip: its output must be the input's own centre.
    model = UNet(1, 1, (1, 1, 1), padding="valid", norm="none")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.zero_()
            if name.endswith("weight") and "up.weight" not in name:
                parameter[:, 0, parameter.shape[2] // 2, parameter.shape[3] // 2] = 1
    for size in ((44, 48), (45, 51), (46, 47)):
        image = torch.rand(1, 1, *size)
        out = model(image)
        assert torch.equal(out, center_crop(image, out.shape[-2:]))


def test_too_small_an_image_for_valid_padding_names_the_smallest_size():
    with torch.device("meta"), pytest.raises(UserError, match="100 pixels, but it must be at least 188"):
        UNet(**PAPER)(torch.zeros(1, 1, 300, 100))


def test_center_crop_is_central_for_masks_images_and_feature_maps():
    mask = torch.arange(7 * 6).reshape(1, 7, 6)
    assert torch.equal(center_crop(mask, (3, 2)), mask[:, 2:5, 2:4])
    assert torch.equal(center_crop(mask, (4, 3)), mask[:, 1:5, 1:4])  # the odd one out goes at the bottom and right
    assert torch.equal(center_crop(mask, (7, 6)), mask)
    assert center_crop(torch.zeros(2, 3, 9, 9), (5, 7)).shape == (2, 3, 5, 7)
    with pytest.raises(UserError, match="8×6 pixels out of 7×6"):
        center_crop(mask, (8, 6))


# ---- what a pixel sees


def test_valid_output_equals_the_interior_of_the_same_padding_networks():
    valid, same = small(padding="valid", norm="none").double(), small(padding="same", norm="none").double()
    same.load_state_dict(valid.state_dict())
    image = torch.randn(1, 3, 160, 160, dtype=torch.float64)
    # Valid convolutions pool a grid that starts 2 pixels in, so tiles start 2 pixels after a multiple of the stride.
    start, size = 4 * 10 + 2, valid.valid_input_size(24)
    tile = valid(image[..., start : start + size, start : start + size])
    first = start + valid.border
    whole = same(image)[..., first : first + tile.shape[-2], first : first + tile.shape[-1]]
    assert min(first, 160 - first - tile.shape[-1]) >= same.receptive_field_radius
    torch.testing.assert_close(tile, whole)


def test_valid_tiles_a_multiple_of_the_stride_apart_are_the_untiled_output():
    model = small(padding="valid", norm="none").double()
    image = torch.randn(1, 3, 84, 84, dtype=torch.float64)
    whole = model(image)  # 44 × 44
    size = model.valid_input_size(24)
    for top in (0, 20):
        for left in (0, 20):
            tile = model(image[..., top : top + size, left : left + size])
            torch.testing.assert_close(tile, whole[..., top : top + 24, left : left + 24])


def farthest_influence(model: UNet, length: int) -> tuple[int, int]:
    """Return how far to the left and to the right of a pixel its gradient reaches, at most, measured.

    With positive weights and an image that rises to one side, pooling always passes on that side's pixel, so that the
    gradient shows the full reach there.
    """
    for name, parameter in model.named_parameters():
        nn.init.constant_(parameter, 0.1 if name.endswith("weight") else 0.0)
    model.double()
    reach = []
    for direction in (-1, 1):
        ramp = torch.linspace(1, 2, length, dtype=torch.float64)
        ramp = ramp if direction == 1 else ramp.flip(0)
        farthest = 0
        for pixel in range(length // 2, length // 2 + model.stride):
            image = ramp.repeat(1, 1, model.stride, 1).requires_grad_()
            model(image)[0, 0, 0, pixel].backward()
            seen = image.grad[0, 0].abs().sum(0).nonzero().flatten()
            farthest = max(farthest, direction * ((seen.max() if direction == 1 else seen.min()).item() - pixel))
        reach.append(farthest)
    return reach[0], reach[1]


@pytest.mark.parametrize("upsampling", ["transpose", "bilinear"])
@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_receptive_field_radius_is_how_far_gradients_reach(levels, upsampling):
    model = UNet(1, 1, (1,) * levels, norm="none", upsampling=upsampling)
    radius = model.receptive_field_radius
    assert farthest_influence(model, 2 * (radius + 3 * model.stride) // 8 * 8) == (radius, radius)


def test_the_papers_receptive_field():
    with torch.device("meta"):
        # 92 pixels that valid convolutions cost, and up to 15 more, by where in its 16 × 16 block a pixel lies
        assert UNet(**PAPER).receptive_field_radius == 107


# ---- blocks


@pytest.mark.parametrize(("norm", "kind"), [("none", nn.Identity), ("batch", nn.BatchNorm2d), ("group", nn.GroupNorm)])
def test_every_convolution_is_followed_by_its_normalisation_and_then_the_activation(norm, kind):
    model = small(norm=norm, activation="silu")
    called = []
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, inputs, output: called.append((module, inputs[0], output)))
    model(torch.randn(2, 3, 16, 16))
    convs = [i for i, (module, _, _) in enumerate(called) if getattr(module, "kernel_size", None) == (3, 3)]
    assert len(convs) == 10  # 5 double convolutions
    for i in convs:
        (conv, _, convolved), (normed, norm_in, norm_out), (activation, act_in, _) = called[i : i + 3]
        assert isinstance(normed, kind)
        assert isinstance(activation, nn.SiLU)
        assert norm_in is convolved
        assert act_in is norm_out
        assert (conv.bias is None) == (norm != "none")


@pytest.mark.parametrize(
    ("channels", "groups"), [(1, 1), (2, 1), (3, 1), (4, 2), (8, 4), (12, 2), (16, 8), (48, 8), (1024, 8)]
)
def test_group_normalisation_divides_any_number_of_channels(channels, groups):
    norm = make_norm("group", channels)
    assert (norm.num_groups, norm.num_channels) == (groups, channels)


def test_double_conv_sizes():
    x = torch.randn(2, 3, 9, 10)
    assert DoubleConv(3, 5)(x).shape == (2, 5, 9, 10)
    assert DoubleConv(3, 5, padding="valid")(x).shape == (2, 5, 5, 6)


def test_dropout_is_at_the_bottom_whole_channels_and_only_in_training():
    model = small(dropout=0.5)
    seen = {}
    model.dropout.register_forward_hook(lambda module, inputs, output: seen.update(before=inputs[0], after=output))
    x = torch.randn(8, 3, 16, 16)
    model(x)
    assert seen["before"].shape == (8, 8, 4, 4)
    kept = seen["after"].flatten(2).abs().sum(2) > 0
    alive = seen["before"].flatten(2).abs().sum(2) > 0
    assert 0.25 < kept[alive].float().mean() < 0.75
    torch.testing.assert_close(seen["after"][kept], 2 * seen["before"][kept])
    model.eval()
    assert torch.equal(model(x), model(x))


# ---- training


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("norm", "upsampling"), [("none", "transpose"), ("batch", "bilinear"), ("group", "transpose")])
def test_the_gradient_reaches_every_parameter(activation, norm, upsampling):
    model = small(widths=(8, 16, 16), norm=norm, upsampling=upsampling, activation=activation)
    model(torch.randn(2, 3, 24, 24)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_initial_weights_keep_the_size_of_the_signal(activation):
    torch.manual_seed(0)
    model = UNet(3, 4, (16, 32, 64, 128), norm="none", activation=activation)
    sizes = []
    for module in model.modules():
        if isinstance(module, DoubleConv):
            module.register_forward_hook(
                lambda module, inputs, output: sizes.append(output.square().mean().sqrt().item())
            )
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        logits = model(x)
    assert len(sizes) == 7
    assert all(0.2 < size < 4 for size in sizes), sizes
    assert 0.1 < logits.std() < 4


def test_the_seed_decides_the_weights():
    first, second = small(), small()
    torch.manual_seed(1)
    other = UNet(3, 2, (4, 6, 8))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.stem.conv1.weight, other.stem.conv1.weight)


def test_a_small_network_learns_one_batch_by_heart():
    torch.manual_seed(0)
    model = UNet(3, 1, (8, 16))
    images = torch.randn(2, 3, 16, 16)
    masks = (torch.rand(2, 1, 4, 4) > 0.5).float().repeat_interleave(4, 2).repeat_interleave(4, 3)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = F.binary_cross_entropy_with_logits(model(images), masks)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.05


def test_state_dict_round_trip_and_plain_keys():
    model, other = randomise(small()).eval(), UNet(3, 2, (4, 6, 8)).eval()
    x = torch.randn(1, 3, 20, 20)
    assert not torch.equal(model(x), other(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x), other(x))
    assert {key.split(".")[0] for key in model.state_dict()} == {"stem", "downs", "ups", "head"}


def test_channels_last_and_bfloat16_give_the_same_up_to_rounding():
    model = small(norm="batch", widths=(8, 16, 16)).eval()
    x = torch.randn(2, 3, 37, 41)
    expected = model(x)
    fast = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(fast(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = fast(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(rounded.float(), expected, rtol=0.1, atol=0.1)


def test_an_image_does_not_depend_on_the_others_of_its_batch():
    model = small().eval()
    x = torch.randn(3, 3, 21, 18)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)


def test_batch_normalisation_of_a_single_value_says_so():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        small(norm="batch").train()(torch.randn(1, 3, 4, 4))


# ---- settings


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("in_channels", 0), ("num_classes", 0), ("num_classes", -1), ("widths", ()), ("widths", (8, 0)),
        ("widths", (8, -4)), ("dropout", 1.0), ("dropout", -0.1), ("dropout", math.nan), ("padding", "full"),
        ("norm", "layer"), ("activation", "swish"), ("upsampling", "nearest"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named(setting, value):
    with pytest.raises(UserError, match=f"^{setting} is .*must be"):
        UNet(**{"widths": (4, 8), setting: value})
    with pytest.raises(UserError, match=f"^{setting} is .*must be"):
        build_model(ModelConfig(**{"widths": (4, 8), setting: value}))


def test_build_model_passes_every_setting_on():
    config = ModelConfig(
        in_channels=2, num_classes=5, widths=(4, 8), padding="valid", norm="group", activation="pysilu",
        upsampling="bilinear", dropout=0.25,
    )  # fmt: skip
    model = build_model(config)
    same = UNet(2, 5, (4, 8), "valid", "group", "pysilu", "bilinear", 0.25)
    assert str(model) == str(same)
    assert model.padding == "valid"


def test_the_default_configuration_has_fewer_than_600_000_parameters():
    assert count_parameters(build_model(ModelConfig())) < 600_000


# ---- activations

INF = math.inf
POINTS = [-1e6, -300.0, -20.0, -3.0, -2.0, -1.0, -0.999, -0.5, -1e-3, -1e-8, -1e-30, -1e-300, -0.0,
          0.0, 1e-300, 1e-8, 0.5, 1.0, 7.0, 300.0, 1e6]  # fmt: skip


def value_by_hand(x: float) -> float:
    return x if x >= 0 else float(Fraction(x) / (1 + Fraction(x) ** 2))


def slope_by_hand(x: float) -> float:
    return 1.0 if x >= 0 else float((1 - Fraction(x) ** 2) / (1 + Fraction(x) ** 2) ** 2)


def value_and_slope(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    y = PySiLU()(x)
    y.sum().backward()
    return y.detach(), x.grad


def test_value_and_gradient_follow_the_formula_at_and_around_zero():
    value, slope = value_and_slope(torch.tensor(POINTS, dtype=torch.float64))
    expected = torch.tensor([value_by_hand(x) for x in POINTS], dtype=torch.float64)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    expected = torch.tensor([slope_by_hand(x) for x in POINTS], dtype=torch.float64)
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=0)


@given(st.floats(-1e3, 1e3))
@settings(max_examples=200, deadline=None)
def test_value_and_gradient_follow_the_formula_anywhere(x):
    value, slope = value_and_slope(torch.tensor([x], dtype=torch.float64))
    assert value.item() == pytest.approx(value_by_hand(x), rel=1e-13, abs=1e-300)
    assert slope.item() == pytest.approx(slope_by_hand(x), rel=1e-9, abs=1e-15)


def test_known_values():
    x = torch.tensor([-2.0, -1.0, 0.0, 3.0])
    value, slope = value_and_slope(x)
    assert value.tolist() == pytest.approx([-0.4, -0.5, 0.0, 3.0])
    assert slope.tolist() == pytest.approx([-0.12, 0.0, 1.0, 1.0], abs=1e-7)


def test_gradcheck():
    x = torch.tensor([-300.0, -5.0, -1.0, -0.3, 0.2, 4.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(PySiLU(), (x,))


def test_both_sides_agree_at_zero():
    _, slope = value_and_slope(torch.tensor([-1e-9, -0.0, 0.0, 1e-9], dtype=torch.float64))
    assert slope.tolist() == [1.0] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_infinite_and_largest_inputs_give_no_nan(dtype):
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    value, slope = value_and_slope(torch.tensor([-INF, -largest, -tiny, 0, tiny, largest, INF], dtype=dtype))
    assert value.dtype == slope.dtype == dtype
    expected = [0, -1 / largest, -tiny, 0, tiny, largest, INF]
    # float32's own 1 / largest is below what x / (1 + x²) can hold: 0 instead of 3e-39
    assert value.tolist() == pytest.approx(expected, rel=5e-3 if dtype.itemsize == 2 else 1e-6, abs=3e-39)
    assert slope.tolist() == [0, 0, 1, 1, 1, 1, 1]


def test_a_gradient_from_above_is_multiplied():
    x = torch.tensor([-2.0, 3.0], requires_grad=True)
    (PySiLU()(x) * torch.tensor([10.0, -7.0])).sum().backward()
    assert x.grad.tolist() == pytest.approx([-1.2, -7.0])


def test_nan_stays_nan():
    assert PySiLU()(torch.tensor([math.nan])).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_right_where_the_square_would_overflow(dtype):
    x = torch.tensor([-60000.0, -1000.0, -300.0, -256.0, -17.0, -1.0, -0.01], dtype=dtype)
    value, slope = value_and_slope(x)
    expected = torch.tensor([value_by_hand(v) for v in x.tolist()], dtype=torch.float64).to(dtype)
    torch.testing.assert_close(value, expected, rtol=torch.finfo(dtype).eps, atol=6e-8)
    expected = torch.tensor([slope_by_hand(v) for v in x.tolist()], dtype=torch.float64).to(dtype)
    torch.testing.assert_close(slope, expected, rtol=torch.finfo(dtype).eps, atol=2e-7)


def test_under_autocast_it_works_in_the_type_it_gets_and_gradients_arrive():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3)
    images = torch.randn(2, 2, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = conv(images)
        before.retain_grad()
        after = PySiLU()(before)
    assert before.dtype == after.dtype == torch.bfloat16
    after.float().sum().backward()
    slopes = [slope_by_hand(v) for v in before.detach().flatten().tolist()]
    torch.testing.assert_close(before.grad.flatten().float(), torch.tensor(slopes).float(), rtol=1e-2, atol=1e-3)
    assert conv.weight.grad.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_under_autocast_it_gives_what_the_cpu_gives(dtype):
    x = torch.tensor([-INF, -60000.0, -300.0, -1.5, -0.0, 2.0, INF], dtype=dtype)
    value, slope = value_and_slope(x)
    leaf = x.cuda().requires_grad_()
    with torch.autocast("cuda", dtype=dtype):
        on_gpu = PySiLU()(leaf)
    on_gpu.sum().backward()
    torch.testing.assert_close(on_gpu.cpu(), value)
    torch.testing.assert_close(leaf.grad.cpu(), slope)


def test_it_keeps_shape_and_memory_format_and_leaves_its_input_alone():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    copy = x.clone()
    y = PySiLU()(x)
    assert y.shape == x.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, copy)


# What each does to -1 and 2, from its definition.
PHI = 0.5 * (1 + math.erf(2 / math.sqrt(2)))
BY_HAND = {
    "relu": (0.0, 2.0),
    "leaky_relu": (-0.01, 2.0),
    "gelu": (-(1 - 0.5 * (1 + math.erf(1 / math.sqrt(2)))), 2 * PHI),
    "silu": (-1 / (1 + math.e), 2 / (1 + math.exp(-2))),
    "mish": (-math.tanh(math.log1p(math.exp(-1))), 2 * math.tanh(math.log1p(math.exp(2)))),
    "pysilu": (-0.5, 2.0),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_each_name_gives_its_function_and_a_module_of_its_own(name):
    block = DoubleConv(3, 5, activation=name)
    module = block.act1
    assert isinstance(module, nn.Module)
    assert module is not block.act2
    assert type(module) is type(block.act2) is ACTIVATIONS[name]
    assert module(torch.tensor([-1.0, 2.0])).tolist() == pytest.approx(BY_HAND[name], abs=1e-6)


def test_the_settings_offer_the_same_names():
    assert set(get_args(get_type_hints(ModelConfig)["activation"])) == set(ACTIVATIONS) == set(BY_HAND)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"swish.*relu, leaky_relu, gelu, silu, mish, pysilu"):
        UNet(activation="swish")
