"""Model configs: what is wrong with one is said in one line, and those that come with the repository are right."""

import json
import re

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import REPOSITORY, TINY_DISCRIMINATOR, TINY_MODEL
from diffusers import VQModel

import train_vqgan
from discriminator import BlurPool, Discriminator

MODEL, DISCRIMINATOR = "--model_config_name_or_path", "--discriminator_config_name_or_path"


@pytest.fixture
def bad_model(error, tmp_path):
    """bad_model(text or dict) -> the message of a run with that config in place of the tiny model's."""

    def run(config, *more, flag=MODEL):
        path = tmp_path / "bad.json"
        path.write_text(config if isinstance(config, str) else json.dumps(config))
        return error(flag, str(path), *more)

    return run


def build(config_path, tmp_path, monkeypatch, resolution=64):
    monkeypatch.chdir(tmp_path)
    flags = [MODEL, str(config_path), "--resolution", str(resolution), "--output_dir", str(tmp_path / "run")]
    return train_vqgan.build_generator(train_vqgan.parse_args(flags))


# ---- JSON ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, line, column",
    [
        ('{\n  "layers_per_block": 1,\n  "block_out_channels": [8, 8,]\n}', 3, 30),
        ('{\n  "block_out_channels": [\n    8,\n    8,\n  ],\n  "latent_channels": 4\n}', 4, 6),
        ('{\n  "latent_channels": 4,\n  "vq_embed_dim": 4,\n}\n', 3, 20),
        ('{"latent_channels": 4 ,}', 1, 23),
        ('{"down_block_types": ["DownEncoderBlock2D",\t\n\n]}', 1, 43),
    ],
)
def test_trailing_comma(bad_model, text, line, column):
    """The comma's own place, not that of the bracket after it. Red when the place is error.lineno, error.colno."""
    assert text.splitlines()[line - 1][column - 1] == ",", "the expectation itself"
    message = bad_model(text)
    assert MODEL in message and "bad.json" in message and f": line {line} column {column} " in message
    assert "trailing comma" in message


@pytest.mark.parametrize(
    "text, line, column",
    [
        ('{\n  "latent_channels": 4\n  "vq_embed_dim": 4\n}', 3, 3),
        ('{\n  "latent_channels" 4\n}', 2, 21),
        ("{\n  'latent_channels': 4\n}", 2, 3),
        ('{\n  "latent_channels": four\n}', 2, 22),
        ('{"latent_channels": 4,, "vq_embed_dim": 4}', 1, 23),
        ('{"latent_channels": 4', 1, 22),
        ("", 1, 1),
    ],
)
def test_other_json_errors(bad_model, text, line, column):
    """Red when a comma anywhere before the error is called a trailing one, or the place is not printed."""
    message = bad_model(text)
    assert MODEL in message and "bad.json" in message and f": line {line} column {column} " in message
    assert "trailing" not in message


def test_json_errors_of_the_discriminator(bad_model):
    message = bad_model('{\n  "depth": 1,\n}', flag=DISCRIMINATOR)
    assert DISCRIMINATOR in message and "trailing comma" in message
    assert ": line 2 column 13 " in message


@pytest.mark.parametrize("flag", [MODEL, DISCRIMINATOR])
@pytest.mark.parametrize("text", ["[]", "3", "null", '"movq"'])
def test_no_json_object(bad_model, text, flag):
    message = bad_model(text, flag=flag)
    assert flag in message and "object" in message


def test_config_that_is_no_text(error, tmp_path):
    """Red when UnicodeDecodeError gets through."""
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "bad.png")
    assert "bad.png" in error(MODEL, str(tmp_path / "bad.png"))


