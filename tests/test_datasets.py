"""Every place images come from: folders, data sets of each kind, and streams."""

import io
import itertools
import json
import os
import pickle
import tarfile
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import fsspec
import numpy as np
import pandas
import PIL.Image
import pytest
import torch
from conftest import equal, metrics, weights, without

import train_vqgan
from train_vqgan import UserError

SHADES = [10, 20, 30, 40, 50, 60, 70]
KINDS = ["dataset", "dict", "parquet", "imagefolder"]


def plain(red):
    """An image of one colour: a pixel tells which one it is."""
    return PIL.Image.new("RGB", (20, 16), (red, 0, 0))


def shades(x):
    """Which plain images these are."""
    return x[:, 0, 0, 0].tolist()


def parsed(*flags):
    common = ("--resolution", "16", "--train_batch_size", "2", "--dataloader_num_workers", "0")
    common += ("--validation_fraction", "0", "--max_train_steps", "9")
    return train_vqgan.parse_args([*common, *map(str, flags)])


def items(*flags, seed=0):
    """The training images."""
    return train_vqgan.load_data(parsed(*flags), seed)[0]


def batches(*flags, start=0, n=7, rank=0, world=1, seed=0):
    """`n` micro-batches of one process, concatenated."""
    process = SimpleNamespace(process_index=rank, num_processes=world, device=torch.device("cpu"))
    watch, images = train_vqgan.Watch(), []
    stream = train_vqgan.training_batches(items(*flags, seed=seed), parsed(*flags), seed, start, process, watch, {})
    for x, faults, *_ in itertools.islice(stream, n):
        watch.note_faults(faults)
        images.append(x)
    return torch.cat(images)


