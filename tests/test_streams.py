"""Streams from a server on the loopback interface that counts what it serves."""

import gc
import http.server
import io
import itertools
import json
import sys
import tarfile
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import fsspec
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import REPOSITORY, without

sys.path.append(str(REPOSITORY / "benchmarks"))

import streams  # noqa: E402

import train_vqgan  # noqa: E402

aiohttp = pytest.importorskip("aiohttp")  # of fsspec[http]

SHARDS, IMAGES = 8, 24  # per shard


def picture(number):
    """Of noise, about 20 kB: its first two pixels tell which one it is."""
    values = np.random.default_rng(number).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    values[:40, :40] = number // 8 * 8 % 256, number % 8 * 32, number // 256 * 100
    file = io.BytesIO()
    PIL.Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


class Handler(streams.Handler):
    """`served` counts bytes by file, `faults` says what is wrong with one GET after another."""

    def do_GET(self, body=True):
        self.fault = next(self.server.faults, None) if body else None
        if self.fault == "stalls":
            threading.Event().wait(3)  # longer than the client
        if self.fault != "500":
            return super().do_GET(body)
        self.send_response(500)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, content):
        if self.fault == "drops":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        else:
            self.server.served[self.path.strip("/")] += self.wfile.write(content)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """As these files are to those of 500 MB: fsspec fetches 5 MB at a time, more than one of them. No test waits long."""
    monkeypatch.setitem(fsspec.config.conf, "http", fsspec.config.conf["http"] | {"block_size": 2**15})
    monkeypatch.setattr("aiohttp.client.DEFAULT_TIMEOUT", aiohttp.ClientTimeout(total=30))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    files, folder = {}, tmp_path_factory.mktemp("shards")
    features = datasets.Features({"image": datasets.Image(), "other": datasets.Value("binary")})
    for i in range(SHARDS):
        pictures = [picture(n) for n in range(i * IMAGES, (i + 1) * IMAGES)]
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for n, content in enumerate(pictures):
                member = tarfile.TarInfo(f"{n:03d}.png")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        files[f"{i}.tar"] = packed.getvalue()
        rows = {"image": [{"bytes": content, "path": None} for content in pictures]}
        rows["other"] = [np.random.default_rng(n).bytes(40_000) for n in range(IMAGES)]  # a column that nobody wants
        dataset = datasets.Dataset.from_dict(rows, features=features)
        dataset.to_parquet(folder / "a.parquet", batch_size=8)
        files[f"{i}.parquet"] = (folder / "a.parquet").read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.served, server.faults, server.daemon_threads = files, Counter(), iter(()), True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def trained_on(server, kind, steps, workers=2, rank=0, world=2, start=0, positions=None, faults=()):
    """Numbers of the pictures of one process, and its positions after the last step."""
    name = f"http://127.0.0.1:{server.server_address[1]}/{{0..{SHARDS - 1}}}.{kind}"
    flags = ("--resolution", "80", "--center_crop", "--train_batch_size", "4", "--validation_fraction", "0")
    flags += ("--dataset_name", name, "--streaming", "--max_train_steps", "9", "--shuffle_buffer", "0")
    args = train_vqgan.parse_args([*flags, "--dataloader_num_workers", str(workers)])
    process = SimpleNamespace(process_index=rank, num_processes=world, device=torch.device("cpu"))
    watch, positions = train_vqgan.Watch(), {} if positions is None else positions
    items, server.faults = train_vqgan.load_data(args, 0)[0], iter(faults)
    stream = train_vqgan.training_batches(items, args, 0, start, process, watch, positions)
    images = [x for (x,) in train_vqgan.step_batches(stream, 1, steps, watch, positions)]
    assert not watch.failure and len(images) == steps
    red, green, blue = torch.cat(images)[:, :, 20, 20].int().unbind(1)
    return (red + green // 32 + blue // 100 * 256).tolist(), positions


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_bytes_of_a_pass(server, kind):
    """Two processes x two data workers: every image once, and the images' bytes once, of parquet without other columns.

    Red when each process reads everything, or `columns` is not set: 8 times the bytes.
    """
    footer = (kind == "parquet") * 2 * 2**16  # of a file's end pyarrow reads that much each time
    shards = [len(server.files[f"{i}.tar"]) + footer for i in range(SHARDS)]
    server.served.clear()
    steps = SHARDS * IMAGES // 2 // 4
    seen = [number for rank in (0, 1) for number in trained_on(server, kind, steps, rank=rank)[0]]
    assert sorted(seen) == list(range(SHARDS * IMAGES))
    # what is fetched ahead of the last batch belongs to the next pass; each process looks whether the first is there
    ahead, start, served = 4 * max(shards), 2 * len(server.files[f"0.{kind}"]), sum(server.served.values())
    assert 0.8 * sum(shards) < served < 1.1 * sum(shards) + ahead + start, (served, shards, start)


def test_data_workers_inherit_no_connection(server, monkeypatch):
    """They would close it for this process, too, which waits for ever then.

    Red without clear_instance_cache, or without gc.collect.
    """
    inherited, loader = [], train_vqgan.DataLoader

    def checked(*args, **options):
        inherited.extend(found for found in gc.get_objects() if type(found).__name__ == "HTTPFileSystem")
        return loader(*args, **options)

    monkeypatch.setattr(train_vqgan, "DataLoader", checked)
    trained_on(server, "parquet", 1, workers=0)
    assert sum(server.served.values()) and not inherited


@pytest.mark.slow
def test_resumed_late_reads_one_shard_per_reader(server):
    """At 7/8 of a pass. Red when the position is gone to by reading all that was before."""
    steps = SHARDS * IMAGES // 4
    whole, _ = trained_on(server, "tar", steps, workers=0, world=1)
    before, positions = trained_on(server, "tar", steps * 7 // 8, workers=0, world=1)
    server.served.clear()
    options = {"workers": 0, "world": 1, "start": len(before), "positions": positions}
    after, _ = trained_on(server, "tar", 1, **options)
    assert before + after == whole[: len(before) + 4]
    assert sum(server.served.values()) < 3.1 * len(server.files["0.tar"])  # it looks whether the first is there, too


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(train_vqgan.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)
    monkeypatch.setattr(datasets.config, "STREAMING_OPEN_RETRY_INTERVAL", 0)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 2)
    monkeypatch.setattr("aiohttp.client.DEFAULT_TIMEOUT", aiohttp.ClientTimeout(total=1.5))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["500", "drops", "stalls"])
