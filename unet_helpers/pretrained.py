"""Networks of segmentation_models_pytorch, made to behave like our own `UNet`, and the weights of their encoders.

The architectures and encoders are theirs (Iakubovskii, 2019, github.com/qubvel-org/segmentation_models.pytorch); what
is added here: any image size goes in and comes out, and whatever cannot be built or loaded ends in one clear line.
"""

import difflib
import logging
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from safetensors.torch import load_file
from torch import nn

from unet_helpers.config import ModelConfig, UserError, one_line
from unet_helpers.model import need, pad_to_multiple


class PretrainedNet(nn.Module):
    """The network `config` names: images (B, in_channels, H, W) to logits (B, num_classes, H, W) for any H and W.

    The image is extended at the bottom and on the right by repeating its last row and column until `stride` divides
    it, and the output is cut back. Of the settings, `architecture`, `encoder`, `encoder_weights`, `in_channels` and
    `num_classes` count; widths, padding, norm, activation, upsampling and dropout are the architecture's own.
    `encoder_weights` is None (random), `imagenet` (downloaded, or from the download cache), or a file
    (.safetensors, or .pth) with an encoder's state_dict as torchvision, timm or smp publish it for 3 channels; for
    other numbers of channels smp spreads the first convolution's weights over them.

    Attributes:
        net: the network as smp built it; `state_dict` has its keys with `net.` in front.
        padding, stride, border: as in `UNet`; the padding is `same`.
        receptive_field_radius: a guide for overlapping tiles only, four strides. What an encoder could see in theory is
            mostly the whole image; the weight it gives to what lies further away is small.

    Raises:
        UserError: architecture or encoder are unknown or do not go together, or the weights cannot be loaded.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        need(config.in_channels >= 1, "in_channels", config.in_channels, "at least 1")
        need(config.num_classes >= 1, "num_classes", config.num_classes, "1 (binary) or the number of classes")
        weights = config.encoder_weights
        self.stride = 128 if config.architecture == "PAN" else 32  # PAN halves the bottom of the encoder twice more
        self.padding, self.border, self.receptive_field_radius = "same", 0, 4 * self.stride
        self.net = build_smp(config, config.in_channels)
        if weights == "imagenet":
            self.net = build_smp(config, config.in_channels, weights)
        elif weights is not None:
            # The file is for 3 channels: it goes into an encoder for 3, which is adapted afterwards.
            encoder = build_smp(config, 3).encoder
            load_encoder(encoder, Path(weights))
            if config.in_channels != 3:
                adaptable = hasattr(encoder, "set_in_channels")
                need(adaptable, "in_channels", config.in_channels, "3 for weights of a timm encoder")
                encoder.set_in_channels(config.in_channels, pretrained=True)
            self.net.encoder = encoder
        try:  # some encoders are built for one image size, and find out only when they see another
            with torch.no_grad():
                self.eval()(torch.zeros(1, config.in_channels, 40, 200))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UserError(
                f"encoder {config.encoder} does not take images of any size in {config.architecture}; "
                f"choose another one ({one_line(error)[:160]})"
            ) from error
        self.train()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits as large as the image."""
        height, width = x.shape[-2:]
        return self.net(pad_to_multiple(x, self.stride))[..., :height, :width]

    def output_size(self, size: int) -> int:
        """Return `size`: the output is as large as the input."""
        return size

    def valid_input_size(self, size: int) -> int:
        """Return `size`: the output is as large as the input."""
        return size


def build_smp(config: ModelConfig, in_channels: int, weights: str | None = None) -> nn.Module:
    """Build the network with random weights, or with an encoder whose weights are downloaded."""
    names = [architecture.__name__ for architecture in smp.MODEL_ARCHITECTURES_MAPPING.values()]
    need(config.architecture in names, "architecture", config.architecture, f"unet (ours) or one of {', '.join(names)}")
    timm = config.encoder.startswith("tu-")
    similar = difflib.get_close_matches(config.encoder, smp.encoders.encoders) or ["resnet34", "efficientnet-b0"]
    rule = f"tu-NAME with a name of timm's, or one of segmentation_models_pytorch, such as {', '.join(similar)}"
    need(timm or config.encoder in smp.encoders.encoders, "encoder", config.encoder, rule)
    # Vision transformers are built for one image size unless told otherwise; no other encoder knows this option.
    options = {"dynamic_img_size": True} if config.architecture == "DPT" else {}
    logger = logging.getLogger("huggingface_hub")  # it reports each of its retries; one line from us is enough
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return smp.create_model(
            config.architecture,
            config.encoder,
            True if timm and weights else weights,
            in_channels=in_channels,
            classes=config.num_classes,
            **options,
        )
    # What is raised here has no common type: wrong pairs are KeyError, ValueError, RuntimeError, TypeError and more,
    # and a failed download is whatever the network library in use raises.
    except Exception as error:
        reason = f"({type(error).__name__}: {one_line(error)[:160]})"
        if weights is None:
            problem = f"architecture {config.architecture} cannot be built with encoder {config.encoder}"
        else:
            problem = (
                f"encoder_weights: the imagenet weights of {config.encoder} could not be loaded; connect to the "
                f"network, name a local weights file, or set it to null for random weights"
            )
        raise UserError(f"{problem} {reason}") from error
    finally:
        logger.setLevel(level)


def load_encoder(encoder: nn.Module, path: Path) -> None:
    """Load a weights file into an encoder for 3 channels; nothing in the file is executed."""
    if not path.is_file():
        raise UserError(f"encoder_weights: there is no file {path}; name a weights file, imagenet, or null.")
    try:
        # torch.load raises anything from EOFError to UnpicklingError for a file that is cut short or something else.
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path}: cannot be read as weights, it may be cut short or something else; get it again "
            f"({type(error).__name__}: {one_line(error)[:160]})"
        ) from error
    try:
        state = dict(state)
        if hasattr(encoder, "model"):  # timm's encoders stand one level deeper, and do not drop a classifier themselves
            state = {"model." + key.removeprefix("model."): value for key, value in state.items()}
            state = {key: value for key, value in state.items() if key in encoder.state_dict()}
        encoder.load_state_dict(state)
    except (RuntimeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: does not fit the encoder that is set ({one_line(error)[:160]})") from error