def test_byte_order_mark(tmp_path, monkeypatch):
    """As Windows editors write it. Red when the file is read as plain utf-8."""
    (tmp_path / "model.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(TINY_MODEL).encode())
    assert build(tmp_path / "model.json", tmp_path, monkeypatch).config.latent_channels == 4


# ---- Where a config comes from -------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [MODEL, DISCRIMINATOR, "--pretrained_model_name_or_path"])
def test_directory_without_config(flags, capsys, tmp_path, flag):
    (tmp_path / "empty").mkdir()
    if flag == "--pretrained_model_name_or_path":
        flags = flags[2:]
    assert train_vqgan.main([*flags, flag, str(tmp_path / "empty")]) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and f"{flag}: no config.json in {tmp_path / 'empty'}" in said


def test_directory_with_config(tmp_path, monkeypatch):
    """As `save_pretrained` leaves it, with keys of diffusers' own. Red when keys that start with _ are not dropped."""
    VQModel(**TINY_MODEL).save_config(tmp_path / "model")
    assert "_class_name" in json.loads((tmp_path / "model" / "config.json").read_text())
    model = build(tmp_path / "model", tmp_path, monkeypatch)
    assert {k: v for k, v in model.config.items() if k in TINY_MODEL} == TINY_MODEL


def test_discriminator_from_directory(tmp_path):
    Discriminator(**TINY_DISCRIMINATOR).save_config(tmp_path / "judge")
    flags = [DISCRIMINATOR, str(tmp_path / "judge"), "--resolution", "64", "--output_dir", str(tmp_path / "run")]
    built = train_vqgan.build_discriminator(train_vqgan.parse_args(flags))
    assert {k: v for k, v in built.config.items() if k in TINY_DISCRIMINATOR} == TINY_DISCRIMINATOR


def test_neither_local_nor_on_the_hub(error):
    message = error(MODEL, "nobody/nothing")
    assert MODEL in message and "nobody/nothing" in message and "Hub" in message


# ---- Unknown keys --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, close",
    [("latent_chanels", "latent_channels"), ("num_vq_embedings", "num_vq_embeddings"), ("norm", "norm_type")],
)
def test_unknown_key_of_the_model(bad_model, key, close):
    """diffusers only warns. Red when unknown keys are not compared with the signature."""
    message = bad_model(TINY_MODEL | {key: 4})
    assert MODEL in message and f"'{key}'" in message and message.endswith(f"did you mean {close}?")


def test_unknown_key_like_no_other(bad_model):
    message = bad_model(TINY_MODEL | {"zzz": 4})
    assert "'zzz'" in message and all(key in message for key in ("latent_channels", "act_fn", "scaling_factor"))


def test_unknown_key_of_the_discriminator(bad_model):
    message = bad_model(TINY_DISCRIMINATOR | {"hidden_chanels": 8}, flag=DISCRIMINATOR)
    assert DISCRIMINATOR in message and "'hidden_chanels'" in message
    assert message.endswith("did you mean hidden_channels?")


def test_config_of_the_other_network(bad_model):
    message = bad_model(TINY_DISCRIMINATOR)
    assert MODEL in message and "VQModel has no 'hidden_channels'" in message


# ---- Values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        ({"block_out_channels": [8, 8, 8]}, ["block_out_channels", "up_block_types", "same length"]),
        ({"up_block_types": ["UpDecoderBlock2D"]}, ["up_block_types", "same length"]),
        ({"block_out_channels": [], "down_block_types": [], "up_block_types": []}, ["block_out_channels", "lists"]),
        ({"down_block_types": "DownEncoderBlock2D"}, ["down_block_types", "lists"]),
        ({"block_out_channels": 8}, ["block_out_channels", "lists"]),
        ({"block_out_channels": None}, ["block_out_channels", "lists"]),
        ({"norm_type": "batch"}, ["norm_type", "'batch'", "group, spatial"]),
        ({"norm_type": None}, ["norm_type", "None", "group, spatial"]),
    ],
    ids=str,
)
def test_values_that_this_script_refuses(bad_model, change, words):
    """Red when the check is left out of `check_vqmodel_config`, or lists are counted before they are known as lists."""
    message = bad_model(TINY_MODEL | change)
    assert MODEL in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    "change, said",
    [
        ({"block_out_channels": [8, 10]}, "num_channels (10) must be divisible by num_groups (4)"),
        ({"norm_type": "spatial"}, "num_channels (8) must be divisible by num_groups (32)"),
        ({"norm_type": "spatial", "block_out_channels": [32, 32], "vq_embed_dim": 8}, "channel"),
        ({"norm_num_groups": 0}, "zero"),
        ({"block_out_channels": [8, 8.5]}, "out_channels"),
        ({"block_out_channels": [8, "8"]}, "string"),
        ({"down_block_types": ["DownEncoderBlock2D", "DownBlock"]}, "DownBlock does not exist"),
        ({"up_block_types": ["UpDecoderBlock2D", "DownEncoderBlock2D"]}, "DownEncoderBlock2D does not exist"),
        ({"layers_per_block": 1.5}, "'float' object cannot be interpreted as an integer"),
        ({"num_vq_embeddings": -1}, "negative dimension -1"),
        ({"num_vq_embeddings": 0}, "zero"),
        ({"vq_embed_dim": 0}, "0 elements"),
        ({"latent_channels": None}, ""),
        ({"act_fn": "silo"}, "activation function silo not found"),
        ({"in_channels": 1}, "channel"),
        ({"out_channels": 4}, "it makes [1, 4, 16, 16] of [1, 3, 16, 16]"),
    ],
    ids=str,
)
def test_values_that_diffusers_refuses(bad_model, change, said):
    """In diffusers' words. Red when the model is not tried on an image, or only RuntimeErrors are caught."""
    message = bad_model(TINY_MODEL | change)
    assert f"{MODEL}: diffusers cannot build this model, or run it on RGB images: " in message and said in message


