"""The recipes: each parses as it stands, trains a step, and says where its numbers come from."""

import json
import re

import datasets
import pytest
from conftest import REPOSITORY, TINY_DISCRIMINATOR, TINY_MODEL

import train_vqgan

RECIPES = sorted((REPOSITORY / "recipes").glob("*.args"))


def test_there_are_recipes():
    names = {path.stem for path in RECIPES}
    assert names >= {"demo", "taming", "llamagen", "vqgan_plus", "cifar10", "small_data"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses_as_it_stands(recipe, tmp_path):
    args = train_vqgan.parse_args([f"@{recipe}", "--output_dir", str(tmp_path)])
    for flag in ("model_config_name_or_path", "discriminator_config_name_or_path"):
        path = getattr(args, flag)
        assert path is None or REPOSITORY / "configs" in train_vqgan.Path(path).parents, path


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
    assert recipe.stem == "demo" or "https://" in recipe.read_text()
