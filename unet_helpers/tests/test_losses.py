import math

import monai.losses
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F

from unet_helpers.config import IGNORE, UserError
from unet_helpers.losses import SegmentationLoss, binary_cross_entropy, check_labels, cross_entropy, soft_dice_loss


def example(num_classes, batch=3, height=13, width=7, ignored=0.3, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, num_classes, height, width, generator=generator)
    target = torch.randint(max(num_classes, 2), (batch, height, width), generator=generator)
    target[torch.rand(target.shape, generator=generator) < ignored] = IGNORE
    return logits, target


def test_hand_computed_binary_case():
    logits = torch.tensor([[[[0.0, math.log(3.0), 50.0]]]])  # p = .5, .75, ignored
    target = torch.tensor([[[1, 0, IGNORE]]])
    bce = -(math.log(0.5) + math.log(0.25)) / 2
    dice = 1 - 2 * 0.5 / (0.5 + 0.75 + 1)
    assert binary_cross_entropy(logits, target).item() == pytest.approx(bce)
    assert soft_dice_loss(logits, target).item() == pytest.approx(dice)
    assert SegmentationLoss(1)(logits, target).item() == pytest.approx(bce + 0.5 * dice)
    assert SegmentationLoss(1, 2.0)(logits, target).item() == pytest.approx(bce + 2 * dice)


def test_hand_computed_three_classes_one_of_them_absent():
    logits = torch.tensor([[[0.0, 0.0], [0.0, math.log(2.0)], [0.0, 0.0]]])[
        ..., None
    ]  # (1, 3, 2, 1): 1/3 each; 1/4 1/2 1/4
    target = torch.tensor([[[0], [1]]])
    assert cross_entropy(logits, target).item() == pytest.approx((math.log(3) + math.log(2)) / 2)
    dice_0 = 1 - 2 * (1 / 3) / (1 / 3 + 1 / 4 + 1)
    dice_1 = 1 - 2 * (1 / 2) / (1 / 3 + 1 / 2 + 1)
    assert soft_dice_loss(logits, target).item() == pytest.approx((dice_0 + dice_1 + 0) / 3)


@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_binary_cross_entropy_equals_torch_and_smp(ignored):
    logits, target = example(1, ignored=ignored)
    valid = target != IGNORE
    expected = F.binary_cross_entropy_with_logits(logits[:, 0][valid], target[valid].float())
    torch.testing.assert_close(binary_cross_entropy(logits, target), expected)
    # smp averages over all pixels, valid or not.
    theirs = smp.losses.SoftBCEWithLogitsLoss(ignore_index=IGNORE)(logits, target[:, None].float())
    torch.testing.assert_close(binary_cross_entropy(logits, target) * valid.float().mean(), theirs)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_cross_entropy_equals_torch(num_classes):
    logits, target = example(num_classes)
    torch.testing.assert_close(cross_entropy(logits, target), F.cross_entropy(logits, target, ignore_index=IGNORE))


@pytest.mark.parametrize("num_classes", [1, 2, 4])
@pytest.mark.parametrize("absent", [False, True])
def test_soft_dice_equals_smp(num_classes, absent):
    logits, target = example(num_classes)
    if absent:
        target[target == 1] = 0
    mode = "binary" if num_classes == 1 else "multiclass"
    theirs = smp.losses.DiceLoss(mode, from_logits=True, ignore_index=IGNORE)(logits, target)
    torch.testing.assert_close(soft_dice_loss(logits, target), theirs)


@pytest.mark.parametrize("num_classes", [1, 3])
def test_soft_dice_equals_monai(num_classes):
    logits, target = example(num_classes, ignored=0)
    binary = num_classes == 1
    dice = monai.losses.DiceLoss(
        sigmoid=binary, softmax=not binary, to_onehot_y=not binary, batch=True, smooth_nr=0, smooth_dr=0
    )
    torch.testing.assert_close(soft_dice_loss(logits, target), dice(logits, target[:, None]))


@pytest.mark.parametrize("num_classes", [1, 3])
def test_gradients_equal_those_of_the_oracles_and_vanish_where_ignored(num_classes):
    logits, target = example(num_classes)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    SegmentationLoss(num_classes)(ours, target).backward()
    mode = "binary" if num_classes == 1 else "multiclass"
    valid = target != IGNORE
    if num_classes == 1:
        first = F.binary_cross_entropy_with_logits(theirs[:, 0][valid], target[valid].float())
    else:
        first = F.cross_entropy(theirs, target, ignore_index=IGNORE)
    (first + 0.5 * smp.losses.DiceLoss(mode, from_logits=True, ignore_index=IGNORE)(theirs, target)).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert (ours.grad.movedim(1, -1)[~valid] == 0).all()
    assert (ours.grad.movedim(1, -1)[valid] != 0).all()


