"""What goes wrong in a week of training: signals, full disks, damaged files, dying workers, numbers not finite."""

import errno
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import wandb
from accelerate.utils import LoggerType
from conftest import REPOSITORY, equal, metrics, weights

import train_vqgan

LONG = ["--max_train_steps", "6", "--checkpointing_steps", "2", "--log_steps", "1", "--use_ema"]
LONG += ["--discriminator_start", "2", "--discriminator_warmup", "2"]
RESUME = ["--resume_from_checkpoint", "latest"]


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, action): call `action` in the middle of the n-th step this process takes."""
    calls, actions = [], {}
    step = train_vqgan.generator_step

    def spy(run, micro_batches, lam):
        number = run.state.step + 1
        calls.append(number)
        micro_batches = actions.get(number, lambda x: x)(micro_batches) or micro_batches
        return step(run, micro_batches, lam)

    monkeypatch.setattr(train_vqgan, "generator_step", spy)

    def plan(n, action):
        actions[n] = action

    plan.calls, plan.actions = calls, actions
    return plan


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept") / "whole"


@pytest.fixture
def whole(train, kept):
    """A run that nothing happened to, to look at."""
    return kept if kept.exists() else train(*LONG, "--output_dir", str(kept))


@pytest.fixture
def copied(whole, flags):
    """The same, to do things to, where the flags say."""
    return Path(shutil.copytree(whole, flags[-1]))


def same_result(a, b):
    assert all(equal(weights(a, name), weights(b, name)) for name in ("generator", "discriminator", "ema"))
    assert metrics(a) == metrics(b) and [line["step"] for line in metrics(a)] == list(range(1, 7))


def names(run):
    """Of its checkpoints."""
    return [path.name for path in train_vqgan.checkpoints(run)]


def error_line(capsys):
    """The one line on stderr that names an error."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    return line


