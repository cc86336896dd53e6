# Copyright 2026 the contributors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The patch discriminator of a VQGAN: judges overlapping patches of an image instead of the whole."""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class BlurPool(nn.Module):
    """[batch, channels, height, width] -> half the sides: blurred before every second pixel is taken (Zhang 2019,
    https://arxiv.org/abs/1904.11486), so that a shift by one pixel changes little."""

    def __init__(self):
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(taps, taps)[None, None], persistent=False)

    def forward(self, x):
        return F.conv2d(
            x, self.kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1), stride=2, padding=1, groups=x.shape[1]
        )


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

    Raises ValueError when the channels do not divide into the groups.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        hidden_channels: int = 64,
        depth: int = 3,
        norm_num_groups: int = 32,
        blur_pool: bool = False,
    ):
        super().__init__()
        if in_channels < 1 or hidden_channels < 1 or depth < 1:
            raise ValueError("in_channels, hidden_channels and depth must be at least 1")
        narrowest = hidden_channels * (1 if blur_pool else 2)
        if norm_num_groups < 1 or narrowest % norm_num_groups:
            raise ValueError(f"{narrowest} channels are not divisible by norm_num_groups {norm_num_groups}")
        widths = [hidden_channels * min(2**i, 8) for i in range(depth + 1)]
        if blur_pool:
            layers = [nn.Conv2d(in_channels, hidden_channels, 5, padding=2), nn.LeakyReLU(0.1)]
            for before, after in zip([hidden_channels, *widths], widths[:-1]):
                layers += [nn.Conv2d(before, after, 3, padding=1), BlurPool()]
                layers += [nn.GroupNorm(norm_num_groups, after), nn.LeakyReLU(0.1)]
            layers += [nn.Conv2d(after, after, 1), nn.LeakyReLU(0.1), nn.Conv2d(after, 1, 5, padding=2)]
        else:
            layers = [nn.Conv2d(in_channels, hidden_channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            for i, (before, after) in enumerate(zip(widths, widths[1:]), 1):
                layers += [nn.Conv2d(before, after, 4, stride=2 if i < depth else 1, padding=1, bias=False)]
                layers += [nn.GroupNorm(norm_num_groups, after), nn.LeakyReLU(0.2)]
            layers.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.layers = nn.Sequential(*layers)

    @property
    def min_resolution(self):
        """Smallest image side, in pixels: two convolutions of stride 1 each take one off the side, or norms need 2 x 2."""
        return 2**self.config.depth * (2 if self.config.blur_pool else 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [batch, in_channels, height, width] in [-1, 1] -> logits [batch, 1, h, w], positive ones say real.

        h = height / 2^depth with blur_pool, else height / 2^depth - 2.
        """
        return self.layers(x)
