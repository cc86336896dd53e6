"""Every place images come from: folders, data sets of each kind, and streams."""

import io
import itertools
import json
import os
import pickle
import tarfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pandas
import PIL.Image
import pytest
import torch
from conftest import metrics, without

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
    stream = train_vqgan.training_batches(items(*flags, seed=seed), parsed(*flags), seed, start, process, watch)
    for x, faults in itertools.islice(stream, n):
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


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 7, 16])
def test_stream_resumes_exactly(photos, tmp_path, workers, start):
    """From any position, in another epoch too. Red when what was seen is not skipped, or augmented otherwise."""
    flags = ("--dataset_name", photos, "--cache_dir", tmp_path, "--streaming", "--random_flip")
    whole = batches(*flags, n=15)
    assert len(torch.unique(whole, dim=0)) > 20, "the samples differ from each other"
    resumed = batches(*flags, "--dataloader_num_workers", workers, start=start)
    assert torch.equal(resumed, whole[start : start + 14])


def test_stream_is_augmented(tmp_path):
    """As another sample in every epoch. Red when a sample is augmented by its place in the epoch."""
    (tmp_path / "wide").mkdir()
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8)
    PIL.Image.fromarray(np.broadcast_to(ramp, (16, 64)).copy()).save(tmp_path / "wide" / "ramp.png")
    flags = ("--dataset_name", tmp_path / "wide", "--cache_dir", tmp_path / "cache", "--streaming", "--random_flip")
    assert len(torch.unique(batches(*flags, n=10), dim=0)) > 10


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_stream_is_shared_by_processes(photos, tmp_path, world, start):
    """Disjoint, and together what one process would see. Red when every process starts at the same sample."""
    flags = ("--dataset_name", photos, "--cache_dir", tmp_path, "--streaming", "--train_batch_size")
    shared = [batches(*flags, 6 // world, start=start, n=4, rank=rank, world=world) for rank in range(world)]
    alone = batches(*flags, 6, start=start, n=4)
    assert len(torch.unique(alone, dim=0)) > 12, "the samples differ from each other"
    for step in range(4):
        seen = [x.numpy().tobytes() for part in shared for x in part.unflatten(0, (4, -1))[step]]
        assert sorted(seen) == sorted(x.numpy().tobytes() for x in alone.unflatten(0, (4, -1))[step])


@pytest.mark.parametrize("batch_size, start", [(2, 0), (1, 0), (1, 1), (1, 2)])
def test_unreadable_image_in_a_stream_is_skipped(tmp_path, caplog, batch_size, start):
    """In batches of one, one of the starts is the unreadable one's place. Red when UNREADABLE is not caught there."""
    flags = (*rows_with(tmp_path, 10, NO_IMAGE, 30), "--streaming", "--train_batch_size", batch_size)
    seen = shades(batches(*flags, start=start, n=9))
    assert len(seen) == 9 * batch_size and set(seen) == {10, 30} and "two.png" in caplog.text


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


@pytest.mark.parametrize("name", ["a.parquet", "[a]", "a::b"])
def test_names_that_datasets_takes_for_something_else(tmp_path, name):
    """Red when `datasets` is asked: "doesn't contain any data files"."""
    if name.endswith("parquet"):
        make_dataset().to_parquet(tmp_path / name)
    else:
        (tmp_path / name).mkdir()
        plain(1).save(tmp_path / name / "1.png")
    message = refused("--dataset_name", tmp_path / name)
    assert "is a file; give the folder" in message or "rename the folder" in message


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


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_broken_shard_of_a_stream_is_named(no_folder, flags, capsys, tmp_path, kind):
    """A truncated parquet file, and a member of an archive that is no JSON. Red when only the data set is named."""
    (tmp_path / "data").mkdir()
    for i in range(2):
        shard = tmp_path / "data" / f"train-{i:05d}.{kind}"
        if kind == "parquet":
            make_dataset().to_parquet(shard)
            shard.write_bytes(shard.read_bytes()[: None if i == 0 else 500])
        else:
            with tarfile.open(shard, "w") as archive:
                for name, content in (("a.png", png(1)), ("a.json", b"{}" if i == 0 else b"{")):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    column = "image" if kind == "parquet" else "png"
    more = ["--dataset_name", str(tmp_path / "data"), "--cache_dir", str(tmp_path / "cache"), "--image_column", column]
    assert train_vqgan.main([*flags, *more, "--streaming"]) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and f"in {shard}; the same command" in said and "Traceback" not in said
