"""What goes wrong in a week of training: signals, full disks, damaged files, dying workers, numbers that are not finite."""

import errno
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from conftest import REPOSITORY, metrics
from test_train import equal, weights

import train_vqgan

LONG = ["--max_train_steps", "6", "--checkpointing_steps", "2", "--log_steps", "1", "--use_ema"]
LONG += ["--discriminator_start", "2", "--discriminator_warmup", "2"]
RESUME = ["--resume_from_checkpoint", "latest"]


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, action): call `action` in the middle of the n-th step this process takes."""
    calls, actions = [], {}
    step = train_vqgan.generator_step

    def spy(accelerator, generator, state, perceptual, micro_batches, weight, args):
        calls.append(state.step + 1)
        micro_batches = actions.get(state.step + 1, lambda x: x)(micro_batches) or micro_batches
        return step(accelerator, generator, state, perceptual, micro_batches, weight, args)

    monkeypatch.setattr(train_vqgan, "generator_step", spy)

    def plan(n, action):
        actions[n] = action

    plan.calls, plan.actions = calls, actions
    return plan


@pytest.fixture
def whole(train, tmp_path):
    """A run that nothing happened to."""
    return train(*LONG, "--output_dir", str(tmp_path / "whole"))


def same_result(a, b):
    assert all(equal(weights(a, name), weights(b, name)) for name in ("generator", "discriminator", "ema"))
    assert metrics(a) == metrics(b) and [line["step"] for line in metrics(a)] == list(range(1, 7))


# ---- Signals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_saves_at_the_end_of_the_step(train, flags, whole, at_step, number):
    """Status 3, a checkpoint of that very step, and the same command goes on as if nothing had happened.

    Red when the loop does not look at state.stopped, or when the checkpoint on a signal is left out.
    """
    at_step(3, lambda _: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    assert train_vqgan.main([*flags, *LONG]) == 3
    assert signal.getsignal(number) is before
    run = train_vqgan.Path(flags[-1])
    assert [p.name for p in train_vqgan.checkpoints(run)] == ["checkpoint-2", "checkpoint-3"]
    assert not (run / "vqmodel").exists()
    at_step.actions.clear()
    train(*LONG, *RESUME)
    assert at_step.calls[-3:] == [4, 5, 6]
    same_result(whole, run)


def test_second_sigint_stops_at_once(flags, at_step):
    def twice(_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(3, twice)
    with pytest.raises(KeyboardInterrupt):
        train_vqgan.main([*flags, *LONG])
    assert [p.name for p in train_vqgan.checkpoints(flags[-1])] == ["checkpoint-2"]


def test_signal_without_checkpoints_still_saves(flags, at_step):
    at_step(3, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert train_vqgan.main([*flags, *LONG, "--checkpointing_steps", "0"]) == 3
    assert [p.name for p in train_vqgan.checkpoints(flags[-1])] == ["checkpoint-3"]


@pytest.mark.slow
def test_killed_at_any_moment():
    """Five of kill_and_resume.py's moments; it compares networks, EMA and metrics bit by bit.

    Red when samples_seen is not restored, averages are dropped from the checkpoint, or metrics.jsonl is not cut.
    """
    command = [sys.executable, str(REPOSITORY / "tests" / "kill_and_resume.py"), "--moments", "5"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert re.search("5 kills, [1-5] of them while a checkpoint was being written: bit-identical", result.stdout)


# ---- Disks ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB, and fill(): make it full."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not possible here; test_save_that_fails injects the error instead")

    def fill(_=None):
        with open(disk / "filler", "wb", buffering=0) as file, pytest.raises(OSError) as full:
            while True:
                file.write(bytes(4096))
        assert full.value.errno == errno.ENOSPC

    yield disk, fill
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_full_disk_costs_a_checkpoint_not_the_run(train, whole, at_step, small_disk, caplog):
    """Full while step 4 is saved, room again before step 6: the run ends as if nothing had happened to it."""
    disk, fill = small_disk
    at_step(4, fill)
    at_step(6, lambda _: (disk / "filler").unlink())
    run = train(*LONG, "--output_dir", str(disk / "run"))
    assert re.search(r"Could not save .*checkpoint-4: .*; training goes on, .*checkpoint-2", caplog.text)
    assert [p.name for p in train_vqgan.checkpoints(run)] == ["checkpoint-2", "checkpoint-6"]
    assert not list(run.glob("unfinished-*"))
    assert all(equal(weights(whole, name), weights(run, name)) for name in ("generator", "discriminator", "ema"))


def test_disk_full_to_the_end_stops_with_one_line(train, flags, whole, at_step, small_disk, capsys):
    """Status 2, the last good checkpoint stays; with room again the same command ends where the untouched run did."""
    disk, fill = small_disk
    at_step(4, fill)
    arguments = [*LONG, "--output_dir", str(disk / "run")]
    assert train_vqgan.main([*flags, *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "train_vqgan.py: error:" in line]
    assert len(errors) == 1 and "No space left" in errors[0] and "--resume_from_checkpoint latest" in errors[0]
    assert [p.name for p in train_vqgan.checkpoints(disk / "run")] == ["checkpoint-2"]
    (disk / "filler").unlink()
    at_step.actions.clear()
    same_result(whole, train(*arguments, *RESUME))


@pytest.mark.parametrize("broken", ["save_weights", "sync"])
def test_save_that_fails(train, whole, monkeypatch, caplog, tmp_path, broken):
    """ENOSPC injected into one save, before and after the files are written."""
    real, calls = getattr(train_vqgan, broken), []

    def failing(*arguments):
        calls.append(arguments)
        if "checkpoint-4" in str(arguments[-1]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(train_vqgan, broken, failing)
    run = train(*LONG)
    assert "Could not save" in caplog.text and "No space left on device" in caplog.text
    assert [p.name for p in train_vqgan.checkpoints(run)] == ["checkpoint-2", "checkpoint-6"]
    assert not list(run.glob("unfinished-*")) and len(calls) > 3
    same_result(whole, run)


def test_last_checkpoint_that_fails_is_said_at_the_end(flags, monkeypatch, capsys):
    """The result is exported, but the run cannot be resumed at its end. Red without the check of state.saved."""
    real = train_vqgan.sync

    def failing(path):
        if "checkpoint-6" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path)

    monkeypatch.setattr(train_vqgan, "sync", failing)
    assert train_vqgan.main([*flags, *LONG]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "train_vqgan.py: error:" in line]
    assert len(errors) == 1 and "the last checkpoint could not be saved" in errors[0]
    run = train_vqgan.Path(flags[-1])
    assert (run / "vqmodel").is_dir() and train_vqgan.checkpoints(run)[-1].name == "checkpoint-4"
    assert not list(run.glob("unfinished-*"))


def test_output_directory_that_vanishes(flags, at_step, tmp_path, capsys):
    """A file where the directory was: one line at the end, what was saved elsewhere stays."""

    def vanish(_):
        os.rename(tmp_path / "run", tmp_path / "moved")
        (tmp_path / "run").touch()

    at_step(3, vanish)
    assert train_vqgan.main([*flags, *LONG]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "train_vqgan.py: error:" in line]
    assert len(errors) == 1 and "--output_dir" in errors[0]
    assert [p.name for p in train_vqgan.checkpoints(tmp_path / "moved")] == ["checkpoint-2"]
    assert at_step.calls == [1, 2, 3, 4, 5, 6]


def test_too_little_room_is_said_at_the_start(error, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=100_000)
    monkeypatch.setattr(train_vqgan.shutil, "disk_usage", lambda path: usage)
    assert "a checkpoint takes" in error()


def test_room_is_checked_against_the_size_of_a_checkpoint(train, monkeypatch, caplog):
    """The size at the start is the size that is written, within 5 %, with EMA."""
    sizes, measure = [], train_vqgan.checkpoint_bytes
    monkeypatch.setattr(train_vqgan, "checkpoint_bytes", lambda state: sizes.append(measure(state)) or sizes[-1])
    config = ["--model_config_name_or_path", str(REPOSITORY / "configs" / "tiny_4x.json")]
    config += ["--discriminator_config_name_or_path", str(REPOSITORY / "configs" / "patchgan_tiny.json")]
    run = train(*config, "--use_ema", "--resolution", "32", "--discriminator_start", "0")
    written = sum(path.stat().st_size for path in (run / "checkpoint-2").iterdir())
    assert sizes[0] == pytest.approx(written, rel=0.05) and written > 1 << 20


# ---- Damaged checkpoints -------------------------------------------------------------------------------------------


def truncate(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


FILES = ["generator.safetensors", "discriminator.safetensors", "ema.safetensors", "training.pt", "process-0.pt"]


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, os.remove])
@pytest.mark.parametrize("name", [*FILES, "progress.json"])
def test_damaged_checkpoint_is_left_for_the_one_before(train, whole, tmp_path, caplog, name, harm):
    """`latest` names the fault and goes on from the one before. Red when damage() compares no hashes, or no sizes."""
    if (name, harm) == ("progress.json", flip_a_bit):
        pytest.skip("one bit may leave valid JSON with the same meaning")
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    harm(run / "checkpoint-6" / name)
    train(*LONG, *RESUME, "--output_dir", str(run))
    said = {truncate: r"has \d+ bytes", flip_a_bit: "does not have the content", os.remove: "is missing"}[harm]
    said = "is missing or not whole" if name == "progress.json" else said
    assert re.search(rf"checkpoint-6 is damaged and left out: {re.escape(name)} {said}", caplog.text)
    assert "Resumed from" in caplog.text and "checkpoint-4: step 4" in caplog.text
    same_result(whole, run)


def test_no_whole_checkpoint_and_a_damaged_one_by_name(train, flags, capsys):
    run = train(*LONG)
    for path in train_vqgan.checkpoints(run):
        truncate(path / "training.pt")
    for which, words in (("latest", "no whole checkpoint"), (str(run / "checkpoint-6"), "training.pt has")):
        capsys.readouterr()
        with pytest.raises(SystemExit) if which != "latest" else train_vqgan.nullcontext():
            assert train_vqgan.main([*flags, *LONG, "--resume_from_checkpoint", which]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert len(errors) == 1 and words in errors[0]
    assert len(metrics(run)) == 6, "the metrics of the run are gone"


def test_going_back_needs_the_later_checkpoints_out_of_the_way(train, flags, capsys, whole):
    run = train(*LONG)
    with pytest.raises(SystemExit):
        train_vqgan.main([*flags, *LONG, "--resume_from_checkpoint", str(run / "checkpoint-2")])
    assert "checkpoint-4" in capsys.readouterr().err
    other = train(*LONG, "--resume_from_checkpoint", str(run / "checkpoint-2"), "--output_dir", str(run) + "-other")
    assert min(line["step"] for line in metrics(other)) == 3, "it began at the one that was named"
    for step in (4, 6):
        os.rename(run / f"checkpoint-{step}", run / f"moved-{step}")
    train(*LONG, "--resume_from_checkpoint", str(run / "checkpoint-2"))
    same_result(whole, run)


# ---- Data workers --------------------------------------------------------------------------------------------------


def test_killed_data_worker_is_replaced(train, whole, at_step, caplog):
    """SIGKILL to both workers in the middle of a step: the same images follow. Red without `start +=`."""
    killed = []

    def kill(_):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
            killed.append(child.pid)

    at_step(3, kill)
    run = train(*LONG, "--dataloader_num_workers", "2")
    assert len(killed) == 2 and "A data worker died" in caplog.text
    same_result(whole, run)


def test_data_workers_that_keep_dying(train, flags, at_step, capsys):
    def kill(_):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    for step in range(1, 100):
        at_step(step, kill)
    assert train_vqgan.main([*flags, *LONG, "--max_train_steps", "99", "--dataloader_num_workers", "1"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "train_vqgan.py: error:" in line]
    assert len(errors) == 1 and "--dataloader_num_workers" in errors[0]


# ---- Numbers that are not finite -----------------------------------------------------------------------------------


def spoil(micro_batches):
    bad = micro_batches[0].clone()
    bad[0, 0, 0, 0] = float("nan")
    return [bad, *micro_batches[1:]]


def test_planted_nan_is_survived_and_named(train, at_step, caplog):
    """Red without `found_inf`, or when the codes of that step are counted."""
    at_step(4, spoil)
    run = train(*LONG)
    assert re.search(r"Step 4: pixel, .*gradient of the generator.* not finite; .* \(1 in a row\)", caplog.text)
    assert "discriminator" in caplog.text.split("Step 4: ")[1].splitlines()[0]
    for name in ("generator", "discriminator", "ema"):
        assert all(w.isfinite().all() for w in weights(run, name).values())
        assert not equal(weights(run, name, 4), weights(run, name, 6)), "training went on"
    bad = metrics(run)[3]
    assert bad["codebook/used"] == 0, "the codes of a bad step were counted"
    assert bad["opt/skipped"] == 1 and all(isinstance(v, (int, float)) and v == v for v in bad.values())


def test_too_many_bad_steps_stop_the_run(train, flags, at_step, capsys):
    """Status 2 and one line after three in a row, not after two; the images are kept, and the good checkpoint."""
    for step in (2, 3, 5, 6, 7, 8, 9):
        at_step(step, spoil)
    arguments = [*flags, *LONG, "--max_train_steps", "20", "--max_bad_steps", "3"]
    assert train_vqgan.main(arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "train_vqgan.py: error:" in line]
    assert len(errors) == 1 and "3 steps in a row" in errors[0] and "pixel" in errors[0]
    assert at_step.calls[-1] == 8  # 5, 6 and 7 were bad; the host knows one step late
    run = train_vqgan.Path(flags[-1])
    saved = safetensors.torch.load_file(run / "bad-step-7-process-0.safetensors")
    assert saved["0"].shape == (2, 3, 16, 16) and saved["0"].isnan().sum() == 1
    last = train_vqgan.checkpoints(run)[-1]
    assert str(last) in errors[0] and all(w.isfinite().all() for w in weights(run).values())


# ---- Secrets -------------------------------------------------------------------------------------------------------

NO_HUB = """
import sys
sys.path.insert(0, {repository!r})
import train_vqgan
train_vqgan.create_repository = lambda args: "me/model"
train_vqgan.upload = lambda args, repository: None
if __name__ == "__main__":
    sys.exit(train_vqgan.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["apart", "equals", "recipe"])
