import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unet_helpers.activations import ACTIVATIONS, PySiLU, make_activation
from unet_helpers.config import UserError

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
    module = make_activation(name)
    assert isinstance(module, nn.Module)
    assert module is not make_activation(name)
    assert module(torch.tensor([-1.0, 2.0])).tolist() == pytest.approx(BY_HAND[name], abs=1e-6)


def test_the_settings_offer_the_same_names():
    from typing import get_args, get_type_hints

    from unet_helpers.config import ModelConfig

    assert set(get_args(get_type_hints(ModelConfig)["activation"])) == set(ACTIVATIONS) == set(BY_HAND)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"swish.*relu, leaky_relu, gelu, silu, mish, pysilu"):
        make_activation("swish")