@pytest.mark.parametrize(
    "change, word",
    [
        ({"norm_num_groups": 5}, "norm_num_groups 5"),
        ({"depth": 0}, "depth"),
        ({"hidden_channels": "many"}, "'many'"),
        ({"in_channels": 1}, "in_channels must be 3"),
    ],
    ids=str,
)
def test_values_of_the_discriminator(bad_model, change, word):
    """Red when the check is left out of `Discriminator`, or `build_discriminator` does not catch its ValueError."""
    message = bad_model(TINY_DISCRIMINATOR | change, flag=DISCRIMINATOR)
    assert DISCRIMINATOR in message and word in message


# ---- Resolution ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution, levels, nearest", [(17, 2, 16), (31, 3, 32), (50, 4, 48), (20, 5, 16)])
def test_resolution_not_divisible_by_downsampling(bad_model, resolution, levels, nearest):
    """Red when the factor is 2^levels, or the check is left out."""
    lists = {"block_out_channels": [8] * levels, "down_block_types": ["DownEncoderBlock2D"] * levels}
    config = TINY_MODEL | lists | {"up_block_types": ["UpDecoderBlock2D"] * levels}
    message = bad_model(config, "--resolution", str(resolution))
    assert "--resolution" in message and f"{resolution} is not divisible" in message
    factor, suggestion = map(int, re.findall(r"\d+", message.split("divisible")[1]))
    assert (factor, suggestion) == (2 ** (levels - 1), nearest) and nearest % factor == 0


@pytest.mark.parametrize("depth, smallest", [(1, 6), (2, 12), (3, 24), (4, 48), (5, 96)])
def test_smallest_resolution_of_the_discriminator(depth, smallest):
    """Red when `min_resolution` is wrong either way: it works at it and fails one downsampling below."""
    network = Discriminator(hidden_channels=4, depth=depth, norm_num_groups=4)
    assert network.min_resolution == smallest
    assert network(torch.zeros(1, 3, smallest, smallest)).numel() >= 1
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 3, smallest - 1, smallest - 1))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_smallest_resolution_with_blur_pool(depth):
    """2 x 2 logits, so that norms of one channel a group still have something to divide by. Red when it is halved."""
    network = Discriminator(hidden_channels=4, depth=depth, norm_num_groups=4, blur_pool=True)
    smallest = network.min_resolution
    assert network(torch.zeros(1, 3, smallest, smallest)).shape == (1, 1, 2, 2)


def test_blur_pool_is_a_blur_of_every_second_pixel():
    """Against numpy, away from the border. Red when a tap of the kernel, or the stride, is another."""
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    taps = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64
    found = BlurPool().double()(x)
    assert found.shape == (2, 3, 8, 8)
    for i, j in ((1, 1), (3, 6)):
        window = x[:, :, 2 * i - 1 : 2 * i + 3, 2 * j - 1 : 2 * j + 3].numpy()
        assert found[:, :, i, j].numpy() == pytest.approx((window * taps).sum((2, 3)))


def test_blur_pool_makes_shifts_matter_less():
    """Logits of an image and of it one pixel further, same weights. Red when BlurPool takes every second pixel."""
    x = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    changes = {}
    for blur in (False, True):
        torch.manual_seed(0)
        network = Discriminator(hidden_channels=16, depth=3, norm_num_groups=4, blur_pool=blur).eval()
        with torch.no_grad():
            a, b = (network(i)[:, :, 2:-2, 2:-2] for i in (x, x.roll(1, 3)))
        changes[blur] = ((a - b).square().mean() / a.var()).item()
    assert changes[True] < changes[False] / 2


def test_resolution_too_small_for_the_discriminator(bad_model):
    """Red when the check is left out of `build_discriminator`."""
    message = bad_model({"depth": 3, "hidden_channels": 8, "norm_num_groups": 4}, flag=DISCRIMINATOR)
    assert "--resolution" in message and "16 is too small" in message and "24" in message and DISCRIMINATOR in message


def test_small_resolution_without_a_discriminator(train, tmp_path):
    """With weight 0 it is not used, so its size does not matter."""
    (tmp_path / "deep.json").write_text(json.dumps({"depth": 3, "hidden_channels": 8, "norm_num_groups": 4}))
    train(DISCRIMINATOR, str(tmp_path / "deep.json"), "--adversarial_weight", "0", "--checkpointing_steps", "0")


# ---- Configs of the repository -------------------------------------------------------------------------------------