def test_token_is_in_no_file(flags, tmp_path, form):
    """wandb records the command line. Red when main leaves the token in sys.argv."""
    secret = "hf_averysecrettoken"
    (tmp_path / "script.py").write_text(NO_HUB.format(repository=str(REPOSITORY)))
    (tmp_path / "secret.args").write_text(f"--hub_token {secret}\n")
    given = {"apart": ["--hub_token", secret], "equals": [f"--hub_token={secret}"]}
    given = given.get(form, [f"@{tmp_path / 'secret.args'}"])
    arguments = [*flags, "--push_to_hub", *given, "--report_to", "all", "--log_steps", "1", "--output_dir"]
    command = [sys.executable, tmp_path / "script.py", *arguments, tmp_path / "out"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr[-3000:]
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any("wandb" in str(path) for path in files) and any("events" in path.name for path in files)
    assert [path for path in files if b"--push_to_hub" in path.read_bytes()], "the command line is recorded nowhere"
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert secret not in result.stdout + result.stderr


# ---- Precision and launch modes ------------------------------------------------------------------------------------


def fp16_scaler(monkeypatch, **options):
    """A GradScaler on the CPU in fp32, unscaled before clipping as accelerate does in fp16. Returns those started."""
    start, unscale, scalers = train_vqgan.start_accelerator, train_vqgan.Accelerator.unscale_gradients, []

    def scaled(args):
        accelerator = start(args)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, **options)
        scalers.append(accelerator.scaler)
        return accelerator

    def as_in_fp16(accelerator, optimizer=None):
        with monkeypatch.context() as patch:
            patch.setattr(accelerator, "native_amp", True)
            patch.setattr(train_vqgan.Accelerator, "mixed_precision", "fp16")
            unscale(accelerator, optimizer)

    monkeypatch.setattr(train_vqgan, "start_accelerator", scaled)
    monkeypatch.setattr(train_vqgan.Accelerator, "unscale_gradients", as_in_fp16)
    return scalers


