import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from unet_helpers.config import ModelConfig, UserError
from unet_helpers.model import UNet, build_model
from unet_helpers.pretrained import PretrainedNet, load_encoder, smp


def config(**changes) -> ModelConfig:
    return ModelConfig(**{"architecture": "Unet", "encoder": "resnet18", "num_classes": 2, **changes})


@pytest.fixture(scope="module")
def model() -> PretrainedNet:
    return build_model(config()).eval()


@given(st.integers(1, 80), st.integers(1, 80))
@settings(max_examples=10, deadline=None)
def test_any_size_goes_in_and_comes_out(model, height, width):
    with torch.no_grad():
        out = model(torch.randn(1, 3, height, width))
    assert out.shape == (1, 2, height, width)
    assert out.isfinite().all()
    assert model.output_size(height) == height == model.valid_input_size(height)


def test_the_image_is_extended_at_the_bottom_and_right_and_the_output_cut_there(model):
    x = torch.randn(1, 3, 30, 50)
    extended = torch.cat([x, x[..., -1:, :].repeat(1, 1, 2, 1)], 2)
    extended = torch.cat([extended, extended[..., -1:].repeat(1, 1, 1, 14)], 3)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.net(extended)[..., :30, :50])


def test_it_is_smps_network_and_gives_its_logits(model):
    plain = smp.create_model("Unet", "resnet18", None, in_channels=3, classes=2).eval()
    plain.load_state_dict({key.removeprefix("net."): value for key, value in model.state_dict().items()})
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("architecture", ["DeepLabV3", "PAN"])
def test_other_architectures_take_any_size_too(architecture):
    model = build_model(config(architecture=architecture, in_channels=1)).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 1, 37, 70)).shape == (1, 2, 37, 70)


def test_ours_and_theirs_have_the_same_attributes(model):
    ours = UNet(widths=(4, 8))
    for name in ("padding", "stride", "border", "receptive_field_radius", "output_size", "valid_input_size"):
        assert type(getattr(ours, name)) is type(getattr(model, name))
    assert model.training is False
    assert build_model(config()).training is True


def test_the_same_seed_gives_the_same_weights():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_model(config()).state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize(("encoder", "suffix"), [("resnet18", ".pth"), ("tu-resnet18", ".safetensors")])
def test_a_local_weights_file_fills_the_encoder(tmp_path, encoder, suffix):
    from torchvision.models import resnet18

    published = resnet18(weights=None)  # with a classifier, as published files have it
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(published.state_dict(), path)
    else:
        save_file(published.state_dict(), path)
    filled = build_model(config(encoder=encoder, encoder_weights=str(path))).net.encoder
    inner = getattr(filled, "model", filled)
    assert torch.equal(inner.layer3[1].conv2.weight, published.layer3[1].conv2.weight)
    assert torch.equal(inner.conv1.weight, published.conv1.weight)


@pytest.mark.parametrize("encoder", ["resnet18", "tu-resnet18"])
def test_of_a_runs_weights_the_encoder_alone_is_taken(tmp_path, encoder):
    torch.manual_seed(1)
    trained = build_model(config(encoder=encoder, full_resolution_skip=True))
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    torch.manual_seed(2)
    fresh = build_model(config(encoder=encoder))
    torch.manual_seed(2)
    filled = build_model(config(encoder=encoder, encoder_weights=str(tmp_path / "model.safetensors")))
    expected = trained.state_dict()
    for key, value in filled.state_dict().items():
        origin = expected[key] if key.startswith("net.encoder.") else fresh.state_dict()[key]
        assert torch.equal(value, origin), key


