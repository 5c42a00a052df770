import dataclasses

import pytest
import yaml

from unet_helpers.config import (
    RULES,
    SECTIONS,
    Config,
    DataConfig,
    UserError,
    check_config,
    dump_config,
    from_dict,
    load_config,
    to_dict,
)


def test_a_configuration_survives_the_way_through_yaml(tmp_path):
    config = Config(seed=7, data=DataConfig(name="drive", sample_images=(1, 2, 3)))
    config.training.steps_per_epoch = None
    config.model.widths = (4, 8)
    config.data.palette = ("#000000", "#ff007f")
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config


def test_settings_left_out_take_their_defaults():
    config = from_dict({"training": {"epochs": 3}}, "here")
    expected = Config()
    expected.training.epochs = 3
    assert config == expected


def test_yaml_holds_every_setting():
    values = yaml.safe_load(dump_config(Config()))
    for section in dataclasses.fields(Config):
        if section.name != "seed":
            names = {field.name for field in dataclasses.fields(getattr(Config(), section.name))}
            assert set(values[section.name]) == names
    assert to_dict(Config()) == values


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"training": {"epoch": 3}}, ["training", "epoch"]),
        ({"training": {"epochs": "three"}}, ["training.epochs", "three"]),
        ({"training": {"epochs": 2.5}}, ["training.epochs", "2.5"]),
        ({"train": {}}, ["`train` is no setting"]),
        ({"data": 3}, ["`data` must hold"]),
        ({"model": {"norm": "batchnorm"}}, ["model.norm", "batchnorm", "group"]),
        ({"model": {"widths": [8, "a"]}}, ["model.widths", "a"]),
        ({"training": {"learning_rate": -1.0}}, ["training.learning_rate", "positive"]),
        ({"training": {"learning_rate": float("nan")}}, ["training.learning_rate", "positive"]),
        ({"training": {"steps_per_epoch": 0}}, ["training.steps_per_epoch"]),
        ({"training": {"warmup": 1.0}}, ["training.warmup"]),
        ({"augmentation": {"scale": [2.0, 1.0]}}, ["augmentation.scale"]),
        ({"augmentation": {"patch_size": 0}}, ["augmentation.patch_size"]),
        ({"augmentation": {"patch_size": [64, 0]}}, ["augmentation.patch_size", "[64, 0]"]),
        ({"augmentation": {"patch_size": [64]}}, ["augmentation.patch_size"]),
        ({"data": {"folds": 1}}, ["data.folds"]),
        ({"data": {"palette": ["#000000", "red"]}}, ["data.palette", "red", "#00ff7f"]),
        ({"data": {"palette": ["#000000", "#FF0000"]}}, ["data.palette"]),
        ({"data": {"palette": ["#000000", "#ff0000", "#000000"]}}, ["data.palette", "once"]),
        ({"data": {"palette": [f"#{value:06x}" for value in range(255)]}}, ["data.palette", "254"]),
        ({"data": {"palette": []}}, ["data.palette"]),
        ({"data": {"folds": 5, "fold": 5}}, ["data.fold", "4"]),
        ({"data": {"val_share": 1.0}}, ["data.val_share"]),
        ({"data": {"test_share": 2.5}}, ["data.test_share"]),
        ({"data": {"longest_side": 10}}, ["data.longest_side"]),
        ({"training": {"class_weights": [1.0, 1.0, 1.0]}}, ["training.class_weights", "2 numbers"]),
        ({"model": {"num_classes": 3}, "training": {"class_weights": [1, -1, 1]}}, ["training.class_weights"]),
        ({"model": {"widths": []}}, ["model.widths"]),
        ({"model": {"num_classes": 0}}, ["model.num_classes"]),
        ({"data": {"train_limit": 0}}, ["data.train_limit", "all"]),
        ({"data": {"normalisation": "batch"}}, ["data.normalisation", "imagenet"]),
        ({"training": {"encoder_rate": 0.1}}, ["training.encoder_rate", "unet"]),
        ({"model": {"architecture": "Unet"}, "training": {"encoder_frozen": 1.5}}, ["training.encoder_frozen"]),
        ({"model": {"architecture": "FPN", "full_resolution_skip": True}}, ["model.full_resolution_skip", "Unet"]),
        ({"model": {"full_resolution_skip": True}}, ["model.full_resolution_skip", "Unet"]),
        ({"seed": -1}, ["seed"]),
    ],
)
def test_wrong_settings_end_in_one_line_that_names_them(settings, words):
    with pytest.raises(UserError) as caught:
        from_dict(settings, "my.yaml")
    message = str(caught.value)
    assert message.startswith("my.yaml: ")
    assert "\n" not in message
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    "text", ["", "just words", "[1, 2]", "a: [", "\x00", "!!python/object/apply:os.system ['true']"]
)
def test_a_file_that_holds_no_settings_is_refused_by_name(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml"):
        load_config(tmp_path / "c.yaml")


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml"):
        load_config(tmp_path / "none.yaml")


def test_the_defaults_are_valid():
    check_config(Config())


def test_shares_may_be_nothing():
    check_config(Config(data=DataConfig(val_share=0.0, test_share=0.0)))


@pytest.mark.parametrize(
    ("section", "values", "word"),
    [
        ("training", {"epochs": None}, "training.epochs"),
        ("training", {"learning_rate": None}, "training.learning_rate"),
        ("augmentation", {"gamma": 1.0}, "augmentation.gamma"),
        ("augmentation", {"scale": None}, "augmentation.scale"),
        ("augmentation", {"flips": None}, r"augmentation\.flips is null, but it must be given"),
        ("training", {"encoder_frozen": 0.5}, "it must be 0.0 for `unet`"),  # and not null, which is refused
        ("data", {"val_share": 1.0}, "must be below 1, or a number above"),
    ],
)
def test_settings_that_are_null_or_just_too_large_are_named(section, values, word):
    with pytest.raises(UserError, match=word):
        from_dict({section: values}, "c.yaml")


JUST_OUTSIDE = {
    "training.epochs": 0, "training.batch_size": 0, "augmentation.patch_size": 0, "seed": -1, "data.split_seed": -1,
    "training.workers": -1, "training.weight_decay": -0.1, "training.clip_norm": -1.0, "data.val_share": 1.5,
    "data.test_share": -0.1, "data.train_limit": 0, "training.steps_per_epoch": 0, "training.dice_weight": -1.0,
    "training.encoder_rate": -1.0, "data.longest_side": 31, "training.warmup": 1.0, "training.ema_decay": 1.0,
    "model.dropout": 1.0, "augmentation.brightness": 1.1, "augmentation.contrast": -0.1, "augmentation.elastic": -0.1,
    "augmentation.noise": 1.1, "training.encoder_frozen": 1.1, "augmentation.gamma": 1.0,
    "augmentation.rotation": 181.0, "augmentation.scale": (1.2, 0.8), "training.learning_rate": 0.0, "data.root": "",
    "data.palette": ("red",), "data.folds": 1, "data.sample_images": (1, 0, 1), "data.sample_size": 31,
    "model.num_classes": 0, "model.in_channels": 1, "model.widths": (), "data.fold": -1,
    "training.class_weights": (0.0, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("setting", JUST_OUTSIDE)
def test_every_rule_refuses_what_lies_just_outside(setting):
    config = Config()
    config.data.folds = 3 if setting == "data.fold" else 0
    section, _, name = setting.rpartition(".")
    setattr(getattr(config, section) if section else config, name, JUST_OUTSIDE[setting])
    with pytest.raises(UserError, match=f"^{setting} is "):
        check_config(config)


def test_every_rule_is_tried():
    assert {setting for settings, _, _ in RULES for setting in settings.split()} <= set(JUST_OUTSIDE)


def test_null_is_for_the_settings_that_say_so():
    nullable = {
        "longest_side",
        "palette",
        "train_limit",
        "encoder_weights",
        "weights",
        "steps_per_epoch",
        "class_weights",
    }
    for section in SECTIONS:
        for name in vars(getattr(Config(), section)):
            config = Config()
            setattr(getattr(config, section), name, None)
            if name in nullable:
                check_config(config)
            else:
                with pytest.raises(UserError, match=rf"^{section}\.{name} is null"):
                    check_config(config)


def test_a_wrong_type_is_named_without_the_names_of_pythons_types():
    with pytest.raises(UserError) as caught:
        from_dict({"seed": "x"}, "c.yaml")
    assert "'>" not in str(caught.value)


def test_a_seed_beyond_what_numpy_takes_is_refused():
    with pytest.raises(UserError, match="seed"):
        from_dict({"seed": 10**23}, "c.yaml")


def test_encoder_weights_without_an_encoder_are_refused():
    with pytest.raises(UserError, match=r"model\.encoder_weights"):
        from_dict({"model": {"encoder_weights": "imagenet"}}, "c.yaml")
