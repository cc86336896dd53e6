# Copyright 2026 the contributors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Train a VQGAN image tokenizer: a diffusers `VQModel` against a patch discriminator.

    L_G = w_pixel |x - x_hat| + w_perceptual P(x, x_hat) + w_codebook |sg[z] - e|^2 + w_commitment |z - sg[e]|^2
          + lambda L_adv(x_hat)
    L_D = E[max(0, 1 - D(x))] + E[max(0, 1 + D(x_hat))]  (+ LeCAM)

x: image, z: latents, e: code vectors nearest to z, x_hat: reconstruction, sg: stop-gradient, P: perceptual distance,
D: discriminator. The objectives are those of Esser et al. 2021 (https://arxiv.org/abs/2012.09841).

Five minutes on a laptop, on the photographs that come with the repository:
    accelerate launch train_vqgan.py @recipes/demo.args
CIFAR-10 from the Hub:
    accelerate launch train_vqgan.py --dataset_name=cifar10 --image_column=img --resolution=128 --report_to=wandb
Your own folder of images:
    accelerate launch train_vqgan.py --train_data_dir=photos --resolution=256 --mixed_precision=bf16 --use_ema

A step is one update of the generator and one of the discriminator on the same
train_batch_size x gradient_accumulation_steps x processes images. To resume, run the same command again with
`--resume_from_checkpoint latest`. The result, in `output_dir/vqmodel`, loads with `VQModel.from_pretrained`.
"""

import argparse
import difflib
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # tensors in huge pages: a tenth of a CPU step went into page faults
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # waiting threads let go of a CPU that others use, too

import accelerate
import datasets
import diffusers
import fsspec
import numpy as np
import PIL.Image
import PIL.ImageOps
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchmetrics
import torchmetrics.functional.image
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from accelerate.utils import ProjectConfiguration, broadcast_object_list, gather_object, set_seed
from diffusers import VQModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import VectorQuantizer
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from diffusers.models.upsampling import Upsample2D
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import HfApi
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm.auto import tqdm

from discriminator import Discriminator

logger = logging.getLogger("train_vqgan")

REPOSITORY = Path(__file__).resolve().parent
SSIM_WINDOW = 11  # pixels, as Wang et al. 2004 and scikit-image
WRITE_ERRORS = (OSError, safetensors.SafetensorError)  # a full or vanished disk
CHECKPOINT_NAME = re.compile(r"checkpoint-\d+")
STOPPED = 3  # exit status after a signal
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
UNREADABLE = (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError)  # what Pillow raises
DEFAULT_CONFIG = REPOSITORY / "configs" / "default_4x.json"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}


class UserError(Exception):
    """Something the user can mend: shown as one line, exit status 2."""


class LocalError(UserError):
    """One that only this process knows of: shown whichever it is."""


def require(condition, message):
    if not condition:
        raise UserError(message)


@contextmanager
def explained(what, hint="", errors=Exception):
    """What goes wrong inside is for the user to mend: one line, what, (why), hint."""
    try:
        yield
    except UserError:
        raise
    except errors as error:
        raise UserError(f"{what} ({first_line(error)}){hint}") from None


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def did_you_mean(close):
    return f"; did you mean {' or '.join(close)}?" if close else ""


# ---- Flags ---------------------------------------------------------------------------------------------------------

BETTER = {"psnr": max, "ssim": max, "perceptual": min, "lpips": min, "rfid": min, "frechet": min}

REMOVED_FLAGS = {
    "--prediction_type": "it belongs to diffusion models and has no meaning here; leave it out",
    "--non_ema_revision": "use --revision",
    "--local_rank": "the launcher sets it; use accelerate launch or torchrun",
    "--timm_model_offset": "name the layers with --timm_model_layers; they are printed at the start",
    "--enable_xformers_memory_efficient_attention": "PyTorch's own attention is as fast; leave it out",
    "--log_grad_norm_steps": "gradient norms are logged every --log_steps",
}


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, once per machine, and recipes: `@file`, several flags a line, # comments.

    Paths in a recipe are relative to the repository.
    """

    def error(self, message):
        unknown = re.match("unrecognized arguments: (--[^ =]+)", message)
        if unknown and unknown[1] in REMOVED_FLAGS:
            message = f"{unknown[1]} is gone: {REMOVED_FLAGS[unknown[1]]}"
        elif unknown:
            message += did_you_mean(difflib.get_close_matches(unknown[1], self._option_string_actions, 1, 0.7))
        self.exit(2, f"{self.prog}: error: {message}\n" if int(os.environ.get("LOCAL_RANK", 0)) == 0 else None)

    def convert_arg_line_to_args(self, line):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            self.error(f"recipe line {line.strip()!r}: {error}")
        return [self.in_repository(word) for word in words]

    @staticmethod
    def in_repository(word):
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        found = "/" in value and (REPOSITORY / value).exists()
        return f"{flag}{equals}{REPOSITORY / value if found else value}"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def number(kind, low=-math.inf, high=math.inf, above=-math.inf):
    """An argparse type: a finite int or float in [low, high], and greater than `above`."""

    def parse(text):
        value = kind(text)
        if not (math.isfinite(value) and low <= value <= high and value > above):
            bounds = [f"greater than {above}"] * (above > -math.inf) + [f"at least {low}"] * (low > -math.inf)
            bounds += [f"at most {high}"] * (high < math.inf)
            raise argparse.ArgumentTypeError(f"must be {' and '.join(bounds) or 'finite'}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


def steps_or_fraction(text):
    """'20000' is a number of steps, '0.1' a fraction of the run."""
    return number(int, 0)(text) if re.fullmatch(r"-?\d+", text) else number(float, 0, 1)(text)


# fmt: off
def parse_args(argv=None):
    """Flags to a namespace; every check that needs neither data nor network happens here."""
    parser = Parser(prog="train_vqgan.py", description=__doc__.split("\n")[0], fromfile_prefix_chars="@", allow_abbrev=False, formatter_class=HelpFormatter)
    schedules = ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
    positive, count, weight = number(int, 1), number(int, 0), number(float, 0)

    add = parser.add_argument_group("data").add_argument
    add("--dataset_name", help="data set on the Hub, or a local directory that the datasets library reads")
    add("--dataset_config_name", help="configuration of that data set, when it has several")
    add("--train_data_dir", help="folder of images, searched recursively; without it and --dataset_name: the photographs in images/train")
    add("--image_column", default="image", help="column that holds the images")
    add("--streaming", action="store_true", help="read the data set while training instead of downloading it first; needs --max_train_steps")
    add("--cache_dir", help="where downloaded models and data sets are kept")
    add("--max_train_samples", type=positive, help="train on this many images, drawn by seed")
    add("--resolution", type=number(int, 8), default=256, help="side of the training images, in pixels; the short side is resized, then cropped")
    add("--center_crop", action="store_true", help="crop the centre instead of a random place")
    add("--random_flip", action="store_true", help="mirror half of the images")
    add("--pixel_range", choices=["signed", "unit"], default="signed", help="what the model takes and gives: [-1, 1] as diffusers expects, or [0, 1]")
    add("--dataloader_num_workers", type=count, help="processes that load images, per training process (default: one per core, at most 8)")

    add = parser.add_argument_group("networks").add_argument
    add("--model_config_name_or_path", help="VQModel config: JSON file, directory or Hub id; see configs/")
    add("--pretrained_model_name_or_path", help="start from this VQModel: directory or Hub id")
    add("--subfolder", help="folder of the pretrained model inside that directory or repository (default: vqmodel where there is one)")
    add("--revision", help="revision of the pretrained model or config on the Hub")
    add("--discriminator_config_name_or_path", help="discriminator config: JSON file, directory or Hub id; see configs/")
    add("--pretrained_discriminator_name_or_path", help="start from this discriminator: directory or Hub id")
    add("--train_only", choices=["decoder"], help="leave the encoder and the codebook of the pretrained model as they are: its codes keep their meaning")
    add("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=True, help="compute norms and activations again in the backward pass instead of keeping them: less memory")

    add = parser.add_argument_group("objectives").add_argument
    add("--vae_loss", choices=["l1", "l2"], default="l2", help="pixel loss")
    add("--pixel_weight", type=weight, default=1.0, help="weight of the pixel loss, on [-1, 1]")
    add("--perceptual_weight", type=weight, default=1.0, help="weight of the perceptual loss; 0 loads no backbone")
    add("--codebook_weight", type=weight, default=1.0, help="weight of |sg[z] - e|^2")
    add("--commitment_weight", type=weight, default=0.25, help="weight of |z - sg[e]|^2")
    add("--adversarial_weight", type=weight, default=0.1, help="weight of the adversarial loss, constant after its ramp; 0 trains no discriminator")
    add("--adversarial_loss", choices=["hinge", "non_saturating"], default="hinge", help="loss of both players on the discriminator's logits")
    add("--adaptive_weight", action="store_true", help="multiply the adversarial weight by the ratio of gradients of Esser et al., at most 100")
    add("--lecam_weight", type=weight, default=0.0, help="weight of LeCAM, which holds the discriminator's logits together when images are few")
    add("--discriminator_start", type=steps_or_fraction, help="first step of the discriminator, in steps or as a fraction of the run (default: 0.1, at most 20000 steps)")
    add("--discriminator_warmup", type=steps_or_fraction, default=0.02, help="length of the ramp of the adversarial weight from there, in steps or as a fraction")
    add("--timm_model_backend", default="vgg19", help="timm model of the perceptual loss")
    add("--timm_model_layers", help="its layers, names or indices separated by | or commas, or logits (default: all stages that are not pooling layers)")
    add("--timm_model_weights", default="hub", help="its weights: hub, a local file, the name of an installed package that ships one, or random")

    add = parser.add_argument_group("codebook").add_argument
    add("--codebook_init", choices=["kmeans", "sphere", "uniform", "keep"], help="k-means of encoder outputs, unit sphere, diffusers' own, or as loaded (default: sphere, keep with a pretrained model)")
    add("--codebook_norm", choices=["l2", "none"], help="search on the unit sphere, or not; folded into the codes on export (default: l2, none with a pretrained model)")
    add("--gradient_estimator", choices=["straight_through", "rotation"], default="straight_through", help="how gradients pass the quantiser: as they are, or turned and scaled from the code to the latent")
    add("--codebook_restart_steps", type=count, help="move codes that nearly no latent chose for this many steps to encoder outputs; 0: never (default: 100, 0 with a pretrained model)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--train_batch_size", type=positive, default=16, help="images per process and micro-batch")
    add("--gradient_accumulation_steps", type=positive, default=1, help="micro-batches per step")
    add("--num_train_epochs", type=number(float, above=0), default=100, help="passes over the data, when --max_train_steps is not given")
    add("--max_train_steps", type=positive, help="steps of the run")
    add("--learning_rate", type=weight, default=1e-4, help="peak learning rate of the generator")
    add("--discr_learning_rate", type=weight, default=1e-4, help="peak learning rate of the discriminator")
    add("--scale_lr", action="store_true", help="multiply both by batch x accumulation x processes")
    add("--lr_scheduler", choices=schedules, default="constant_with_warmup", help="schedule of the generator")
    add("--discr_lr_scheduler", choices=schedules, default="constant_with_warmup", help="schedule of the discriminator, counted from its start")
    add("--lr_warmup_steps", type=count, default=500, help="steps of linear warm-up, of both")
    add("--adam_beta1", type=number(float, 0, 0.99999), default=0.9, help="AdamW beta1")
    add("--adam_beta2", type=number(float, 0, 0.99999), default=0.99, help="AdamW beta2")
    add("--adam_weight_decay", type=weight, default=1e-4, help="AdamW weight decay; none on codebook, norms and biases")
    add("--adam_epsilon", type=number(float, above=0), default=1e-8, help="AdamW epsilon")
    add("--use_8bit_adam", action="store_true", help="8-bit AdamW of bitsandbytes")
    add("--max_grad_norm", type=weight, default=1.0, help="clip each network's gradient to this norm; 0: never")
    add("--max_bad_steps", type=positive, default=50, help="stop after this many steps in a row whose loss or gradient is not finite; fp16 takes some to find its scale")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="autocast of the networks; losses and quantiser stay fp32 (default: as in accelerate config)")
    add("--allow_tf32", action=argparse.BooleanOptionalAction, default=True, help="TF32 products on NVIDIA GPUs, outside quantiser and validation")
    add("--torch_compile", action="store_true", help="compile the networks for training, at the start; validation and export stay as they are")
    add("--seed", type=number(int, 0, 2**32 - 1), help="seed of everything (default: drawn and recorded)")

    add = parser.add_argument_group("ema").add_argument
    add("--use_ema", action="store_true", help="validate and export an exponential moving average of the generator")
    add("--ema_decay", type=number(float, 0, 1), default=0.999, help="its decay per step")

    add = parser.add_argument_group("validation and logging").add_argument
    add("--validation_images", nargs="+", default=[], help="images shown with their reconstructions at every validation")
    add("--early_images", action="store_true", help="show them at steps 1, 2, 4, 8, ... before the first validation, too")
    add("--validation_steps", type=count, default=500, help="validate every this many steps and at the end; 0: only at the end")
    add("--validation_data_dir", help="folder of held-out images, searched recursively")
    add("--validation_split", help="split of --dataset_name with held-out images")
    add("--validation_fraction", type=number(float, 0, 1), help="part of the training images to hold out, drawn by seed (default: 0.01, 0 where held-out images are given)")
    add("--num_validation_samples", type=positive, help="held-out images to evaluate (default: at most 500, all of them with --eval_only)")
    add("--lpips_weights", default="hub", help="ImageNet weights of LPIPS's vgg16: hub, a local file, the name of an installed package, or none to leave LPIPS out")
    add("--fid", action="store_true", help="evaluate rFID, too; needs torch-fidelity")
    add("--fid_weights", help="local file with torch-fidelity's Inception weights (default: downloaded)")
    add("--frechet_backend", help="evaluate a Frechet distance on the pooled features of this timm model, too")
    add("--frechet_weights", default="hub", help="its weights, as --timm_model_weights")
    add("--save_best", choices=list(BETTER), help="keep the export with the best held-out value of this metric in output_dir/best")
    add("--eval_only", action="store_true", help="evaluate --pretrained_model_name_or_path on the held-out images, print one JSON line, train nothing")
    add("--save_reconstructions", help="with --eval_only: folder for the images and their reconstructions, as PNG")
    add("--log_steps", type=positive, default=50, help="log every this many steps")
    add("--report_to", choices=["tensorboard", "wandb", "all", "none"], default="tensorboard", help="tracker; output_dir/metrics.jsonl is always written")
    add("--tracker_project_name", default="vqgan-training", help="project name on the tracker")
    add("--logging_dir", default="logs", help="TensorBoard directory, below output_dir")

    add = parser.add_argument_group("checkpoints and hub").add_argument
    add("--output_dir", default="vqgan-output", help="where everything is written")
    add("--checkpointing_steps", type=count, default=500, help="write a checkpoint every this many steps and at the end; 0: none")
    add("--checkpoints_total_limit", type=positive, help="keep only this many of them")
    add("--resume_from_checkpoint", help="a checkpoint directory, or latest: the newest one in output_dir, a fresh start when there is none")
    add("--push_to_hub", action="store_true", help="upload the result to the Hub")
    add("--hub_token", help="token for the upload (default: that of `hf auth login`)")
    add("--hub_model_id", help="repository to upload to (default: the name of output_dir)")
    args = parser.parse_args(argv)
    try:
        check_args(args)
    except UserError as error:
        parser.error(str(error))
    return args


def check_args(args):
    """Fill in defaults that depend on other flags; raise UserError for what cannot work."""
    output, resume, pretrained = Path(args.output_dir), args.resume_from_checkpoint, args.pretrained_model_name_or_path
    require(not (args.dataset_name and args.train_data_dir), "--dataset_name and --train_data_dir: give one of them")
    require(not args.streaming or args.dataset_name, "--streaming: needs --dataset_name")
    require(not args.streaming or args.max_train_steps or args.eval_only, "--streaming: needs --max_train_steps; the data has no known end")
    require(not (args.streaming and args.max_train_samples), "--max_train_samples: does not go with --streaming")
    for flag in ("train_data_dir", "validation_data_dir"):
        folder = getattr(args, flag)
        require(folder is None or Path(folder).is_dir(), f"--{flag}: no such folder: {folder}")
    for path in args.validation_images:
        require(Path(path).is_file(), f"--validation_images: no such file: {path}")
    check_evaluation_args(args)
    for flag in ("model_config_name_or_path", "discriminator_config_name_or_path"):
        path = getattr(args, flag) or ""
        require(not path.endswith(".json") or Path(path).is_file(), f"--{flag}: no such file: {path}")
    both = pretrained and args.model_config_name_or_path
    require(not both, "--model_config_name_or_path: a pretrained model brings its own config; give one of them")
    both = args.pretrained_discriminator_name_or_path and args.discriminator_config_name_or_path
    require(not both, "--discriminator_config_name_or_path: a pretrained discriminator brings its own; give one of them")
    for flag in ("pretrained_model_name_or_path", "pretrained_discriminator_name_or_path"):
        path = getattr(args, flag)
        require(not path or not Path(path).is_file(), f"--{flag}: {path} is a single file; checkpoints of taming-transformers, LDM, LlamaGen or MaskGIT are not read; convert them to a diffusers VQModel directory (vqmodel/ of a run, or a Hub id) first")
    require(args.timm_model_layers != "head", "--timm_model_layers: 'head' is no feature layer; leave it out for all stages, or use logits")
    hub = args.push_to_hub or not (args.hub_token or args.hub_model_id)
    require(hub, "--hub_token and --hub_model_id: need --push_to_hub")
    bits = not args.use_8bit_adam or importlib.util.find_spec("bitsandbytes")
    require(bits, "--use_8bit_adam: needs the bitsandbytes package; pip install bitsandbytes, or leave it out")
    args.codebook_init = args.codebook_init or ("keep" if pretrained else "sphere")
    args.codebook_norm = args.codebook_norm or ("none" if pretrained else "l2")
    if args.codebook_restart_steps is None:
        args.codebook_restart_steps = 0 if pretrained else 100
    require(pretrained or args.codebook_init != "keep", "--codebook_init keep: needs --pretrained_model_name_or_path")
    if args.train_only:
        require(pretrained, "--train_only: needs --pretrained_model_name_or_path")
        kept = args.codebook_init == "keep" and args.codebook_norm == "none" and not args.codebook_restart_steps
        require(kept, "--train_only: the codebook stays as it is; leave out --codebook_init, --codebook_norm and --codebook_restart_steps")
    if args.eval_only:  # nothing is written there
        return
    with explained(f"--output_dir: cannot write to {output}"):
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    present = checkpoints(output, intact=False)
    if resume not in (None, "latest"):
        found = ", ".join(map(str, present)) or f"none in {output}"
        fault = damage(Path(resume))
        require(not fault, f"--resume_from_checkpoint: {resume} is not a finished checkpoint ({fault}); found: {found}")
        later = ", ".join(str(path) for path in present if step_of(path) > step_of(resume))
        require(not later, f"--resume_from_checkpoint: later checkpoints than {resume} would be taken for its continuation; move them away first: {later}")
    taken = not resume and (present or (output / "metrics.jsonl").exists())
    require(not taken, f"--output_dir: {output} already holds a run; add --resume_from_checkpoint latest to go on with it, or choose another directory")


def check_evaluation_args(args):
    """The flags of validation and --eval_only."""
    given = args.validation_data_dir or args.validation_split
    require(not (args.validation_data_dir and args.validation_split), "--validation_split: give it or a folder, not both")
    require(not args.validation_split or args.dataset_name, "--validation_split: needs --dataset_name")
    require(not (given and args.validation_fraction), "--validation_fraction: held-out images are given; give one of them")
    require(not (args.streaming and args.validation_fraction), "--validation_fraction: a stream cannot be divided; name held-out images with --validation_split")
    if args.validation_fraction is None:
        args.validation_fraction = 0 if given or args.streaming else 0.01
    require(args.validation_images or not args.early_images, "--early_images: needs --validation_images")
    held_out = given or args.validation_fraction
    require(held_out or not args.save_best, "--save_best: needs held-out images, see --validation_fraction")
    needs = {"perceptual": "perceptual_weight", "lpips": "lpips_weights", "rfid": "fid", "frechet": "frechet_backend"}.get(args.save_best)
    require(not needs or getattr(args, needs) not in (0, None, False, "none"), f"--save_best {args.save_best}: needs --{needs}")
    require(args.lpips_weights != "random", "--lpips_weights: LPIPS is defined by pretrained weights; none leaves it out")
    if args.frechet_backend:
        check_timm_model("frechet_backend", args.frechet_backend)
    weights = args.fid_weights
    require(args.fid or not weights, "--fid_weights: needs --fid")
    require(not weights or Path(weights).is_file(), f"--fid_weights: no such file: {weights}")
    require(args.eval_only or not args.save_reconstructions, "--save_reconstructions: needs --eval_only")
    if args.eval_only:
        require(args.pretrained_model_name_or_path, "--eval_only: needs --pretrained_model_name_or_path")
        require(held_out, "--eval_only: name held-out images with --validation_data_dir or --validation_split")
        known = given or args.seed is not None or args.validation_fraction == 1
        require(known, "--eval_only: which images a run held out depends on its --seed (in its README.md): give it, or name images with --validation_data_dir or --validation_split")
# fmt: on


# ---- Data ----------------------------------------------------------------------------------------------------------


def permute(i, n, seed):
    """Place of `i` in a permutation of range(n) keyed by `seed`, in constant time and memory.

    A Feistel network on the next even number of bits, walked until it lands inside (cycle walking: Black and Rogaway
    2002). Twelve rounds of a multiply-xorshift hash (splitmix64, Steele et al. 2014).
    """
    half = max(1, (n - 1).bit_length() + 1 >> 1)
    mask, u64 = (1 << half) - 1, (1 << 64) - 1
    while True:
        left, right = i >> half, i & mask
        for r in range(12):
            h = (right + (seed * 12 + r + 1) * 0x9E3779B97F4A7C15) & u64
            h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & u64
            h = (h ^ h >> 27) * 0x94D049BB133111EB & u64
            left, right = right, left ^ ((h ^ h >> 31) & mask)
        i = left << half | right
        if i < n:
            return i


def to_rgb(image):
    """Any PIL image to RGB: EXIF orientation applied, 16-bit and float scaled to 8, transparency on white."""
    try:
        PIL.ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # broken EXIF, of several kinds, in a good image
        logger.debug("ignored unreadable EXIF")
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        peak = values.max(initial=0)
        if image.mode == "F":
            values = values * (255 if peak <= 1 else 1)
        elif "16" in image.mode or peak > 255:
            values = values / 257
        image = PIL.Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def to_square(image, resolution, rng=None, flip=False):
    """PIL image to uint8 [3, resolution, resolution]: short side resized (antialiased bicubic) and cropped.

    The crop is the centre without `rng`, else drawn from it. Only the crop is resized, by torch: as Pillow to one level of
    256, in half the time.
    """
    image = to_rgb(image)
    side = min(image.size)
    room = [max(0, round(length * resolution / side) - resolution) for length in image.size]
    left, top = [round((rng.randint(0, r) if rng else r / 2) * side / resolution) for r in room]
    left, top = min(left, image.width - side), min(top, image.height - side)
    pixels = np.array(image.crop((left, top, left + side, top + side)))
    x = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
    x = F.interpolate(x, (resolution, resolution), mode="bicubic", antialias=True)[0]
    return x.flip(2) if flip else x


def open_image(item):
    """A path, or what a datasets.Image column holds undecoded, to a PIL image."""
    if isinstance(item, dict):
        item = item["path"] if item["bytes"] is None else io.BytesIO(item["bytes"])
    if item is None:
        raise ValueError("no image in this row")
    if isinstance(item, str) and "://" in item:  # an image folder on the Hub, streamed
        with fsspec.open(item) as file:
            item = io.BytesIO(file.read())
    return PIL.Image.open(item)


class Drawn:
    """`size` of the items from place `start` on, in an order drawn by seed: a view, nothing is copied."""

    def __init__(self, items, start, size, seed):
        self.items, self.start, self.size, self.seed = items, start, size, seed

    def row(self, i):
        return permute(self.start + i, len(self.items), self.seed)

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return self.items[self.row(i)]


def name_of(items, index):
    """For messages."""
    item = items[index]
    row = items.row(index) if isinstance(items, Drawn) else index
    return item if isinstance(item, Path) else (item or {}).get("path") or f"row {row}"


def augment(item, g, args):
    """Global sample `g` of the stream, uint8 [3, resolution, resolution], the same whichever process loads it.

    JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where that leaves twice the resolution.
    """
    rng = random.Random((args.seed << 64) + g)
    crop = None if args.center_crop else rng
    with open_image(item) as image:
        image.draft(None, (2 * args.resolution, 2 * args.resolution))
        return to_square(image, args.resolution, crop, args.random_flip and rng.random() < 0.5)


class SampleStream(Dataset):
    """The endless stream of training images: sample g is item permutation(seed, epoch)[g % N], epoch = g // N.

    Indexed by the global sample number, so any process, any worker and any resumed run finds the same pixels there.
    """

    def __init__(self, items, args):
        self.items, self.args = items, args

    def index(self, g):
        epoch, i = divmod(g, len(self.items))
        return permute(i, len(self.items), self.args.seed + 1_000_003 * epoch)

    def __getitem__(self, g):
        """uint8 [3, resolution, resolution]. An unreadable image is reported and its neighbour taken."""
        for attempt in range(10):
            index = (self.index(g) + attempt) % len(self.items)
            try:
                return augment(self.items[index], g, self.args)
            except UNREADABLE as error:
                name = name_of(self.items, index)
                logger.error(f"Skipped an unreadable training image: {name}: {first_line(error)}")
        raise LocalError(f"ten training images in a row cannot be read; the last one: {name}")


def read_ahead(kind, numbered, load, size, threads):
    """Lists [(number, load(number, item))] of up to `size`, without the unreadable; threads make the next meanwhile."""

    def load_or_report(i, item):
        try:
            return i, load(i, item)
        except UNREADABLE as error:
            logger.error(f"Skipped an unreadable {kind} image: {name_of({i: item}, i)}: {first_line(error)}")

    def batches():
        while chunk := list(itertools.islice(numbered, size)):
            yield list(filter(None, pool.map(load_or_report, *zip(*chunk))))

    with ThreadPoolExecutor(max(1, threads) + 1) as pool:
        made = batches()
        upcoming = pool.submit(next, made, None)
        while (batch := upcoming.result()) is not None:
            upcoming = pool.submit(next, made, None)
            yield batch


def remote_batches(dataset, args, start, rank, world, threads):
    """--streaming: batches of the shuffled stream again and again; process `rank` takes every world-th sample.

    Resuming reads past what was seen, undecoded: a position in a remote stream cannot be jumped to. Threads, not
    processes, decode: each further process would read the whole stream again.
    """
    dataset = dataset.cast_column(args.image_column, datasets.Image(decode=False))
    dataset = dataset.shuffle(seed=args.seed, buffer_size=1000)

    def samples():
        g = 0
        for epoch in itertools.count():
            dataset.set_epoch(epoch)
            for example in dataset:
                if g >= start and (g - start) % world == rank:
                    yield g, example[args.image_column]
                g += 1
            require(g > 0, f"--dataset_name: {args.dataset_name} has no images in its train split")

    def load(g, item):
        return augment(item, g, args)

    good, bad = [], 0
    for batch in read_ahead("training", samples(), load, args.train_batch_size, threads):
        fresh = [image for _, image in batch]
        good, bad = fresh or good, 0 if fresh else bad + 1
        if bad == 10:
            raise LocalError("ten batches of training images in a row cannot be read")
        if good:  # unreadable ones are made up for by another
            yield torch.stack((fresh + good[:1] * args.train_batch_size)[: args.train_batch_size])


def held_out_batches(items, n, args, rank, world):
    """(numbers, uint8 [<= train_batch_size, 3, resolution, resolution]): each of the first n images in one process."""
    if isinstance(items, datasets.IterableDataset):
        stream = itertools.islice(items.cast_column(args.image_column, datasets.Image(decode=False)), n)
        numbered = ((i, row[args.image_column]) for i, row in enumerate(stream) if i % world == rank)
    else:
        numbered = ((i, items[i]) for i in range(rank, n, world))

    def square(i, item):
        with open_image(item) as image:
            return to_square(image, args.resolution)

    batches = read_ahead("held-out", numbered, square, args.train_batch_size, cores_per_process())
    for batch in filter(None, batches):
        numbers, images = zip(*batch)
        yield numbers, torch.stack(images)


def list_images(flag, folder):
    """All image files below `folder`, links followed, sorted."""
    found, visited = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in visited:  # a link back
            folders.clear()
            continue
        visited.add(os.path.realpath(root))
        found += [Path(root) / name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    found = sorted(path for path in found if path.is_file())
    require(found, f"--{flag}: no images in {folder} ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return found


def load_data(args):
    """(training images, held-out images or None).

    Each is something with len() and [i] for `open_image`, or an iterable data set (--streaming).
    """
    items = held_out = None
    if not args.eval_only or args.validation_fraction:
        if args.dataset_name:
            items = load_split(args, "train")
        else:
            items = list_images("train_data_dir", args.train_data_dir or REPOSITORY / "images" / "train")
    if args.validation_data_dir:
        held_out = list_images("validation_data_dir", args.validation_data_dir)
    elif args.validation_split:
        held_out = load_split(args, args.validation_split)
    if args.streaming or items is None:
        return items, held_out
    held = 0
    if args.validation_fraction:
        held = min(max(1, round(args.validation_fraction * len(items))), len(items) - (not args.eval_only))
    if held:
        held_out = Drawn(items, 0, held, args.seed)
        logger.info(f"Held out {held} of {len(items)} training images for validation, see --validation_fraction")
    kept = min(args.max_train_samples or len(items), len(items) - held)
    return items if kept == len(items) else Drawn(items, held, kept, args.seed), held_out


def load_split(args, split):
    """Images of one split of --dataset_name, undecoded."""
    dataset, column, name = open_split(args, split), args.image_column, args.dataset_name
    features = dataset.features or {}
    listed = ", ".join(features)
    require(not features or column in features, f"--image_column: no column '{column}' in {name}; it has: {listed}")
    if features and not isinstance(features[column], datasets.Image):
        images = ", ".join(name for name, feature in features.items() if isinstance(feature, datasets.Image)) or "none"
        held = f"column '{column}' of {name} holds {features[column]}, not images"
        raise UserError(f"--image_column: {held}; columns with images: {images}")
    if args.streaming:
        return dataset
    require(len(dataset), f"--dataset_name: {name} has no images in its {split} split")
    return dataset.cast_column(column, datasets.Image(decode=False))[column]


def open_split(args, split):
    """A split of --dataset_name: saved by `save_to_disk`, of a directory, or on the Hub."""
    name, path = args.dataset_name, Path(args.dataset_name)
    flag = "--dataset_name" if split == "train" else "--validation_split"
    what = f"--dataset_name: datasets cannot read {name}"
    hint = ""
    if not path.exists():
        what = f"--dataset_name: no local directory {name}, and the Hub did not give it"
        hint = "; check the name and the network, or name a local copy"
        logger.info(f"Contacting the Hugging Face Hub for data set {name}")
    with explained(what, hint):
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            dataset = datasets.load_from_disk(name)
            dataset = dataset if isinstance(dataset, datasets.DatasetDict) else {"train": dataset}
            require(split in dataset, f"{flag}: {name} has no {split} split; it has: {', '.join(dataset)}")
            return dataset[split].to_iterable_dataset() if args.streaming else dataset[split]
        options = {"split": split, "cache_dir": args.cache_dir, "streaming": args.streaming}
        try:
            return datasets.load_dataset(name, args.dataset_config_name, **options)
        except ValueError as error:
            require(not re.search("(Unknown|Bad) split", str(error)), f"{flag}: {name} has no {split} split: {error}")
            raise


def training_batches(items, args, start, accelerator):
    """Endless uint8 micro-batches [train_batch_size, 3, resolution, resolution] of this process: every world-th sample
    from `start`.

    Data workers that die, killed for memory perhaps, are replaced: the position says all.
    """
    rank, world, size = accelerator.process_index, accelerator.num_processes, args.train_batch_size
    workers = min(8, cores_per_process()) if args.dataloader_num_workers is None else args.dataloader_num_workers
    if args.streaming:
        yield from remote_batches(items, args, start, rank, world, workers)
    stream, deaths, died_at = SampleStream(items, args), 0, start
    while True:
        handler = signal.getsignal(signal.SIGCHLD)
        options = {"batch_size": size, "num_workers": workers, "pin_memory": accelerator.device.type == "cuda"}
        batches = iter(DataLoader(stream, sampler=itertools.count(start + rank, world), **options))
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)  # torch's raises anywhere, while saving too
        try:
            for batch in batches:
                start += size * world
                yield batch
        except (RuntimeError, ConnectionError, EOFError) as error:  # the last two: killed while it hands a batch over
            if isinstance(error, RuntimeError) and "exited unexpectedly" not in str(error):  # raised by a worker
                raise
            deaths = deaths + 1 if start - died_at < 100 * size * world else 1
            died_at, why = start, first_line(error)
            if deaths > 3:
                raise LocalError(f"--dataloader_num_workers: data workers keep dying; use fewer ({why})") from None
            logger.error(f"A data worker died; starting new ones at sample {start} ({why})")


def cores_per_process():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def to_signed(images, device):
    """uint8 [0, 255] to the default float type in [-1, 1], on the device."""
    return images.to(device, non_blocking=True).to(torch.get_default_dtype()) / 127.5 - 1


def to_uint8(x):
    """[-1, 1] to uint8 [0, 255], rounded as VaeImageProcessor does."""
    return ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def to_model(x, args):
    """[-1, 1] to the range the model works in, --pixel_range."""
    return x if args.pixel_range == "signed" else x / 2 + 0.5


def from_model(x, args):
    return x if args.pixel_range == "signed" else x * 2 - 1


# ---- Objectives ----------------------------------------------------------------------------------------------------


def at_least_fp32(x):
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class Codes(NamedTuple):
    """What the quantiser saw and chose for one micro-batch."""

    z: torch.Tensor  # latents, [tokens, vq_embed_dim], fp32
    e: torch.Tensor  # the code vectors nearest to them, same shape
    indices: torch.Tensor  # and their rows in the codebook, [tokens]


@contextmanager
def exact_fp32():
    """Inside, no TF32 and nothing compiled: codes are searched, validated and exported as any other program will."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


@torch.no_grad()
@exact_fp32()
def nearest_codes(z, codes, buffer_bytes=64 << 20):
    """argmin_k |z - e_k|^2 = argmin_k |e_k|^2 / 2 - z e_k for z [tokens, dim], codes [codes, dim] -> [tokens].

    In chunks: the distances of all tokens to all codes can be larger than everything else together.
    """
    half_squares = codes.square().sum(1) / 2
    rows = max(1, buffer_bytes // (len(codes) * z.element_size()))
    return torch.cat([torch.addmm(half_squares, part, codes.T, alpha=-1).argmin(1) for part in z.split(rows)])


def rotated(z, e):
    """z turned and stretched onto e, [tokens, dim], by a map that gradients take for constant (Fifty et al. 2024).

    |e| / |z| R z = e with R = I - 2 r r^T + 2 e_ z_^T, where z_, e_ and r are z, e and z_ + e_ scaled to unit length
    (https://arxiv.org/abs/2410.06424, section 4.2). As products of vectors: no matrix per token.
    """
    z_, e_ = F.normalize(z, dim=1).detach(), F.normalize(e, dim=1).detach()
    r = F.normalize(z_ + e_, dim=1)
    scale = (e.norm(dim=1, keepdim=True) / z.norm(dim=1, keepdim=True).clamp(min=1e-12)).detach()
    return scale * (z - 2 * r * (r * z).sum(1, keepdim=True) + 2 * e_ * (z_ * z).sum(1, keepdim=True))


class Quantizer(VectorQuantizer):
    """diffusers' VectorQuantizer for training: same parameter, same images, another codebook loss and search.

    diffusers puts beta on the wrong term (legacy=True), keeps the distances of all tokens to all codes at once, and
    returns no usable indices. Here the search runs in fp32, under no_grad, in chunks; the second result of `forward`,
    which VQModel hands through as its commitment loss, is `Codes`, so that the loss is written where it is used.

    With norm "l2" the codes are the rows of `embedding.weight` scaled to unit length (Yu et al. 2021,
    https://arxiv.org/abs/2110.04627). Latents are not scaled: among codes of equal length the Euclidean nearest is the
    one of largest cosine, so a plain VQModel holding the scaled rows chooses the same codes.
    """

    def __init__(self, size, dim, norm, gradient_estimator="straight_through"):
        super().__init__(size, dim, beta=0.25, legacy=False)
        self.norm, self.gradient_estimator = norm, gradient_estimator

    def codebook(self):
        """Code vectors as a plain VQModel would hold them, [codes, dim]."""
        weight = self.embedding.weight
        return F.normalize(weight, dim=1) if self.norm == "l2" else weight

    def forward(self, z):
        """z: [batch, dim, height, width] -> codes of that shape, Codes, (None, None, indices).

        In training the codes pass gradients on to z, straight through or rotated; e gets none from the decoder.
        """
        batch, dim, height, width = z.shape
        with torch.autocast(z.device.type, enabled=False):
            z = at_least_fp32(z).permute(0, 2, 3, 1).reshape(-1, dim)
            indices = nearest_codes(z, self.codebook())
            e = self.embedding(indices)
            through = z
            if self.norm == "l2":
                e, through = F.normalize(e, dim=1), F.normalize(z, dim=1)
            if not self.training:
                z_q = e
            elif self.gradient_estimator == "rotation":
                z_q = rotated(through, e)
            else:
                z_q = through + (e - through).detach()
            z_q = z_q.reshape(batch, height, width, dim).permute(0, 3, 1, 2).contiguous()
        return z_q, Codes(z, e, indices), (None, None, indices)


def kmeans(points, k, iterations, norm, generator):
    """Lloyd's algorithm on points [n, dim] -> centres [k, dim]; on the unit sphere with norm "l2".

    Starts from points drawn without replacement, and noisy copies where there are fewer than k; an empty cluster keeps
    its centre.
    """
    onto = (lambda p: F.normalize(p, dim=1)) if norm == "l2" else (lambda p: p)
    points = onto(points)
    order = torch.randperm(len(points), generator=generator).repeat(-(-k // len(points)))[:k]
    noise = torch.randn(k, points.shape[1], generator=generator).to(points) * points.std() * 0.01
    centres = onto(points[order.to(points.device)] + noise * (k > len(points)))
    for _ in range(iterations):
        nearest = nearest_codes(points, centres)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        counts = torch.bincount(nearest, minlength=k).unsqueeze(1)
        centres = onto(torch.where(counts > 0, sums / counts.clamp(min=1), centres))
    return centres


class TimmModel(nn.Module):
    """A frozen timm model for images [batch, 3, height, width] in [0, 1], resized, antialiased, to `size` if it has one."""

    def __init__(self, backbone, size):
        super().__init__()
        backbone = backbone.requires_grad_(False).to(memory_format=torch.channels_last)  # vgg19: 5 % of a CPU step
        self.backbone, self.size = backbone, size
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
        return self.backbone((self.resized(x) - self.mean) / self.std)


class PerceptualLoss(TimmModel):
    """P(x, x_hat) = mean_l mean_hw sum_c (phi_l(x) / |phi_l(x)| - phi_l(x_hat) / |phi_l(x_hat)|)^2

    phi_l: stage l of a frozen timm backbone. For vgg16 each channel has LPIPS's calibrated weight and layers are
    summed: then P is LPIPS itself (Zhang et al. 2018, https://arxiv.org/abs/1801.03924, version 0.1, heads from
    torchmetrics). With layers "logits" it is the mean squared difference of the classifier's logits (Weber et al. 2024,
    https://arxiv.org/abs/2409.16211). Images are [batch, 3, height, width] in [-1, 1]; they enter the backbone at their
    own resolution unless it only takes one, or a classifier is asked, then resized, antialiased. Returns a scalar.

    Raises UserError for an unknown model, layer or weights.
    """

    def __init__(self, name, layers=None, weights="hub", resolution=256, cache_dir=None, flag="timm_model_weights"):
        check_timm_model("timm_model_backend", name)
        if layers == "logits":
            stages, backbone = ["logits"], load_backbone(flag, name, weights, cache_dir)
        else:
            stages, backbone = self.load_stages(name, layers, weights, cache_dir, flag)
        config = backbone.pretrained_cfg
        sized = layers == "logits" or config.get("fixed_input_size")
        super().__init__(backbone, config["input_size"][-2:] if sized else None)
        self.layers = stages
        self.nhwc = str(getattr(backbone, "output_fmt", "NCHW")).endswith("NHWC")
        heads = lpips_heads(self.layers) if name.split(".")[0] == "vgg16" and layers != "logits" else []
        self.heads = nn.ParameterList(nn.Parameter(head, requires_grad=False) for head in heads)
        with explained(f"--timm_model_backend: {name} fails at {resolution} pixels"), torch.no_grad():
            self(*torch.zeros(2, 1, 3, resolution, resolution))

    @staticmethod
    def load_stages(name, layers, weights, cache_dir, flag):
        """Names of the stages of --timm_model_layers, and a backbone that gives them and runs no further."""
        with explained(f"--timm_model_backend: {name} gives no feature maps"):
            extractor = timm.create_model(name, pretrained=False, features_only=True)
        modules = [stage["module"] for stage in extractor.feature_info.info]
        chosen = PerceptualLoss.resolve_layers(name, layers, modules, extractor)
        layers = [modules[i] for i in chosen]
        backbone = load_backbone(flag, name, weights, cache_dir, features_only=True, out_indices=chosen)
        if isinstance(getattr(backbone, "blocks", None), nn.Sequential):  # timm runs all of an EfficientNet's
            last = re.fullmatch(r"blocks\.(\d+)", layers[-1])
            backbone.blocks = backbone.blocks[: int(last[1]) + 1 if last else 0]
        return layers, backbone

    @staticmethod
    def resolve_layers(name, layers, modules, extractor):
        """--timm_model_layers to indices into `modules`, in ascending order."""
        if not layers:  # timm counts the last max-pool of a VGG as a stage
            pooling = [m for m in modules if isinstance(getattr(extractor, m.replace(".", "_"), None), nn.MaxPool2d)]
            return [i for i in extractor.feature_info.out_indices if modules[i] not in pooling]
        chosen = set()
        for layer in re.split(r"[|,\s]+", layers.strip()):
            if layer not in modules and not (layer.isdigit() and int(layer) < len(modules)):
                listed = ", ".join(f"{i}: {module}" for i, module in enumerate(modules))
                raise UserError(f"--timm_model_layers: {name} has no layer '{layer}'; it has {listed}, and logits")
            chosen.add(modules.index(layer) if layer in modules else int(layer))
        return sorted(chosen)

    def features(self, x):
        """Unit-normalised features [batch, channels, height, width] of each layer, fp32."""
        maps = [at_least_fp32(f) for f in self.outputs(x / 2 + 0.5)]
        maps = [f.permute(0, 3, 1, 2) for f in maps] if self.nhwc else maps
        # epsilon inside the root: its gradient is infinite where all channels are zero
        return [f / (f.square().sum(1, keepdim=True) + 1e-10).sqrt() for f in maps]

    def forward(self, x, x_hat):
        if self.layers == ["logits"]:
            with torch.no_grad():
                target = at_least_fp32(self.outputs(x / 2 + 0.5))
            return F.mse_loss(at_least_fp32(self.outputs(x_hat / 2 + 0.5)), target)
        with torch.no_grad():
            targets = self.features(x)
        squares = [(t - f).square() for t, f in zip(targets, self.features(x_hat))]
        if len(self.heads):
            return sum((w.to(s) * s).sum(1).mean() for w, s in zip(self.heads, squares))
        return sum(s.sum(1).mean() for s in squares) / len(squares)


def lpips_heads(layers):
    """LPIPS's channel weights [1, channels, 1, 1] of these layers of timm's vgg16."""
    path = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "vgg.pth"
    heads = torch.load(path, map_location="cpu", weights_only=True)
    taps = ["features.3", "features.8", "features.15", "features.22", "features.29"]
    known = set(layers) <= set(taps)
    require(known, f"--timm_model_layers: LPIPS's weights for vgg16 are for {', '.join(taps)} only")
    return [heads[f"lin{taps.index(layer)}.model.1.weight"] for layer in layers]


def check_timm_model(flag, name):
    if "hub:" not in name and not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 3, 0.4)
        raise UserError(f"--{flag}: timm has no model '{name}'" + did_you_mean(close))


def load_backbone(flag, name, weights, cache_dir, **options):
    """A timm model with weights from the Hub, a file or an installed package, or random ones."""
    hint = "; name a local file, an installed package that ships them, or random"
    hint += "; --perceptual_weight 0 does without" * (flag == "timm_model_weights")
    with explained(f"--{flag}: no weights of {name} from '{weights}'", hint):
        if weights == "random":
            return timm.create_model(name, pretrained=False, **options)
        if weights == "hub":
            logger.info(f"Fetching the weights of {name} from the Hugging Face Hub, unless they are cached")
            return timm.create_model(name, pretrained=True, cache_dir=cache_dir, **options)
        state = read_weights(flag, weights, timm.create_model(name, pretrained=False).state_dict())
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": state}, **options)


def read_weights(flag, source, expected):
    """Tensors of a local file or of the one weight file of an installed package, under timm's names.

    Packages may name them otherwise: then the same number of tensors of the same sizes in the same order will do
    (torchvision's VGG ends in linear layers where timm's has convolutions).
    """
    files = [Path(source)] if Path(source).is_file() else []
    if not files and re.fullmatch(r"[\w.-]+", source):
        spec = importlib.util.find_spec(source.replace("-", "_").split(".")[0])
        for folder in (spec.submodule_search_locations or []) if spec else []:
            files += [f for f in sorted(Path(folder).rglob("*")) if f.suffix in (".safetensors", ".pth", ".pt", ".bin")]
    if len(files) != 1:
        found = f"a package with {len(files)} weight files" if files else "neither a file nor an installed package"
        raise UserError(f"--{flag}: '{source}' is {found}")
    try:
        if files[0].suffix == ".safetensors":
            state = safetensors.torch.load_file(files[0])
        else:
            state = torch.load(files[0], map_location="cpu", weights_only=True)
        sizes = [(tensor.shape[:1], tensor.numel()) for tensor in state.values()]
    except Exception:  # torch's own text advises to run the file's code
        raise UserError(f"--{flag}: {files[0].name} holds no plain tensors by name") from None
    if set(state) != set(expected):
        if sizes != [(tensor.shape[:1], tensor.numel()) for tensor in expected.values()]:
            raise UserError(f"--{flag}: the tensors in {files[0].name} are not those of this backbone")
        state = {name: tensor.reshape(expected[name].shape) for name, tensor in zip(expected, state.values())}
    return state


# On the discriminator's logits: what the generator minimises, and what the discriminator does on real and fake images.
ADVERSARIAL = {
    "hinge": (lambda fake: -fake, lambda real: F.relu(1 - real), lambda fake: F.relu(1 + fake)),  # Lim and Ye 2017
    "non_saturating": (lambda fake: F.softplus(-fake), lambda real: F.softplus(-real), F.softplus),  # Goodfellow 2014
}


def generator_loss(x, x_hat, codes, perceptual, discriminator, args, adversarial_weight):
    """L_G and its terms. x, x_hat: [batch, 3, height, width] in [-1, 1]; the discriminator is frozen by the caller."""
    pixel = F.l1_loss if args.vae_loss == "l1" else F.mse_loss
    terms = {
        "pixel": (args.pixel_weight, pixel(x_hat, x)),
        "perceptual": (args.perceptual_weight, perceptual(x, x_hat) if perceptual else x_hat.new_zeros(())),
        "codebook": (args.codebook_weight, F.mse_loss(codes.e, codes.z.detach())),
        "commitment": (args.commitment_weight, F.mse_loss(codes.z, codes.e.detach())),
    }
    if adversarial_weight > 0:
        terms["adversarial"] = (adversarial_weight, ADVERSARIAL[args.adversarial_loss][0](discriminator(x_hat)).mean())
    return sum(weight * term for weight, term in terms.values()), terms


def discriminator_loss(x, x_hat, discriminator, kind="hinge"):
    """L_D, and what the discriminator said; `kind` is one of ADVERSARIAL."""
    real, fake = discriminator(torch.cat([x, x_hat])).chunk(2)
    _, on_real, on_fake = ADVERSARIAL[kind]
    loss = on_real(real).mean() + on_fake(fake).mean()
    accuracy = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
    return loss, {"disc/loss": loss, "disc/real": real.mean(), "disc/fake": fake.mean(), "disc/accuracy": accuracy}


def lecam(real, fake, anchors):
    """LeCAM (Tseng et al. 2021, https://arxiv.org/abs/2104.03310): mean logits that run away from the others' average.

    real, fake: means of this batch; anchors [2]: their moving averages.
    """
    return F.relu(real - anchors[1]).square() + F.relu(anchors[0] - fake).square()


def adaptively_weighted(accelerator, terms, x_hat, last_layer):
    """(all processes) Something whose gradient is that of L_G with an adaptive lambda, and this lambda.

    lambda = w |grad_v (pixel + perceptual)| / (|grad_v adversarial| + 1e-4), v = last_layer (Esser et al. 2021, eq. 7),
    the ratio at most 100 and averaged over processes. The gradients are split at x_hat: the perceptual network and the
    discriminator are gone through once each, and the generator once, from there.
    """
    scale = accelerator.scaler.scale(x_hat.new_ones(())) if accelerator.scaler else 1.0  # fp16 would lose them
    weight, adversarial = terms["adversarial"]
    judged = sum(weight * term for name, (weight, term) in terms.items() if name in ("pixel", "perceptual"))
    gradients = [torch.autograd.grad(loss * scale, x_hat)[0] for loss in (judged, adversarial)]
    at_last = [torch.autograd.grad(x_hat, last_layer, g, retain_graph=True)[0] for g in gradients]
    norms = [at_least_fp32(gradient).norm() for gradient in at_last]
    ratio = (norms[0] / (norms[1] + 1e-4 * scale)).clamp(max=100)
    weight = weight * accelerator.reduce(ratio, "mean")
    objective = (x_hat * (gradients[0] + weight * gradients[1]) / scale).sum()
    return objective + sum(terms[name][0] * terms[name][1] for name in ("codebook", "commitment")), weight


def gradient_shares(terms, x_hat):
    """Share of each term in the gradient at x_hat, by norm: which one steers the decoder."""
    norms = {}
    for name, (weight, term) in terms.items():
        if term.requires_grad and weight > 0:
            gradient = torch.autograd.grad(term, x_hat, retain_graph=True, allow_unused=True)[0]
            if gradient is not None:
                norms[name] = weight * gradient.norm().item()
    return {name: norm / (sum(norms.values()) or 1) for name, norm in norms.items()}


# ---- Building ------------------------------------------------------------------------------------------------------


def read_config(flag, source, network, **where):
    """Config of a `network` class from a JSON file, a directory or the Hub; UserError for bad JSON and unknown keys."""
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
        require(path.is_file(), f"--{flag}: no config.json in {source}")
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8-sig")
            config = json.loads(text)
        except (UnicodeDecodeError, OSError) as error:
            raise UserError(f"--{flag}: {path} is no text file: {first_line(error)}") from None
        except json.JSONDecodeError as error:
            before = text[: error.pos + 1].rstrip("]} \t\r\n")
            if before.endswith(",") and text[len(before) :].lstrip()[:1] in ("]", "}"):
                line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1)
                where = f"{path}, line {line}, column {column}"
                raise UserError(f"--{flag}: {where}: trailing comma; JSON has none after the last item") from None
            raise UserError(f"--{flag}: {path}, line {error.lineno}, column {error.colno}: {error.msg}") from None
    else:
        logger.info(f"Contacting the Hugging Face Hub for the config of {source}")
        hint = "" if network is not VQModel or where.get("subfolder") else "; is it in a --subfolder, such as vqvae?"
        with explained(f"--{flag}: no local file or directory {source}, and the Hub did not give it", hint):
            config = network.load_config(source, **where)
    require(isinstance(config, dict), f"--{flag}: {path} holds no JSON object")
    known = [name for name in inspect.signature(network.__init__).parameters if name != "self"]
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    for key in config:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1, 0.5) or known
            raise UserError(f"--{flag}: {source}: {network.__name__} has no '{key}'" + did_you_mean(close))
    return config


def check_vqmodel_config(flag, config, resolution):
    """UserError for a VQModel config that diffusers cannot build, or that cannot train at this resolution."""

    def check(condition, message):
        require(condition, f"--{flag}: {message}")

    config = {k: p.default for k, p in inspect.signature(VQModel.__init__).parameters.items()} | config
    lists = {key: config[key] for key in ("block_out_channels", "down_block_types", "up_block_types")}
    check(all(isinstance(v, (list, tuple)) and v for v in lists.values()), f"{', '.join(lists)} must be lists")
    lengths = ", ".join(f"{key} {len(value)}" for key, value in lists.items())
    check(len({len(value) for value in lists.values()}) == 1, f"these lists need the same length: {lengths}")
    widths, groups, spatial = config["block_out_channels"], config["norm_num_groups"], config["norm_type"] == "spatial"
    latent, dim = config["latent_channels"], config["vq_embed_dim"]
    dim = latent if dim is None else dim
    whole = ["layers_per_block", "latent_channels", "num_vq_embeddings", "norm_num_groups"]
    whole = [("vq_embed_dim", dim), *((key, config[key]) for key in whole)]
    for key, value in [*whole, *(("block_out_channels", width) for width in widths)]:
        check(isinstance(value, int) and value > 0, f"{key} must be a whole number of at least 1, not {value!r}")
    kinds = {
        "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"],
        "norm_type": ["group", "spatial"],
    }
    for key, known in kinds.items():
        for value in config[key] if isinstance(config[key], (list, tuple)) else [config[key]]:
            check(value in known, f"{key}: '{value}' is not one of {', '.join(known)}")
    check(config["in_channels"] == config["out_channels"] == 3, "in_channels and out_channels must be 3: RGB")
    for width in widths:
        check(width % groups == 0, f"block_out_channels: {width} is not divisible by norm_num_groups {groups}")
        fits = not spatial or width % 32 == 0
        check(fits, f"block_out_channels: {width} is not divisible by spatial norm's 32 groups")
    unequal = f"norm_type spatial needs latent_channels ({latent}) equal to vq_embed_dim ({dim})"
    check(not spatial or latent == dim, unequal)
    factor = 2 ** (len(widths) - 1)
    nearest = max(factor, round(resolution / factor) * factor)
    divisible = f"--resolution: {resolution} is not divisible by the model's downsampling {factor}; {nearest} is"
    require(resolution % factor == 0, divisible)


def build_generator(args):
    """The VQModel to train, its quantiser swapped for ours."""
    if args.pretrained_model_name_or_path:
        flag, source = "pretrained_model_name_or_path", args.pretrained_model_name_or_path
        where = {"subfolder": args.subfolder, "revision": args.revision, "cache_dir": args.cache_dir}
        if Path(source).is_dir():
            inner = Path(source) / (where.pop("subfolder") or "vqmodel")
            source = str(inner) if inner.is_dir() or args.subfolder else source
        config = read_config(flag, source, VQModel, **where)
        check_vqmodel_config(flag, config, args.resolution)
        with explained(f"--{flag}: cannot load {source}"):
            model = VQModel.from_pretrained(source, torch_dtype=torch.get_default_dtype(), **where)
    else:
        flag, source = "model_config_name_or_path", args.model_config_name_or_path or DEFAULT_CONFIG
        config = read_config(flag, source, VQModel, revision=args.revision, cache_dir=args.cache_dir)
        check_vqmodel_config(flag, config, args.resolution)
        with explained(f"--{flag}: diffusers cannot build this model"):
            model = VQModel.from_config(config)
    sizes = model.quantize.n_e, model.quantize.vq_embed_dim
    quantizer = Quantizer(*sizes, args.codebook_norm, args.gradient_estimator)
    quantizer.load_state_dict(model.quantize.state_dict())
    model.quantize = quantizer
    if args.train_only == "decoder":
        model.requires_grad_(False)
        for part in (model.post_quant_conv, model.decoder):
            part.requires_grad_(True)
    if args.codebook_init == "sphere":
        quantizer.embedding.weight.data = F.normalize(torch.randn_like(quantizer.embedding.weight), dim=1)
    if args.gradient_checkpointing:
        checkpoint_activations(model)
    return model.train()


def checkpoint_activations(model):
    """Compute norms and activations before convolutions, most of the memory and little of the work, again in the backward
    pass instead of keeping them (Chen et al. 2016, https://arxiv.org/abs/1604.06174).
    """
    spatial = model.config.norm_type == "spatial"  # group norm keeps nothing but its input anyway
    for part in [*model.modules()]:
        if not any(weight.requires_grad for weight in part.parameters()):
            continue
        if isinstance(part, (ResnetBlock2D, ResnetBlockCondNorm2D)):
            part.forward = partial(residual_block, part)
        elif isinstance(part, Upsample2D) or (spatial and part is model.decoder.conv_norm_out):
            part.forward = partial(again, part.forward)


def again(function, *inputs, **more):
    """function(*inputs), in the backward pass computed again as far as the inputs of its last product. None is random."""
    return torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **more)


def residual_block(block, x, temb=None):
    """The forward pass of diffusers' block in a VQModel; temb: latents for spatial norm, or None."""

    def convolved(h, norm, conv):
        return conv(block.nonlinearity(norm(h) if temb is None else norm(h, temb)))

    h = again(convolved, x, block.norm1, block.conv1)
    h = again(convolved, h, block.norm2, block.conv2)
    return (block.conv_shortcut(x) if block.conv_shortcut else x) + h


def build_discriminator(args):
    """A new discriminator, or a pretrained one."""
    pretrained, source = args.pretrained_discriminator_name_or_path, args.discriminator_config_name_or_path
    flag = f"{'pretrained_discriminator' if pretrained else 'discriminator_config'}_name_or_path"
    with explained(f"--{flag}"):
        if pretrained:
            inner = not Path(pretrained).is_dir() or (Path(pretrained) / "discriminator").is_dir()
            where = {"subfolder": "discriminator"} if inner else {}
            discriminator = Discriminator.from_pretrained(pretrained, cache_dir=args.cache_dir, **where)
            discriminator.to(torch.get_default_dtype())
        else:
            config = read_config(flag, source, Discriminator, cache_dir=args.cache_dir) if source else {}
            discriminator = Discriminator.from_config(config)
    require(discriminator.config.in_channels == 3, f"--{flag}: in_channels must be 3: training images are RGB")
    least = discriminator.min_resolution if args.adversarial_weight else 0
    small = f"--resolution: {args.resolution} is too small for the discriminator, which needs {least}"
    require(args.resolution >= least, f"{small}; lower its depth with --{flag}")
    return discriminator.train()


def build_perceptual(args):
    if args.perceptual_weight:
        layers, weights = args.timm_model_layers, args.timm_model_weights
        return PerceptualLoss(args.timm_model_backend, layers, weights, args.resolution, args.cache_dir)


def build_optimizer(network, learning_rate, args):
    """AdamW; no weight decay on the codebook, norms and biases: it would only shrink what sets a scale."""
    decayed, rest = [], []
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        (decayed if parameter.ndim > 1 and "quantize.embedding" not in name else rest).append(parameter)
    groups = [{"params": decayed, "weight_decay": args.adam_weight_decay}, {"params": rest, "weight_decay": 0.0}]
    options = {"lr": learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


def build_schedule(name, warmup_steps, total_steps):
    """Learning rate multiplier as a function of the number of steps taken: no state to save or to get out of step."""
    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(name, stand_in, num_warmup_steps=warmup_steps, num_training_steps=total_steps)
    return schedule.lr_lambdas[0]


def compile_networks(generator, discriminator, perceptual, args):
    """--torch_compile, in place: names in checkpoints and exports stay as they are."""
    decoder = generator.decoder
    # the adaptive weight goes back through conv_out three times, which a compiled graph does not allow
    parts = [decoder.mid_block, *decoder.up_blocks] if args.adaptive_weight else [decoder]
    for part in [generator.encoder, *parts, discriminator.layers, *([perceptual] if perceptual else [])]:
        part.compile(dynamic=False)


class TrainingState:
    """The two players and everything else that moves during training: what a checkpoint holds."""

    def __init__(self, generator, discriminator, args, device):
        self.generator, self.discriminator = generator.to(device), discriminator.to(device)  # unwrapped
        self.quantizer = generator.quantize
        self.optimizers = {
            "generator": build_optimizer(generator, args.learning_rate, args),
            "discriminator": build_optimizer(discriminator, args.discr_learning_rate, args),
        }
        self.ema = None
        self.step = 0  # pairs of updates taken
        self.samples_seen = 0  # position in the sample stream, over all processes
        self.samples_logged = 0  # where the last log stood
        self.settled = {}  # flags that were fractions of the run, see settle_flags
        self.tracker_run = uuid.uuid4().hex[:8]
        self.averages = Averages()
        self.lecam_anchors = torch.zeros(2, device=device)  # moving averages of the mean logits, real and fake
        self.warned = False  # of a discriminator that has won or collapsed
        self.watch = Watch()
        self.stopped = False  # by a signal
        self.saved = True  # the last checkpoint
        codes = self.quantizer.n_e
        self.log_counts = torch.zeros(codes, dtype=torch.long, device=device)  # since the last log, this process
        self.restart_counts = torch.zeros(codes, dtype=torch.long, device=device)  # since the last restart
        self.restart_tokens = 0  # tokens counted there, all processes
        self.recent = torch.empty(0, self.quantizer.vq_embed_dim, device=device)  # latents here, for restarts

    def start_ema(self, decay):
        self.ema = EMAModel(self.generator.parameters(), decay=decay, foreach=True)


class Averages:
    """Means of scalars since the last `read`, summed on the device: reading is the only host sync."""

    def __init__(self):
        self.sums = {}  # tuple of names -> [sum of each..., number of summands]

    def add(self, metrics):
        names = tuple(metrics)
        values = torch.stack([v.detach().to(torch.get_default_dtype()) for v in metrics.values()])
        row = torch.cat([values.nan_to_num(0, 0, 0), values.new_ones(1)]) * values.isfinite().all()
        self.sums[names] = self.sums[names] + row if names in self.sums else row

    def read(self, accelerator):
        """(all processes) Means over micro-batches, steps and processes; empties the sums."""
        totals, counts = {}, {}
        for names, row in self.sums.items():
            *sums, n = accelerator.reduce(row, "sum").tolist()
            for name, total in zip(names, sums):
                totals[name], counts[name] = totals.get(name, 0) + total, counts.get(name, 0) + n
        self.sums = {}
        return {name: totals[name] / counts[name] for name in totals if counts[name]}


class Watch:
    """What was not finite in each step, and whether a signal came: agreed between processes, read one step late.

    Reading at once would make the host wait for the device at every step.
    """

    def __init__(self):
        self.counts = {}  # this step: tuple of names -> how often each was not finite, on the device
        self.sent = None  # the last step, on its way to the host
        self.bad_steps = 0  # in a row
        self.signal = None  # the signal this process got

    def check(self, named):
        names = tuple(named)
        bad = (~torch.stack([value.detach() for value in named.values()]).isfinite()).float()
        self.counts[names] = self.counts.get(names, 0) + bad

    def send(self, accelerator, step, micro_batches):
        """(all processes) The step is over: sum its counts over processes and start them for the host."""
        names, device = [name for names in self.counts for name in names], accelerator.device
        signalled = torch.full((1,), float(self.signal is not None), device=device)
        total = accelerator.reduce(torch.cat([*self.counts.values(), signalled]), "sum")
        total = total.to("cpu", non_blocking=device.type == "cuda")
        arrived = torch.cuda.Event() if device.type == "cuda" else None
        if arrived:
            arrived.record()
        self.sent, self.counts = (step, names, total, arrived, micro_batches), {}

    def read(self, accelerator, args):
        """(all processes) Of the step sent last: was there a signal? UserError at --max_bad_steps bad ones in a row."""
        if self.sent is None:
            return False
        (step, names, total, arrived, micro_batches), self.sent = self.sent, None
        if arrived:
            arrived.synchronize()
        *counts, signalled = total.tolist()
        bad = ", ".join(name for name, count in zip(names, counts) if count)
        self.bad_steps = self.bad_steps + 1 if bad else 0
        if bad:
            logger.warning(f"Step {step}: {bad} not finite; the update was skipped ({self.bad_steps} in a row)")
        if self.bad_steps >= args.max_bad_steps:
            path = Path(args.output_dir) / f"bad-step-{step}-process-{accelerator.process_index}.safetensors"
            with keep_going(f"save {path}"):
                safetensors.torch.save_file({str(i): x.contiguous() for i, x in enumerate(micro_batches)}, path)
            good = next(reversed(checkpoints(args.output_dir)), "none")
            raise UserError(
                f"{self.bad_steps} steps in a row were not finite, the last one, {step}, in: {bad}; its images are in "
                f"{path.with_stem(f'bad-step-{step}-process-N')}, the last good checkpoint is {good}; "
                "lower --learning_rate or --max_grad_norm, or use --mixed_precision bf16 or no"
            )
        return signalled > 0


@contextmanager
def signals_noted(watch):
    """Inside, SIGTERM, SIGINT and SIGUSR1 are noted for the end of the step; a second SIGINT stops at once.

    Data workers, forked inside, inherit the handler for SIGINT and so outlive a Ctrl-C: the step needs them.
    """
    pid = os.getpid()

    def note(number, frame):
        if os.getpid() == pid:
            watch.signal = number
            with stderr_may_be_gone():
                os.write(2, f"\n{signal.Signals(number).name}: stopping at the end of this step\n".encode())
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stderr_may_be_gone():
    """A `| tee` dies of the same Ctrl-C: then write to nowhere instead of failing."""
    try:
        yield
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


@contextmanager
def keep_going(what):
    """Inside, a full or vanished disk costs a warning, not the run."""
    try:
        yield
    except WRITE_ERRORS as error:
        logger.warning(f"Could not {what}: {first_line(error)}")


# ---- One step ------------------------------------------------------------------------------------------------------


@contextmanager
def frozen(network):
    """Inside, `network` judges but collects no gradients."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


def adversarial_weight(step, args):
    """lambda at this step: 0 before --discriminator_start, then a linear ramp to --adversarial_weight."""
    ramp = (step + 1 - args.discriminator_start) / max(1, args.discriminator_warmup)
    return args.adversarial_weight * min(1.0, max(0.0, ramp))


def synced(accelerator, network, last):
    """Gradients travel between processes with the last micro-batch only."""
    return nullcontext() if last else accelerator.no_sync(network)


def clip_and_step(accelerator, network, optimizer, loss, max_norm):
    """Clip, update, clear. Returns the gradient norm before clipping, and whether the update took place.

    A non-finite loss or gradient on any process skips the update on all of them, decided on the device: the fused
    optimiser reads the flag there (fp16's scaler does the same by itself).
    """
    norm = accelerator.clip_grad_norm_(network.parameters(), max_norm or math.inf)
    finite = accelerator.reduce((loss.isfinite() & norm.isfinite()).float(), "sum") == accelerator.num_processes
    fused = optimizer.optimizer.defaults.get("fused")
    if fused and accelerator.scaler is None:
        optimizer.optimizer.found_inf = (~finite).float()
    if fused or accelerator.scaler is not None or finite:
        optimizer.step()
    optimizer.zero_grad()
    return norm, finite


def generator_step(accelerator, generator, state, perceptual, micro_batches, weight, args):
    """Update the generator on L_G averaged over the micro-batches [batch, 3, height, width].

    Returns the pairs (x, x_hat) for the discriminator.
    """
    kept, chosen, total = [], [], 0.0
    for i, x in enumerate(micro_batches):
        with synced(accelerator, generator, last=i == len(micro_batches) - 1):
            x_hat, codes = generator(to_model(x, args), return_dict=False)  # the only call of the generator
            x_hat = from_model(x_hat, args)
            first = state.step == 0 and i == 0
            with frozen(state.discriminator), torch.compiler.set_stance("force_eager") if first else nullcontext():
                loss, terms = generator_loss(x, x_hat, codes, perceptual, state.discriminator, args, weight)
            if first:
                report_gradient_shares(gradient_shares(terms, x_hat))
            objective = loss
            if args.adaptive_weight and weight > 0:
                last_layer = state.generator.decoder.conv_out.weight
                objective, adapted = adaptively_weighted(accelerator, terms, x_hat, last_layer)
                loss = loss + (adapted - weight) * terms["adversarial"][1]
                state.averages.add({"opt/adversarial_weight": adapted})
            accelerator.backward(objective / len(micro_batches))
        kept.append((x, x_hat.detach()))
        chosen.append(codes)
        total = total + loss.detach()
        state.averages.add({f"loss/{name}": term for name, (_, term) in terms.items()} | {"loss/total": loss})
        state.watch.check({name: term for name, (_, term) in terms.items()})
    norm, finite = clip_and_step(accelerator, generator, state.optimizers["generator"], total, args.max_grad_norm)
    if state.ema:
        state.ema.step(state.generator.parameters())
    if args.codebook_restart_steps:
        latents = torch.cat([state.recent, *(codes.z.detach() for codes in chosen)])
        most = (16 << 20) // (4 * latents.shape[1])  # 16 MiB; of all processes together no more than one for each code
        state.recent = latents[-max(1, min(state.quantizer.n_e, most) // accelerator.num_processes) :]
    indices = torch.cat([codes.indices for codes in chosen])  # index_add_, as bincount waits for the device
    counts = torch.zeros_like(state.log_counts).index_add_(0, indices, finite.long().expand(len(indices)))
    state.log_counts += counts
    state.restart_counts += counts
    state.restart_tokens += len(indices) * accelerator.num_processes
    state.averages.add({"opt/grad_norm": norm})
    state.averages.add({"opt/skipped": (~finite).float()})
    state.watch.check({"loss of the generator": total, "gradient of the generator": norm})
    return kept


def discriminator_step(accelerator, discriminator, state, kept, args):
    """Update the discriminator on L_D averaged over the same micro-batches."""
    total, said = 0.0, 0.0
    for i, (x, x_hat) in enumerate(kept):
        with synced(accelerator, discriminator, last=i == len(kept) - 1):
            loss, metrics = discriminator_loss(x, x_hat, discriminator, args.adversarial_loss)
            if args.lecam_weight:
                metrics["disc/lecam"] = lecam(metrics["disc/real"], metrics["disc/fake"], state.lecam_anchors)
                loss = loss + args.lecam_weight * metrics["disc/lecam"]
                said = said + torch.stack([metrics["disc/real"], metrics["disc/fake"]]).detach() / len(kept)
            accelerator.backward(loss / len(kept))
        total = total + loss.detach()
        state.averages.add(metrics)
        state.watch.check({"loss of the discriminator": loss})
    optimizer = state.optimizers["discriminator"]
    norm, finite = clip_and_step(accelerator, discriminator, optimizer, total, args.max_grad_norm)
    if args.lecam_weight:
        said = accelerator.reduce(said.to(state.lecam_anchors), "mean")
        state.lecam_anchors = torch.where(finite, state.lecam_anchors.lerp(said, 1e-3), state.lecam_anchors)
    state.averages.add({"opt/discriminator_grad_norm": norm})
    state.averages.add({"opt/discriminator_skipped": (~finite).float()})
    state.watch.check({"gradient of the discriminator": norm})


@torch.no_grad()
def initialise_codebook(accelerator, state, items, args):
    """(all processes) k-means over latents of the first images of the stream."""
    quantizer = state.quantizer
    wanted, found, latents = 2 * quantizer.n_e, 0, []
    batches = training_batches(items, args, 0, accelerator)
    for _ in range(64):
        x = to_signed(next(batches), accelerator.device)
        z = state.generator.encode(to_model(x, args)).latents
        z = accelerator.gather(z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]))
        latents, found = [*latents, z], found + len(z)
        if found >= wanted:
            break
    sampler = torch.Generator().manual_seed(args.seed)
    iterations = 10 if quantizer.n_e <= 4096 else 3
    codes = kmeans(torch.cat(latents)[: max(wanted, 1 << 16)], quantizer.n_e, iterations, quantizer.norm, sampler)
    quantizer.embedding.weight.copy_(codes)  # DDP shares the first process's


@torch.no_grad()
def restart_dead_codes(accelerator, state):
    """(all processes) Move codes chosen less than 3 % as often as under uniform use to latents of the last steps.

    The optimiser's and the EMA's rows move along. Every process draws the same from the gathered latents, each of them for
    one code at most: of two equal codes one would never be chosen.
    """
    weight = state.quantizer.embedding.weight
    counts = accelerator.reduce(state.restart_counts, "sum")
    dead = (counts < 0.03 * counts.sum() / len(counts)).unsqueeze(1)
    tokens = state.restart_tokens / len(weight)  # a code
    if tokens < 8 and dead.float().mean() <= 2 * math.exp(-tokens):  # most of them may just have been unlucky
        return
    pool = accelerator.gather(state.recent)
    pool = pool[pool.isfinite().all(1)]  # the last update may have been skipped
    if not len(pool):
        return
    pool = F.normalize(pool, dim=1) if state.quantizer.norm == "l2" else pool
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(state.step)).to(pool.device)
    rank = dead.cumsum(0) - 1  # among the dead ones
    dead &= rank < len(pool)
    fresh = pool[order[rank.squeeze(1) % len(pool)]].to(weight.dtype)
    weight.copy_(torch.where(dead, fresh, weight))
    moments = state.optimizers["generator"].optimizer.state
    if any(torch.is_tensor(moment) and moment.dtype == torch.uint8 for moment in moments.get(weight, {}).values()):
        del moments[weight]  # 8-bit blocks share their scales: all begin anew
    for moment in moments.get(weight, {}).values():
        if torch.is_tensor(moment) and moment.shape == weight.shape and moment.is_floating_point():
            moment.masked_fill_(dead, 0)
    if state.ema:
        shadow = next(s for s, p in zip(state.ema.shadow_params, state.generator.parameters()) if p is weight)
        shadow.copy_(torch.where(dead, fresh, shadow))
    state.averages.add({"codebook/restarted": dead.sum()})
    state.restart_counts.zero_()
    state.restart_tokens = 0


# ---- Checkpoints ---------------------------------------------------------------------------------------------------


def manifest(files):
    """Name -> size and SHA-256 of each file."""
    found = {}
    for path in files:
        with open(path, "rb") as file:
            found[path.name] = {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return found


def damage(checkpoint, hashes=False):
    """What is wrong with a checkpoint directory by its manifest, or None; `hashes` reads all of it."""
    if not CHECKPOINT_NAME.fullmatch(checkpoint.name):
        return "its name is not checkpoint-N"
    try:
        files = json.loads((checkpoint / "progress.json").read_text())["files"]
    except (OSError, ValueError, KeyError):
        return "progress.json is missing or not whole"
    for name, expected in files.items():
        path = checkpoint / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected["bytes"]:
            return f"{name} is missing" if size is None else f"{name} has {size} bytes, not {expected['bytes']}"
        if hashes and manifest([path])[name] != expected:
            return f"{name} does not have the content that was saved"


def checkpoints(output_dir, intact=True):
    """Checkpoints in `output_dir`, oldest first; only those whose files are all there, unless told otherwise."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name)]
    found = [path for path in found if not (intact and damage(path))]
    return sorted(found, key=step_of)


def step_of(checkpoint):
    return int(Path(checkpoint).name.split("-")[1])


def checkpoint_to_resume(args):
    """Path or None: `latest` takes the newest whole one; on a directory without checkpoints it is a fresh start."""
    if args.resume_from_checkpoint is None:
        return None
    latest = args.resume_from_checkpoint == "latest"
    present = checkpoints(args.output_dir, intact=False)
    for checkpoint in reversed(present) if latest else [Path(args.resume_from_checkpoint)]:
        fault = damage(checkpoint, hashes=True)
        if not fault:
            return checkpoint
        require(latest, f"--resume_from_checkpoint: {checkpoint} is damaged: {fault}; take another one")
        logger.warning(f"{checkpoint} is damaged and left out: {fault}")
    none = f"--resume_from_checkpoint: no whole checkpoint in {args.output_dir}"
    require(not present, f"{none}; remove it to start afresh")


def what_is_trained(args, generator, discriminator, items):
    """What must be the same when a run is resumed."""
    configs = {f"model config {k}": v for k, v in generator.config.items() if k != "scaling_factor"}
    configs |= {f"discriminator config {k}": v for k, v in discriminator.config.items()}
    flags = "seed resolution pixel_range center_crop random_flip codebook_norm validation_fraction train_only use_8bit_adam "
    flags += "dataset_name dataset_config_name train_data_dir image_column max_train_samples streaming"
    trained = {f"--{flag}": getattr(args, flag) for flag in flags.split()}
    trained["number of training images"] = None if args.streaming else len(items)
    return json.loads(json.dumps(trained | {k: v for k, v in configs.items() if "config _" not in k}))


def save_checkpoint(accelerator, state, args, trained):
    """(all processes) Everything that moves, into output_dir/checkpoint-N. Returns whether that succeeded.

    Written to a temporary sibling, synced to disk, then renamed: a directory of that name is always whole. Older ones
    are pruned only afterwards. A full disk costs this checkpoint, not the run.
    """
    output = Path(args.output_dir)
    final = output / f"checkpoint-{state.step}"
    temporary = output / f"unfinished-{final.name}"
    sums = {"|".join(names): accelerator.reduce(row, "sum") for names, row in state.averages.sums.items()}
    counts = {name: accelerator.reduce(getattr(state, name), "sum") for name in ("log_counts", "restart_counts")}

    def prepare():
        for leftover in output.glob("unfinished-*"):
            shutil.rmtree(leftover)
        temporary.mkdir()

    def write_own():
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        own = {"cpu": torch.get_rng_state(), "cuda": cuda, "recent": state.recent}
        torch.save(own, temporary / f"process-{accelerator.process_index}.pt")

    def write_state():
        save_weights(state.generator, temporary / "generator.safetensors")
        save_weights(state.discriminator, temporary / "discriminator.safetensors")
        ema = state.ema.state_dict() if state.ema else {}
        if ema:
            names = [name for name, _ in state.generator.named_parameters()]
            safetensors.torch.save_file(dict(zip(names, ema.pop("shadow_params"))), temporary / "ema.safetensors")
        optimizers = {name: optimizer.state_dict() for name, optimizer in state.optimizers.items()}
        scaler = accelerator.scaler.state_dict() if accelerator.scaler else {}
        moving = {"optimizers": optimizers, "scaler": scaler, "ema": ema, "averages": sums, **counts}
        moving["lecam_anchors"] = state.lecam_anchors
        torch.save(moving, temporary / "training.pt")

    def finish():
        progress = {"step": state.step, "samples_seen": state.samples_seen, "restart_tokens": state.restart_tokens}
        progress |= {"seed": args.seed, "tracker_run": state.tracker_run, "processes": accelerator.num_processes}
        progress |= {"settled": state.settled, "versions": versions(), "trained": trained}
        progress["files"] = manifest(sorted(temporary.iterdir()))
        (temporary / "progress.json").write_text(json.dumps(progress, indent=2))
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        if final.exists():  # the same step again, after resuming from an earlier one
            final.rename(output / f"unfinished-old-{final.name}")
        temporary.rename(final)
        sync(output)

    def prune():
        with keep_going("remove old checkpoints"):
            past = [path for path in checkpoints(output) if step_of(path) <= state.step]
            for old in past[: -args.checkpoints_total_limit] if args.checkpoints_total_limit else []:
                old.rename(output / f"unfinished-{old.name}")  # never half of one under its own name
            for leftover in output.glob("unfinished-*"):
                shutil.rmtree(leftover)

    main = accelerator.is_main_process
    parts = [[prepare] * main, [write_own, *[write_state] * main], [finish, prune] * main]
    for part in parts:
        error = None
        try:
            for work in part:
                work()
        except (*WRITE_ERRORS, RuntimeError) as failure:  # torch.save raises the last
            error = first_line(failure)
        error = next(filter(None, gather_object([error])), None)
        if error:
            good = next(reversed(checkpoints(output)), "none")
            logger.error(f"Could not save {final}: {error}; training goes on, the last good checkpoint is {good}")
            if main:
                shutil.rmtree(temporary, ignore_errors=True)
            return False
    logger.info(f"Saved {final}")
    return True


def save_weights(network, path):
    safetensors.torch.save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path)


def sync(path):
    """Force a file or directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_progress(checkpoint):
    return json.loads((checkpoint / "progress.json").read_text()) if checkpoint else None


def load_checkpoint(accelerator, state, checkpoint, args, trained):
    """(all processes) The reverse of `save_checkpoint`; UserError where what is trained has changed."""
    progress = read_progress(checkpoint)
    for key in progress["trained"] | trained:
        was, now = progress["trained"].get(key), trained.get(key)
        remedy = "restore it, or start afresh in another --output_dir"
        require(was == now, f"--resume_from_checkpoint: {key} was {was} in {checkpoint} and is {now} now; {remedy}")
    state.generator.load_state_dict(safetensors.torch.load_file(checkpoint / "generator.safetensors"))
    state.discriminator.load_state_dict(safetensors.torch.load_file(checkpoint / "discriminator.safetensors"))
    moving = torch.load(checkpoint / "training.pt", map_location="cpu", weights_only=True)
    for name, optimizer in state.optimizers.items():
        groups = optimizer.state_dict()["param_groups"]  # flags of this run, not of the last
        optimizer.load_state_dict(moving["optimizers"][name] | {"param_groups": groups})
    if accelerator.scaler and moving["scaler"]:
        accelerator.scaler.load_state_dict(moving["scaler"])
    if args.use_ema:
        state.start_ema(args.ema_decay)
        if moving["ema"]:
            shadow = safetensors.torch.load_file(checkpoint / "ema.safetensors", device=str(accelerator.device))
            shadow = [shadow[name] for name, _ in state.generator.named_parameters()]
            state.ema.load_state_dict(moving["ema"] | {"shadow_params": shadow, "decay": args.ema_decay})
        else:
            logger.warning(f"{checkpoint} holds no EMA: it starts from the weights there")
    state.step, state.samples_seen = progress["step"], progress["samples_seen"]
    state.samples_logged = state.samples_seen
    state.tracker_run, state.restart_tokens = progress["tracker_run"], progress["restart_tokens"]
    share = 1 if accelerator.is_main_process else 0  # sums over processes: the first one carries them on
    for names, row in moving["averages"].items():
        state.averages.sums[tuple(names.split("|"))] = row.to(accelerator.device) * share
    state.lecam_anchors.copy_(moving["lecam_anchors"])
    state.log_counts.copy_(moving["log_counts"] * share)
    state.restart_counts.copy_(moving["restart_counts"] * share)
    if progress["processes"] == accelerator.num_processes:
        own = torch.load(checkpoint / f"process-{accelerator.process_index}.pt", map_location="cpu", weights_only=True)
        state.recent = own["recent"].to(accelerator.device)
        torch.set_rng_state(own["cpu"])
        if own["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["cuda"])
    else:
        was, now = progress["processes"], accelerator.num_processes
        logger.info(f"{was} processes before, {now} now: the images go on where they were, sums differ in order")
    logger.info(f"Resumed from {checkpoint}: step {state.step}, {state.samples_seen} images seen")


def versions():
    modules = {"torch": torch, "diffusers": diffusers, "accelerate": accelerate, "timm": timm}
    modules |= {"datasets": datasets, "torchmetrics": torchmetrics}
    return {"python": sys.version.split()[0]} | {name: module.__version__ for name, module in modules.items()}


@contextmanager
def as_exported(state):
    """Inside, the generator is in eval mode and holds the EMA's weights, when there is one; nothing is copied."""
    pairs = list(zip(state.generator.parameters(), state.ema.shadow_params)) if state.ema else []
    training = state.generator.training

    def swap():
        for parameter, shadow in pairs:
            parameter.data, shadow.data = shadow.data, parameter.data

    swap()
    state.generator.eval()
    try:
        yield
    finally:
        swap()
        state.generator.train(training)


def plain_vqmodel(generator, **config):
    """A VQModel as diffusers knows it with the generator's weights, codes folded, on the CPU; `config` overrides."""
    model = VQModel.from_config({k: v for k, v in generator.config.items() if not k.startswith("_")} | config)
    weights = generator.state_dict() | {"quantize.embedding.weight": generator.quantize.codebook().detach()}
    model.load_state_dict({name: weight.cpu() for name, weight in weights.items()})
    return model


@torch.no_grad()
@exact_fp32()
def export(accelerator, state, items, args, output):
    """(main process) vqmodel/, discriminator/ and image_processor/ for diffusers, and a model card, in `output`.

    `scaling_factor` is 1 / the standard deviation of the latents of up to 256 training images, so that a latent
    diffusion model that multiplies by it sees unit variance; with --train_only the latents are as before.
    """
    with as_exported(state):
        latents = []
        batches = training_batches(items, args, 0, accelerator)
        for _ in range(max(1, min(256, 0 if args.streaming else len(items)) // args.train_batch_size)):
            x = to_signed(next(batches), accelerator.device)
            latents.append(state.generator.encode(to_model(x, args)).latents.cpu().double())
        deviation = torch.cat(latents).std(correction=0).clamp(min=1e-6).item()
        factor = state.generator.config.scaling_factor if args.train_only else round(1 / deviation, 5)
        model = plain_vqmodel(state.generator, scaling_factor=factor)
    model.save_pretrained(output / "vqmodel")
    state.discriminator.save_pretrained(output / "discriminator")
    side, signed = 2 ** (len(model.config.block_out_channels) - 1), args.pixel_range == "signed"
    processor = VaeImageProcessor(vae_scale_factor=side, do_normalize=signed, do_convert_rgb=True)
    processor.save_config(output / "image_processor")
    (output / "README.md").write_text(model_card(state, model, args))
    logger.info(f"Exported {output / 'vqmodel'}; scaling_factor {model.config.scaling_factor}")


def model_card(state, model, args):
    """README.md for the Hub: what the model is, how to load it, how it was trained."""
    side = 2 ** (len(model.config.block_out_channels) - 1)
    last = [line for line in read_metrics(args) if "val/" in str(line)][-1:]
    clip = ".clamp(0, 1)" if args.pixel_range == "unit" else ""  # which diffusers leaves out then
    flags = "\n".join(f"{name}: {value}" for name, value in public_config(args).items() if value != "")
    return f"""---
library_name: diffusers
tags: [vqgan, image-tokenizer]
---
# VQGAN image tokenizer

{model.config.num_vq_embeddings} codes of dimension {model.quantize.vq_embed_dim}, one per {side} x {side} pixels.
Trained for {state.step} steps on {state.samples_seen} images at {args.resolution} pixels. Held-out metrics (`_nN`: over N
images) and how they were measured:

```json
{json.dumps(last[0] if last else {}, indent=2)}
```

```python
import torch
from diffusers import VQModel
from diffusers.image_processor import VaeImageProcessor

model = VQModel.from_pretrained(repository, subfolder="vqmodel")
processor = VaeImageProcessor.from_config(VaeImageProcessor.load_config(repository, subfolder="image_processor"))
with torch.no_grad():
    reconstruction = processor.postprocess(model(processor.preprocess(image)).sample{clip})[0]
```

```
{flags}
```
"""


def create_repository(args):
    """(main process) Id of the repository to upload to, created before training: a bad token shows now."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    logger.info(f"Contacting the Hugging Face Hub to create {name}")
    with explained(f"--push_to_hub: the Hub did not create {name}"):
        return HfApi(token=args.hub_token).create_repo(name, exist_ok=True).repo_id


def upload(args, repository):
    ignored = ["bad-step-*", "checkpoint-*", "unfinished-*", "wandb/*", f"{args.logging_dir}/*"]
    with explained(f"--push_to_hub: {repository} was not uploaded", f"; the result is in {args.output_dir}"):
        api = HfApi(token=args.hub_token)
        api.upload_folder(repo_id=repository, folder_path=args.output_dir, ignore_patterns=ignored)
    logger.info(f"Uploaded to {repository}")


# ---- Validation ----------------------------------------------------------------------------------------------------


def load_validation_images(args):
    """uint8 [n, 3, resolution, resolution]: short side resized, centre cropped; None without --validation_images."""
    images = []
    for path in args.validation_images:
        with explained(f"--validation_images: cannot read {path}", errors=UNREADABLE), PIL.Image.open(path) as image:
            images.append(to_square(image, args.resolution))
    return torch.stack(images) if images else None


class PooledFeatures(TimmModel):
    """uint8 images [batch, 3, height, width] -> pooled features [batch, num_features] of a timm model, at its size."""

    def __init__(self, name, weights, cache_dir):
        backbone = load_backbone("frechet_weights", name, weights, cache_dir, num_classes=0)
        super().__init__(backbone, backbone.pretrained_cfg["input_size"][-2:])
        self.num_features = self(torch.zeros(2, 3, *self.size, dtype=torch.uint8)).shape[1]

    @torch.no_grad()
    def forward(self, images):
        return self.outputs(self.resized(images.to(self.mean.dtype) / 255).clamp(0, 1))


class Evaluation:
    """Held-out images, and the networks that judge their reconstructions."""

    def __init__(self, accelerator, items, perceptual, args):
        self.items, self.args, self.accelerator = items, args, accelerator
        at_most = args.num_validation_samples or (500 if not args.eval_only else None)
        self.n = at_most if isinstance(items, datasets.IterableDataset) else min(at_most or len(items), len(items))
        self.distances = {f"perceptual_{args.timm_model_backend}": perceptual} if perceptual else {}
        self.frechet = {}
        offered = {"lpips": self.load_lpips} if args.lpips_weights != "none" else {}
        offered |= {"rfid": self.load_inception} if args.fid else {}
        offered |= {"frechet": self.load_frechet} if args.frechet_backend else {}
        if args.resolution < SSIM_WINDOW:
            logger.warning(f"val/ssim is left out: its window needs --resolution {SSIM_WINDOW}")
        for name, load in offered.items():
            loaded = error = None
            with accelerator.local_main_process_first():  # nothing may leave before its barrier
                try:
                    loaded = load()
                except UserError as failure:
                    error = str(failure)
            error = next(filter(None, gather_object([error])), None)
            require(not error or args.save_best != name, f"--save_best {name}: {error}")
            if error:
                logger.warning(f"val/{name} is left out: {error}")
            else:
                (self.distances if name == "lpips" else self.frechet).update(loaded)
        for network in [*self.distances.values(), *self.frechet.values()]:
            network.to(accelerator.device)
        for name, metric in self.frechet.items():
            metric.orig_dtype = torch.get_default_dtype()  # left unset where a process has no image
            features = len(metric.real_features_sum)
            if self.n and self.n < 2 * features:
                logger.warning(f"val/{name}: {self.n} images are few for {features} features; compare at equal N only")

    def load_lpips(self):
        weights, resolution, cache = self.args.lpips_weights, max(64, self.args.resolution), self.args.cache_dir
        return {"lpips_vgg16": PerceptualLoss("vgg16", None, weights, resolution, cache, "lpips_weights")}

    def load_inception(self):
        """Inception as torch-fidelity and the first FID code have it: TensorFlow's weights and its resizing."""
        missing = importlib.util.find_spec("torch_fidelity") is None
        require(not missing, "--fid: needs the torch-fidelity package; pip install torch-fidelity")
        source = self.args.fid_weights
        if not source:
            logger.info("Fetching Inception's weights for --fid from github.com, unless they are cached")
        hint = "; --fid_weights takes pt_inception-2015-12-05-6726825d.pth from torch-fidelity's releases"
        with explained(f"--fid: no Inception weights from {source or 'github.com'}", hint):
            metric = FrechetInceptionDistance(2048, feature_extractor_weights_path=source, antialias=False)
            return {"rfid_inception": metric}

    def load_frechet(self):
        features = PooledFeatures(self.args.frechet_backend, self.args.frechet_weights, self.args.cache_dir)
        return {f"frechet_{self.args.frechet_backend}": FrechetInceptionDistance(features)}

    @torch.no_grad()
    @exact_fp32()
    def __call__(self, generator):
        """(all processes) Metrics over the first `n` held-out images, each counted once, and how often codes were used.

        generator: a VQModel with our Quantizer, in eval mode. Everything is measured in fp32 on reconstructions rounded
        to 8 bits: PSNR in dB (at most 100), SSIM, perceptual distances, Frechet distances; the codebook's use, with
        the expected use `bound` of equally likely codes, its perplexity, and the mean squared error of the quantiser.
        """
        args, accelerator = self.args, self.accelerator
        counts = torch.zeros(generator.quantize.n_e, dtype=torch.long)
        sums, n = {}, 0
        rank, world = accelerator.process_index, accelerator.num_processes
        for numbers, images in held_out_batches(self.items, self.n, args, rank, world):
            x = to_signed(images, accelerator.device)
            x_hat, codes = generator.decode(generator.encode(to_model(x, args)).latents, return_dict=False)
            rounded = to_uint8(from_model(x_hat, args))
            if args.save_reconstructions:
                save_pairs(args.save_reconstructions, numbers, images, rounded.cpu())
            scores = self.score(images.to(accelerator.device), rounded)
            scores["quantization_error"] = (codes.z - codes.e).square().mean()
            for name, score in scores.items():
                sums[name] = sums.get(name, 0) + score.item() * len(images)
            counts += torch.bincount(codes.indices.cpu(), minlength=len(counts))
            n += len(images)
        everyone = gather_object([(sums, counts, n)])
        counts, n = sum(counts for _, counts, _ in everyone), sum(n for _, _, n in everyone)
        if not n:
            return {}, counts
        names = next(sums for sums, _, n in everyone if n)
        metrics = {name: sum(sums.get(name, 0) for sums, _, _ in everyone) / n for name in names}
        metrics |= codebook_use(counts)
        for name, metric in self.frechet.items():
            metrics[name] = metric.compute().item() if n > 1 else math.nan  # torchmetrics adds up all processes
            metric.reset()
        return {f"val/{name}_n{n}": value for name, value in metrics.items() if math.isfinite(value)}, counts

    def score(self, images, rounded):
        """Means over a batch of uint8 images and reconstructions [batch, 3, height, width]; updates the Frechet sums."""
        x, x_hat = (to_signed(i, i.device) / 2 + 0.5 for i in (images, rounded))
        psnr = torchmetrics.functional.image.peak_signal_noise_ratio
        scores = {"psnr": psnr(x_hat, x, 1.0, reduction="none", dim=(1, 2, 3)).clamp(max=100).mean()}
        if x.shape[-1] >= SSIM_WINDOW:
            options = {"data_range": 1.0, "kernel_size": SSIM_WINDOW, "return_full_image": True}
            full = torchmetrics.functional.image.structural_similarity_index_measure(x_hat, x, **options)[1]
            border = SSIM_WINDOW // 2  # where torchmetrics reflects the image
            scores["ssim"] = full[..., border:-border, border:-border].mean()
        for name, distance in self.distances.items():  # not through accelerate's autocast
            scores[name] = PerceptualLoss.forward(distance, x * 2 - 1, x_hat * 2 - 1)
        for metric in self.frechet.values():
            metric.update(images, real=True)
            metric.update(rounded, real=False)
        return scores

    def protocol(self, weights):
        """What has to be the same for two numbers to be comparable."""
        args = self.args
        source = args.validation_data_dir or args.dataset_name or args.train_data_dir or "images/train"
        part = args.validation_split or (f"{args.validation_fraction} held out with seed {args.seed}")
        return {
            "weights": weights,
            "data": source if args.validation_data_dir else f"{source}, {part}",
            "resolution": args.resolution,
            "crop": "centre, side as the short one, resized by torch (bicubic, antialiased)",
            "rounding": "reconstructions clipped and rounded to 8 bits",
            "ssim": "gaussian window 11, sigma 1.5, data range 1, border of 5 pixels cropped",
            "distances": {name: network.layers for name, network in self.distances.items()},
            "frechet": {name: metric.real_features_sum.numel() for name, metric in self.frechet.items()},
            "precision": "fp32",
            "versions": versions(),
        }


def codebook_use(counts):
    """Use, its bound for equally likely codes, perplexity exp(H) and its share, of counts [codes]."""
    tokens, codes = counts.sum().item(), len(counts)
    perplexity = torch.special.entr(counts.double() / max(1, tokens)).sum().exp().item()
    return {
        "codebook_used": (counts > 0).double().mean().item(),
        "codebook_bound": 1 - math.exp(-tokens / codes),
        "perplexity": perplexity,
        "perplexity_share": perplexity / codes,
    }


def save_pairs(folder, numbers, images, rounded):
    """uint8 batches as folder/original/N.png and folder/reconstruction/N.png."""
    for name, batch in (("original", images), ("reconstruction", rounded)):
        (Path(folder) / name).mkdir(parents=True, exist_ok=True)
        for i, image in zip(numbers, batch):
            PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).save(Path(folder) / name / f"{i:06d}.png")


def validate(accelerator, state, evaluation, images, items, args):
    """(all processes) Evaluate the weights that would be exported, show reconstructions, keep the best export."""
    metrics, extra = {}, {}
    with as_exported(state):
        if evaluation:
            metrics, counts = evaluation(state.generator)
            if metrics:
                extra["protocol"] = evaluation.protocol("EMA" if state.ema else "generator")
                show_code_use(accelerator, counts, state.step)
            else:
                logger.warning("None of the held-out images can be read: nothing was measured")
    if images is not None and accelerator.is_main_process:
        metrics |= show_images(accelerator, state, images, args)
    if metrics:
        write_metrics(accelerator, metrics, state.step, args, **extra)
    if args.save_best and accelerator.is_main_process:
        keep_best(accelerator, state, items, metrics, args)
    return metrics


@torch.no_grad()
@exact_fp32()
def show_images(accelerator, state, images, args):
    """(main process) Reconstruct `images` in fp32 with the weights that would be exported.

    Writes output_dir/validation/step-N.png, a strip original | reconstruction | absolute difference for each, and
    shows the strips on the trackers. Returns their mean PSNR in dB.
    """
    pairs = []
    with as_exported(state):
        for image in images.split(1):
            x = to_signed(image, accelerator.device)
            x_hat = state.generator.decode(state.generator.encode(to_model(x, args)).latents).sample
            pairs.append((image, to_uint8(from_model(x_hat, args)).cpu()))
    psnr = torchmetrics.functional.image.peak_signal_noise_ratio
    scores = [psnr(x_hat / 255.0, x / 255.0, data_range=1.0).item() for x, x_hat in pairs]
    strips = [torch.cat([x, x_hat, (x.int() - x_hat.int()).abs().to(torch.uint8)], dim=3) for x, x_hat in pairs]
    strips = torch.cat(strips)  # [n, 3, resolution, 3 * resolution]
    folder = Path(args.output_dir) / "validation"
    column = strips.permute(0, 2, 3, 1).flatten(0, 1).numpy()
    with keep_going("write validation images"):
        folder.mkdir(exist_ok=True)
        PIL.Image.fromarray(column).save(folder / f"step-{state.step}.png")
        for tracker in accelerator.trackers:
            shown = strips if tracker.name == "tensorboard" else strips.permute(0, 2, 3, 1)
            tracker.log_images({"validation": shown.numpy()}, step=state.step)
    return {f"val/images_psnr_n{len(images)}": sum(scores) / len(scores)}


def show_code_use(accelerator, counts, step):
    """A histogram on the trackers of how often each code is chosen; 1 is as often as if all were equally likely."""
    use = counts * (len(counts) / max(1, counts.sum().item()))
    with keep_going("write to the trackers"):
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_histogram("val/code_use", use, step)
            if tracker.name == "wandb":
                import wandb

                tracker.log({"val/code_use": wandb.Histogram(use.numpy())}, step=step)


def keep_best(accelerator, state, items, metrics, args):
    """(main process) Export to output_dir/best when --save_best is better than what best.json there says."""
    best, before, new = (Path(args.output_dir) / name for name in ("best", "best-before", "unfinished-best"))
    key = next((key for key in metrics if key.startswith(f"val/{args.save_best}_")), None)
    earlier = []
    for folder in (best, before):  # the second after a kill between the two renames below
        with suppress(OSError, ValueError, KeyError):
            earlier.append(json.loads((folder / "best.json").read_text())[key])
    if not key or any(BETTER[args.save_best](value, metrics[key]) == value for value in earlier):
        return
    with keep_going("keep the best export"):
        shutil.rmtree(new, ignore_errors=True)
        export(accelerator, state, items, args, new)
        (new / "best.json").write_text(json.dumps({"step": state.step} | metrics, indent=2))
        if best.exists():
            shutil.rmtree(before, ignore_errors=True)
            best.rename(before)
        new.rename(best)
        shutil.rmtree(before, ignore_errors=True)
        logger.info(f"Best so far: {key} {metrics[key]:.5g} at step {state.step}, in {best}")


def evaluate_only(args):
    """--eval_only: one JSON line on stdout."""
    accelerator = start_accelerator(args)
    args.seed = args.seed or 0
    set_seed(args.seed)
    generator = build_generator(args).to(accelerator.device).eval()
    with accelerator.local_main_process_first():
        _, held_out = load_data(args)
        perceptual = build_perceptual(args)
    evaluation = Evaluation(accelerator, held_out, perceptual, args)
    logger.info(f"Evaluating {args.pretrained_model_name_or_path} at {args.resolution} pixels")
    metrics, _ = evaluation(generator)
    require(metrics, "--eval_only: none of the held-out images can be read; name others with --validation_data_dir")
    if accelerator.is_main_process:
        print(json.dumps(metrics | {"protocol": evaluation.protocol(args.pretrained_model_name_or_path)}), flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


# ---- Reporting -----------------------------------------------------------------------------------------------------


def public_config(args):
    """Flags for trackers and cards: no secrets, plain values (TensorBoard takes no lists)."""
    flags = {name: value for name, value in vars(args).items() if "token" not in name}
    return {k: v if isinstance(v, (int, float, str)) else " ".join(map(str, v)) if v else "" for k, v in flags.items()}


class TqdmHandler(logging.Handler):
    """Log lines above the progress bar, on stderr."""

    def emit(self, record):
        with stderr_may_be_gone():
            tqdm.write(self.format(record), file=sys.stderr)


class Clock:
    """Wall time of training since the last `read`, without pauses for validation and checkpoints."""

    def __init__(self):
        self.start, self.paused, self.waited = time.perf_counter(), 0.0, 0.0

    @contextmanager
    def timing(self, what):
        start = time.perf_counter()
        yield
        setattr(self, what, getattr(self, what) + time.perf_counter() - start)

    def read(self, images):
        seconds = max(time.perf_counter() - self.start - self.paused, 1e-9)
        metrics = {"speed/images_per_sec": images / seconds, "speed/data_time": self.waited / seconds}
        self.__init__()
        return metrics


def report(accelerator, state, clock, bar, args):
    """(all processes) Means over the last log window to the trackers, metrics.jsonl and the progress bar."""
    metrics = state.averages.read(accelerator)
    use = codebook_use(accelerator.reduce(state.log_counts, "sum").cpu())
    state.log_counts.zero_()
    metrics |= {"codebook/used": use["codebook_used"], "codebook/perplexity": use["perplexity"]}
    metrics["opt/lr"] = state.optimizers["generator"].param_groups[0]["lr"]
    metrics["opt/discriminator_lr"] = state.optimizers["discriminator"].param_groups[0]["lr"]
    metrics.setdefault("opt/adversarial_weight", adversarial_weight(state.step - 1, args))
    warn_of_discriminator(state, metrics, args)
    metrics |= clock.read(images=state.samples_seen - state.samples_logged)
    state.samples_logged = state.samples_seen
    if accelerator.device.type == "cuda":
        metrics["speed/peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    write_metrics(accelerator, metrics, state.step, args)
    shown = {"loss/pixel": "pixel", "loss/perceptual": "perceptual", "disc/loss": "disc", "codebook/used": "codes"}
    bar.set_postfix({name: f"{metrics[key]:.3g}" for key, name in shown.items() if key in metrics})


def warn_of_discriminator(state, metrics, args):
    """One line, once, when the discriminator of the last log window has won or collapsed."""
    settled = state.step > args.discriminator_start + args.discriminator_warmup
    if state.warned or not settled or "disc/accuracy" not in metrics:
        return
    accuracy, gap = metrics["disc/accuracy"], abs(metrics["disc/real"] - metrics["disc/fake"])
    if accuracy > 0.98:
        advice = "has won, the generator learns little from it; lower --discr_learning_rate or raise --lecam_weight"
    elif abs(accuracy - 0.5) < 0.02 and gap < 0.02:
        advice = "has collapsed; raise --discr_learning_rate, or give it time with a lower --adversarial_weight"
    else:
        return
    state.warned = True
    logger.warning(f"Step {state.step}: the discriminator is right {accuracy:.0%} of the time: it {advice}")


def write_metrics(accelerator, metrics, step, args, **extra):
    """(main process) One line of output_dir/metrics.jsonl, with what is `extra` there, and the trackers."""
    if accelerator.is_main_process:
        with keep_going("write metrics"), open(Path(args.output_dir) / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step} | metrics | extra) + "\n")
    with keep_going("write to the trackers"):
        accelerator.log(metrics, step=step)


def read_metrics(args):
    """The lines of metrics.jsonl, without one cut short by a full disk or a kill."""
    path, lines = Path(args.output_dir) / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def cut_metrics(args, step):
    """(main process) Drop the lines of metrics.jsonl and a best export beyond `step`: its steps are taken again."""
    for folder in (Path(args.output_dir) / "best", Path(args.output_dir) / "best-before"):
        with suppress(OSError, ValueError, KeyError):
            if json.loads((folder / "best.json").read_text())["step"] > step:
                shutil.rmtree(folder)
    path = Path(args.output_dir) / "metrics.jsonl"
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(line) + "\n" for line in read_metrics(args) if line["step"] <= step))
    new.replace(path)


def report_gradient_shares(shares):
    """Log which term steers the decoder at the first step, and warn of one that drowns the others."""
    logger.info("Gradient at x_hat: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    for name, share in shares.items():
        if share > 0.9 and len(shares) > 1:
            logger.warning(f"{name} makes up {share:.0%} of the gradient at x_hat; consider a lower --{name}_weight")


def summary(accelerator, state, perceptual, items, args):
    """Start-up lines: data, batch arithmetic, networks, memory."""
    sizes = [sum(p.numel() for p in network.parameters()) for network in (state.generator, state.discriminator)]
    bytes_each = torch.get_default_dtype().itemsize
    held = (4 * sizes[0] + (4 * sizes[1] if args.adversarial_weight else 0)) * bytes_each / 2**30
    average = sizes[0] * bytes_each / 2**30
    batch = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    images = "a stream of images" if args.streaming else f"{len(items)} images"
    logger.info(f"Training on {images} at {args.resolution} pixels for {args.max_train_steps} steps, seed {args.seed}")
    logger.info(
        f"Step: {args.train_batch_size} images x {args.gradient_accumulation_steps} micro-batches x "
        f"{accelerator.num_processes} processes = {batch}"
    )
    logger.info(f"Generator {sizes[0] / 1e6:.1f} M parameters, discriminator {sizes[1] / 1e6:.1f} M")
    logger.info(
        f"Weights, gradients and optimisers: {held:.2f} GiB without EMA, {held + average:.2f} GiB with EMA "
        f"(EMA is {'on' if args.use_ema else 'off'}); activations come on top"
    )
    if perceptual:
        logger.info(f"Perceptual layers of {args.timm_model_backend}: {', '.join(perceptual.layers)}")
    if args.adversarial_weight:
        start, ramp = args.discriminator_start, args.discriminator_warmup
        logger.info(f"Discriminator from step {start}, at full weight from step {start + ramp}")


# ---- Training ------------------------------------------------------------------------------------------------------


def start_accelerator(args):
    """Accelerator, logging, threads; UserError for launch modes that are not tested."""
    if not logger.handlers:
        logger.addHandler(TqdmHandler())
    logging.getLogger("timm").setLevel(logging.ERROR)
    trackers = {"all": ["tensorboard", "wandb"], "none": None}.get(args.report_to, args.report_to)
    project = ProjectConfiguration(args.output_dir, str(Path(args.output_dir) / args.logging_dir))
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        chosen = os.environ.get(f"ACCELERATE_USE_{name}", "false") not in ("false", "0", "")
        require(not chosen, f"accelerate config: {name} is not supported; use plain multi-GPU")
    compiled = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no"
    require(not compiled, "accelerate config: torch dynamo is not supported there; choose no, and use --torch_compile")
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=3))  # others wait while one downloads, saves or uploads
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, log_with=trackers, project_config=project, kwargs_handlers=[ddp, patient]
    )
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    kind = accelerator.distributed_type
    plain = kind in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    require(plain, f"accelerate config: {kind.value} is not supported; use plain multi-GPU")
    if accelerator.device.type == "cpu":
        require(accelerator.mixed_precision != "fp16", "--mixed_precision fp16: needs a GPU; use bf16 or no")
        if accelerator.mixed_precision == "bf16":
            logger.warning("--mixed_precision bf16: many times slower than no on CPUs without bf16 instructions")
        if os.environ.get("OMP_NUM_THREADS") == "1" and "ACCELERATE_MIXED_PRECISION" in os.environ:
            torch.set_num_threads(cores_per_process())  # the launcher set one thread because nobody chose
    if accelerator.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = args.allow_tf32
    return accelerator


def check_shared(accelerator, args):
    """(all processes) UserError when the nodes do not share output_dir."""
    output = Path(args.output_dir)
    probe = output / f".shared-{broadcast_object_list([uuid.uuid4().hex])[0]}"
    if accelerator.is_main_process:
        probe.touch()
    accelerator.wait_for_everyone()
    shared = all(gather_object([probe.exists()]))
    if accelerator.is_main_process:
        probe.unlink()
    require(shared, f"--output_dir: {output} is not the same directory on every node; choose one that they share")


def check_room(state, args):
    """UserError when a checkpoint does not fit on the disk of output_dir, a warning when not all of them do."""
    if args.checkpointing_steps:
        free, one = shutil.disk_usage(args.output_dir).free, checkpoint_bytes(state)
        planned = (args.max_train_steps - state.step) // args.checkpointing_steps + 1
        planned = min(planned, (args.checkpoints_total_limit or planned) + 1)
        room = f"{free / 2**30:.2f} GiB free in {args.output_dir}, a checkpoint takes {one / 2**30:.2f} GiB"
        require(free > one, f"--output_dir: {room}; make room, choose another directory or --checkpointing_steps 0")
        if free < planned * one:
            logger.warning(f"{room}, and {planned} are planned; see --checkpoints_total_limit")


def checkpoint_bytes(state):
    """Size of a checkpoint: weights, two moments for each, EMA."""
    sizes = [sum(p.numel() * p.element_size() for p in n.parameters()) for n in (state.generator, state.discriminator)]
    return (4 if state.ema else 3) * sizes[0] + 3 * sizes[1]


def settle_flags(accelerator, items, args, checkpoint=None):
    """Fill in what depends on the data and the processes: steps, schedules, learning rates.

    A start of the discriminator that was a fraction of the run stays where it was when the run is resumed and prolonged.
    Returns what was asked for, and what came of it.
    """
    batch = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    if args.max_train_steps is None:
        args.max_train_steps = math.ceil(len(items) * args.num_train_epochs / batch)
    before, settled = (read_progress(checkpoint) or {}).get("settled", {}), {}
    for flag in ("discriminator_start", "discriminator_warmup"):
        asked = value = getattr(args, flag)
        if not isinstance(value, int):
            value = min(args.max_train_steps // 10, 20000) if value is None else round(value * args.max_train_steps)
            value = before[flag]["steps"] if flag in before and before[flag]["asked"] == asked else value
        setattr(args, flag, value)
        settled[flag] = {"asked": asked, "steps": value}
    if args.scale_lr:
        args.learning_rate, args.discr_learning_rate = args.learning_rate * batch, args.discr_learning_rate * batch
    return settled


def train(args):
    accelerator = start_accelerator(args)
    check_shared(accelerator, args)
    checkpoint = checkpoint_to_resume(args)
    if args.seed is None:
        drawn = read_progress(checkpoint)["seed"] if checkpoint else random.SystemRandom().randrange(2**31)
        args.seed = broadcast_object_list([drawn])[0]
    set_seed(args.seed)
    generator, discriminator = build_generator(args), build_discriminator(args)
    images = load_validation_images(args)
    with accelerator.local_main_process_first():
        items, held_out = load_data(args)
        perceptual = build_perceptual(args)
    if accelerator.is_main_process and not args.streaming:
        SampleStream(items, args)[0]  # data that cannot be read shows before anything is written
    evaluation = Evaluation(accelerator, held_out, perceptual, args) if held_out is not None else None
    settled = settle_flags(accelerator, items, args, checkpoint)
    trained = what_is_trained(args, generator, discriminator, items)
    repository = create_repository(args) if args.push_to_hub and accelerator.is_main_process else None

    state = TrainingState(generator, discriminator, args, accelerator.device)
    state.settled = settled
    if checkpoint:
        load_checkpoint(accelerator, state, checkpoint, args, trained)
    else:
        if args.codebook_init == "kmeans":
            initialise_codebook(accelerator, state, items, args)
        if args.use_ema:
            state.start_ema(args.ema_decay)
    if args.torch_compile:
        compile_networks(generator, discriminator, perceptual, args)
    generator, discriminator = accelerator.prepare(generator, discriminator)
    for name, optimizer in state.optimizers.items():
        state.optimizers[name] = accelerator.prepare_optimizer(optimizer)
    if perceptual:
        perceptual = accelerator.prepare_model(perceptual, evaluation_mode=True)
    summary(accelerator, state, perceptual, items, args)
    check_room(state, args)
    if accelerator.is_main_process:
        cut_metrics(args, state.step)
    tracker_options = {
        "wandb": {"id": state.tracker_run, "resume": "allow", "dir": args.output_dir},
        "tensorboard": {"purge_step": state.step + 1},
    }
    accelerator.init_trackers(args.tracker_project_name, public_config(args), tracker_options)

    with signals_noted(state.watch):
        validated = train_steps(
            accelerator, generator, discriminator, state, perceptual, items, evaluation, images, args, trained
        )
    if accelerator.is_main_process and not state.stopped:
        hint = "; make room, and run the same command again with --resume_from_checkpoint latest"
        with explained(f"--output_dir: cannot write the result to {args.output_dir}", hint, WRITE_ERRORS):
            export(accelerator, state, items, args, Path(args.output_dir))
        for name, value in (validated or {}).items():
            if "psnr" in name:
                logger.info(f"{name}: {value:.2f} dB")
        if repository:
            upload(args, repository)
    for tracker in accelerator.trackers:  # before any process ends: a launcher stops the others then
        tracker.finish()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    lost = f"--output_dir: the last checkpoint could not be saved in {args.output_dir}; "
    require(state.saved, lost + "make room, and run the same command again with --resume_from_checkpoint latest")
    if state.stopped:
        logger.info(f"Stopped at step {state.step}; to go on, the same command with --resume_from_checkpoint latest")
    return STOPPED if state.stopped else 0


def train_steps(accelerator, generator, discriminator, state, perceptual, items, evaluation, images, args, trained):
    """The loop, to the last step or a signal. Returns the last validation's metrics."""
    total, start, validated = args.max_train_steps, args.discriminator_start, None
    schedule = build_schedule(args.lr_scheduler, args.lr_warmup_steps, total)
    discr_schedule = build_schedule(args.discr_lr_scheduler, args.lr_warmup_steps, max(1, total - start))
    batches = training_batches(items, args, state.samples_seen, accelerator)
    bar = tqdm(total=total, initial=state.step, disable=not accelerator.is_main_process, desc="Steps")
    clock = Clock()
    while state.step < total and not state.stopped:
        with clock.timing("waited"):
            micro_batches = [next(batches) for _ in range(args.gradient_accumulation_steps)]
        micro_batches = [to_signed(x, accelerator.device) for x in micro_batches]
        set_learning_rate(state.optimizers["generator"], args.learning_rate * schedule(state.step))
        discr_rate = args.discr_learning_rate * discr_schedule(max(0, state.step - start))
        set_learning_rate(state.optimizers["discriminator"], discr_rate)
        weight = adversarial_weight(state.step, args)
        kept = generator_step(accelerator, generator, state, perceptual, micro_batches, weight, args)
        if weight > 0:
            discriminator_step(accelerator, discriminator, state, kept, args)
        state.step += 1
        state.samples_seen += sum(map(len, micro_batches)) * accelerator.num_processes
        bar.update()

        last = state.step == total
        state.stopped = state.watch.read(accelerator, args)
        state.watch.send(accelerator, state.step, [x for x, _ in kept])
        if last or accelerator.num_processes == 1 and state.watch.signal:  # nobody to agree with
            state.stopped = state.watch.read(accelerator, args)
        if due(state.step, args.codebook_restart_steps) and state.step <= 0.9 * total:  # the last codes need to settle
            restart_dead_codes(accelerator, state)
        if due(state.step, args.log_steps) or last:
            report(accelerator, state, clock, bar, args)
        with clock.timing("paused"):
            if due(state.step, args.validation_steps) or last:
                validated = validate(accelerator, state, evaluation, images, items, args)
            elif early(state.step, args) and accelerator.is_main_process:
                show_images(accelerator, state, images, args)
            if due(state.step, args.checkpointing_steps) or (last and args.checkpointing_steps) or state.stopped:
                state.saved = save_checkpoint(accelerator, state, args, trained)
    bar.close()
    return validated


def set_learning_rate(optimizer, learning_rate):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def early(step, args):
    """--early_images: at the powers of two before the first validation."""
    return args.early_images and step < (args.validation_steps or step + 1) and step & (step - 1) == 0


def due(step, every):
    return every > 0 and step % every == 0


# ---- Entry ---------------------------------------------------------------------------------------------------------


def main(argv=None):
    """Exit status: 0 done, 2 something to mend, in one line on stderr, 3 saved and stopped by a signal."""
    args = parse_args(argv)
    if args.hub_token:  # wandb records the command line
        sys.argv = [word.replace(args.hub_token, "***") for word in sys.argv]
    try:
        return evaluate_only(args) if args.eval_only else train(args)
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 or isinstance(error, LocalError):
            line = re.split("(?:User|Local)Error: ", str(error).splitlines()[-1])[-1]
            tqdm.write(f"train_vqgan.py: error: {line}", file=sys.stderr)  # on a line of its own, bar or not
        return 2
    except torch.OutOfMemoryError:
        advice = "lower --train_batch_size, raise --gradient_accumulation_steps, and leave --gradient_checkpointing on"
        print(f"train_vqgan.py: error: out of GPU memory: {advice}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