def refused(*flags):
    """The one line of a data set that cannot be used."""
    with pytest.raises(UserError) as caught:
        items(*flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """datasets waits five seconds at the end of every epoch of streamed parquet."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


# ---- A folder of images --------------------------------------------------------------------------------------------


def test_folder_with_subfolders_and_links(tmp_path):
    """No metadata needed; other files are left alone. Red when links are not followed, or suffixes keep their case."""
    inside, outside = tmp_path / "photos", tmp_path / "elsewhere"
    for folder in (inside / "a" / "b", outside):
        folder.mkdir(parents=True)
    for path in (inside / "1.png", inside / "a/2.JPG", inside / "a/b/3.jpeg", outside / "4.webp", tmp_path / "5.bmp"):
        plain(1).save(path)
    (inside / "notes.txt").touch()
    (inside / "folder.png").mkdir()
    (inside / "linked").symlink_to(outside)
    (inside / "5.bmp").symlink_to(tmp_path / "5.bmp")
    found = [str(path.relative_to(inside)) for path in [*items("--train_data_dir", inside)]]
    assert found == sorted(["1.png", "5.bmp", "a/2.JPG", "a/b/3.jpeg", "linked/4.webp"])


TAKEN = ".avif .jfif .jp2 .tga .mpo .webp .TIF .pfm .ico .dds"


def test_every_format_that_pillow_decodes(tmp_path):
    """Others need another program, or are stubs. Red with a list of our own, without MPO, or with a stub's suffix."""
    for suffix in (TAKEN + " .h5 .mpg .eps .cur .pdf .wmf .iim .txt .safetensors").split():
        (tmp_path / f"image{suffix}").touch()
    found = items("--train_data_dir", tmp_path)
    assert {path.suffix for path in found} == set(TAKEN.split())


def test_folder_linked_into_itself(tmp_path):
    """Red when links are followed until the system refuses: 41 copies of each image."""
    plain(1).save(tmp_path / "1.png")
    (tmp_path / "again").symlink_to(tmp_path)
    assert len(items("--train_data_dir", tmp_path)) == 1


def test_empty_folder(error, tmp_path):
    """Red when the check is left out: an empty folder would end in a division by zero."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    message = error("--train_data_dir", str(tmp_path / "empty"))
    assert "--train_data_dir" in message and str(tmp_path / "empty") in message and "1 .txt" in message


def test_what_is_left_out_of_a_folder_is_said_once(tmp_path, caplog):
    """Hidden files and folders, as `datasets` leaves them out, and suffixes that nothing here reads, with a remedy.

    Red when hidden ones are listed (AppleDouble files are no images), or the counts are not said.
    """
    for name in ("1.png", ".2.png", "._1.png", ".cache/3.png", "__MACOSX/4.png", "a/@eaDir/5.png", "a/6.PNG"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        plain(1).save(tmp_path / name)
    for name in ("7.heic", "8.HEIC", "notes.txt", "LICENSE"):
        (tmp_path / name).touch()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with caplog.at_level("INFO", "train_vqgan"):
        found = [*items("--train_data_dir", tmp_path)]
    assert [str(path.relative_to(tmp_path)) for path in found] == ["1.png", "a/6.PNG"]
    (line,) = [record.message for record in caplog.records if "left out" in record.message]
    for part in ("2 .heic (pip install pillow-heif)", "1 .txt", "1 without a suffix", "5 hidden", "1 broken links"):
        assert part in line


@pytest.mark.parametrize("output", ["out", ".", "a/out"])
def test_what_a_run_writes_below_its_data_is_no_data(tmp_path, output):
    """Strips of validation and pictures of wandb, in the folder itself too. Red when they are listed."""
    for name in (
        "1.png",
        "a/2.png",
        "checkpoint-photos/3.png",
        f"{output}/validation/step-5.png",
        f"{output}/wandb/4.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        plain(1).save(tmp_path / name)
    found = [*items("--train_data_dir", tmp_path, "--output_dir", tmp_path / output)]
    assert [path.name for path in found] == ["1.png", "2.png", "3.png"]


def test_paths_of_a_large_folder_are_one_flat_array():
    """100,000 names of 20 bytes: 8 bytes each besides, also as a spawned worker gets them. Red with path objects."""
    names = [f"class-{i % 100:03d}/{i:010d}" for i in range(100_000)]
    files = train_vqgan.ImageFiles("/data", [(name, 1) for name in names])
    assert len(files) == 100_000 and len(pickle.dumps(files)) < 100_000 * 30
    assert [str(files[i]) for i in (0, 7, 99_999)] == [f"/data/{names[i]}" for i in (0, 7, 99_999)]
    odd = train_vqgan.ImageFiles("/data", [("na\udcefve ä.png", 1)])  # no valid UTF-8
    assert odd[0] == Path("/data/na\udcefve ä.png")


def test_bundled_photographs():
    """Neither --train_data_dir nor --dataset_name."""
    found = items()
    assert len(found) >= 10 and all(path.is_relative_to(train_vqgan.REPOSITORY / "images/train") for path in [*found])


# ---- Data sets -----------------------------------------------------------------------------------------------------


def make_dataset(column="image"):
    features = datasets.Features({column: datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    data = {column: [plain(shade) for shade in SHADES], "label": [i % 2 for i in range(7)]}
    return datasets.Dataset.from_dict(data, features=features)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """kind of local data set -> its flags; every one holds an image of each of SHADES."""
    root = tmp_path_factory.mktemp("datasets")
    make_dataset().save_to_disk(root / "dataset")
    datasets.DatasetDict(train=make_dataset(), test=make_dataset().select([0])).save_to_disk(root / "dict")
    for split in ("train", "test"):  # as CIFAR-10 is on the Hub
        part = make_dataset("img") if split == "train" else make_dataset("img").select([0, 1])
        (root / "parquet" / "plain_text").mkdir(parents=True, exist_ok=True)
        part.to_parquet(root / "parquet" / "plain_text" / f"{split}-00000-of-00001.parquet")
    for i, shade in enumerate(SHADES):
        folder = root / "imagefolder" / "train" / ("dog" if i % 2 else "cat")
        folder.mkdir(parents=True, exist_ok=True)
        plain(shade).save(folder / f"{i}.png")
        (root / "folder").mkdir(exist_ok=True)
        plain(shade).save(root / "folder" / f"{i}.png")
    flags = {kind: ("--dataset_name", str(root / kind), "--cache_dir", str(root / "cache")) for kind in KINDS}
    flags["parquet"] += ("--image_column", "img")
    return flags | {"folder": ("--train_data_dir", str(root / "folder"))}


@pytest.mark.parametrize("kind", KINDS)
def test_local_dataset(local, kind):
    """Each item once, from the train split. Red when another split is read, or the column is not cast."""
    assert len(items(*local[kind])) == 7
    assert sorted(shades(batches(*local[kind]))[:7]) == SHADES


@pytest.fixture
def no_folder(flags):
    """`train` and `error` without --train_data_dir."""
    flags[:] = without(flags, "--train_data_dir")


def test_dataset_through_main(no_folder, train, local):
    """--dataset_name with --image_column, as the docstring's CIFAR-10 command has it."""
    output = train(*local["parquet"], "--max_train_steps", "1", "--log_steps", "1", "--checkpointing_steps", "0")
    assert (output / "vqmodel" / "config.json").is_file() and len(metrics(output)) == 1


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["dict", "parquet"])
def test_wrong_column_lists_the_columns(local, kind, streaming):
    """Red when the column is not compared with the features."""
    message = refused(*local[kind], "--image_column", "picture", *["--streaming"] * streaming)
    assert "--image_column" in message and "'picture'" in message and local[kind][1] in message
    assert message.endswith(f"all: {'img' if kind == 'parquet' else 'image'}, label")


def test_column_without_images_says_which_have_some(local):
    """Red when the feature's type is not looked at."""
    message = refused(*local["dataset"], "--image_column", "label")
    assert "--image_column" in message and "'label'" in message and "columns that may hold images: image;" in message


