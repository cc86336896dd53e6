# Copyright 2026 the contributors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""How a stream of many shards is shared by many readers, and what a server sees of it. Prints tables of docs/scale.md.

    python benchmarks/streams.py                          # 256 processes x 8 data workers, 10,000 shards
    python benchmarks/streams.py --processes 2 --workers 2 --shards 16 --passes 10
    python benchmarks/streams.py --served tar             # or parquet: two processes x two data workers, 16 shards
    python benchmarks/streams.py --memory 100000          # images of 16 px from local archives, in this process

Without the last two every reader of every process is asked, one after the other, what it would read, and no pixel is
read: the shards are names in a list, each of one sample. --served reads from a server on the loopback interface that
counts bytes: two passes; then 90 % of a pass, kill -9 of both processes, and the rest from the positions saved before.
"""

import argparse
import http.server
import io
import multiprocessing
import os
import resource
import statistics
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import PIL.Image
import psutil
import pyarrow
import pyarrow.parquet
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_vqgan


def listed(shards):
    for shard in shards:
        yield {"image": shard}


def streams(processes, workers, shards):
    """The stream of each process over the same listed shards."""
    features = datasets.Features({"image": datasets.Value("int64")})
    names = {"shards": [*range(shards)]}
    items = datasets.IterableDataset.from_generator(listed, features=features, gen_kwargs=names)
    args = train_vqgan.parse_args(["--dataset_name", "listed", "--streaming", "--max_train_steps", "1"])
    positions = dict.fromkeys(range(workers), (0, None, 0))
    ranks = [SimpleNamespace(process_index=rank, num_processes=processes) for rank in range(processes)]
    return [train_vqgan.ShardStream(items, args, 0, 0, rank, positions) for rank in ranks]


def readers(found, workers):
    """(rank, worker, stream, reader) of all processes."""
    return [(s.rank, w, s, w * s.world + s.rank) for s in found for w in range(workers)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=256)
    parser.add_argument("--workers", type=int, default=8, help="data workers of each process")
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--passes", type=int, default=100)
    parser.add_argument("--asked", type=int, help="readers that are asked for their whole list (default: all)")
    parser.add_argument("--served", choices=["tar", "parquet"], help="count what a server of such shards sends")
    parser.add_argument("--memory", type=int, metavar="IMAGES", help="measure memory over that many images")
    options = parser.parse_args(argv)
    if options.served or options.memory:
        rows = served(options.served) if options.served else memory(options.memory)
        return table(rows)
    begun = time.perf_counter()
    found = streams(options.processes, options.workers, options.shards)
    rows = [("streams of all processes made, seconds", f"{time.perf_counter() - begun:.2f}")]

    everyone, read, seconds = readers(found, options.workers), Counter(), []
    for _, _, stream, reader in everyone[: options.asked]:  # a whole pass, sample by sample
        begun = time.perf_counter()
        read.update(sample for sample, _ in stream.one_pass(reader, 0, None, 0))
        seconds.append(time.perf_counter() - begun)
    once = set(read.values()) == {1} and (options.asked or len(read) == options.shards)
    rows.append(
        (
            "no sample twice in a pass, and none left out" if not options.asked else "no sample twice",
            "yes" if once else "NO",
        )
    )
    rows.append(("seconds of a reader for its list of a pass, median and most", spread(seconds)))

    totals, uneven = Counter(), 0
    for number in range(options.passes):
        by_rank = Counter()
        for rank, _, stream, reader in everyone:
            by_rank[rank] += shards_of(stream, reader, number)
        uneven = max(uneven, max(by_rank.values()) - min(by_rank.values()))
        totals.update(by_rank)
    for _, _, stream, reader in everyone[:: len(everyone) // 4]:
        assert all(shards_of(stream, reader, n) == stream.share(reader, n).num_shards for n in (0, 1, 7))
    rows.append(("shards of one process in a pass, most less fewest", uneven))
    apart = max(totals.values()) / min(totals.values()) - 1
    rows.append((f"the same over {options.passes} passes, as a share", f"{apart:.3%}"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows.append(("memory of the simulating process at its peak, MiB", f"{peak:.0f}"))
    print(f"{options.processes} processes x {options.workers} data workers, {options.shards:,} shards:\n")
    table(rows)
    even = uneven <= 1 and max(totals.values()) - min(totals.values()) <= 1
    return 0 if once and even else 1


def image(number, padding=0):
    """A PNG of 16 px whose colour is its number, with bytes after its end that nobody decodes."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (16, 16), (number % 256, number // 256 % 256, number // 65536)).save(file, "PNG")
    return file.getvalue() + os.urandom(padding)


