"""What people see of a run: wandb's files by its own reader, its server as `wandb sync` fills it, TensorBoard's events."""

import gzip
import json
import re
import shutil
import subprocess
import sys
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import PIL.Image
import pytest
import wandb
from conftest import TINY_MODEL, metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_vqgan

EVERY_STEP = ["--log_steps", "1", "--validation_steps", "2", "--checkpointing_steps", "2", "--lr_warmup_steps", "0"]
FRACTION = ["--validation_fraction", "0.3"]


def parts(run):
    """wandb's directories of a run, the oldest first."""
    return sorted((run / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime)


def read(part):
    """(id, config, history by step, summary) of a directory that an offline run left, by wandb's own reader."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", part]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    config, history, summary, identity = {}, [], {}, None
    for record in map(json.loads, done.stdout.splitlines()):
        said = record.get(record["type"])
        if record["type"] == "run":
            identity = said["run_id"]
        elif record["type"] == "config":
            config |= said["update"]
        elif record["type"] == "history":
            history.append(said["item"])
        elif record["type"] == "summary":
            summary |= said["update"]
    steps = [row["_step"] for row in history]
    assert steps == sorted(set(steps)), "a step twice"
    return identity, config, {row["_step"]: row for row in history}, summary


def logged(run):
    """metrics.jsonl by step, without what has no place on a tracker."""
    rows = defaultdict(dict)
    for line in metrics(run):
        rows[line["step"]] |= {key: value for key, value in line.items() if "/" in key}
    return rows


@pytest.fixture
def tracked(train, photos):
    """tracked(*flags): a run of six steps with wandb and TensorBoard, held-out images and two shown ones."""
    shown = ["--validation_images", str(photos / "0.png"), str(photos / "3.png")]
    return lambda *more: train(*EVERY_STEP, *FRACTION, *shown, "--report_to", "all", "--max_train_steps", "6", *more)


@pytest.mark.slow
def test_wandb_holds_what_the_run_was(tracked):
    """Its networks, each number at its step under a grouped name, captioned pictures, best values.

    Red when start_trackers leaves architecture() out, log_images the captions, or BEST is turned round.
    """
    run = tracked()
    (part,) = parts(run)
    _, config, history, summary = read(part)
    model = json.loads((run / "vqmodel" / "config.json").read_text())
    for key, value in TINY_MODEL.items():
        assert model[key] == value
        assert config[f"model/{key}"] == (" ".join(map(str, value)) if isinstance(value, list) else value), key
    assert config["model/downsampling"] == 2 and config["discriminator/hidden_channels"] == 8
    for name in ("model", "discriminator"):
        folder = run / {"model": "vqmodel"}.get(name, name)
        weights = train_vqgan.safetensors.torch.load_file(folder / "diffusion_pytorch_model.safetensors")
        assert config[f"{name}/parameters"] == sum(weight.numel() for weight in weights.values()) > 0
    assert config["resolution"] == 16 and not [key for key in config if "token" in key]

    assert set(history) == set(logged(run)) == set(range(1, 7))
    for step, row in logged(run).items():
        assert {key: history[step][key] for key in row} == pytest.approx(row), step
    groups = {key.split("/")[0] for row in history.values() for key in row if not key.startswith("_")}
    assert groups <= {"loss", "disc", "codebook", "opt", "data", "speed", "val"}

    for step in (2, 4, 6):
        captions = history[step]["val/strips.captions"]
        assert [caption.split(",")[0] for caption in captions] == ["0.png", "3.png"]
        decibels = [float(re.fullmatch(r".*, (\d+\.\d\d) dB", caption)[1]) for caption in captions]
        assert np.mean(decibels) == pytest.approx(history[step]["val/images_psnr_n2"], abs=0.01)
        column = np.array(PIL.Image.open(run / "validation" / f"step-{step}.png"))
        for name, strip in zip(history[step]["val/strips.filenames"], np.split(column, 2)):
            assert (np.array(PIL.Image.open(part / "files" / name)) == strip).all()
        assert sum(history[step]["val/code_use.values"]) == TINY_MODEL["num_vq_embeddings"]

    for name, best in (("psnr_n2", max), ("ssim_n2", max), ("perceptual_tf_efficientnet_lite0_n2", min)):
        assert summary[f"best/{name}"] == best(history[step][f"val/{name}"] for step in (2, 4, 6))


def failing_at(monkeypatch, step):
    """As a killed process: the step fails, and nothing is finished."""
    original = train_vqgan.generator_step

    def generator_step(run, *others):
        if run.state.step == step:
            raise ZeroDivisionError
        return original(run, *others)

    monkeypatch.setattr(train_vqgan, "generator_step", generator_step)


@pytest.mark.slow
def test_wandb_of_a_run_that_goes_on(tracked):
    """One run of two parts, with the best of both; nothing when there is nothing left to do.

    Red when `finished` is not written, or a run without steps to take starts the trackers.
    """
    run = tracked("--max_train_steps", "4")
    tracked("--resume_from_checkpoint", "latest")
    first, second = map(read, parts(run))
    assert first[0] == second[0] and list(first[2]) == [1, 2, 3, 4] and list(second[2]) == [5, 6]
    psnr = [row["val/psnr_n2"] for row in (first[2] | second[2]).values() if "val/psnr_n2" in row]
    assert len(psnr) == 3 and second[3]["best/psnr_n2"] == max(psnr)
    tracked("--resume_from_checkpoint", "latest")
    assert len(parts(run)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "killed twice", "back"])
def test_wandb_of_a_run_that_takes_steps_again(tracked, monkeypatch, how):
    """A new run with the whole history: what the one before lacks, or has too much, is not in it.

    Red when the one before goes on whatever its last step, or the lines of metrics.jsonl are not told.
    """
    with monkeypatch.context() as patch:
        if how != "back":
            failing_at(patch, 5)
            with pytest.raises(ZeroDivisionError):
                tracked()
            wandb.finish()
        else:
            run = tracked()
            (run / "checkpoint-6").rename(run / "moved-6")
        if how == "killed twice":
            failing_at(patch, 4)
            with pytest.raises(ZeroDivisionError):
                tracked("--resume_from_checkpoint", "latest")
            wandb.finish()
    run = tracked("--resume_from_checkpoint", "latest")
    pieces = [read(part) for part in parts(run)]
    assert len(pieces) == len({piece[0] for piece in pieces}) == (3 if how == "killed twice" else 2)
    history = pieces[-1][2]
    assert list(history) == [1, 2, 3, 4, 5, 6]
    for step, row in logged(run).items():
        assert {key: history[step][key] for key in row} == pytest.approx(row), step


@pytest.mark.slow
def test_wandb_of_a_branch(tracked, tmp_path):
    """Another output directory is another run. Red when the id is always the same."""
    run = tracked("--max_train_steps", "4")
    branch = tracked("--resume_from_checkpoint", str(run / "checkpoint-4"), "--output_dir", str(tmp_path / "branch"))
    (first,), (second,) = map(parts, (run, branch))
    first, second = read(first), read(second)
    assert first[0] != second[0] and list(second[2]) == [5, 6]


def test_tensorboard_reads_each_step_once(tracked, monkeypatch):
    """Also after a kill, with pictures and histograms. Red without purge_step."""
    with monkeypatch.context() as patch:
        failing_at(patch, 5)
        with pytest.raises(ZeroDivisionError):
            tracked()
        wandb.finish()
    run = tracked("--resume_from_checkpoint", "latest")
    (folder,) = {path.parent for path in run.glob("logs/*/events*")}
    assert len(list(folder.glob("events*"))) == 2
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0}).Reload()
    scalars = [tag for tag in events.Tags()["scalars"] if not tag.startswith("speed/")]
    assert {"loss/total", "val/psnr_n2", "codebook/used"} <= set(scalars)
    for tag in scalars:
        found = {event.step: event.value for event in events.Scalars(tag)}
        assert len(found) == len(events.Scalars(tag)), tag
        assert found == pytest.approx({step: row[tag] for step, row in logged(run).items() if tag in row}), tag
    assert [event.step for event in events.Images("val/strips")] == [2, 4, 6]
    assert [event.step for event in events.Histograms("val/code_use")] == [2, 4, 6]
    shown = PIL.Image.open(train_vqgan.io.BytesIO(events.Images("val/strips")[-1].encoded_image_string))
    assert (np.array(shown) == np.array(PIL.Image.open(run / "validation" / "step-6.png"))).all()


@pytest.mark.slow
def test_tensorboard_in_a_browser(tracked, tmp_path):
    """Its page has a group for each kind of number, in this order. Red when a name has no group, such as `lr`."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no chromium: apt-get install chromium")
    logs = tracked("--report_to", "tensorboard", "--max_train_steps", "2") / "logs"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", logs, "--port", "0", "--host", "127.0.0.1"]
    with subprocess.Popen([*command, "--load_fast=false"], stderr=subprocess.PIPE, text=True) as server:
        try:
            (address,) = next(filter(None, (re.findall(r"http://127\.0\.0\.1:\d+/", line) for line in server.stderr)))
            options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=60000"]
            options += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"{address}#timeseries"]
            done = subprocess.run([chromium, *options], capture_output=True, text=True, timeout=300)
        finally:
            server.kill()
    groups = re.findall(r'class="group-title" title="(\w+)"', done.stdout)
    assert groups == ["codebook", "data", "disc", "loss", "opt", "speed", "val"]