def test_no_train_split_says_which_splits_there_are(tmp_path):
    """Red when the missing split ends in a KeyError."""
    datasets.DatasetDict(valid=make_dataset(), test=make_dataset()).save_to_disk(tmp_path / "dict")
    message = refused("--dataset_name", tmp_path / "dict")
    assert "--dataset_name" in message and "no train split" in message and message.endswith("valid, test")
    (tmp_path / "parquet").mkdir()
    make_dataset().to_parquet(tmp_path / "parquet" / "test-00000-of-00001.parquet")
    message = refused("--dataset_name", tmp_path / "parquet", "--cache_dir", tmp_path / "cache")
    assert "--dataset_name: cannot read the train split" in message and "'test'" in message


def test_dataset_that_datasets_cannot_read(tmp_path, local):
    """Red when the exceptions of `datasets` get through, or `split` in a message is taken for a missing split."""
    (tmp_path / "none").mkdir()
    make_dataset().select([]).to_parquet(tmp_path / "none" / "train.parquet")
    message = refused("--dataset_name", tmp_path / "none", "--cache_dir", tmp_path / "cache")
    assert "--dataset_name" in message and str(tmp_path / "none") in message
    (tmp_path / "splits").mkdir()
    message = refused("--dataset_name", tmp_path / "splits", "--cache_dir", tmp_path / "cache")
    assert f"--dataset_name: cannot read the train split of {tmp_path / 'splits'}: " in message and "Hub" not in message
    message = refused(*local["parquet"], "--dataset_config_name", "my_split")
    assert (
        f"--dataset_name: cannot read the train split of {local['parquet'][1]}: " in message and "'my_split'" in message
    )


def test_hub_out_of_reach(no_folder, error):
    """HF_HUB_OFFLINE=1. Red when the Hub's exception gets through."""
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    message = error("--dataset_name", "nobody/nothing")
    assert "--dataset_name" in message and "nobody/nothing" in message and "Hub" in message and "network" in message


@pytest.mark.parametrize("kind", ["folder", *KINDS])
def test_max_train_samples(local, kind):
    """That many different images, drawn by seed. Red when the first ones are taken, or the seed is left out."""
    chosen = {}
    for seed in range(6):
        drawn = items(*local[kind], "--max_train_samples", 3, seed=seed)
        found = [int(np.asarray(train_vqgan.open_image(drawn[i]))[0, 0, 0]) for i in range(len(drawn))]
        assert len(drawn) == len(set(found)) == 3
        chosen[seed] = tuple(sorted(found))
    assert len(set(chosen.values())) >= 4 and set(itertools.chain(*chosen.values())) == set(SHADES)
    again = items(*local[kind], "--max_train_samples", 3, seed=5)
    assert len(again) == 3 and [again[i] for i in range(3)] == [drawn[i] for i in range(3)]
    assert len(items(*local[kind], "--max_train_samples", 100)) == 7


def rows_with(tmp_path, *images):
    """Flags of a data set of these rows: None, bytes, or a plain image of that red."""

    def row(image):
        if isinstance(image, int):
            file = io.BytesIO()
            plain(image).save(file, "PNG")
            image = file.getvalue()
        return image if image is None or isinstance(image, dict) else {"bytes": image, "path": None}

    features = datasets.Features({"image": datasets.Image()})
    data = datasets.Dataset.from_dict({"image": [row(image) for image in images]}, features=features)
    data.save_to_disk(tmp_path / "data")
    return "--dataset_name", tmp_path / "data"


NO_IMAGE = {"bytes": b"no image", "path": "two.png"}


@pytest.mark.parametrize(
    "row, name",
    [(NO_IMAGE, "two.png"), (b"no image", "number 1"), (None, "number 1")],
    ids=["with a path", "without a path", "missing"],
)
def test_unreadable_row_is_skipped_and_named(tmp_path, caplog, row, name):
    """As in CIFAR-10's parquet, without a path, and as in data sets of scraped images, without an image.

    Red when rows are decoded before `open_image`, when it hands None to Pillow, or when the line gives the path alone.
    """
    assert sorted(shades(batches(*rows_with(tmp_path, 10, row, 30), n=3))[:3])[0] == 10
    assert {record.message.split(": ")[1] for record in caplog.records} == {name}