# ---- Signals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_saves_at_the_end_of_the_step(train, flags, whole, at_step, number):
    """Status 3, a checkpoint of that very step, and the same command goes on as if nothing had happened.

    Red when the loop does not look at watch.stopping, or when the checkpoint on a signal is left out.
    """
    at_step(3, lambda _: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    assert train_vqgan.main([*flags, *LONG]) == 3
    assert signal.getsignal(number) is before
    run = Path(flags[-1])
    assert names(run) == ["checkpoint-2", "checkpoint-3"] and not (run / "vqmodel").exists()
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
    assert names(flags[-1]) == ["checkpoint-2"]


def test_signal_without_checkpoints_still_saves(flags, at_step):
    at_step(3, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert train_vqgan.main([*flags, *LONG, "--checkpointing_steps", "0"]) == 3
    assert names(flags[-1]) == ["checkpoint-3"]


@pytest.mark.slow
@pytest.mark.parametrize("processes, moments", [(1, 5), (2, 2)])
def test_killed_at_any_moment(processes, moments):
    """Some of kill_and_resume.py's moments; it compares networks, EMA and metrics bit by bit.

    Red when samples_seen is not restored, averages are dropped from the checkpoint, or metrics.jsonl is not cut.
    """
    command = [sys.executable, str(REPOSITORY / "tests" / "kill_and_resume.py"), "--moments", str(moments)]
    command += ["--processes", str(processes)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    saving = "[1-5]" if moments >= 4 else "[0-2]"
    assert re.search(f"{moments} kills, {saving} of them while a checkpoint was being written: bit-iden", result.stdout)


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
    assert names(run) == ["checkpoint-2", "checkpoint-6"] and not list(run.glob("unfinished-*"))
    assert all(equal(weights(whole, name), weights(run, name)) for name in ("generator", "discriminator", "ema"))


def test_disk_full_to_the_end_stops_with_one_line(train, flags, whole, at_step, small_disk, capsys):
    """Status 2, the last good checkpoint stays; with room again the same command ends where the untouched run did."""
    disk, fill = small_disk
    at_step(4, fill)
    arguments = [*LONG, "--output_dir", str(disk / "run")]
    assert train_vqgan.main([*flags, *arguments]) == 2
    line = error_line(capsys)
    assert "No space left" in line and "--resume_from_checkpoint latest" in line
    assert names(disk / "run") == ["checkpoint-2"]
    (disk / "filler").unlink()
    at_step.actions.clear()
    same_result(whole, train(*arguments, *RESUME))


@pytest.mark.parametrize("broken", ["export", "manifest", "sync"])
def test_save_that_fails(train, whole, monkeypatch, caplog, broken):
    """ENOSPC injected into one save, before, while and after the files are written."""
    real, calls = getattr(train_vqgan, broken), []

    def failing(*arguments):
        calls.append(arguments)
        if "checkpoint-4" in str(arguments[-1]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(train_vqgan, broken, failing)
    run = train(*LONG)
    assert "Could not save" in caplog.text and "No space left on device" in caplog.text
    assert names(run) == ["checkpoint-2", "checkpoint-6"]
    assert not list(run.glob("unfinished-*")) and len(calls) >= 3
    same_result(whole, run)


def test_last_checkpoint_that_fails_is_said_at_the_end(flags, monkeypatch, capsys):
    """The result is exported, but the run cannot be resumed at its end. Red without the check of watch.saved."""
    real = train_vqgan.sync

    def failing(path):
        if "checkpoint-6" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path)

    monkeypatch.setattr(train_vqgan, "sync", failing)
    assert train_vqgan.main([*flags, *LONG]) == 2
    assert "the last checkpoint could not be saved" in error_line(capsys)
    run = Path(flags[-1])
    assert (run / "vqmodel").is_dir() and names(run)[-1] == "checkpoint-4"
    assert not list(run.glob("unfinished-*"))


def test_output_directory_that_vanishes(flags, at_step, tmp_path, capsys):
    """A file where the directory was: one line at the end, what was saved elsewhere stays."""

    def vanish(_):
        os.rename(tmp_path / "run", tmp_path / "moved")
        (tmp_path / "run").touch()

    at_step(3, vanish)
    assert train_vqgan.main([*flags, *LONG]) == 2
    assert "--output_dir" in error_line(capsys) and names(tmp_path / "moved") == ["checkpoint-2"]
    assert at_step.calls == [1, 2, 3, 4, 5, 6]


# ---- Damaged and foreign checkpoints -------------------------------------------------------------------------------


def truncate(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


HARMS = [truncate, flip_a_bit, os.remove]
STATE = ["generator.safetensors", "discriminator.safetensors", "ema.safetensors", "training.pt"]
NETWORKS = [f"{name}/diffusion_pytorch_model.safetensors" for name in ("vqmodel", "discriminator")]
CARDS = ["vqmodel/config.json", "discriminator/config.json", "image_processor/config.json", "README.md"]


def test_manifest_names_every_file(whole):
    checkpoint = whole / "checkpoint-6"
    files = json.loads((checkpoint / "progress.json").read_text())["files"]
    found = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert set(files) == {*STATE, *NETWORKS, *CARDS} == found - {"progress.json"}
    assert train_vqgan.find_fault(checkpoint) is None


@pytest.mark.parametrize(
    "name, harm",
    [
        *((name, harm) for name in [*NETWORKS, *STATE] for harm in HARMS),
        *(("progress.json", harm) for harm in (truncate, os.remove)),  # one bit may leave JSON of the same meaning
    ],
)
def test_damaged_checkpoint_is_left_for_the_one_before(train, whole, copied, caplog, name, harm):
    """`latest` names the fault and goes on from the one before. Red when find_fault compares no hashes."""
    harm(copied / "checkpoint-6" / name)
    train(*LONG, *RESUME)
    said = "is missing or not whole" if name == "progress.json" else "is missing or not as it was saved"
    assert re.search(rf"checkpoint-6 is damaged and left out: {re.escape(name)} {said}", caplog.text)
    assert "Resumed from" in caplog.text and "checkpoint-4: step 4" in caplog.text
    same_result(whole, copied)


def test_no_whole_checkpoint_and_a_damaged_one_by_name(flags, copied, capsys):
    for path in train_vqgan.checkpoints(copied):
        truncate(path / "training.pt")
    for which, words in (
        ("latest", "no whole checkpoint"),
        (str(copied / "checkpoint-6"), "training.pt is missing or"),
    ):
        assert train_vqgan.main([*flags, *LONG, "--resume_from_checkpoint", which]) == 2
        assert words in error_line(capsys)
    assert len(metrics(copied)) == 6, "the metrics of the run are gone"


def test_going_back_needs_the_later_checkpoints_out_of_the_way(train, flags, capsys, whole, copied):
    named = ["--resume_from_checkpoint", str(copied / "checkpoint-2")]
    assert train_vqgan.main([*flags, *LONG, *named]) == 2
    assert f"{copied / 'checkpoint-4'}, {copied / 'checkpoint-6'}" in error_line(capsys)
    other = train(*LONG, *named, "--output_dir", f"{copied}-other")
    assert min(line["step"] for line in metrics(other)) == 3, "it began at the one that was named"
    for step in (4, 6):
        os.rename(copied / f"checkpoint-{step}", copied / f"moved-{step}")
    train(*LONG, *named)
    same_result(whole, copied)


def of_the_last_version(checkpoint):
    """Its progress.json says no format."""
    progress = json.loads((checkpoint / "progress.json").read_text())
    assert progress.pop("format")
    (checkpoint / "progress.json").write_text(json.dumps(progress))


def of_the_version_before_exports(checkpoint):
    """Flat files, each network in one of them, and other keys in progress.json."""
    progress = json.loads((checkpoint / "progress.json").read_text())
    networks = {
        name: weights(checkpoint.parent, name, progress["step"]) for name in ("generator", "ema", "discriminator")
    }
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    for name, network in networks.items():
        train_vqgan.safetensors.torch.save_file(network, checkpoint / f"{name}.safetensors")
    for name in ("training.pt", "process-0.pt"):
        torch.save({"optimizers": {}}, checkpoint / name)
    old = {name: progress[name] for name in ("step", "samples_seen", "seed", "processes", "versions")}
    old |= {"restart_tokens": 0, "tracker_run": "0", "settled": {}, "trained": {"--resolution": 16}}
    old["files"] = train_vqgan.manifest(checkpoint)
    (checkpoint / "progress.json").write_text(json.dumps(old))


@pytest.mark.parametrize("made_old", [of_the_last_version, of_the_version_before_exports])
@pytest.mark.parametrize("which", ["latest", "checkpoint-6"])
def test_checkpoint_of_an_older_version_is_refused(flags, copied, capsys, made_old, which):
    """One line that says what to do instead; nothing is deleted, nothing taken for damaged.

    Red when find_checkpoint does not compare the format, or takes this one for damaged and an earlier one instead.
    """
    made_old(copied / "checkpoint-6")

    def content():
        return {path: path.is_file() and path.read_bytes() for path in copied.rglob("*")}

    before = content()
    named = which if which == "latest" else str(copied / which)
    assert train_vqgan.main([*flags, *LONG, "--max_train_steps", "8", "--resume_from_checkpoint", named]) == 2
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if "checkpoint-6" in line]
    assert f"--resume_from_checkpoint: {copied / 'checkpoint-6'} is of another version of this script" in line
    assert "--pretrained_model_name_or_path" in line and "Traceback" not in said
    assert content() == before and len(before) > 30


# ---- Data workers --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("killed", [1, 2])
def test_killed_data_worker_ends_the_run_which_goes_on_later(train, flags, at_step, capsys, tmp_path, killed):
    """SIGKILL to one or both workers amid a step: status 2, one line, a checkpoint of the last finished step.

    Red when training_batches does not know the error, or when the run stops without a checkpoint.
    """
    more = [
        *LONG,
        "--checkpointing_steps",
        "100",
        "--gradient_accumulation_steps",
        "4",
    ]  # more batches than are in flight
    untouched = train(*more, "--output_dir", str(tmp_path / "untouched"))
    del at_step.calls[:]
    others, victims = set(multiprocessing.active_children()), []

    def kill(_):
        for child in sorted({*multiprocessing.active_children()} - others, key=lambda child: child.pid)[:killed]:
            os.kill(child.pid, signal.SIGKILL)
            victims.append(child.pid)

    at_step(3, kill)
    more += ["--dataloader_num_workers", "2"]
    handler = signal.getsignal(signal.SIGCHLD)
    assert train_vqgan.main([*flags, *more]) == 2
    assert len(victims) == killed and signal.getsignal(signal.SIGCHLD) is handler
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if "train_vqgan.py: error:" in line]
    assert "--dataloader_num_workers: a data worker died" in line and "--resume_from_checkpoint latest" in line
    assert "Traceback" not in said
    run, last = Path(flags[-1]), at_step.calls[-1]
    assert 3 <= last < 6, "it was not in the middle"
    assert names(run) == [f"checkpoint-{last}"] and train_vqgan.find_fault(run / f"checkpoint-{last}") is None
    assert not (run / "vqmodel").exists()
    at_step.actions.clear()
    train(*more, *RESUME)
    assert at_step.calls == [*range(1, 7)], "a step was taken twice"
    same_result(untouched, run)


KILLED, AGAIN = "DataLoader worker (pid 12) is killed by signal: ", "--resume_from_checkpoint latest"
BUS = "It is possible that dataloader's workers are out of shared memory. Please try to raise your shared memory limit."
CAUGHT = (
    "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\nRuntimeError: "
)
WORKER_FAILURES = {
    "killed": (RuntimeError(f"{KILLED}Killed. "), ["a data worker died", AGAIN]),
    "exited": (RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly"), ["a data worker died", AGAIN]),
    "bus": (RuntimeError(f"{KILLED}Bus error. {BUS}"), ["--shm-size", "--dataloader_num_workers 0", AGAIN]),
    "full": (
        RuntimeError(f"{CAUGHT}unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device"),
        ["--shm-size", "--dataloader_num_workers 0", AGAIN],
    ),
    "unwritable": (
        RuntimeError("unable to write to file </torch_12_345_6>: No space left on device (28)"),
        ["--shm-size", "--dataloader_num_workers 0", AGAIN],
    ),
    "reset": (ConnectionResetError(104, "Connection reset by peer"), ["a data worker died", AGAIN]),
    "own": (RuntimeError(f"{CAUGHT}shapes do not match"), None),
    "own words": (RuntimeError(f"{CAUGHT}ours".replace("Original", "# shared memory\nOriginal")), None),
}


@pytest.mark.parametrize("failure", WORKER_FAILURES)
def test_failures_of_data_workers(flags, monkeypatch, failure):
    """Those of the machine are one line with a remedy, a worker's own error is ours.

    Red when training_batches looks for "out of shared memory" anywhere but in the last line, or not at all.
    """
    error, words = WORKER_FAILURES[failure]

    class Loader:
        def __init__(self, *_, **__):
            pass

        def __iter__(self):
            yield "a batch"
            raise error

    monkeypatch.setattr(train_vqgan, "DataLoader", Loader)
    args = train_vqgan.parse_args(flags)
    batches = train_vqgan.training_batches([], args, 0, 0, train_vqgan.start_accelerator(args), train_vqgan.Watch(), {})
    assert next(batches) == "a batch"
    with pytest.raises(train_vqgan.UserError if words else RuntimeError) as caught:
        next(batches)
    if words:
        assert str(caught.value).startswith("--dataloader_num_workers: ")
        assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
        assert ("--shm-size" in str(caught.value)) == ("--shm-size" in words)
    else:
        assert caught.value is error


@pytest.mark.slow
@pytest.mark.parametrize("size", ["4k", "128k"])
def test_small_shared_memory(flags, size, tmp_path):
    """In a container with little of it: too little to start workers, or for the images. Red without either line."""
    command = [sys.executable, str(REPOSITORY / "train_vqgan.py"), *flags, "--dataloader_num_workers", "2"]
    command += ["--resolution", "128", "--train_batch_size", "4"]
    shell = f"mount -t tmpfs -o size={size} tmpfs /dev/shm || exit 77; exec {shlex.join(command)}"
    try:
        result = subprocess.run(["unshare", "-m", "sh", "-c", shell], capture_output=True, text=True, timeout=300)
    except OSError:
        pytest.skip("no unshare here")
    if result.returncode in (1, 77) and "train_vqgan" not in result.stderr:
        pytest.skip("mounting is not possible here; test_failures_of_data_workers has the messages")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    (line,) = re.findall("train_vqgan.py: error: (.*)", result.stderr)
    assert line.startswith("--dataloader_num_workers: ") and "No space left on device" in line
    assert "--shm-size" in line and "--dataloader_num_workers 0" in line
    assert train_vqgan.main(flags) == 0, "the same command works"


# ---- Numbers that are not finite -----------------------------------------------------------------------------------


def spoil(micro_batches):
    bad = micro_batches[0].clone()
    bad[0, 0, 0, 0] = float("nan")
    return [bad, *micro_batches[1:]]


def test_planted_nan_is_survived_and_named(train, at_step, caplog):
    """Red without `found_inf`, or when the codes of that step are counted."""
    at_step(4, spoil)
    run = train(*LONG)
    where = "Step 4, samples 6 to 7: loss or gradient of the generator and discriminator"
    assert f"{where} not finite; the update was skipped (1 in a row)" in caplog.text
    assert caplog.text.count("not finite") == 1
    for name in ("generator", "discriminator", "ema"):
        assert all(w.isfinite().all() for w in weights(run, name).values())
        assert not equal(weights(run, name, 4), weights(run, name, 6)), "training went on"
    bad = metrics(run)[3]
    assert bad["codebook/used"] == 0, "the codes of a bad step were counted"
    assert bad["opt/skipped"] == 1 and all(isinstance(v, (int, float)) and v == v for v in bad.values())


def test_too_many_bad_steps_stop_the_run(train, flags, at_step, capsys):
    """Status 2 and one line after three in a row, not after two; the good checkpoint is kept."""
    for step in (2, 3, 5, 6, 7, 8, 9):
        at_step(step, spoil)
    assert train_vqgan.main([*flags, *LONG, "--max_train_steps", "20", "--max_bad_steps", "3"]) == 2
    line = error_line(capsys)
    assert "3 steps in a row" in line and "generator" in line and "Step 7, samples 12 to 13: " in line
    assert at_step.calls[-1] == 8  # 5, 6 and 7 were bad; the host knows one step late
    last = train_vqgan.checkpoints(flags[-1])[-1]
    assert str(last) in line and all(w.isfinite().all() for w in weights(Path(flags[-1])).values())


# ---- Errors of the program -----------------------------------------------------------------------------------------

PARTS = [
    "start_accelerator",
    "claimed_output_dir",
    "find_checkpoint",
    "check_vqmodel_config",
    "build_discriminator",
    "choose_stages",
    "list_images",
    "augment",
    "generator_loss",
    "discriminator_loss",
    "reconstruct",
    "plain_vqmodel",
    "manifest",
]


@pytest.mark.parametrize("part", PARTS)
def test_error_of_the_program_shows_its_traceback(flags, monkeypatch, capsys, part):
    """No line, no status, but the exception itself, wherever it is raised and the first time that it is.

    Red when a place that makes a line of a user's mistake, a full disk or an unreadable image takes it for one.
    """
    calls = []

    def broken(*arguments, **options):
        calls.append(part)
        raise TypeError("ours")

    monkeypatch.setattr(train_vqgan, part, broken)
    with pytest.raises(TypeError, match="ours") as caught:
        train_vqgan.main([*flags, "--validation_fraction", "0.3", "--save_best", "psnr"])
    assert calls == [part] and caught.traceback[-1].name == "broken"
    assert "error:" not in capsys.readouterr().err


@pytest.mark.parametrize("verbose", [False, True])
def test_verbose_shows_the_error_behind_a_line(flags, at_step, tmp_path, capsys, verbose):
    """In the middle of a run, too. Red when main always prints it, or never."""

    def vanish(_):
        os.rename(tmp_path / "run", tmp_path / "moved")
        (tmp_path / "run").touch()

    at_step(6, vanish)
    assert train_vqgan.main([*flags, *LONG, *["--verbose"] * verbose]) == 2
    said = capsys.readouterr().err
    assert ("Traceback" in said and "in export" in said and "NotADirectoryError" in said) == verbose
    assert ("Traceback" in said) == verbose
    assert said.splitlines()[-1].startswith("train_vqgan.py: error: --output_dir: cannot write the result to ")


# ---- Failures at the start -----------------------------------------------------------------------------------------


def failing(error):
    """A function that raises `error`, whatever it is given."""

    def fail(*_, **__):
        raise error

    return fail


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB of which 1 MiB is free."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError("Unable to allocate 1. GiB for an array"),
]


@pytest.mark.parametrize("cause", OUT_OF_MEMORY, ids=lambda cause: str(cause)[:30])
def test_out_of_memory_in_the_first_step(train, flags, at_step, capsys, cause):
    """One line with the remedy, and the same command works with room. Red when main knows torch's exception only, or
    when a fresh run writes an empty metrics.jsonl before its first step."""
    at_step(1, failing(cause))
    assert train_vqgan.main(flags) == 2
    assert "train_vqgan.py: error: out of memory: lower --train_batch_size" in error_line(capsys)
    at_step.actions.clear()
    train()


def test_memory_that_is_really_not_there(flags, at_step, capsys):
    at_step(1, lambda _: torch.empty(10**14))
    assert train_vqgan.main(flags) == 2
    assert "out of memory" in error_line(capsys)


@pytest.mark.slow
def test_no_compiler(flags, tmp_path):
    """--torch_compile without a C++ compiler. Red when main does not know the compiler's errors."""
    environment = os.environ | {"PATH": str(tmp_path / "bin"), "CXX": str(tmp_path / "g++")}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, REPOSITORY / "train_vqgan.py", *flags]
    result = subprocess.run([*command, "--torch_compile"], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    (line,) = re.findall("train_vqgan.py: error: (.*)", result.stderr)
    assert line.startswith("--torch_compile: InvalidCxxCompiler: No working C++ compiler") and "leave it out" in line
    assert train_vqgan.main(flags) == 0, "without the flag the same command works"


@pytest.mark.slow
def test_half_a_file_of_the_compiler(tmp_path):
    """What a compilation that was killed leaves in PyTorch's cache: the message names the file, and without it all is well.

    Red when it says that a compiler is missing.
    """
    program = "import sys, torch, train_vqgan\ntry:\n    torch.compile(lambda x: (x.sin() + 1).sum())(torch.ones(64))\n"
    program += "except Exception as error:\n    sys.exit(train_vqgan.known_failure(error) or repr(error))"
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for said in ("", "file too short", ""):
        for file in tmp_path.rglob("*.main.so"):
            file.write_bytes(b"") if said else file.unlink()
        command = [sys.executable, "-c", program]
        result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
        assert (result.returncode != 0) == bool(said), result.stderr
        if said:
            assert re.search(f"--torch_compile: {tmp_path}.*{said}; .*remove it", result.stderr), result.stderr


def test_a_module_is_not_to_be_removed():
    """An import that fails inside a package has a path, too. Red when every path is taken for the cache's."""
    cause = ImportError("cannot import name 'x'", path=torch.__file__)
    error = torch._dynamo.exc.BackendCompilerFailed(lambda graph: graph, cause, None)
    assert "install them" in train_vqgan.known_failure(error) and "remove" not in train_vqgan.known_failure(error)


def test_wandb_without_a_key(train, flags, monkeypatch, capsys, tmp_path):
    """Red when start_trackers does not catch the tracker's own errors."""
    wandb.teardown()  # of the tests before
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert train_vqgan.main([*flags, "--report_to", "wandb"]) == 2
    line = error_line(capsys)
    assert "--report_to wandb: " in line and "No API key" in line and "--report_to none" in line
    wandb.teardown()  # another process would read this anew
    monkeypatch.setenv("WANDB_MODE", "offline")
    train("--report_to", "wandb")


def test_tracker_that_is_not_installed(error, flags, monkeypatch, train):
    """accelerate leaves it out with a warning. Red without the check in start_accelerator."""
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TENSORBOARD])
    for chosen in ("wandb", "all"):
        line = error("--report_to", chosen)
        assert f"--report_to {chosen}: wandb is not installed; pip install wandb" in line
    train("--report_to", "tensorboard")


