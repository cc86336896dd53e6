# Copyright 2026 the contributors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Turn all images of a data set into the codes of a VQModel: codes-00000.parquet and so on, for `datasets`.

    accelerate launch scripts/tokenize_dataset.py --pretrained_model_name_or_path=demo --resolution=64 --output_dir=demo/codes

In the order of the data set; the short side is resized, the centre cropped. A row has `codes` [height, width], of the
smallest integer type; `source`, the path below the folder or the row of the data set; and --keep_columns. An image that
cannot be read is left out and counted. Processes share the shards, which are there whole or not at all: after a stop the
same command goes on. One line of JSON says what there is in the end.
"""

import hashlib
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
import numpy as np
import pyarrow.parquet
import torch
from datasets.table import embed_table_storage

import train_vqgan
from train_vqgan import UserError, logger, number, on_main, require, user_error

PHOTOGRAPHS = train_vqgan.REPOSITORY / "images" / "train"
METADATA = b"tokenize_dataset"  # where a shard says how it was made
AS_IN_TRAINING = ("subfolder", "revision", "pixel_range", "dataset_name", "dataset_config_name", "image_column")
AS_IN_TRAINING += ("train_data_dir", "resolution", "value_range", "cache_dir")
SETTINGS = ("split", "image_column", "keep_columns", "resolution", "value_range", "pixel_range", "shard_size")


# fmt: off
def parse_args(argv=None):
    """Some of the training script's flags and our own; the others at their defaults, for its functions."""
    parser = train_vqgan.Parser(prog="tokenize_dataset.py", description=__doc__.split("\n")[0], allow_abbrev=False, formatter_class=train_vqgan.HelpFormatter)
    add = parser.group("flags")
    add("--pretrained_model_name_or_path", required=True, type=train_vqgan.network_source, help="VQModel: directory, such as the output_dir of a training run, or Hub id")
    add("--output_dir", required=True, help="folder of the shards")
    add("--shard_size", type=number(int, 1), default=4096, help="images of a shard, which one process makes")
    add("--batch_size", dest="train_batch_size", type=number(int, 1), default=16, help="images at a time")
    add("--split", help="split of --dataset_name (default: train)")
    add("--streaming", action="store_true", help="read --dataset_name while encoding; each process reads all of it")
    add("--keep_columns", nargs="+", default=[], help="columns of --dataset_name to write beside the codes")
    theirs = train_vqgan.build_parser()._option_string_actions
    for name in AS_IN_TRAINING:
        parser._add_action(theirs[f"--{name}"])
    others = train_vqgan.parse_args(["--pretrained_model_name_or_path=.", "--report_to=none", "--no-gradient_checkpointing"])
    return parser.parse_args(argv, others)
# fmt: on


def load_rows(args):
    """(paths or dicts of columns, what tells them from other data, features of `source` and of the kept columns)."""
    if not args.dataset_name:
        needless = args.split or args.streaming or args.keep_columns
        require(not needless, "--split, --streaming and --keep_columns: need --dataset_name")
        files = train_vqgan.list_images("--train_data_dir", args.train_data_dir or PHOTOGRAPHS, args)
        return files, files.identity, {"source": datasets.Value("string")}
    require(not args.train_data_dir, "--dataset_name and --train_data_dir: give one of them")
    flag, split, kept = "--split" if args.split else "--dataset_name", args.split or "train", args.keep_columns
    rows, identity = train_vqgan.load_split(flag, split, args, kept)
    rows = rows if args.streaming else rows.source
    there = set(kept) <= set(rows.features) - {"codes", "source"}
    require(there, f"--keep_columns: not among {', '.join(rows.features)}; codes and source are written here")
    features = {name: rows.features[name] for name in kept}
    for name, feature in features.items():
        if getattr(feature, "decode", False):  # pictures and sounds are kept as they are
            rows = rows.cast_column(name, type(feature)(decode=False))
    rows = rows.select_columns([args.image_column, *kept])
    return rows, identity, {"source": datasets.Value("int64")} | features


