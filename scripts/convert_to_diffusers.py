# Copyright 2026 the contributors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Make a diffusers VQModel of a published tokenizer's checkpoint: taming-transformers, latent-diffusion's VQ models,
LlamaGen, and MaskGIT as open-muse and MaskBit ported it. docs/tokenizers.md says how each was checked.

    python scripts/convert_to_diffusers.py last.ckpt converted
    accelerate launch train_vqgan.py --pretrained_model_name_or_path=converted --train_data_dir=photos

The architecture follows from the tensors' names and shapes. Nothing else that the file names is imported or called.
"""

import argparse
import re
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import VQModel
from diffusers.image_processor import VaeImageProcessor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_vqgan import WRITE_ERRORS, UserError, require, user_error  # noqa: E402

FAMILIES = {  # what each calls the blocks in the middle; the last tells them apart
    "taming": {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"},  # and latent-diffusion
    "LlamaGen": {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"},
    "MaskGIT": {r"(?:res_blocks\.)?0": "resnets.0", r"(?:res_blocks\.)?1": "resnets.1"},
}
NAMES = [  # theirs, diffusers'
    (r"^encoder\.(?:down|conv_blocks)\.", "encoder.down_blocks."),
    (r"^decoder\.(?:up|conv_blocks)\.", "decoder.up_blocks."),
    (r"(_blocks\.\d+)\.(?:block|res|res_blocks)\.", r"\1.resnets."),
    (r"(_blocks\.\d+)\.attn\.", r"\1.attentions."),
    (r"(_blocks\.\d+)\.(?:downsample\.conv|down_conv)\.", r"\1.downsamplers.0.conv."),
    (r"(_blocks\.\d+)\.(?:upsample\.conv|upsample_conv)\.", r"\1.upsamplers.0.conv."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
    (r"^quantize\.codebook$", "quantize.embedding.weight"),  # all corners of a cube, of MaskBit's lookup-free quantiser
]
LEFT_OUT = r"(loss|model_ema)\.|colorize$|quantize\.(codebook_used|bits_to_indices)$"  # for training
REFUSED = [
    (r"decoder\.adaptive\.", "MAGVIT2 scales its decoder by statistics of the latents, and has no codebook (LFQ)"),
    (r"quantize\.proj\.", "its codes are those of the highest logits (Gumbel), not those nearest to the latents"),
    (r"..coder\.mid\.res_blocks\.[2-9]", "a VQModel has two blocks in the middle, its encoder or decoder has more"),
    (r"..coder\.mid_block\.resnets", "it has diffusers' names already; give its folder to train_vqgan.py"),
]
# What published files mention besides tensors: LlamaGen's flags, Lightning's callbacks, OmegaConf's configs, numbers.
INERT = """argparse.Namespace builtins.dict builtins.int builtins.list builtins.str collections.defaultdict typing.Any
    pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint omegaconf.dictconfig.DictConfig omegaconf.base.Metadata
    pytorch_lightning.callbacks.early_stopping.EarlyStopping omegaconf.listconfig.ListConfig numpy.ndarray numpy.dtype
    omegaconf.base.ContainerMetadata omegaconf.nodes.AnyNode numpy._core.multiarray.scalar numpy.core.multiarray.scalar
    numpy._core.multiarray._reconstruct numpy.core.multiarray._reconstruct""".split()


class Inert:  # stands in for each of them: takes any arguments and any state, and does nothing with them
    def __new__(cls, *args):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


def read_tensors(path):
    """The model's tensors by name; the averaged ones where the file keeps both."""
    require(Path(path).is_file(), "no such file")
    stand_ins = [(Inert, name) for name in INERT] + [(dict, "pytorch_lightning.utilities.parsing.AttributeDict")]
    try:
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes of the reader
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it asks for {named[1]}, which is not known to be harmless" if named else "damaged, or something else"
        raise UserError(f"no checkpoint that can be read: {why}") from error
    content = content if isinstance(content, dict) else {}
    inner = [content[key] for key in ("ema", "model", "state_dict") if isinstance(content.get(key), dict)]
    items = (inner + [content])[0].items()
    named = {n: t for n, t in items if isinstance(n, str) and torch.is_tensor(t) and t.is_floating_point()}
    prefixes = ("", "module.", "first_stage_model.")  # alone, of DistributedDataParallel, in a latent diffusion model
    prefix = next((prefix for prefix in prefixes if f"{prefix}encoder.conv_in.weight" in named), None)
    require(prefix is not None, f"no encoder.conv_in.weight among its {len(named)} tensors; is it a tokenizer's?")
    return {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}