class StandIn(BaseHTTPRequestHandler):
    """As much of wandb's server as `wandb sync` asks for: it keeps the lines of each file of a run."""

    runs = defaultdict(lambda: defaultdict(dict))  # id -> file -> number -> line

    def log_message(self, *_):
        pass

    def reply(self, answer):
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply({})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        if self.path.endswith("/file_stream"):
            for name, chunk in (json.loads(body).get("files") or {}).items():
                lines = self.runs[self.path.split("/")[-2]][name]
                for i, line in enumerate(chunk.get("content", []), start=chunk.get("offset", 0)):
                    lines[i] = json.loads(line) if name != "output.log" else line
            return self.reply({"exitcode": None, "limits": {}})
        if self.path != "/graphql":
            return self.reply({})
        asked = json.loads(body)
        (operation,) = re.findall(r"(?:query|mutation)\s+(\w+)", asked["query"])[:1] or [""]
        variables, me = asked.get("variables") or {}, {"id": "e", "name": "me"}
        name = variables.get("name")
        answer = {"serverInfo": {"features": []}}
        if operation == "Viewer":
            answer = {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        elif operation == "RunResumeStatus":
            answer = {"model": {"id": "m", "name": "p", "entity": me, "bucket": self.resumed(name)}}
        elif operation == "UpsertBucket":
            project, known = {"id": "p", "name": "p", "entity": me}, name in self.runs
            history = self.runs[name]["wandb-history.jsonl"]
            bucket = {"id": "b", "name": name, "displayName": name, "config": "{}", "project": project}
            answer = {"upsertBucket": {"bucket": bucket | {"historyLineCount": len(history)}, "inserted": not known}}
        elif operation == "CreateRunFiles":
            host = f"http://127.0.0.1:{self.server.server_port}"
            files = [{"name": name, "uploadUrl": f"{host}/{name}"} for name in variables["files"]]
            answer = {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        self.reply({"data": answer})

    def resumed(self, name):
        if name not in self.runs:
            return None
        history, summary = (self.runs[name][f"wandb-{file}"] for file in ("history.jsonl", "summary.json"))
        tail = [json.dumps(history[max(history)])] if history else []
        counts = {"historyLineCount": len(history), "eventsLineCount": 0, "logLineCount": 0}
        found = {"summaryMetrics": json.dumps(summary.get(0, {})), "historyTail": json.dumps(tail), "eventsTail": "[]"}
        return found | counts | {"id": "b", "name": name, "config": "{}", "tags": [], "wandbConfig": '{"t": 1}'}


@pytest.fixture
def standin(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    StandIn.runs.clear()
    yield StandIn.runs
    server.shutdown()


@pytest.mark.slow
def test_parts_that_are_synced_are_one_history(tracked, standin, monkeypatch, tmp_path):
    """Offline, stopped and continued, then `wandb sync`. Red when the second is a run of its own."""
    run = tracked("--max_train_steps", "4")
    tracked("--resume_from_checkpoint", "latest")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    command = [sys.executable, "-m", "wandb", "sync", *parts(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ((_, files),) = standin.items()
    history = [files["wandb-history.jsonl"][i] for i in sorted(files["wandb-history.jsonl"])]
    assert [row["_step"] for row in history] == [1, 2, 3, 4, 5, 6]
    psnr = [row["val/psnr_n2"] for row in history if "val/psnr_n2" in row]
    assert len(psnr) == 3 and files["wandb-summary.json"][0]["best/psnr_n2"] == max(psnr)