def test_the_full_resolution_skip_carries_what_half_size_loses():
    """A checkerboard of single pixels vanishes in every 2×2 block's mean, but not in the skip at full size."""
    net = build_model(config(full_resolution_skip=True)).eval()
    with torch.no_grad():
        assert net(torch.randn(1, 3, 33, 50)).shape == (1, 2, 33, 50)
        x, changed = torch.zeros(2, 1, 3, 64, 64)
        changed[..., 31, 31] = 1.0
        decoded = net.net.decoder(net.net.encoder(x))
        parts = [
            net.net.segmentation_head(net.join(torch.cat([net.detail(image), decoded], 1))) for image in (x, changed)
        ]
        torch.testing.assert_close(net(x), parts[0])
        rows, columns = torch.nonzero((parts[1] - parts[0])[0, 0], as_tuple=True)
    # Four 3×3 convolutions and smp's 3×3 head, at full size: five pixels either way, and no more.
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (26, 36, 26, 36)
    assert set(build_model(config()).state_dict()) < set(net.state_dict())


def one_line_about(changes: dict, match: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        build_model(config(**changes))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_wrong_names_are_named():
    one_line_about({"architecture": "UNet"}, "architecture is UNet, but it must be unet .*Unet, UnetPlusPlus")
    one_line_about({"encoder": "resnet_34"}, "encoder is resnet_34.*resnet34")
    one_line_about({"encoder": "tu-no-such-thing"}, "Unet.*tu-no-such-thing")
    for elsewhere in (
        "tu-hf-hub:someone/x",
        "tu-local-dir:/tmp",
    ):  # a stranger's run would fetch, or read, what it names
        one_line_about({"encoder": elsewhere}, f"encoder is {elsewhere}")
    one_line_about({"architecture": "DPT"}, "DPT cannot be built with encoder resnet18.*tu-")
    one_line_about({"num_classes": 0}, "num_classes")
    one_line_about({"in_channels": 0}, "in_channels")


def test_wrong_weights_files_are_named(model, tmp_path):
    def refused(name: str, problem: str, encoder=model.net.encoder) -> None:
        with pytest.raises(UserError, match=f"{name}: {problem}") as error:
            load_encoder(encoder, tmp_path / name)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500

    weights = model.net.encoder.state_dict()
    save_file(weights, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    one_line_about({"encoder": "resnet34", "encoder_weights": str(tmp_path / "whole.safetensors")}, "does not fit")
    (tmp_path / "cut.safetensors").write_bytes(whole[:-1000])
    refused("cut.safetensors", "cannot be read")

    save_file({**weights, "conv1.weight": torch.zeros(64, 4, 7, 7)}, tmp_path / "shape.safetensors")
    refused("shape.safetensors", "does not fit")
    for name, content in (
        ("list.pth", [1, 2]),
        ("tensor.pth", torch.zeros(2)),
        ("keys.pth", {1: 2}),
        ("empty.pth", {}),
    ):
        torch.save(content, tmp_path / name)
        refused(name, "does not fit")
        refused(name, "does not fit", smp.encoders.get_encoder("tu-resnet18"))
    (tmp_path / "cut.pth").write_bytes((tmp_path / "tensor.pth").read_bytes()[:-200])
    refused("cut.pth", "cannot be read")
    (tmp_path / "text.pth").write_text("not weights")
    refused("text.pth", "cannot be read")

    one_line_about({"encoder_weights": str(tmp_path / "absent.pth")}, "no file .*absent.pth")
    with pytest.raises(UserError, match="no file"):
        load_encoder(model.net.encoder, tmp_path)


def test_weights_that_cannot_be_downloaded_say_what_to_do(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(smp.encoders, "hf_hub_download", no_network)
    one_line_about({"encoder_weights": "imagenet"}, "imagenet weights of resnet18 could not .*network.*local.*null")


def test_downloaded_weights_fill_the_encoder(model, monkeypatch, tmp_path):
    published = model.net.encoder.state_dict()
    save_file(published, tmp_path / "model.safetensors")
    monkeypatch.setattr(smp.encoders, "hf_hub_download", lambda repo, filename, **kwargs: str(tmp_path / filename))
    filled = build_model(config(encoder_weights="imagenet")).net.encoder
    assert torch.equal(filled.layer4[0].conv1.weight, published["layer4.0.conv1.weight"])


def test_an_encoder_for_one_image_size_is_refused():
    one_line_about({"encoder": "tu-swin_tiny_patch4_window7_224"}, "does not take images of any size")
