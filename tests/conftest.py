"""Fixtures: a small folder of images, a model that trains a step in milliseconds, and `train` = main(argv) in process."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a network
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; more threads than cores are slow
REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import numpy as np  # noqa: E402
import PIL.Image  # noqa: E402
import pytest  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402

import train_vqgan  # noqa: E402

TINY_MODEL = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "vq_embed_dim": 4,
    "num_vq_embeddings": 32,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}
TINY_DISCRIMINATOR = {"hidden_channels": 8, "depth": 1, "norm_num_groups": 4}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps one state per process, and torch sets a handler of signals once; every test starts anew."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of 7 small images of different shapes: 7 is odd, and divisible by no batch used here."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(7):
        coarse = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        PIL.Image.fromarray(coarse).resize((24 + 4 * i, 20), PIL.Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def flags(tmp_path, photos):
    """Flags of a run that takes a second or two; later flags win."""
    (tmp_path / "model.json").write_text(json.dumps(TINY_MODEL))
    (tmp_path / "discriminator.json").write_text(json.dumps(TINY_DISCRIMINATOR))
    return [
        *("--model_config_name_or_path", str(tmp_path / "model.json")),
        *("--discriminator_config_name_or_path", str(tmp_path / "discriminator.json")),
        *("--train_data_dir", str(photos), "--resolution", "16", "--train_batch_size", "2"),
        *("--timm_model_backend", "tf_efficientnet_lite0", "--timm_model_weights", "random"),
        *("--timm_model_layers", "0,1", "--max_train_steps", "2", "--dataloader_num_workers", "0", "--seed", "0"),
        *("--validation_fraction", "0", "--lpips_weights", "none"),
        *("--report_to", "none", "--output_dir", str(tmp_path / "run")),
    ]


@pytest.fixture
def train(flags, tmp_path):
    """train(*more flags) -> the output directory; asserts that the run succeeded."""

    def run(*more):
        assert train_vqgan.main([*flags, *more]) == 0
        return Path(train_vqgan.parse_args([*flags, *more, "--resume_from_checkpoint", "latest"]).output_dir)

    return run


@pytest.fixture
def error(flags, capsys):
    """error(*more flags) -> the one line on stderr of a run that must fail with status 2 before its first step."""

    def run(*more):
        try:
            status = train_vqgan.main([*flags, *more])
        except SystemExit as stop:
            status = stop.code
        lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert status == 2 and len(lines) == 1, lines
        assert lines[0].startswith("train_vqgan.py: error: ")
        output = Path(flags[-1])
        assert not (output / "metrics.jsonl").exists(), "training had started"
        assert not output.exists() or any(output.iterdir()), "an empty folder is left"
        return lines[0]

    return run


def without(flags, *names):
    """`flags` without these, which take one value each."""
    dropped = {at + i for at, flag in enumerate(flags) if flag in names for i in (0, 1)}
    return [flag for at, flag in enumerate(flags) if at not in dropped]


def metrics(output_dir):
    """Lines of metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("speed/")} for line in lines]


def weights(run, name="generator", step=None):
    """ "generator", "discriminator" or "ema" of a checkpoint, the last one unless told otherwise."""
    folder = run / f"checkpoint-{step}" if step else train_vqgan.checkpoints(run)[-1]
    return safetensors.torch.load_file(folder / f"{name}.safetensors")


def exported(run, network="vqmodel"):
    """The weights of an exported network, as they are in its file."""
    return safetensors.torch.load_file(Path(run) / network / "diffusion_pytorch_model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def launch(arguments, processes=1, cwd=None, **environment):
    """accelerate launch on the CPU. An unconfigured `--cpu --num_processes 2` silently starts one process."""
    options = ["--num_processes", str(processes)] + ["--multi_gpu"] * (processes > 1)
    if processes > 1:
        options += ["--main_process_port", "0"]
    return start_launcher(options, arguments, cwd, environment).finish()


def start_launcher(options, arguments, cwd, environment):
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
        launchers.append(start_launcher(options, arguments, folder, {"NODE": str(rank)}))
    return [launcher.finish() for launcher in launchers]