@pytest.mark.parametrize("part", ["log", "finish"])
def test_tracker_that_fails_later_costs_a_warning(train, monkeypatch, caplog, photos, part):
    """Red when keep_going is given no other errors there than a disk's, or end_training finishes the trackers again."""
    monkeypatch.setattr(f"accelerate.tracking.TensorBoardTracker.{part}", failing(ValueError("the tracker's own")))
    run = train("--report_to", "tensorboard", "--log_steps", "1", "--validation_images", str(photos / "0.png"))
    assert "the trackers: the tracker's own" in caplog.text
    assert (run / "vqmodel").is_dir() and [line["step"] for line in metrics(run)] == [1, 2, 2]


@pytest.mark.parametrize(
    "cause",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(errno.EACCES, "Permission denied"),
        train_vqgan.safetensors.SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_result_that_cannot_be_written(flags, monkeypatch, capsys, cause):
    """Red when SafetensorError gets through, or the remedy takes a checkpoint for granted."""
    monkeypatch.setattr(train_vqgan, "export", failing(cause))
    assert train_vqgan.main([*flags, "--checkpointing_steps", "0"]) == 2
    line = error_line(capsys)
    assert "there is no checkpoint: move" in line and train_vqgan.one_line(cause) in line


# ---- Secrets -------------------------------------------------------------------------------------------------------

NO_HUB = """
import sys
sys.path.insert(0, {repository!r})
import train_vqgan
train_vqgan.create_repository = lambda args: "me/model"
train_vqgan.upload = lambda run, folder: None
if __name__ == "__main__":
    sys.exit(train_vqgan.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["apart", "equals", "recipe"])
def test_token_is_in_no_file(flags, tmp_path, form):
    """wandb records the command line. Red when main leaves the token in sys.argv, or public_config keeps hub_token."""
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


SAME, BF16 = "the same result", "--mixed_precision bf16: many times slower"
ANSWERS = {
    "cpu": ({"ACCELERATE_USE_CPU": "True"}, SAME),
    "gpu ids": ({"CUDA_VISIBLE_DEVICES": "0"}, SAME),
    "affinity": ({"ACCELERATE_CPU_AFFINITY": "1"}, SAME),
    "debug": ({"ACCELERATE_DEBUG_MODE": "true"}, SAME),
    "accumulation": ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"}, SAME),
    "clipping": ({"ACCELERATE_GRADIENT_CLIPPING": "0.001"}, SAME),
    "plain": ({"ACCELERATE_USE_FSDP": "False", "ACCELERATE_MIXED_PRECISION": "no"}, SAME),
    "dynamo options": (
        {
            "ACCELERATE_DYNAMO_BACKEND": "NO",
            "ACCELERATE_DYNAMO_MODE": "max-autotune",
            "ACCELERATE_DYNAMO_USE_FULLGRAPH": "True",
            "ACCELERATE_DYNAMO_USE_DYNAMIC": "True",
            "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "True",
        },
        SAME,
    ),
    "bf16": ({"ACCELERATE_MIXED_PRECISION": "bf16"}, BF16),
    "fp16": ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "--mixed_precision fp16: not supported here"),
    "fp8": ({"ACCELERATE_MIXED_PRECISION": "fp8", "ACCELERATE_FP8_BACKEND": "TE"}, "accelerate config: "),
    "dynamo": ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "DYNAMO_BACKEND is not supported"),
    "deepspeed": ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DEEPSPEED is not supported"),
    "fsdp": ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP is not supported"),
    "megatron": ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "MEGATRON_LM is not supported"),
    "parallelism": ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "PARALLELISM_CONFIG is not supported"),
    "sagemaker": (
        {"ACCELERATE_USE_SAGEMAKER": "true", "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "DATA_PARALLEL"},
        "SAGEMAKER is not supported",
    ),
    "processes apart": ({"WORLD_SIZE": "2"}, "2 processes were launched, but each"),
    "not a value": ({"ACCELERATE_USE_CPU": "perhaps"}, "accelerate config: "),
}


@pytest.fixture
def plain(train, kept):
    """A run without any of these."""
    run = kept.parent / "plain"
    return run if run.exists() else train(*LONG, "--output_dir", str(run))


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_of_accelerate_config(plain, train, flags, monkeypatch, caplog, capsys, answer):
    """What `accelerate launch` sets for each answer is honoured, without effect, or refused in one line.

    Red when accelerate divides the loss by its own number of accumulation steps, or fp8 trains and cannot be saved.
    """
    environment, expected = ANSWERS[answer]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if expected not in (SAME, BF16):
        assert train_vqgan.main([*flags, *LONG]) == 2
        assert expected in error_line(capsys)
        return
    run = train(*LONG)
    if expected == SAME:
        same_result(plain, run)
    else:
        assert BF16 in caplog.text and not equal(weights(plain), weights(run))


@pytest.mark.parametrize(
    "environment, said",
    [
        ({"SLURM_NTASKS": "4"}, "SLURM_NTASKS is 4, but this run has 1 process"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2, but this run has 1 process"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, "prepared several processes but started 1"),
        ({"SLURM_NTASKS": "1"}, None),
        ({}, None),
    ],
)
def test_tasks_that_would_train_alone_are_warned_of(flags, monkeypatch, caplog, environment, said):
    """Red without the warnings of start_accelerator, or with one for a single task."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    train_vqgan.start_accelerator(train_vqgan.parse_args(flags))
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == (said is not None) and all(said in line for line in warned)


def test_fp16_on_a_cpu_is_refused(error):
    assert "--mixed_precision" in error("--mixed_precision", "fp16")


def test_fp16_overflow_skips_one_player(train, monkeypatch):
    fp16_scaler(monkeypatch, growth_interval=1000)
    step = train_vqgan.discriminator_step

    def overflowing(run, pairs):
        factor = float("inf") if run.state.step == 3 else 1
        hook = next(run.discriminator.parameters()).register_hook(lambda gradient: gradient * factor)
        step(run, pairs)
        hook.remove()

    monkeypatch.setattr(train_vqgan, "discriminator_step", overflowing)
    run = train(*LONG, "--checkpointing_steps", "1", "--discriminator_start", "0")
    assert equal(weights(run, "discriminator", 3), weights(run, "discriminator", 4))
    assert not equal(weights(run, "discriminator", 4), weights(run, "discriminator", 5))
    assert not equal(weights(run, "generator", 3), weights(run, "generator", 4))
    scales = [torch.load(run / f"checkpoint-{n}" / "training.pt", weights_only=True)["scaler"]["scale"] for n in (3, 4)]
    assert scales == [2.0**10, 2.0**9]


# ---- Two runs, network shares, slow validations --------------------------------------------------------------------

HOLD = """
import sys, time, filelock
held = filelock.FileLock(sys.argv[1] + "/.lock")
held.acquire()
print("locked", flush=True)
time.sleep(600)
"""


def test_two_runs_do_not_write_one_directory(train, flags, capsys):
    """A requeued job that overlaps the old one; once that is killed, however hard, the lock is gone.

    Red when the directory is not locked, or when a lock file that is there counts as a lock.
    """
    output = Path(flags[-1])
    output.mkdir()
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(output)], cwd=REPOSITORY, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"locked\n"
        assert train_vqgan.main(flags) == 2
        said = capsys.readouterr().err
        assert said.count("error:") == 1 and f"--output_dir: another run is writing to {output}" in said
        assert names(output) == []
    finally:
        other.kill()
        other.wait()
    assert (output / ".lock").exists(), "what is left of the killed run"
    train()
    assert not (output / ".lock").exists()


