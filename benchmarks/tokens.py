# Copyright 2026 the contributors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Throughput of scripts/tokenize_dataset.py beside a plain diffusers loop, in turns in one process; medians.

    python benchmarks/tokens.py demo/vqmodel --resolution 64 --images 128 --rounds 3

Both read the same photographs, load the model, and write parquet. Seconds of the clock and of the CPU: the clock says
little on a machine that others use, too. The first round of each is not counted.
"""

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import datasets
import numpy as np
import PIL.Image
import tokenize_dataset
import torch
import torchvision.transforms.v2 as transforms
from diffusers import VQModel
from diffusers.image_processor import VaeImageProcessor


@torch.no_grad()
def plain(options, photos, out):
    """As one writes it with diffusers."""
    model = VQModel.from_pretrained(options.model).eval()
    processor = VaeImageProcessor(vae_scale_factor=2 ** (len(model.config.block_out_channels) - 1))
    resize = transforms.Resize(options.resolution, transforms.InterpolationMode.BICUBIC)
    square = transforms.Compose([resize, transforms.CenterCrop(options.resolution)])
    paths, rows = sorted(photos.iterdir()), []
    for start in range(0, len(paths), options.batch_size):
        batch = paths[start : start + options.batch_size]
        x = processor.preprocess([square(PIL.Image.open(path).convert("RGB")) for path in batch])
        z = model.encode(x).latents
        codes = model.quantize(z)[2][2].reshape(len(z), *z.shape[2:]).numpy().astype(np.uint16)
        rows += [{"codes": grid, "source": path.name} for grid, path in zip(codes, batch)]
    grid = datasets.Array2D(rows[0]["codes"].shape, "uint16")
    features = datasets.Features({"codes": grid, "source": datasets.Value("string")})
    columns = {name: [row[name] for row in rows] for name in features}
    datasets.Dataset.from_dict(columns, features).to_parquet(out / "codes.parquet")


def ours(options, photos, out):
    flags = ["--pretrained_model_name_or_path", options.model, "--resolution", options.resolution]
    flags += ["--train_data_dir", photos, "--output_dir", out, "--batch_size", options.batch_size]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert tokenize_dataset.main([*map(str, flags)]) == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a VQModel")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    seconds = {plain: [], ours: []}
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        photos.mkdir()
        for path in sorted(tokenize_dataset.PHOTOGRAPHS.iterdir())[: options.images]:
            (photos / path.name).symlink_to(path)
        for turn in range(options.rounds + 1):
            for loop, taken in seconds.items():
                out = Path(folder) / f"{loop.__name__}-{turn}"
                out.mkdir()
                clock, cpu = time.perf_counter(), time.process_time()
                loop(options, photos, out)
                if turn:
                    taken.append((time.perf_counter() - clock, time.process_time() - cpu))
    cores = len(os.sched_getaffinity(0))
    print(f"{torch.get_num_threads()} torch threads on {cores} CPU cores, load {os.getloadavg()[0]:.1f}")
    for loop, taken in seconds.items():
        clock, cpu = (options.images / statistics.median(column) for column in zip(*taken))
        print(f"{loop.__name__}: {clock:.1f} images a second, {cpu:.1f} a CPU second; (clock, CPU) {taken}")


if __name__ == "__main__":
    main()
