"""The recipes: each parses as it stands, trains a step, and says where its numbers come from; and how they are read."""

import hashlib
import itertools
import json
import re

import datasets
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from conftest import REPOSITORY, TINY_DISCRIMINATOR, TINY_MODEL

import train_vqgan

RECIPES = sorted((REPOSITORY / "recipes").glob("*.args"))


def test_there_are_recipes():
    names = {path.stem for path in RECIPES}
    assert names >= {"demo", "photos", "best", "taming", "llamagen", "vqgan_plus", "cifar10", "small_data"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses_as_it_stands(recipe, tmp_path, monkeypatch):
    """From anywhere, and flags after it win. Red when a recipe names a flag or file that is gone."""
    monkeypatch.chdir(tmp_path)
    args = train_vqgan.parse_args([f"@{recipe}"])
    for flag in ("model_config_name_or_path", "discriminator_config_name_or_path"):
        path = getattr(args, flag)
        assert path is None or REPOSITORY / "configs" in train_vqgan.Path(path).parents, path
    assert args.resolution != 48 and train_vqgan.parse_args([f"@{recipe}", "--resolution", "48"]).resolution == 48
    assert train_vqgan.parse_args(["--resolution", "48", f"@{recipe}"]).resolution == args.resolution


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_takes_a_step(recipe, tmp_path, photos):
    """With tiny networks and images, from its first step on with a discriminator; all else is the recipe's."""
    (tmp_path / "model.json").write_text(json.dumps(TINY_MODEL))
    (tmp_path / "discriminator.json").write_text(json.dumps(TINY_DISCRIMINATOR))
    flags = ["--resolution", "16", "--max_train_steps", "1", "--discriminator_start", "0", "--train_batch_size", "2"]
    flags += ["--model_config_name_or_path", str(tmp_path / "model.json"), "--output_dir", str(tmp_path / "run")]
    flags += ["--discriminator_config_name_or_path", str(tmp_path / "discriminator.json"), "--seed", "0"]
    flags += ["--timm_model_backend", "test_resnet", "--timm_model_weights", "random", "--lpips_weights", "none"]
    flags += ["--mixed_precision", "no", "--report_to", "none", "--dataloader_num_workers", "0"]
    text = recipe.read_text()
    if "--image_column" in text:
        column = re.search(r"--image_column (\S+)", text)[1]
        data = datasets.Dataset.from_dict({column: [str(path) for path in sorted(photos.iterdir())]})
        data = data.cast_column(column, datasets.Image())
        datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "data")
        flags += ["--dataset_name", str(tmp_path / "data")]
    else:
        flags += ["--train_data_dir", str(photos)]
    assert train_vqgan.main([f"@{recipe}", *flags]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "disc/loss" in lines[0] and (tmp_path / "run" / "vqmodel" / "config.json").exists()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_cites_its_source(recipe):
    assert recipe.stem in ("demo", "photos") or "https://" in recipe.read_text()


# ---- The photographs in images/ ------------------------------------------------------------------------------------


def thumbnail(image):
    """16 x 16 pixels less their mean, of length 1: the product of two is their correlation."""
    pixels = np.asarray(image.convert("RGB").resize((16, 16), PIL.Image.Resampling.BOX), dtype=float).ravel()
    pixels -= pixels.mean()
    return pixels / np.linalg.norm(pixels)


def parts_of(image):
    """The image, its mirror image, and squares of 0.6 and 0.8 of its side from all over either."""
    for whole, share in itertools.product((image, PIL.ImageOps.mirror(image)), (0.6, 0.8, 1)):
        side = round(image.width * share)
        for left, top in itertools.product(range(0, image.width - side + 1, 32), repeat=2):
            yield whole.crop((left, top, left + side, top + side))


def test_no_picture_shown_is_trained_on():
    """Nor a part or near copy of one: unrelated photographs correlate by up to 0.8 here, a crop made smaller by 0.95.
    Red when a crop of images/dog.jpg is put into images/train."""
    trained_on = sorted((REPOSITORY / "images" / "train").iterdir())
    hashes = {hashlib.sha256(path.read_bytes()).digest() for path in trained_on}
    thumbnails = np.stack([thumbnail(PIL.Image.open(path)) for path in trained_on])
    shown = sorted((REPOSITORY / "images").glob("*.jpg"))
    assert len(shown) == 4 and len(trained_on) > 300
    for path in shown:
        image = PIL.Image.open(path)
        near_copy = image.crop((10, 10, 310, 310)).resize((128, 128))
        assert thumbnail(near_copy) @ thumbnail(image) > 0.9
        assert hashlib.sha256(path.read_bytes()).digest() not in hashes
        assert max((thumbnails @ thumbnail(part)).max() for part in parts_of(image)) < 0.85, path


# ---- Files of flags ------------------------------------------------------------------------------------------------


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """parse(recipe's text) -> namespace, from a working directory that is not the repository."""
    monkeypatch.chdir(tmp_path)

    def run(text):
        (tmp_path / "x.args").write_text(text)
        return train_vqgan.parse_args([f"@{tmp_path / 'x.args'}"])

    return run


def test_recipe_lines_and_comments(parse, tmp_path):
    """Red when comments=True is dropped, or a line is not split."""
    text = """# a comment; it's ignored, --seed 9 too
--resolution 64 --random_flip   # and so is this: --seed 8

--tracker_project_name 'two words'
    --timm_model_layers "0, 1" --seed=7
"""
    args = parse(text)
    assert (args.resolution, args.random_flip, args.seed) == (64, True, 7)
    assert (args.tracker_project_name, args.timm_model_layers) == ("two words", "0, 1")


def test_recipe_paths_are_relative_to_the_repository(parse, tmp_path):
    """From another working directory. Red when `convert_arg_line_to_args` returns the words as they are."""
    text = "--model_config_name_or_path configs/model/tiny_4x.json --validation_images images/bird.jpg images/dog.jpg\n"
    args = parse(text + f"--cache_dir {tmp_path / 'a/b'} --hub_model_id owner/name --push_to_hub")
    assert args.model_config_name_or_path == str(REPOSITORY / "configs/model/tiny_4x.json")
    assert args.validation_images == [str(REPOSITORY / "images" / name) for name in ("bird.jpg", "dog.jpg")]
    assert args.cache_dir == str(tmp_path / "a/b") and args.hub_model_id == "owner/name"


def test_recipe_path_after_an_equals_sign(parse, tmp_path):
    """Red when only whole words are taken for paths."""
    args = parse("--model_config_name_or_path=configs/model/tiny_4x.json")
    assert args.model_config_name_or_path == str(REPOSITORY / "configs/model/tiny_4x.json")


def test_paths_outside_a_recipe_are_not(error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "configs/model/tiny_4x.json" in error("--model_config_name_or_path", "configs/model/tiny_4x.json")


@pytest.mark.parametrize(
    "text, word",
    [(None, "x.args"), ("--tracker_project_name 'open", "quot"), ("--seed 1\n--resol 64\n", "--resol")],
    ids=["missing", "open quote", "unknown flag"],
)
def test_error_in_a_recipe_is_one_line(error, tmp_path, text, word):
    """Red when shlex's ValueError gets through."""
    if text:
        (tmp_path / "x.args").write_text(text)
    assert word in error(f"@{tmp_path / 'x.args'}")