# ---- Streaming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_stream_is_endless_and_shuffled(local, kind):
    """Every image once per epoch, in another order each time. Red when `set_epoch` or the shuffle is left out."""
    flags = (*local[kind], "--streaming")
    assert isinstance(items(*flags), datasets.IterableDataset)
    seen = shades(batches(*flags, n=21))
    epochs = [tuple(seen[i : i + 7]) for i in range(0, 42, 7)]
    assert all(sorted(epoch) == SHADES for epoch in epochs)
    assert len(set(epochs)) >= 5 and tuple(SHADES) not in epochs[:2]
    assert shades(batches(*flags, n=21, seed=1)) != seen


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """kind -> a folder of six shards of four plain images each, red 0 to 230 in steps of 10; parquet has row groups of two."""
    root = tmp_path_factory.mktemp("shards")
    for kind in ("parquet", "tar"):
        (root / kind).mkdir()
        for i in range(6):
            reds = [40 * i + 10 * k for k in range(4)]
            if kind == "tar":
                write_tar(root / kind / f"{i:06d}.tar", {f"{red}.png": png(red) for red in reds})
            else:
                rows = {"image": [{"bytes": png(red), "path": None} for red in reds], "label": reds}
                features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
                data = datasets.Dataset.from_dict(rows, features=features)
                data.to_parquet(root / kind / f"train-{i}-of-6.parquet", batch_size=2)
    return root


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def steps(*flags, n, start=0, rank=0, world=1, positions=None):
    """Shades of `n` steps of a stream, as one process trains on them, and its positions then."""
    positions = {} if positions is None else positions
    process = SimpleNamespace(process_index=rank, num_processes=world, device=torch.device("cpu"))
    watch, flags = train_vqgan.Watch(), (*flags, "--streaming")
    stream = train_vqgan.training_batches(items(*flags), parsed(*flags), 0, start, process, watch, positions)
    images = torch.cat([x for (x,) in train_vqgan.step_batches(stream, 1, n, watch, positions)])
    assert not watch.failure and len(images) == 2 * n
    return shades(images), positions