@pytest.mark.parametrize("users_own", [True, False])
def test_output_dir_of_a_run_that_cannot_start(flags, tmp_path, users_own):
    """It is as it was before. Red when it is removed whoever made it, and when it is left."""
    output, nothing = tmp_path / "run", tmp_path / "nothing"
    nothing.mkdir()
    if users_own:
        output.mkdir()
    assert train_vqgan.main([*flags, "--train_data_dir", str(nothing)]) == 2
    assert output.exists() == users_own and (not users_own or not any(output.iterdir()))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_directories_that_cannot_be_synced(train, monkeypatch, caplog, number):
    """Network shares and FUSE. Red when the error gets through: every save failed though the files were whole."""
    fsync, refused = os.fsync, []

    def share(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            refused.append(handle)
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", share)
    run = train()
    assert refused and names(run) == ["checkpoint-2"] and "Could not save" not in caplog.text


def test_file_that_cannot_be_synced_is_not_saved(flags, monkeypatch, capsys):
    """EIO of a file. Red when every error of fsync is passed over."""

    def broken(handle):
        if not os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    assert train_vqgan.main(flags) == 2
    assert names(Path(flags[-1])) == [] and os.strerror(errno.EIO) in capsys.readouterr().err


@pytest.mark.parametrize("step", [2, 4])
def test_signal_during_validation(train, flags, monkeypatch, step):
    """Between two batches of held-out images: that step is saved at once. Red when the validation goes on to its end.

    In the middle of the run, and at its last step: resumed there, the run validates and exports.
    """
    more = ["--validation_fraction", "0.9", "--train_batch_size", "1", "--max_train_steps", "4"]
    more += ["--validation_steps", "2", "--checkpointing_steps", "100", "--dataloader_num_workers", "0"]
    reconstruct, evaluated = train_vqgan.reconstruct, []
    loop = train_vqgan.train_loop

    def watched(run, batches):
        def interrupted(*rest):
            evaluated.append(run.state.step)
            if evaluated.count(step) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return reconstruct(*rest)

        monkeypatch.setattr(train_vqgan, "reconstruct", interrupted)
        return loop(run, batches)

    monkeypatch.setattr(train_vqgan, "train_loop", watched)
    run = Path(flags[-1])
    assert train_vqgan.main([*flags, *more]) == train_vqgan.STOPPED
    assert evaluated.count(step) == 2 and names(run) == [f"checkpoint-{step}"] and not (run / "vqmodel").exists()
    monkeypatch.undo()
    train(*more, *RESUME)
    steps = [line["step"] for line in metrics(run) if "protocol" in line]
    assert steps[-1] == 4 and (run / "vqmodel").exists()


@pytest.mark.parametrize("kind", ["link", "busy", "own"])
def test_leftovers_that_cannot_be_removed_cost_nothing(train, tmp_path, monkeypatch, caplog, kind):
    """A link, a folder that a network share keeps, and one of the user's own. Red when rmtree's error gets through."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    left = tmp_path / "run" / ("unfinished-notes" if kind == "own" else "unfinished-checkpoint-1")
    left.symlink_to(tmp_path / "elsewhere") if kind == "link" else left.mkdir()
    rmtree = shutil.rmtree

    def kept(path, *rest):
        if Path(path) == left and kind == "busy":
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        rmtree(path, *rest)

    monkeypatch.setattr(train_vqgan.shutil, "rmtree", kept)
    run = train(*LONG)
    assert names(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"] and (tmp_path / "elsewhere").is_dir()
    assert os.path.lexists(left) == (kind != "link")


def test_branch_into_a_directory_with_another_run(train, flags, capsys, tmp_path):
    """Refused; but not after a try that broke off before its first checkpoint. Red without the one or the other."""
    first = train(*LONG, "--output_dir", str(tmp_path / "first"))
    second = train("--output_dir", str(tmp_path / "second"))
    branch = ["--resume_from_checkpoint", str(first / "checkpoint-4"), "--max_train_steps", "5", "--use_ema"]
    assert train_vqgan.main([*flags, *branch, "--output_dir", str(second)]) == 2
    assert f"--output_dir: {second} already holds another run" in capsys.readouterr().err
    (tmp_path / "third").mkdir()
    (tmp_path / "third" / "metrics.jsonl").write_text('{"step": 5}\n')
    third = train(*branch, "--output_dir", str(tmp_path / "third"))
    assert [line["step"] for line in metrics(third)] == [5]


def test_remedy_without_a_checkpoint(flags, monkeypatch, capsys):
    """Red when it says to go on from a checkpoint that is not there: that is refused."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(train_vqgan, "export", full)
    assert train_vqgan.main([*flags, "--checkpointing_steps", "0", "--log_steps", "1"]) == 2
    said = capsys.readouterr().err
    assert "there is no checkpoint: move " in said and "--resume_from_checkpoint latest goes on" not in said
    assert train_vqgan.main(flags) == 2
    assert "no checkpoint to go on from; move it away, or choose another directory" in capsys.readouterr().err


@pytest.mark.parametrize("listed", ["[]", "null", '{"files": []}', '{"files": {"a": 1}}'])
def test_progress_of_another_shape_is_a_damaged_checkpoint(copied, listed):
    """Red when TypeError or AttributeError gets through."""
    (copied / "checkpoint-6" / "progress.json").write_text(listed)
    file = "a" if "a" in listed else "progress.json"
    assert train_vqgan.find_fault(copied / "checkpoint-6").startswith(f"{file} is missing or not ")
    assert train_vqgan.find_fault(copied / "checkpoint-7") == "progress.json is missing or not whole"
