"""Networks of segmentation_models_pytorch, made to behave like our own `UNet`, and the weights of their encoders.

The architectures are theirs (Iakubovskii 2019, github.com/qubvel-org/segmentation_models.pytorch); added here: any
image size goes in and comes out, and whatever cannot be built or loaded ends in one clear line.
"""

import difflib
import logging
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from safetensors.torch import load_file
from torch import nn

from unet_helpers.config import ModelConfig, UserError, need, one_line
from unet_helpers.model import DoubleConv, initialise, pad_to_multiple

logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports each of its retries; our one line is enough


class PretrainedNet(nn.Module):
    """The network `config` names: images (B, in_channels, H, W) to logits (B, num_classes, H, W) for any H and W.

    The encoder's weights are None (random), `imagenet` (downloaded, or from the download cache), or a file (.pth or
    .safetensors) with its state_dict as torchvision, timm or smp publish it, or of a run, whose encoder alone is taken.
    `UserError` if they cannot be loaded, or architecture and encoder are unknown or do not go together.

    Attributes are those of `UNet` with `same` padding, `net`, the network as smp built it, and with the full-resolution
    skip `detail` and `join`: smp's encoders see the image at half size first, so its `Unet` has no skip connection at
    full size; here a double convolution of the image is one, joined to the decoder's end. `receptive_field_radius` is
    for overlapping tiles only: most encoders see the whole image, but give little weight to what is far off.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        need(config.in_channels >= 1, "in_channels", config.in_channels, "at least 1")
        need(config.num_classes >= 1, "num_classes", config.num_classes, "1 (binary) or the number of classes")
        self.stride = 128 if config.architecture == "PAN" else 32  # PAN stops at 16, then halves three times more
        self.padding, self.border, self.receptive_field_radius = "same", 0, 4 * self.stride
        self.net = build_smp(config)
        if config.encoder_weights == "imagenet":
            self.net = build_smp(config, "imagenet")  # what fails now is the download, not the pair
        elif config.encoder_weights is not None:
            load_encoder(self.net.encoder, Path(config.encoder_weights))
        self.detail = self.join = None
        if config.full_resolution_skip:
            width = self.net.segmentation_head[0].in_channels
            blocks = DoubleConv(config.in_channels, width), DoubleConv(2 * width, width)
            self.detail, self.join = (block.apply(initialise) for block in blocks)
        try:  # some encoders are built for one image size, and find out only when they see another
            with torch.no_grad():
                self.eval()(torch.zeros(1, config.in_channels, 40, 200))
        except (RuntimeError, AssertionError, ValueError) as error:
            problem = f"encoder {config.encoder} does not take images of any size; choose another one"
            raise UserError(f"{problem} {_because(error)}") from error
        self.train()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits as large as the image."""
        height, width = x.shape[-2:]
        x = pad_to_multiple(x, self.stride)
        if self.detail is None:
            logits = self.net(x)
        else:
            decoded = self.net.decoder(self.net.encoder(x))
            logits = self.net.segmentation_head(self.join(torch.cat([self.detail(x), decoded], dim=1)))
        return logits[..., :height, :width]

    def output_size(self, size: int) -> int:
        """Return `size`: the output is as large as the input."""
        return size

    valid_input_size = output_size


def build_smp(config: ModelConfig, weights: str | None = None) -> nn.Module:
    """Build the network with random weights, or with an encoder whose weights are downloaded."""
    names = [architecture.__name__ for architecture in smp.MODEL_ARCHITECTURES_MAPPING.values()]
    need(config.architecture in names, "architecture", config.architecture, f"unet (ours) or one of {', '.join(names)}")
    timm, known = config.encoder.startswith("tu-") and ":" not in config.encoder, smp.encoders.encoders
    similar = difflib.get_close_matches(config.encoder, known) or ["resnet34", "efficientnet-b0"]
    rule = f"tu-NAME with a name of timm's, or one of segmentation_models_pytorch, such as {', '.join(similar)}"
    need(timm or config.encoder in known, "encoder", config.encoder, rule)
    options = {"in_channels": config.in_channels, "classes": config.num_classes}
    if config.architecture == "DPT":  # its vision transformers are built for one image size unless told otherwise
        options["dynamic_img_size"] = True
    try:
        return smp.create_model(config.architecture, config.encoder, True if timm and weights else weights, **options)
    except Exception as error:  # of no common type, neither for wrong pairs nor for a failed download
        problem = f"architecture {config.architecture} cannot be built with encoder {config.encoder}"
        if weights:
            remedy = "connect to the network, name a local weights file, or set it to null for random weights"
            problem = f"encoder_weights: the imagenet weights of {config.encoder} could not be loaded; {remedy}"
        raise UserError(f"{problem} {_because(error)}") from error


def load_encoder(encoder: nn.Module, path: Path) -> None:
    """Load a weights file into an encoder; nothing in the file is executed."""
    if not path.is_file():
        raise UserError(f"encoder_weights: there is no file {path}; name a weights file, imagenet, or null.")
    problem = "cannot be read as weights, it may be cut short or something else; get it again"
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        problem = "does not fit the encoder that is set"
        own = {key.removeprefix("net.encoder."): value for key, value in state.items() if key.startswith("net.encoder")}
        state = own or dict(state)
        if hasattr(encoder, "model"):  # timm's encoders stand one level deeper, and do not drop a classifier themselves
            state = {"model." + key.removeprefix("model."): value for key, value in state.items()}
            state = {key: value for key, value in state.items() if key in encoder.state_dict()}
        encoder.load_state_dict(state)
    except Exception as error:  # torch.load raises anything from EOFError to UnpicklingError
        raise UserError(f"{path}: {problem} {_because(error)}") from error


def _because(error: Exception) -> str:
    return f"({type(error).__name__}: {one_line(error)[:160]})"