@pytest.mark.parametrize("kind, world, workers", [("parquet", 1, 0), ("tar", 2, 0), ("parquet", 3, 2), ("tar", 2, 3)])
def test_each_image_of_a_stream_once_a_pass(shards, tmp_path, kind, world, workers):
    """By all processes and data workers together, in an order of its own in each of two passes.

    Red when readers overlap: without their number in `split_dataset_by_node`, or without the worker's turn.
    """
    flags = ("--dataset_name", shards / kind, "--cache_dir", tmp_path, "--dataloader_num_workers", workers)
    parts = [steps(*flags, n=24 // world, rank=rank, world=world)[0] for rank in range(world)]
    passes = [[red for part in parts for red in part[half * 24 // world : (half + 1) * 24 // world]] for half in (0, 1)]
    assert all(sorted(seen) == list(range(0, 240, 10)) for seen in passes)
    assert passes[0] != passes[1] and sorted(passes[0]) != passes[0]


@pytest.mark.slow
def test_fewer_shards_than_readers_are_read_by_all(shards, tmp_path, caplog):
    """Six tars for eight readers: every image once, and the cost is said. Parquet files have row groups: twelve.

    Red when each reader takes every image, or row groups are not counted.
    """
    flags = ("--cache_dir", tmp_path, "--dataset_name", shards / "tar")
    parts = [steps(*flags, n=3, rank=rank, world=8)[0][:3] for rank in range(8)]
    assert sorted(red for part in parts for red in part) == list(range(0, 240, 10))
    assert "6 shards for 8 readers (processes x data workers): each reads them all" in caplog.text
    caplog.clear()
    steps(*flags[:3], shards / "parquet", n=3, rank=7, world=8)
    assert "each reads them all" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("kind, workers, cut", [("parquet", 0, 1), ("tar", 0, 14), ("parquet", 2, 5), ("tar", 2, 13)])
def test_stream_resumes_exactly_without_a_buffer(shards, tmp_path, kind, workers, cut):
    """From any step, in another pass too, though batches had been fetched ahead of it.

    Red when the positions are those of the last batch fetched, or the first worker begins whose turn it is not.
    """
    flags = ("--dataset_name", shards / kind, "--cache_dir", tmp_path, "--dataloader_num_workers", workers)
    whole, _ = steps(*flags, "--shuffle_buffer", 0, n=20)
    before, positions = steps(*flags, "--shuffle_buffer", 0, n=cut)
    after, _ = steps(*flags, "--shuffle_buffer", 0, n=20 - cut, start=2 * cut, positions=positions)
    assert before + after == whole and len(set(whole)) == 24


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_resumed_reader_skips_what_its_buffer_held(shards, tmp_path, kind):
    """Nothing is repeated, at most the buffer is left out of the pass. Red when the position is of the image given."""
    flags = ("--dataset_name", shards / kind, "--cache_dir", tmp_path, "--shuffle_buffer", 5)
    before, positions = steps(*flags, n=6)
    rest, _ = steps(*flags, n=(24 - 12 - 5) // 2, start=12, positions=positions)
    assert len(before) == 12 and len(set(before + rest)) == 12 + len(rest)


def test_another_number_of_workers_begins_a_new_pass(shards, tmp_path, caplog):
    """Where none was finished, the second. Red when positions of other readers are taken for one's own."""
    flags = ("--dataset_name", shards / "tar", "--cache_dir", tmp_path, "--dataloader_num_workers")
    _, positions = steps(*flags, 0, n=3)
    with caplog.at_level("INFO", "train_vqgan"):
        after, positions = steps(*flags, 2, n=12, start=6, positions=positions)
    assert sorted(after) == list(range(0, 240, 10)) and "a new pass" in caplog.text
    assert {number for number, *_ in positions.values()} == {1}


def test_buffer_is_bounded_in_bytes_and_images():
    """Red when bytes are not counted, or not subtracted."""
    pairs = [({"bytes": bytes(2**18), "path": None}, i) for i in range(100)]
    for flags, held in ((("--shuffle_buffer_mb", 4), 16), (("--shuffle_buffer", 10), 11)):
        stream = train_vqgan.ShardStream.__new__(train_vqgan.ShardStream)
        stream.args, stream.turns = parsed(*flags, "--dataset_name", "a", "--streaming"), [0]
        ahead = [position - n for n, (_, position) in enumerate(stream.shuffled(iter(pairs), 0))]
        assert len(ahead) == 100 and held - 2 <= max(ahead[:80]) <= held, flags


@pytest.mark.slow
def test_resumed_run_of_a_stream_is_the_uninterrupted_one(no_folder, train, shards, tmp_path):
    """Through main, to the last bit. Red when the checkpoint does not hold the positions."""
    flags = ("--dataset_name", str(shards / "tar"), "--streaming", "--shuffle_buffer", "0", "--max_train_steps")
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    train(*flags, "4", "--checkpointing_steps", "4", "--output_dir", whole)
    train(*flags, "2", "--checkpointing_steps", "2", "--output_dir", cut, "--discriminator_start", "0")
    train(*flags, "4", "--checkpointing_steps", "4", "--output_dir", cut, "--resume_from_checkpoint", "latest")
    assert equal(weights(Path(whole)), weights(Path(cut)))


@pytest.fixture
def remote(monkeypatch):
    """Address of four tars in fsspec's file system in memory; the first opens fail, as many as `remote.failures` says."""
    files, failures = fsspec.filesystem("memory"), []
    for i in range(4):
        with tempfile.TemporaryDirectory() as folder:
            write_tar(f"{folder}/a.tar", {f"{red}.png": png(red) for red in range(60 * i, 60 * i + 60, 10)})
            files.pipe(f"/data/{i}.tar", Path(folder, "a.tar").read_bytes())
    opened = train_vqgan.xopen

    def xopen(path, *mode):
        if failures:
            raise failures.pop()
        return opened(path, *mode)

    monkeypatch.setattr(train_vqgan, "xopen", xopen)
    monkeypatch.setattr(train_vqgan.time, "sleep", lambda seconds: None)
    return SimpleNamespace(name="memory://data/{0..3}.tar", failures=failures)


def test_network_that_fails_for_a_while(remote, caplog):
    """Every image once all the same, with a line for each failure. Red when a failure ends the stream, or restarts it."""
    whole = steps("--dataset_name", remote.name, n=12)[0]
    assert sorted(whole) == list(range(0, 240, 10))
    remote.failures += [OSError("503 Service Unavailable"), FileNotFoundError("gone")]
    assert steps("--dataset_name", remote.name, n=12)[0] == whole
    said = [record.message for record in caplog.records if "trying again" in record.message]
    assert len(said) == 2 and "503 Service Unavailable in memory://data/" in said[1]


def test_network_that_fails_for_good(remote):
    """Red when it is tried for ever."""
    stream = train_vqgan.ShardStream(
        items("--dataset_name", remote.name, "--streaming"),
        parsed("--dataset_name", remote.name, "--streaming"),
        0,
        0,
        SimpleNamespace(process_index=0, num_processes=1),
        {0: (0, None, 0)},
    )
    remote.failures += [OSError("503")] * 100
    with pytest.raises(
        UserError, match="--streaming: memory.* broke off: 503 in memory://data/.*resume_from_checkpoint"
    ):
        next(iter(stream))


def test_stream_is_augmented(tmp_path):
    """As another sample in every epoch. Red when a sample is augmented by its place in the epoch."""
    (tmp_path / "wide").mkdir()
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8)
    PIL.Image.fromarray(np.broadcast_to(ramp, (16, 64)).copy()).save(tmp_path / "wide" / "ramp.png")
    flags = ("--dataset_name", tmp_path / "wide", "--cache_dir", tmp_path / "cache", "--streaming", "--random_flip")
    assert len(torch.unique(batches(*flags, n=10), dim=0)) > 10


@pytest.mark.parametrize("batch_size", [1, 2])
def test_unreadable_image_in_a_stream_is_skipped(tmp_path, caplog, batch_size):
    """The next one takes its place: both others as often. Red when Unreadable is not caught there."""
    flags = (*rows_with(tmp_path, 10, NO_IMAGE, 30), "--streaming", "--train_batch_size", batch_size)
    seen = shades(batches(*flags, n=8))
    assert seen.count(10) == seen.count(30) == 4 * batch_size and "two.png" in caplog.text


def test_stream_without_a_readable_image(tmp_path):
    """Red when it goes on reading for ever."""
    flags = (*rows_with(tmp_path, NO_IMAGE, None), "--streaming")
    with pytest.raises(UserError, match="no image of .* can be read"):
        batches(*flags)


def test_streaming_through_main(no_folder, train, flags, local, capsys):
    """As far as the export, and not on as a run that does not stream.

    Red when something asks the stream for its length, or when --streaming is not fixed.
    """
    data = local["dataset"]
    output = train(*data, "--streaming", "--log_steps", "1", "--checkpointing_steps", "2")
    assert (output / "vqmodel" / "config.json").is_file() and len(metrics(output)) == 2
    assert json.loads((output / "checkpoint-2" / "progress.json").read_text())["samples_seen"] == 4
    assert train_vqgan.main([*flags, *data, "--resume_from_checkpoint", "latest", "--max_train_steps", "3"]) == 2
    line = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(line) == 1 and "--resume_from_checkpoint: --streaming" in line[0]


# ---- Other people's columns and folders ----------------------------------------------------------------------------


def png(red):
    file = io.BytesIO()
    plain(red).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["bytes", "both", "paths"])
def test_columns_that_pandas_wrote(tmp_path, kind, streaming):
    """Parquet without an Image feature. Red when only declared columns of images are taken."""
    (tmp_path / "data").mkdir()
    for shade in SHADES:
        (tmp_path / f"{shade}.png").write_bytes(png(shade))
    values = {
        "bytes": [png(shade) for shade in SHADES],
        "both": [{"bytes": png(shade), "path": None} for shade in SHADES],
        "paths": [str(tmp_path / f"{shade}.png") for shade in SHADES],
    }
    pandas.DataFrame({"image": values[kind]}).to_parquet(tmp_path / "data" / "train.parquet")
    flags = ("--dataset_name", tmp_path / "data", "--cache_dir", tmp_path / "cache", *["--streaming"] * streaming)
    assert sorted(shades(batches(*flags))[:7]) == SHADES


def test_stream_without_known_columns(tmp_path):
    """csv with paths. Red when the column is cast without its features: a TypeError."""
    (tmp_path / "data").mkdir()
    for shade in SHADES:
        (tmp_path / f"{shade}.png").write_bytes(png(shade))
    rows = [f"{tmp_path / f'{shade}.png'},{shade}" for shade in SHADES]
    (tmp_path / "data" / "train.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    flags = ("--dataset_name", tmp_path / "data", "--cache_dir", tmp_path / "cache", "--streaming")
    assert sorted(shades(batches(*flags))[:7]) == SHADES


def test_other_columns_of_a_stream_are_not_decoded(tmp_path):
    """A broken mask beside every image. Red when `select_columns` is left out."""
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    rows = {"image": [{"bytes": png(s), "path": None} for s in SHADES], "mask": [NO_IMAGE] * 7}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "data")
    flags = ("--dataset_name", tmp_path / "data", "--streaming")
    assert sorted(shades(batches(*flags))[:7]) == SHADES
    assert items(*flags).column_names == ["image"]


def test_folders_taken_for_splits_are_said(tmp_path, caplog):
    """Classes bus, car and train: `datasets` takes 3 of 9. Red when the numbers are not compared."""
    for kind in ("bus", "car", "train"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for i in range(3):
            plain(i).save(tmp_path / "data" / kind / f"{kind}{i}.png")
    assert len(items("--dataset_name", tmp_path / "data", "--cache_dir", tmp_path / "cache")) == 3
    assert "holds 3 of the 9 images" in caplog.text and "--train_data_dir reads all" in caplog.text
    assert len(items("--train_data_dir", tmp_path / "data")) == 9


def test_errors_of_datasets_keep_the_line_that_helps(tmp_path):
    """Two configurations: the second line lists them. Red when only the first line of an error is shown."""
    for name in ("big", "small"):
        (tmp_path / "data" / name).mkdir(parents=True)
        make_dataset().to_parquet(tmp_path / "data" / name / "train.parquet")
    (tmp_path / "data" / "README.md").write_text(
        "---\nconfigs:\n- config_name: big\n  data_files: big/*\n- config_name: small\n  data_files: small/*\n---\n"
    )
    message = refused("--dataset_name", tmp_path / "data", "--cache_dir", tmp_path / "cache")
    assert "big" in message and "small" in message and "--dataset_config_name" in message


def test_saved_dataset_has_no_configurations(local):
    """Red when the flag is ignored."""
    assert "--dataset_config_name" in refused(*local["dataset"], "--dataset_config_name", "plain_text")


@pytest.mark.parametrize("where", ["run", "."])
def test_results_inside_a_local_dataset_are_refused(error, tmp_path, no_folder, where):
    """`datasets` takes validation/step-2.png for a split. Red when the two paths are not compared."""
    plain(1).save(tmp_path / "1.png")
    message = error("--dataset_name", str(tmp_path), "--output_dir", str(tmp_path / where))
    assert "--output_dir: it lies inside" in message


def test_results_of_other_runs_and_held_out_images_are_no_training_data(tmp_path, caplog):
    """Red when only this run's own folder is left out, or a folder of held-out images is trained on."""
    for name in ("1.png", "old/validation/step-1.png", "held/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        plain(1).save(tmp_path / name)
    (tmp_path / "old" / "metrics.jsonl").touch()
    with caplog.at_level("INFO", "train_vqgan"):
        found = [*items("--train_data_dir", tmp_path, "--validation_data_dir", tmp_path / "held")]
    assert [path.name for path in found] == ["1.png"] and "2 folders that hold results or held-out" in caplog.text


@pytest.mark.parametrize("name", ["[a].parquet", "[a]", "a::b"])
def test_names_that_datasets_takes_for_something_else(tmp_path, name):
    """Red when `datasets` is asked: "doesn't contain any data files". Links do not help: it resolves them."""
    (tmp_path / name).mkdir() if "." not in name else make_dataset().to_parquet(tmp_path / name)
    message = refused("--dataset_name", tmp_path / name)
    assert "rename it" in message and "--train_data_dir" in message


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "tar", "zip", "csv"])
def test_single_file(tmp_path, kind, streaming):
    """Red when a file is refused, or taken for the name of a repository on the Hub."""
    pictures = {f"{red}.png": png(red) for red in SHADES}
    file = tmp_path / f"x.{kind}"
    if kind == "parquet":
        make_dataset().to_parquet(file)
    elif kind == "tar":
        write_tar(file, pictures)
    else:
        for name, content in pictures.items():
            (tmp_path / name).write_bytes(content)
        if kind == "zip":
            with zipfile.ZipFile(file, "w") as archive:
                for name in pictures:
                    archive.write(tmp_path / name, name)
        else:
            file.write_text("\n".join(["image", *(str(tmp_path / name) for name in pictures)]) + "\n")
    flags = ("--dataset_name", file, "--cache_dir", tmp_path / "cache", *["--streaming"] * streaming)
    assert sorted(shades(batches(*flags))[:7]) == SHADES


def test_file_of_another_kind(tmp_path):
    """Red when it is taken for the name of a repository on the Hub."""
    (tmp_path / "notes.doc").touch()
    assert "is of no kind that is read here: .tar, .parquet" in refused("--dataset_name", tmp_path / "notes.doc")
    assert "no such file: " in refused("--dataset_name", f"{tmp_path}/{{00..03}}.tar")
    write_tar(tmp_path / "a.tar", {"1.png": png(1)})
    assert "files have no splits" in refused("--dataset_name", tmp_path / "a.tar", "--validation_split", "test")


@pytest.mark.parametrize(
    "name, files",
    [
        ("/d/{008..011}.tar", ["/d/008.tar", "/d/009.tar", "/d/010.tar", "/d/011.tar"]),
        ("a.tar,b.tar", ["a.tar", "b.tar"]),
        ("s3://b/{x,y}/{0..1}.tar", ["s3://b/x/0.tar", "s3://b/x/1.tar", "s3://b/y/0.tar", "s3://b/y/1.tar"]),
        ("owner/name", []),
        ("owner/name.parquet-v2", []),
    ],
)
def test_listed_files(name, files):
    """Red when leading zeros are lost, a range ends too early, or a repository is taken for a file."""
    assert train_vqgan.listed_files(name) == files


@pytest.mark.parametrize("streaming", [False, True])
def test_images_in_tars_whatever_their_suffix(tmp_path, caplog, streaming):
    """One of each sample, in folders, with other members; an archive that is cut costs its rest, and is named.

    Red when one suffix is expected, the mask is taken, or the archive that is cut ends the run.
    """
    jpeg = io.BytesIO()
    plain(50).save(jpeg, "JPEG")
    write_tar(tmp_path / "0.tar", {"a/1.png": png(10), "a/1.json": b"{", "a/1.mask.png": png(0), "b/1.PNG": png(20)})
    write_tar(tmp_path / "1.tar", {"2.jpeg": jpeg.getvalue(), "3.txt": b"no image", "._4.png": b"AppleDouble"})
    write_tar(tmp_path / "2.tar", {"5.png": png(30), "6.png": png(40)})
    (tmp_path / "2.tar").write_bytes((tmp_path / "2.tar").read_bytes()[:1600])
    flags = (
        "--dataset_name",
        f"{tmp_path}/{{0..2}}.tar",
        "--cache_dir",
        tmp_path / "cache",
        *["--streaming"] * streaming,
    )
    seen = shades(batches(*flags, n=12))
    assert {*seen} == {10, 20, 30, 50} and "the end of " in caplog.text and str(tmp_path / "2.tar") in caplog.text
    assert {*shades(batches(*flags, "--image_column", "mask.png", n=2))} == {0}


def test_only_column_of_images_is_taken(tmp_path, local):
    """Red when the default column has to be named."""
    assert len(items(*without([*map(str, local["parquet"])], "--image_column"))) == 7


def test_another_split_than_train(tmp_path, local):
    """Red when the flag is ignored, or the message does not name it, or names it for a missing --validation_split."""
    datasets.DatasetDict(valid=make_dataset(), test=make_dataset().select([3])).save_to_disk(tmp_path / "dict")
    assert len(items("--dataset_name", tmp_path / "dict", "--train_split", "test")) == 1
    assert len(items(*local["parquet"], "--train_split", "test")) == 2
    assert "--train_split chooses another" in refused("--dataset_name", tmp_path / "dict")
    datasets.DatasetDict(train=make_dataset()).save_to_disk(tmp_path / "train")
    for given in (["--dataset_name", tmp_path / "train"], local["parquet"]):
        message = refused(*given, "--validation_split", "nope")
        assert message.startswith("--validation_split: ") and "nope split" in message and "--train_split" not in message


def test_captions_beside_images(tmp_path):
    """Red when the flag that reads the images is not named."""
    (tmp_path / "data").mkdir()
    for i in range(3):
        plain(i).save(tmp_path / "data" / f"{i}.png")
        for name in (f"{i}.txt", f"{i}-long.txt"):
            (tmp_path / "data" / name).write_text("a caption")
    message = refused("--dataset_name", tmp_path / "data", "--cache_dir", tmp_path / "cache")
    assert message.endswith("--train_data_dir reads the 3 image files below it")


def test_notes_beside_a_local_dataset_do_not_change_it(tmp_path):
    """Red when every file below the folder is part of its identity."""
    make_dataset().to_parquet(tmp_path / "train.parquet")
    flags = ("--dataset_name", tmp_path, "--cache_dir", tmp_path.parent / "cache")
    before = train_vqgan.load_data(parsed(*flags), 0)[2]
    (tmp_path / "README.md").write_text("notes")
    assert train_vqgan.load_data(parsed(*flags), 0)[2] == before
    make_dataset().to_parquet(tmp_path / "train-2.parquet")
    assert train_vqgan.load_data(parsed(*flags), 0)[2] != before


@pytest.mark.parametrize("kind", ["bytes", "long name"])
def test_fault_of_an_image_is_one_short_line_once(tmp_path, caplog, kind):
    """Each of two broken rows in seven passes. Red when the address of its bytes is in it, or the name is not cut."""
    bad = b"no image" if kind == "bytes" else {"bytes": b"no image", "path": "x" * 5000}
    batches(*rows_with(tmp_path, 10, bad, 30, bad), n=14)
    said = [record.message for record in caplog.records]
    assert len(said) == (2 if kind == "bytes" else 1) and all(
        len(line) < 400 and "BytesIO" not in line for line in said
    )


def test_held_out_stream_that_breaks_off_costs_that_validation(no_folder, train, tmp_path, caplog):
    """Training goes on, and is saved. Red when the error gets through: all since the last checkpoint was lost."""
    (tmp_path / "data").mkdir()
    make_dataset().to_parquet(tmp_path / "data" / "train.parquet")
    make_dataset().to_parquet(tmp_path / "data" / "validation.parquet")
    held_out = tmp_path / "data" / "validation.parquet"
    held_out.write_bytes(held_out.read_bytes()[:300])
    flags = ("--dataset_name", str(tmp_path / "data"), "--streaming", "--validation_split", "validation")
    run = train(*flags, "--cache_dir", str(tmp_path / "cache"), "--checkpointing_steps", "2")
    assert "This validation is left out: --validation_split: validation of" in caplog.text
    assert (run / "checkpoint-2").is_dir() and (run / "vqmodel").is_dir()


@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_broken_shard_of_a_stream_is_named(no_folder, flags, capsys, tmp_path, kind):
    """A truncated parquet file, and a line that is no JSON. Red when only the data set is named."""
    (tmp_path / "data").mkdir()
    for i in range(2):
        shard = tmp_path / "data" / f"train-{i:05d}.{kind}"
        if kind == "parquet":
            make_dataset().to_parquet(shard)
            shard.write_bytes(shard.read_bytes()[: None if i == 0 else 500])
        else:
            shard.write_text('{"image": "a.png"}\n' if i == 0 else "{")
    more = ["--dataset_name", str(tmp_path / "data"), "--cache_dir", str(tmp_path / "cache")]
    assert train_vqgan.main([*flags, *more, "--streaming"]) == 2
    said = capsys.readouterr().err
    assert (
        said.count("train_vqgan.py: error:") == 1
        and f"in {shard}; the same command" in said
        and "Traceback" not in said
    )