def shard(kind, images):
    """The bytes of a file of these images: tar, or parquet in four row groups, with captions that nobody reads."""
    file = io.BytesIO()
    if kind == "parquet":
        rows = {"image": [{"bytes": content, "path": None} for content in images]}
        rows["caption"] = [os.urandom(100).hex() for _ in images]
        pyarrow.parquet.write_table(pyarrow.table(rows), file, row_group_size=-(-len(images) // 4))
        return file.getvalue()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number, content in enumerate(images):
            member = tarfile.TarInfo(f"{number:06d}.png")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


class Handler(http.server.SimpleHTTPRequestHandler):
    """GET with ranges, HEAD; counts the bytes of files that left it."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        content = self.server.files[self.path.strip("/")]
        low, _, high = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        content, whole = memoryview(content)[int(low) : int(high or len(content)) + 1], len(content)
        self.send_response(206 if "Range" in self.headers else 200)
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {low}-{int(low) + len(content) - 1}/{whole}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.send(content)

    def send(self, content):
        for at in range(0, len(content), 2**16):
            self.server.served.append(self.wfile.write(content[at : at + 2**16]))  # threads would lose some of a sum


def batches(args, rank, world, start, positions):
    """The numbers of the images of one step after another of this process; `positions` move along."""
    process = SimpleNamespace(process_index=rank, num_processes=world, device=torch.device("cpu"))
    items, watch = train_vqgan.load_data(args, 0)[0], train_vqgan.Watch()
    stream = train_vqgan.training_batches(items, args, 0, start, process, watch, positions)
    for (x,) in train_vqgan.step_batches(stream, 1, 10**9, watch, positions):
        red, green, blue = x[:, :, 0, 0].int().unbind(1)
        yield (red + 256 * green + 65536 * blue).tolist()


def train(pipe, words, rank, world, start, positions):
    """A process: a step whenever it is told to."""
    for step in batches(train_vqgan.parse_args(words), rank, world, start, positions):
        pipe.recv()
        pipe.send((step, dict(positions)))


class Training:
    """Processes that take their steps together, as in training."""

    def __init__(self, words, start=0, positions=({}, {})):
        self.processes, self.pipes = [], []
        context = multiprocessing.get_context("fork")  # what the first process has imported is theirs
        for rank in (0, 1):
            pipe, other = context.Pipe()
            self.processes.append(context.Process(target=train, args=(other, words, rank, 2, start, positions[rank])))
            self.processes[-1].start()
            self.pipes.append(pipe)

    def steps(self, n):
        """Numbers of the images of n steps, and the positions after them."""
        seen, positions = [], None
        for _ in range(n):
            for pipe in self.pipes:
                pipe.send(None)
            taken, positions = zip(*(pipe.recv() for pipe in self.pipes))
            seen += sum(taken, [])
        return seen, positions

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()


def served(kind, shards=16, per_shard=256, batch=16):
    """Rows of the table of --served."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.served = True, []
    server.handle_error = lambda *_: None  # connections that are cut
    numbers = range(shards * per_shard)
    images = [[image(n, 130_000) for n in numbers[i * per_shard : (i + 1) * per_shard]] for i in range(shards)]
    server.files = {f"{i}.{kind}": shard(kind, part) for i, part in enumerate(images)}
    wanted = sum(len(content) for part in images for content in part)
    del images
    threading.Thread(target=server.serve_forever, daemon=True).start()
    name = f"http://127.0.0.1:{server.server_address[1]}/{{0..{shards - 1}}}.{kind}"
    words = ["--dataset_name", name, "--streaming", "--max_train_steps", "9", "--resolution", "16", "--shuffle_buffer"]
    words += ["0", "--train_batch_size", str(batch), "--dataloader_num_workers", "2"]
    steps, rows = len(numbers) // batch // 2, [("images' bytes in a shard, MB", f"{wanted / shards / 1e6:.1f}")]

    whole, before = [], 0
    training = Training(words)
    for number in (1, 2):
        seen, _ = training.steps(steps)
        rows.append((f"pass {number}: every image once", "yes" if sorted(seen) == [*numbers] else "NO"))
        rows.append((f"pass {number}: bytes served / images' bytes", f"{(sum(server.served) - before) / wanted:.3f}"))
        whole, before = whole + seen, sum(server.served)
    training.kill()

    late = round(0.9 * steps)
    training = Training(words)
    seen, positions = training.steps(late)
    lost, _ = training.steps(3)
    training.kill()
    before = sum(server.served)
    training = Training(words, len(seen), positions)
    first, _ = training.steps(1)
    shards_read = (sum(server.served) - before) / wanted * shards
    rows.append(("resumed at 90 %: bytes before the first step, in shards, for 4 readers", f"{shards_read:.2f}"))
    rest, _ = training.steps(2 * steps - late - 1)
    training.kill()
    exact = seen + first + rest == whole and first + rest[: len(lost) - len(first)] == lost
    rows.append(("killed and resumed: the same images in the same order", "yes" if exact else "NO"))
    return rows


def memory(images, shards=20):
    """Rows of the table of --memory: without a buffer, and with one of 10,000 images."""
    rows, resident = [], psutil.Process().memory_info
    with tempfile.TemporaryDirectory() as folder:
        for i in range(shards):
            part = [image(n) for n in range(i * images // shards, (i + 1) * images // shards)]
            Path(folder, f"{i:02d}.tar").write_bytes(shard("tar", part))
        for buffer in ("0", "10000"):
            words = ["--dataset_name", f"{folder}/{{00..{shards - 1}}}.tar", "--streaming", "--max_train_steps", "9"]
            words += ["--resolution", "16", "--train_batch_size", "50", "--dataloader_num_workers", "0"]
            found = []
            for n, _ in enumerate(batches(train_vqgan.parse_args([*words, "--shuffle_buffer", buffer]), 0, 1, 0, {})):
                if n % (images // 250) == 0:  # of batches of 50
                    found.append(resident().rss / 2**20)
                if n * 50 >= images:
                    break
            name = f"MiB resident at every fifth of {images:,} images, --shuffle_buffer {buffer}"
            rows.append((name, " ".join(f"{mib:.0f}" for mib in found)))
    return rows


def shards_of(stream, reader, number):
    """As `share` deals them, without building the data set."""
    place = (reader - number * stream.items.num_shards) % stream.readers
    return len(range(place, stream.items.num_shards, stream.readers))


def table(rows):
    """Exit status."""
    print("\n".join(f"| {name} | {value} |" for name, value in [("", ""), ("---", "---"), *rows]), flush=True)
    return int(any(value == "NO" for _, value in rows))


def spread(values):
    return f"{statistics.median(values):.3f}, {max(values):.3f}"


if __name__ == "__main__":
    sys.exit(main())