def numbers(tensors, pattern):
    """What the group of `pattern` stands for in the tensors' names."""
    return {int(match[1]) for match in map(re.compile(pattern).match, tensors) if match}


def renamed(tensors, family):
    """The tensors under diffusers' names, without those that only training needs."""
    middle = [(rf"coder\.mid\.{theirs}\.", f"coder.mid_block.{ours}.") for theirs, ours in FAMILIES[family].items()]
    result = {}
    for name, tensor in tensors.items():
        if not re.match(LEFT_OUT, name):
            for theirs, ours in middle + NAMES:
                name = re.sub(theirs, ours, name)
            result[name] = tensor[..., 0, 0] if ".attentions." in name and tensor.ndim == 4 else tensor
    if "decoder.up_blocks.0.upsamplers.0.conv.weight" in result:
        return result  # the decoder's levels in the order of use; others number them as the encoder's
    last = max(numbers(result, r"decoder\.up_blocks\.(\d+)\."), default=0)
    level = re.compile(r"(?<=^decoder\.up_blocks\.)\d+")
    return {level.sub(lambda match: str(last - int(match[0])), name): tensor for name, tensor in result.items()}


def infer_config(tensors, family):
    """The VQModel config that the tensors' names and shapes ask for."""
    levels = range(max(1, len(numbers(tensors, r"encoder\.down_blocks\.(\d+)\."))))
    first = [f"encoder.down_blocks.{level}.resnets.0.conv1.weight" for level in levels]
    ends = ["encoder.conv_in.weight", "encoder.conv_out.weight", "decoder.conv_out.weight", "quantize.embedding.weight"]
    lacking = [name for name in first + ends if name not in tensors or tensors[name].ndim < 2]
    require(not lacking, f"no {', no '.join(lacking)} of the usual shape; is it a VQ model?")
    image, latents, x_hat, codes = (tensors[name].shape for name in ends)
    depth = len(numbers(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."))
    if family == "MaskGIT":
        depth = max(depth, len(numbers(tensors, r"decoder\.up_blocks\.0\.resnets\.(\d+)\.")) - 1)
    config = {"in_channels": image[1], "out_channels": x_hat[0], "latent_channels": latents[0]}
    config |= {"layers_per_block": depth, "num_vq_embeddings": codes[0], "scaling_factor": 1.0}  # 1 as LDM's VQ models
    config["vq_embed_dim"] = latents[0] if family == "MaskGIT" else codes[1]  # it has no quant_conv
    attends = numbers(tensors, r"encoder\.down_blocks\.(\d+)\.attentions\.")
    kinds = ["Attn" if level in attends else "" for level in levels]
    config["block_out_channels"] = [len(tensors[name]) for name in first]
    config["down_block_types"] = [f"{kind}DownEncoderBlock2D" for kind in kinds]
    config["up_block_types"] = [f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)]
    config["mid_block_add_attention"] = bool(numbers(tensors, r"encoder\.mid_block\.attentions\.(\d+)\."))
    return config


def fold_maskgit(tensors, fresh):
    """Turn MaskGIT's blocks into a VQModel's that do the same, in place; fresh: the tensors of a new VQModel."""
    for name in [name for name in tensors if name.endswith("conv_shortcut.weight")]:
        conv2 = name.replace("conv_shortcut", "conv2")
        if name in fresh and conv2 in tensors:
            # The shortcut takes what conv2 gives, not what the block was given: both are one convolution.
            both = torch.eye(len(tensors[name])).double() + tensors[name][..., 0, 0].double()
            tensors[conv2] = torch.einsum("oi,ijyx->ojyx", both, tensors[conv2].double())
            tensors[name] = torch.zeros_like(fresh[name])
    tensors["encoder.conv_out.weight"] = F.pad(tensors["encoder.conv_out.weight"], (1, 1, 1, 1))  # 1x1 to 3x3
    whole = {name.removesuffix("norm1.weight") for name in tensors if name.endswith("norm1.weight")}
    for name in fresh.keys() - tensors.keys():
        fill, block = torch.zeros_like(fresh[name]), re.match(r"decoder\.up_blocks\.\d+\.resnets\.[1-9]\.", name)
        if block and block[0] not in whole:  # one block less than a VQModel's: it adds nothing to its input
            fill = fill if ".conv2." in name else fresh[name]
        elif name.endswith("quant_conv.weight"):
            fill = torch.eye(len(fill))[..., None, None]
        elif name.endswith("downsamplers.0.conv.weight"):  # the mean of 2x2 pixels
            fill[..., :2, :2] = torch.eye(len(fill))[..., None, None] / 4
        elif not re.search(r"(conv[12]|conv_shortcut|encoder\.conv_in|quant_conv|0\.conv)\.bias$", name):
            continue
        tensors[name] = fill


def convert(tensors):
    """(VQModel, its family) of a checkpoint's tensors; UserError where they are none."""
    for pattern, why in REFUSED:
        require(not any(re.match(pattern, name) for name in tensors), f"cannot become a VQModel: {why}")
    last = {family: re.compile(rf"encoder\.mid\.{[*FAMILIES[family]][-1]}\.norm1\.weight") for family in FAMILIES}
    family = next((family for family in FAMILIES if any(map(last[family].fullmatch, tensors))), None)
    require(family, f"its tensors are not named as those of {', '.join(FAMILIES)}")
    tensors = renamed(tensors, family)
    torch.manual_seed(0)  # a file gives the same model every time, see `fold_maskgit`
    with user_error("diffusers cannot build such a VQModel", ValueError):  # of odd widths, say
        model = VQModel.from_config(infer_config(tensors, family))
    if family == "LlamaGen":
        tensors["quantize.embedding.weight"] = F.normalize(tensors["quantize.embedding.weight"].double(), dim=1)
    with user_error("its tensors do not make a VQModel", RuntimeError):  # torch says which are missing or misshapen
        if family == "MaskGIT":
            fold_maskgit(tensors, model.state_dict())
        model.load_state_dict(tensors)
    return model, family


def main(argv=None):
    """Exit status: 0 done, 2 something to mend, in one line on stderr."""
    parser = argparse.ArgumentParser(prog="convert_to_diffusers.py", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file that torch.save wrote: .ckpt, .pt, .pth or .bin")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="new directory, for vqmodel/ and image_processor/")
    args = parser.parse_args(argv)
    try:
        require(not args.output.exists(), f"OUTPUT {args.output} exists already; name a new directory")
        model, family = convert(read_tensors(args.checkpoint))
        factor, unit = 2 ** (len(model.config.block_out_channels) - 1), family == "MaskGIT"  # its pixels are in [0, 1]
        processor = VaeImageProcessor(vae_scale_factor=factor, do_normalize=not unit, do_convert_rgb=True)
        with user_error(f"OUTPUT {args.output} cannot be written", WRITE_ERRORS):
            model.save_pretrained(args.output / "vqmodel")
            processor.save_config(args.output / "image_processor")
    except UserError as error:
        print(f"convert_to_diffusers.py: error: {args.checkpoint}: {error}", file=sys.stderr)
        return 2
    flags = f"--pretrained_model_name_or_path={args.output}{' --pixel_range=unit' * unit}"
    print(f"{family}: downsampling {factor}, {model.config.num_vq_embeddings} codes. For train_vqgan.py: {flags}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