def test_fp16_scaler_serves_both_players(train, monkeypatch, tmp_path, caplog):
    """One GradScaler, two optimisers, on the CPU in fp32: a power of two scales exactly, so nothing may change.

    An overflow skips that player's update alone and halves the scale; the scale comes back on resume.
    Red when the discriminator's backward runs before the generator's step.
    """
    fast = [*LONG, "--lr_warmup_steps", "0", "--learning_rate", "1e-3", "--discr_learning_rate", "1e-3"]
    whole = train(*fast, "--output_dir", str(tmp_path / "whole"))
    scalers = fp16_scaler(monkeypatch, growth_interval=3)
    run = train(*fast, "--output_dir", str(tmp_path / "scaled"))
    assert scalers[0].is_enabled() and scalers[0].get_scale() > 2**10  # it grew, so it was updated
    for name in ("generator", "discriminator"):
        moved = [(w - weights(whole, name, 2)[key]).abs().max() for key, w in weights(whole, name).items()]
        assert max(moved) > 2e-3, "training moves less than the tolerance below"
    for name in ("generator", "discriminator", "ema"):
        for key, w in weights(whole, name).items():
            torch.testing.assert_close(weights(run, name)[key], w, rtol=1e-3, atol=1e-5)
    moving = torch.load(run / "checkpoint-6" / "training.pt", weights_only=True)
    assert moving["scaler"]["scale"] == scalers[0].get_scale()
    shutil.rmtree(run / "checkpoint-6")
    train(*fast, *RESUME, "--output_dir", str(run))
    assert scalers[1].get_scale() == scalers[0].get_scale()


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP"])
def test_untested_launch_modes_are_refused(error, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    assert name in error()


def test_dynamo_of_accelerate_config_is_refused(error, monkeypatch):
    """It would compile the whole generator, which does not trace. Red when nothing reads the launcher's choice."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert "accelerate config: torch dynamo" in error() and "--torch_compile" in error()


def test_fp16_on_a_cpu_is_refused(error):
    assert "--mixed_precision" in error("--mixed_precision", "fp16")


def test_manifest_names_every_file(train):
    run = train(*LONG)
    checkpoint = run / "checkpoint-6"
    files = json.loads((checkpoint / "progress.json").read_text())["files"]
    assert sorted(files) == sorted(FILES) == sorted(p.name for p in checkpoint.iterdir() if p.name != "progress.json")
    assert logging.getLogger("train_vqgan").handlers


def test_fp16_overflow_skips_one_player(train, monkeypatch, tmp_path):
    fp16_scaler(monkeypatch, growth_interval=1000)
    step = train_vqgan.discriminator_step

    def overflowing(accelerator, discriminator, state, kept, args):
        hook = next(discriminator.parameters()).register_hook(lambda g: g * (float("inf") if state.step == 3 else 1))
        step(accelerator, discriminator, state, kept, args)
        hook.remove()

    monkeypatch.setattr(train_vqgan, "discriminator_step", overflowing)
    run = train(*LONG, "--checkpointing_steps", "1", "--discriminator_start", "0")
    assert equal(weights(run, "discriminator", 3), weights(run, "discriminator", 4))
    assert not equal(weights(run, "discriminator", 4), weights(run, "discriminator", 5))
    assert not equal(weights(run, "generator", 3), weights(run, "generator", 4))
    scales = [torch.load(run / f"checkpoint-{n}" / "training.pt", weights_only=True)["scaler"]["scale"] for n in (3, 4)]
    assert scales == [2.0**10, 2.0**9]