@pytest.mark.parametrize("num_classes", [1, 3])
def test_what_stands_at_ignored_pixels_does_not_matter(num_classes):
    logits, target = example(num_classes)
    loss = SegmentationLoss(num_classes)
    expected = loss(logits, target)
    for value in (1e4, -math.inf, math.nan):
        changed = logits.clone()
        changed.movedim(1, -1)[target == IGNORE] = value
        changed.requires_grad_()
        result = loss(changed, target)
        result.backward()
        assert result.item() == expected.item()
        assert changed.grad.isfinite().all()


@pytest.mark.parametrize("num_classes", [1, 3])
def test_nothing_valid_gives_exactly_zero_and_zero_gradient(num_classes):
    logits, target = example(num_classes, ignored=1.1)
    logits.requires_grad_()
    for loss in (
        SegmentationLoss(num_classes),
        soft_dice_loss,
        binary_cross_entropy if num_classes == 1 else cross_entropy,
    ):
        logits.grad = None
        result = loss(logits, target)
        result.backward()
        assert result.item() == 0
        assert (logits.grad == 0).all()


@pytest.mark.parametrize("num_classes", [1, 3])
def test_huge_logits_stay_finite(num_classes):
    logits, target = example(num_classes)
    logits = (1e4 * logits).requires_grad_()
    result = SegmentationLoss(num_classes)(logits, target)
    result.backward()
    assert result.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("num_classes", [1, 3])
def test_no_foreground_still_has_a_gradient_towards_background(num_classes):
    logits, _ = example(num_classes)
    logits.requires_grad_()
    SegmentationLoss(num_classes)(logits, torch.zeros(3, 13, 7, dtype=torch.int64)).backward()
    foreground = logits.grad[:, -1]
    assert (foreground > 0).all()


@pytest.mark.parametrize("num_classes", [1, 3])
def test_gradcheck_in_double_precision(num_classes):
    logits, target = example(num_classes, batch=2, height=3, width=4)
    loss = SegmentationLoss(num_classes)
    assert torch.autograd.gradcheck(lambda z: loss(z, target), logits.double().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_are_computed_in_float32(dtype):
    logits, target = example(3, height=65, width=67)
    half = logits.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        result = SegmentationLoss(3)(half, target)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, SegmentationLoss(3)(half.float(), target), rtol=0, atol=0)


def parts(logits, target, cuts):
    """A batch divided among processes, each of which may get any number of images."""
    return list(zip(logits.detach().tensor_split(cuts), target.tensor_split(cuts), strict=True))


@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize("cuts", [[2], [1], [1, 2]])
def test_averaged_gradients_of_processes_equal_those_of_one_with_the_whole_batch(num_classes, cuts):
    logits, target = example(num_classes, batch=4)
    target[0, :10] = IGNORE  # very unequal numbers of valid pixels
    weight = torch.ones(1, *logits.shape[1:], requires_grad=True)  # a "network" of one layer
    loss = SegmentationLoss(num_classes)
    whole = loss(weight * logits, target)
    (expected,) = torch.autograd.grad(whole, weight)

    sums = [loss.sums(weight * z, y).detach() for z, y in parts(logits, target, cuts)]
    calls = []

    def reduce(local):
        calls.append(local)
        assert not local.requires_grad
        return torch.cat([torch.stack(sums).sum(0), torch.tensor([float(len(sums))])])

    gradients = []
    for (z, y), own in zip(parts(logits, target, cuts), sums, strict=True):
        result = loss(weight * z, y, reduce)
        torch.testing.assert_close(result, whole, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(calls[-1], torch.cat([own, torch.ones(1)]))
        gradients.append(torch.autograd.grad(result, weight)[0])
    torch.testing.assert_close(torch.stack(gradients).mean(0), expected)

    naive = torch.stack([torch.autograd.grad(loss(weight * z, y), weight)[0] for z, y in parts(logits, target, cuts)])
    assert not torch.allclose(naive.mean(0), expected, rtol=1e-2)  # i.e. the reduction is needed


def test_a_process_without_a_valid_pixel_takes_part():
    logits, target = example(1, batch=2)
    target[0] = IGNORE
    logits.requires_grad_()
    loss = SegmentationLoss(1)
    other = loss.sums(logits[1:], target[1:]).detach()
    result = loss(logits[:1], target[:1], lambda local: local + torch.cat([other, torch.ones(1)]))
    result.backward()
    torch.testing.assert_close(result, loss(logits, target))
    assert (logits.grad == 0).all()


def test_reduce_that_does_nothing_changes_nothing():
    logits, target = example(3)
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    first, second = SegmentationLoss(3)(a, target), SegmentationLoss(3)(b, target, lambda sums: sums)
    first.backward()
    second.backward()
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(a.grad, b.grad)


def test_sums_add_up_over_batches():
    logits, target = example(4, batch=5)
    loss = SegmentationLoss(4)
    total = sum(loss.sums(z, y).double() for z, y in parts(logits, target, [1, 3]))
    assert loss.sums(logits, target).shape == (2 + 3 * 4,)
    assert loss.sums(logits, target)[0] == (target != IGNORE).sum()
    torch.testing.assert_close(loss.from_sums(total).float(), loss(logits, target))


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (
            torch.zeros(2, 1, 4, 4),
            torch.zeros(2, 1, 4, 4, dtype=torch.int64),
            r"target has shape \(2, 1, 4, 4\).*squeeze",
        ),
        (
            torch.zeros(2, 4, 4),
            torch.zeros(2, 4, 4, dtype=torch.int64),
            r"logits have shape \(2, 4, 4\), expected \(batch, 1",
        ),
        (torch.zeros(2, 2, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64), r"expected \(batch, 1, height, width\)"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 5, dtype=torch.int64), r"target has shape \(2, 4, 5\), expected"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4), r"target is torch.float32.*target.long"),
        (
            torch.zeros(2, 1, 4, 4, dtype=torch.int64),
            torch.zeros(2, 4, 4, dtype=torch.int64),
            "expected floating point",
        ),
        (torch.zeros(2, 1, 4, 4), torch.full((2, 4, 4), 2), "holds the value 2, expected class indices 0 to 1"),
        (torch.zeros(2, 1, 4, 4), torch.full((2, 4, 4), -1), "holds the value -1"),
    ],
)
def test_wrong_input_ends_in_one_clear_line(logits, target, message):
    with pytest.raises(UserError, match=message) as error:
        SegmentationLoss(1)(logits, target)
    assert "\n" not in str(error.value)


