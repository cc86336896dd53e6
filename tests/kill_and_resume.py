"""Kill a run with SIGKILL at random moments, repeat the same command, compare with a run that nobody touched.

    python tests/kill_and_resume.py --moments 20
    python tests/kill_and_resume.py --moments 20 --processes 2

Prints the table of moments; exit status 0 when generator, discriminator, EMA, the exported model and metrics (all but
speed/) are bit-identical. Every fourth kill waits until a checkpoint is being written. The processes are forked from
one that has imported the script, because importing takes longer than training here; each is a process of its own and
really killed. Nothing is killed before its first checkpoint: results without one are not gone on with. With --processes
the run is one of several gloo processes, and all of them are killed.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import PIL.Image
import torch
from conftest import TINY_DISCRIMINATOR, TINY_MODEL, equal, exported, metrics, weights

import train_vqgan

STEPS = 60


def arguments(folder):
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for i in range(7):
        coarse = PIL.Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        coarse.resize((40, 30), PIL.Image.Resampling.BICUBIC).save(folder / "photos" / f"{i}.png")
    (folder / "model.json").write_text(json.dumps(TINY_MODEL))
    (folder / "discriminator.json").write_text(json.dumps(TINY_DISCRIMINATOR))
    return [
        *("--model_config_name_or_path", str(folder / "model.json"), "--train_data_dir", str(folder / "photos")),
        *("--discriminator_config_name_or_path", str(folder / "discriminator.json"), "--resolution", "16"),
        *("--train_batch_size", "2", "--gradient_accumulation_steps", "2", "--random_flip", "--use_ema"),
        *("--timm_model_backend", "tf_efficientnet_lite0", "--timm_model_layers", "0,1"),
        *("--timm_model_weights", "random", "--dataloader_num_workers", "2", "--seed", "0"),
        *("--discriminator_start", "10", "--discriminator_warmup", "10", "--codebook_restart_steps", "7"),
        *("--lecam_weight", "0.1"),
        *("--max_train_steps", str(STEPS), "--log_steps", "2", "--checkpointing_steps", "3"),
        *("--validation_steps", "5", "--validation_images", str(folder / "photos" / "0.png")),
        *("--validation_fraction", "0.3", "--lpips_weights", "none"),
        *("--checkpoints_total_limit", "2", "--resume_from_checkpoint", "latest", "--report_to", "tensorboard"),
    ]


def child(flags, log, rank, world, port):
    os.setsid()
    if world > 1:
        several = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        several |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": 1}
        os.environ.update({name: str(value) for name, value in several.items()})
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1), os.dup2(handle, 2)
    torch.set_num_threads(1)
    sys.exit(train_vqgan.main(flags))


def steps_logged(run):
    path = run / "metrics.jsonl"
    return path.read_text().count('"loss/total"') if path.exists() else 0


def moment(run, processes, rng, saving):
    """Wait for a random moment of these processes, kill them, say when it was; None when they had finished by then."""
    start, first, process = time.monotonic(), steps_logged(run), processes[0]
    target = rng.randint(0, 4)

    def too_early():
        young = time.monotonic() - start < 0.3 or steps_logged(run) < first + target
        return young or not train_vqgan.checkpoints(run)

    while process.is_alive() and too_early():
        time.sleep(0.002)
    while process.is_alive():
        while saving and process.is_alive() and not list(run.glob("unfinished-*")):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.01 if saving else 0.3))
        if process.is_alive():
            os.kill(process.pid, signal.SIGSTOP)  # to look at what it is doing
        left = sorted(path.name for path in run.glob("unfinished-*"))
        if left or not saving:
            break
        os.kill(process.pid, signal.SIGCONT)  # it had just finished saving
    if not process.is_alive():
        return None
    step, since = steps_logged(run), time.monotonic() - start
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    newest = [path.name for path in train_vqgan.checkpoints(run)][-1:]
    return step, since, " ".join(left) or "-", " ".join(newest) or "none"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, fork = random.Random(options.seed), multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        flags = arguments(folder)

        def start(name):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            arguments = [*flags, "--output_dir", str(folder / name)], folder / "log"
            world = options.processes
            processes = [fork.Process(target=child, args=(*arguments, rank, world, port)) for rank in range(world)]
            for process in processes:
                process.start()
            return processes

        def finish(processes):
            for process in processes:
                process.join()
                assert process.exitcode == 0, (folder / "log").read_text()[-3000:]

        finish(start("untouched"))
        recorded = json.loads((folder / "untouched" / f"checkpoint-{STEPS}" / "progress.json").read_text())
        assert recorded["processes"] == options.processes
        killed, saves, run = 0, 0, folder / "killed"
        print(f"{'kill':>4} {'steps logged':>12} {'seconds':>8}  {'newest whole checkpoint':24} being written")
        while killed < options.moments:
            processes = start("killed")
            found = moment(run, processes, rng, saving=killed % 4 == 3)
            if found is None:  # finished: from its first checkpoints again
                finish(processes)
                compare(folder / "untouched", run)
                shutil.rmtree(run)
                continue
            killed, saves = killed + 1, saves + (found[2] != "-")
            print(f"{killed:4} {found[0]:12} {found[1]:8.2f}  {found[3]:24} {found[2]}", flush=True)
        finish(start("killed"))
        compare(folder / "untouched", run)
        assert saves or options.moments < 4, "no kill hit a checkpoint being written"
        print(f"{killed} kills, {saves} of them while a checkpoint was being written: bit-identical")


def compare(untouched, run):
    for name in ("generator", "discriminator", "ema"):
        assert equal(weights(untouched, name, STEPS), weights(run, name, STEPS)), f"{name} differs"
    for network in ("vqmodel", "discriminator"):
        assert equal(exported(untouched, network), exported(run, network)), f"the exported {network} differs"
    factors = [json.loads((r / "vqmodel" / "config.json").read_text())["scaling_factor"] for r in (untouched, run)]
    assert factors[0] == factors[1], f"scaling factors {factors} differ"
    assert metrics(untouched) == metrics(run), "metrics differ"
    assert len([line for line in metrics(run) if "loss/total" in line]) == STEPS // 2


if __name__ == "__main__":
    main()