PLAIN_DOWN, PLAIN_UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
PROPERTIES = {
    "movq_8x": {
        "block_out_channels": [128, 256, 256, 512],
        "down_block_types": [*[PLAIN_DOWN] * 3, "AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D", *[PLAIN_UP] * 3],
        "norm_type": "spatial",
        "num_vq_embeddings": 16384,
        "vq_embed_dim": 4,
        "latent_channels": 4,
    },
    "default_4x": {
        "block_out_channels": [128, 256, 512],
        "down_block_types": [PLAIN_DOWN] * 3,
        "up_block_types": [PLAIN_UP] * 3,
        "norm_type": "spatial",
        "num_vq_embeddings": 16384,
        "vq_embed_dim": 4,
        "latent_channels": 4,
    },
    "small_8x": {"block_out_channels": [64, 128, 128, 256], "num_vq_embeddings": 4096, "norm_type": "group"},
    "taming_16x": {"block_out_channels": [128, 128, 256, 256, 512], "num_vq_embeddings": 1024, "norm_type": "group"},
    "vqgan_plus_16x": {"num_vq_embeddings": 1024, "mid_block_add_attention": False, "norm_type": "group"},
    "llamagen_16x": {"num_vq_embeddings": 16384, "vq_embed_dim": 8, "norm_type": "group"},
    "tiny_4x": {"down_block_types": [PLAIN_DOWN] * 3, "up_block_types": [PLAIN_UP] * 3},
    "photos_4x": {"num_vq_embeddings": 4096, "mid_block_add_attention": False, "norm_type": "spatial"},
}
DIMENSION = {"movq_8x": 4, "default_4x": 4, "taming_16x": 256, "vqgan_plus_16x": 256}  # others: 8


def test_every_config_has_a_test():
    assert {path.stem for path in (REPOSITORY / "configs" / "model").iterdir()} == set(PROPERTIES)
    assert train_vqgan.DEFAULT_CONFIG == REPOSITORY / "configs" / "model" / "default_4x.json"


@pytest.mark.parametrize("name", PROPERTIES)
def test_config_of_the_repository(name, tmp_path, monkeypatch):
    """Valid, as its name says, and it builds: an image in, one code per factor x factor pixels, an image out."""
    path = REPOSITORY / "configs" / "model" / f"{name}.json"
    config = json.loads(path.read_text())
    assert {key: config[key] for key in PROPERTIES[name]} == PROPERTIES[name]
    with torch.device("meta"):
        model = build(path, tmp_path, monkeypatch)
        x = torch.zeros(2, 3, 64, 64)
        levels, factor = len(config["block_out_channels"]), int(name.split("_")[-1].removesuffix("x"))
        assert 2 ** (levels - 1) == factor
        z = model.encode(x).latents
        assert z.shape == (2, DIMENSION.get(name, 8), 64 // factor, 64 // factor)
        assert model.quantize.embedding.weight.shape == (config["num_vq_embeddings"], DIMENSION.get(name, 8))
        assert model.decode(z, force_not_quantize=True).sample.shape == x.shape


def test_tiny_config_is_tiny(tmp_path, monkeypatch):
    with torch.device("meta"):
        model = build(REPOSITORY / "configs/model/tiny_4x.json", tmp_path, monkeypatch)
    assert sum(p.numel() for p in model.parameters()) < 2e6


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs" / "discriminator").glob("patchgan_*.json")), ids=lambda path: path.name
)
def test_discriminator_config_of_the_repository(path, tmp_path):
    """Valid, builds, and says real or fake at its smallest resolution."""
    flags = [DISCRIMINATOR, str(path), "--resolution", "256", "--output_dir", str(tmp_path / "run")]
    with torch.device("meta"):
        network = train_vqgan.build_discriminator(train_vqgan.parse_args(flags))
        assert network(torch.zeros(2, 3, network.min_resolution, network.min_resolution)).numel() in (2, 8)


def test_patchgan_3_is_the_default():
    config = train_vqgan.read_config("--flag", str(REPOSITORY / "configs/discriminator/patchgan_3.json"), Discriminator)
    with torch.device("meta"):
        ours, default = Discriminator.from_config(config), Discriminator()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in default.state_dict().items()}
    assert ours.config.depth == 3 and ours.min_resolution == 24


def test_pixel_range_of_a_pretrained_model(train, flags):
    """The processor beside a model knows it, in a checkpoint, too. Red when check_pixel_range is not called."""
    run = train("--pixel_range", "unit", "--checkpointing_steps", "2")
    flags[:2] = ["--pretrained_model_name_or_path", str(run)]
    for where in ([], ["--subfolder", "checkpoint-2/vqmodel"]):
        flags += where
        with pytest.raises(train_vqgan.UserError, match="--pixel_range unit"):
            train_vqgan.build_generator(train_vqgan.parse_args(flags))
        train_vqgan.build_generator(train_vqgan.parse_args([*flags, "--pixel_range", "unit"]))