def shards(rows, args):
    """(number, its pairs of row number and row) of every shard in order. What is passed over is not decoded."""
    if isinstance(rows, datasets.IterableDataset):

        def stream():
            with user_error(f"--streaming: {args.dataset_name} broke off; the same command goes on", Exception):
                yield from enumerate(rows)

        yield from itertools.groupby(stream(), lambda pair: pair[0] // args.shard_size)
    else:
        for start in range(0, len(rows), args.shard_size):
            stop = min(start + args.shard_size, len(rows))
            yield start // args.shard_size, ((i, rows[i]) for i in range(start, stop))


def load(i, row, args):
    """uint8 [3, resolution, resolution], and the columns to write beside its codes; Unreadable when it is."""
    if isinstance(row, Path):
        name = row.relative_to(args.train_data_dir or PHOTOGRAPHS)
        image, columns = row, {"source": str(name).encode("utf-8", "backslashreplace").decode()}  # names on old disks
    else:
        image, columns = row[args.image_column], {"source": i} | {name: row[name] for name in args.keep_columns}
    return train_vqgan.to_square(train_vqgan.read_image(image, args), args.resolution), columns


@torch.no_grad()
@train_vqgan.exact_fp32()
def encode_shard(generator, numbered, args):
    """(columns of each readable image, number of the others). Codes are those of a plain VQModel in fp32."""
    made, unreadable, threads = [], 0, train_vqgan.cores_per_process()
    for batch in train_vqgan.read_ahead(numbered, lambda *pair: load(*pair, args), args.train_batch_size, threads):
        readable = [loaded for loaded, fault in batch if not fault]
        for fault in filter(None, (fault for _, fault in batch)):
            logger.error(f"Left out an image that cannot be read: {fault}")
            unreadable += 1
        if readable:
            images, columns = zip(*readable)
            x = train_vqgan.to_model(train_vqgan.to_signed(torch.stack(images), generator.device), args)
            z = generator.encode(x).latents.permute(0, 2, 3, 1)
            codes = train_vqgan.nearest_codes(z.flatten(0, 2), generator.quantize.codebook()).reshape(z.shape[:3])
            made += [{"codes": grid} | others for grid, others in zip(codes.cpu().numpy(), columns)]
    return made, unreadable


def write_shard(path, made, features, about):
    """Beside its place, synced to disk, then renamed."""
    columns = {name: [row[name] for row in made] for name in features}
    table = embed_table_storage(datasets.Dataset.from_dict(columns, datasets.Features(features)).data.table)
    table = table.replace_schema_metadata(table.schema.metadata | {METADATA: json.dumps(about)})
    unfinished = path.with_name(f".{path.name}.unfinished")
    with user_error(f"--output_dir: cannot write {path}", OSError, "; the same command goes on"):
        with pyarrow.parquet.ParquetWriter(unfinished, table.schema) as writer:
            if made:  # datasets cannot read a group of no rows
                writer.write_table(table)
        train_vqgan.sync(unfinished)
        unfinished.replace(path)
        train_vqgan.sync(path.parent)


def finished_shards(output, settings):
    """(main process) {number: what it says of itself}. UserError for one of another model, other data or flags."""
    found = {}
    for path in sorted(output.glob("codes-*.parquet")):
        with user_error(f"--output_dir: cannot read {path}", (OSError, pyarrow.ArrowInvalid), "; remove it"):
            file = pyarrow.parquet.read_metadata(path)
        about = json.loads(file.metadata.get(METADATA, "{}"))
        other = [f"{name} {about.get(name)}" for name, now in settings.items() if about.get(name) != now]
        require(not other, f"--output_dir: {path} was made with {', '.join(other)}; choose another directory")
        found[about["shard"]] = {"images": file.num_rows, "unreadable": about["unreadable"]}
    return found


def tokenize(args):
    """(all processes) Exit status."""
    accelerator, output = train_vqgan.start_accelerator(args), Path(args.output_dir)
    with train_vqgan.claimed_output_dir(accelerator, args):
        with accelerator.local_main_process_first():  # downloads once per machine
            generator = train_vqgan.build_generator(args).to(accelerator.device).eval()
            rows, identity, columns = load_rows(args)
        codes, side = generator.quantize.n_e, args.resolution // 2 ** (len(generator.config.block_out_channels) - 1)
        features = {"codes": datasets.Array2D((side, side), np.min_scalar_type(codes - 1).name)} | columns
        weights = b"".join(weight.cpu().numpy().tobytes() for weight in generator.state_dict().values())
        settings = {"data": identity, "model": hashlib.sha256(weights).hexdigest()[:16]}
        settings |= {name: getattr(args, name) for name in SETTINGS}
        done = on_main(accelerator, lambda: finished_shards(output, settings))
        left = (shard for shard in shards(rows, args) if shard[0] not in done)
        try:
            for i, numbered in itertools.islice(left, accelerator.process_index, None, accelerator.num_processes):
                made, unreadable = encode_shard(generator, numbered, args)
                path = output / f"codes-{i:05d}.parquet"
                write_shard(path, made, features, settings | {"shard": i, "unreadable": unreadable})
                logger.info(f"Wrote {path}: {len(made)} images")
        except UserError as error:  # of this process alone: the launcher stops the others
            return fail(error)
        accelerator.wait_for_everyone()
        done = on_main(accelerator, lambda: finished_shards(output, settings))
    total = {name: sum(shard[name] for shard in done.values()) for name in ("images", "unreadable")}
    require(total["images"], "none of the images can be read")
    total |= {"shards": len(done), "num_codes": codes, "height": side, "width": side}
    if accelerator.is_main_process:
        print(json.dumps(total), flush=True)
    accelerator.end_training()
    return 0


def fail(message):
    print(f"tokenize_dataset.py: error: {message}", file=sys.stderr)
    return 2


def main(argv=None):
    """Exit status: 0 done, 2 something to mend, in one line on stderr."""
    args = parse_args(argv)
    try:
        return tokenize(args)
    except UserError as error:
        return fail(error) if train_vqgan.is_first_on_machine() else 2
    except torch.OutOfMemoryError:
        return fail("out of memory: lower --batch_size")


if __name__ == "__main__":
    sys.exit(main())
