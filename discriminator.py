# Copyright 2026 the contributors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The patch discriminator of a VQGAN: judges overlapping patches of an image instead of the whole."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class Discriminator(ModelMixin, ConfigMixin):
    """PatchGAN (Isola et al. 2017, https://arxiv.org/abs/1611.07004) with GroupNorm and raw logits.

    GroupNorm in place of BatchNorm keeps every image's verdict its own: real and fake images share one pass, and
    processes need not exchange statistics.

    Args:
        in_channels: channels of the images.
        hidden_channels: channels after the first convolution; they double at each further one, up to eight times.
        depth: convolutions of stride 2. Depth 3 judges patches of 70 x 70 pixels, depth 4 of 142 x 142.
        norm_num_groups: groups of each GroupNorm.

    Raises ValueError when the channels do not divide into the groups.
    """

    @register_to_config
    def __init__(self, in_channels: int = 3, hidden_channels: int = 64, depth: int = 3, norm_num_groups: int = 32):
        super().__init__()
        if in_channels < 1 or hidden_channels < 1 or depth < 1:
            raise ValueError("in_channels, hidden_channels and depth must be at least 1")
        if norm_num_groups < 1 or hidden_channels * 2 % norm_num_groups:
            raise ValueError(
                f"hidden_channels {hidden_channels} x 2 is not divisible by norm_num_groups {norm_num_groups}"
            )
        widths = [hidden_channels * min(2**i, 8) for i in range(depth + 1)]
        layers = [nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, depth + 1):
            stride = 2 if i < depth else 1
            layers += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(norm_num_groups, widths[i]),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.layers = nn.Sequential(*layers)

    @property
    def min_resolution(self):
        """Smallest image side, in pixels: the two last convolutions of stride 1 each take one off the side."""
        return 3 * 2**self.config.depth

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [batch, in_channels, height, width] in [-1, 1] -> logits [batch, 1, h, w], h = height / 2^depth - 2.

        Positive logits say real.
        """
        return self.layers(x)
