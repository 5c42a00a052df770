from pathlib import Path

import pytest
import torch

from unet_helpers.config import AugmentationConfig, Config, DataConfig, ModelConfig, TrainingConfig
from unet_helpers.training import train

SMALL_ENCODER = "tu-mobilenetv3_small_050"  # of smp's encoders; a fortieth of resnet18


def make_small_config() -> Config:
    """A network that trains in a second: two epochs of three steps on 64-pixel retinas."""
    return Config(
        seed=3,
        data=DataConfig(sample_images=(5, 3, 3), sample_size=64),
        augmentation=AugmentationConfig(patch_size=32),
        model=ModelConfig(widths=(4, 8)),
        training=TrainingConfig(epochs=2, steps_per_epoch=3, batch_size=4, device="cpu", precision="fp32"),
    )


@pytest.fixture
def small_config() -> Config:
    return make_small_config()


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory) -> Path:
    """A finished run of `make_small_config`; tests must not change it."""
    run = tmp_path_factory.mktemp("runs") / "small"
    train(make_small_config(), run, quiet=True)
    return run


@pytest.fixture(scope="session")
def three_classes(tmp_path_factory) -> Path:
    """A finished run that tells arteries from veins, trained until it finds all three classes; not to be changed."""
    config, run = make_small_config(), tmp_path_factory.mktemp("runs") / "three"
    config.data.labels, config.model.num_classes = "artery_vein", 3
    config.training.epochs, config.training.steps_per_epoch, config.training.ema_decay = 2, 20, 0.8
    config.training.learning_rate, config.training.class_weights = 1e-2, (1.0, 12.0, 6.0)
    config.training.dice_weight = 0.0
    train(config, run, quiet=True)
    return run


@pytest.fixture(autouse=True, scope="session")
def few_threads():
    """Tiny tensors are slower on many threads, and reproducibility is promised for equal numbers of them."""
    torch.set_num_threads(1)