def test_functions_refuse_the_other_kind_of_logits():
    target = torch.zeros(2, 4, 4, dtype=torch.int64)
    with pytest.raises(UserError, match="binary_cross_entropy"):
        cross_entropy(torch.zeros(2, 1, 4, 4), target)
    with pytest.raises(UserError, match="logits have shape"):
        binary_cross_entropy(torch.zeros(2, 3, 4, 4), target)
    with pytest.raises(UserError, match="expected \\(batch, classes, height, width\\)"):
        soft_dice_loss(torch.zeros(4, 4), target)


@pytest.mark.parametrize("settings", [(0,), (256,), (1, -0.5), (1, math.inf), (1, math.nan)])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(UserError, match="must be"):
        SegmentationLoss(*settings)


def test_class_weights_that_are_no_number_a_class_are_refused():
    for num_classes, weights in ((1, (1.0,)), (3, (1.0, 2.0))):
        with pytest.raises(UserError, match="class_weights"):
            SegmentationLoss(num_classes, class_weights=weights)


def test_class_weights_count_relative_to_each_other_however_small():
    logits, target = torch.randn(2, 3, 5, 4), torch.randint(0, 3, (2, 5, 4))
    plain, tiny = SegmentationLoss(3), SegmentationLoss(3, class_weights=(1e-5,) * 3)
    torch.testing.assert_close(tiny(logits, target), plain(logits, target))


def test_check_labels_takes_arrays_and_names_the_file():
    check_labels(np.array([[0, 1, 255]], np.uint8), 1)
    check_labels(np.array([[0, 2, 255]], np.uint8), 3)
    with pytest.raises(UserError, match=r"a.png holds the value 3"):
        check_labels(np.array([[0, 3, 255]], np.uint8), 3, "a.png")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_gives_the_same_loss_without_waiting_for_values():
    logits, target = example(3)
    on_gpu = logits.cuda(), target.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = SegmentationLoss(3)(*on_gpu, lambda sums: 1 * sums)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.cpu(), SegmentationLoss(3)(logits, target))


@pytest.mark.parametrize("num_classes", [1, 4])
def test_class_weights_equal_torch_and_reach_only_the_cross_entropy(num_classes):
    torch.manual_seed(2)
    logits = torch.randn(2, num_classes, 9, 7)
    target = torch.randint(0, max(2, num_classes), (2, 9, 7))
    target[0, :3] = IGNORE
    weights = (0.25, 3.0) if num_classes == 1 else (0.5, 0.0, 2.0, 1.0)
    several = logits if num_classes > 1 else torch.cat([torch.zeros_like(logits), logits], 1)  # softmax of (0, z)
    expected = torch.nn.functional.cross_entropy(several, target, torch.tensor(weights), ignore_index=IGNORE)
    only = SegmentationLoss(num_classes, dice_weight=0.0, class_weights=weights)
    torch.testing.assert_close(only(logits, target), expected)
    both = SegmentationLoss(num_classes, dice_weight=0.5, class_weights=weights)
    torch.testing.assert_close(both(logits, target), expected + 0.5 * soft_dice_loss(logits, target))
    halves = both.sums(logits[:1], target[:1]) + both.sums(logits[1:], target[1:])
    torch.testing.assert_close(both.from_sums(halves), both(logits, target))
    equal = SegmentationLoss(num_classes, class_weights=(2.0,) * len(weights))
    torch.testing.assert_close(equal(logits, target), SegmentationLoss(num_classes)(logits, target))
    assert both(logits, torch.full_like(target, IGNORE)) == 0