def test_server_that_fails_for_a_while(server, impatient, caplog, fault):
    """Three answers in the middle: more than `datasets` tries, here. Red when they end the stream, or images come again."""
    faults = [None] * 9 + [fault] * 3
    seen, _ = trained_on(server, "tar", SHARDS * IMAGES // 4, workers=0, world=1, faults=faults)
    assert sorted(seen) == list(range(SHARDS * IMAGES)) and next(server.faults, "all were used") == "all were used"
    (line,) = [record.message for record in caplog.records if "trying again" in record.message]
    assert "broke off" in line and ".tar" in line


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["500", "drops", "stalls"])
def test_server_that_fails_for_good(server, impatient, flags, monkeypatch, capsys, fault):
    """One line, and what was trained till then is saved. Red when UserError is not kept for the end of the step."""
    monkeypatch.setattr(train_vqgan, "READ_AGAIN", 1)
    server.faults = itertools.chain([None] * 9, itertools.repeat(fault))
    name = f"http://127.0.0.1:{server.server_address[1]}/{{0..{SHARDS - 1}}}.tar"
    more = ["--dataset_name", name, "--streaming", "--max_train_steps", "99", "--checkpointing_steps", "99"]
    assert train_vqgan.main([*without(flags, "--train_data_dir", "--max_train_steps"), *more]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "broke off" in line and "--resume_from_checkpoint latest goes on" in line
    (checkpoint,) = train_vqgan.checkpoints(Path(flags[-1]))
    assert json.loads((checkpoint / "progress.json").read_text())["samples_seen"] > 0
