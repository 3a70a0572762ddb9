"""The MAGVIT-v2 tokenizer in PyTorch: the layers of `walt_jax.models.Tokenizer`, to compare with.

Written from torch.nn alone, module for module under the same names, so that the parameters carry
over by path. Videos are (B, C, T, H, W).
"""

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from walt_jax.models import TokenizerConfig

Triple = tuple[int, int, int]


class CausalConv(nn.Conv3d):
    """Replicate padding, in time before the video alone, then a 3-D convolution."""

    def forward(self, x: Tensor) -> Tensor:
        time, height, width = self.kernel_size
        space = [n for k in (width, height) for n in ((k - 1) // 2, k // 2)]
        return super().forward(functional.pad(x, (*space, time - 1, 0), mode="replicate"))


class GroupNorm(nn.GroupNorm):
    """Group normalisation of each frame alone."""

    def __init__(self, groups: int, channels: int, affine: bool = True) -> None:
        super().__init__(groups, channels, eps=1e-6, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.transpose(1, 2)
        return super().forward(frames.flatten(0, 1)).view(frames.shape).transpose(1, 2)


class AdaptiveGroupNorm(nn.Module):
    """A group normalisation whose scale and bias are linear in the latents."""

    def __init__(self, latent_channels: int, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, affine=False)
        self.gamma = nn.Linear(latent_channels, channels)
        self.beta = nn.Linear(latent_channels, channels)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        gamma, beta = (_repeat_to(_pointwise(f, z), x.shape[2:]) for f in (self.gamma, self.beta))
        return self.norm(x) * (1 + gamma) + beta


class ResBlock(nn.Module):
    """Norm, swish, convolution, twice; a 1x1x1 shortcut where the widths differ."""

    def __init__(self, channels_in: int, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, channels_in)
        self.conv1 = CausalConv(channels_in, channels, 3, bias=False)
        self.norm2 = GroupNorm(groups, channels)
        self.conv2 = CausalConv(channels, channels, 3, bias=False)
        self.shortcut = (
            nn.Identity()
            if channels_in == channels
            else CausalConv(channels_in, channels, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(functional.silu(self.norm1(x)))
        y = self.conv2(functional.silu(self.norm2(y)))
        return y + self.shortcut(x)


class Encoder(nn.Module):
    """Pixels (B, 3, T, H, W) to latents (B, c, t, h, w)."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        groups, width = config.norm_groups, config.widths[0]
        self.conv_in = CausalConv(3, width, 3, bias=False)
        stages: list[nn.Module] = []
        for level, channels in enumerate(config.widths):
            for _ in range(config.blocks[level]):
                stages.append(ResBlock(width, channels, groups))
                width = channels
            if level < len(config.strides):
                stages.append(CausalConv(width, width, 4, stride=config.strides[level]))
        stages += [ResBlock(width, width, groups) for _ in range(config.blocks[-1])]
        self.stages = nn.Sequential(*stages)
        self.norm_out = GroupNorm(groups, width)
        self.conv_out = CausalConv(width, config.latent_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(functional.silu(self.norm_out(self.stages(self.conv_in(x)))))


class Level(nn.Module):
    """One level of the decoder: AdaGN by the latents, residual blocks, upsampling."""

    def __init__(self, config: TokenizerConfig, level: int, width: int) -> None:
        super().__init__()
        groups, channels = config.norm_groups, config.widths[level]
        self.norm = AdaptiveGroupNorm(config.latent_channels, width, groups)
        widths = [width, *[channels] * config.blocks[level]]
        self.blocks = nn.Sequential(*(ResBlock(a, b, groups) for a, b in pairwise(widths)))
        self.factors = config.strides[level - 1] if level else (1, 1, 1)
        out = math.prod(self.factors) * channels
        self.upsample = CausalConv(channels, out, 3) if level else nn.Identity()

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return _depth_to_space(self.upsample(self.blocks(self.norm(x, z))), self.factors)


class Decoder(nn.Module):
    """Latents (B, c, t, h, w) to pixels (B, 3, T, H, W)."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        groups, width = config.norm_groups, config.widths[-1]
        self.conv_in = CausalConv(config.latent_channels, width, 3)
        blocks = range(config.blocks[-1])
        self.blocks = nn.Sequential(*(ResBlock(width, width, groups) for _ in blocks))
        inputs = [width, *reversed(config.widths[1:])]
        levels = reversed(range(len(config.widths)))
        self.levels = nn.ModuleList(Level(config, i, n) for i, n in zip(levels, inputs))
        self.norm_out = GroupNorm(groups, config.widths[0])
        self.conv_out = CausalConv(config.widths[0], 3, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.blocks(self.conv_in(z))
        for level in self.levels:
            x = level(x, z)
        return self.conv_out(functional.silu(self.norm_out(x)))


class TorchTokenizer(nn.Module):
    """Encoder and decoder with continuous latents; `forward` reconstructs.

    Args:
      config: sizes; `dtype` is not read, `.to(dtype)` sets it.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def load_params(model: nn.Module, params: Mapping) -> None:
    """Copies parameters of `walt_jax` into the module of the same structure.

    Args:
      model: a module of this file.
      params: nested dict of arrays; kernels (kt, kh, kw, C, F) or (C, F) become torch's weights.

    Raises:
      RuntimeError: the names or shapes differ (torch lists them).
    """
    model.load_state_dict(torch_state(params))


def torch_state(params: Mapping) -> dict[str, Tensor]:
    """A nested dict of arrays (parameters, or gradients of them) under torch's names and shapes."""
    return {name: torch.from_numpy(array) for name, array in _flatten(params, "")}


def to_torch(x: np.ndarray, device: str) -> Tensor:
    """(B, T, H, W, C) as (B, C, T, H, W), channels last in memory."""
    return torch.tensor(np.asarray(x), device=device).movedim(-1, 1)


@torch.no_grad()
def apply(module: nn.Module, x: Tensor) -> Tensor:
    """The module without gradients, waited for."""
    y = module(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return y


def train(module: nn.Module, x: Tensor, target: Tensor | float) -> float:
    """The mean squared error to a target; its gradients are left in `.grad`."""
    module.zero_grad()
    x.grad = None
    loss = (module(x) - target).float().square().mean()
    loss.backward()
    return loss.item()


def _flatten(tree: Mapping, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif key == "kernel":
            value = np.asarray(value)
            yield f"{prefix}weight", np.moveaxis(value, (-1, -2), (0, 1)).copy()
        else:
            yield prefix + {"scale": "weight"}.get(key, key), np.array(value)


def _pointwise(linear: nn.Linear, z: Tensor) -> Tensor:
    return linear(z.movedim(1, -1)).movedim(-1, 1)


def _repeat_to(z: Tensor, grid: Triple) -> Tensor:
    """Nearest-neighbour enlargement, the first frame's copies trimmed."""
    (t, h, w), frames = grid, z.shape[2]
    if frames > 1:
        factor = (t - 1) // (frames - 1)
        z = z.repeat_interleave(factor, 2)[:, :, factor - 1 :]
    return z.repeat_interleave(h // z.shape[3], 3).repeat_interleave(w // z.shape[4], 4)


def _depth_to_space(x: Tensor, factors: Triple) -> Tensor:
    """Channels (ft, fh, fw, C) become frames and pixels; the first ft - 1 frames are dropped."""
    (b, c, t, h, w), (ft, fh, fw) = x.shape, factors
    c //= math.prod(factors)
    x = x.reshape(b, ft, fh, fw, c, t, h, w).permute(0, 4, 5, 1, 6, 2, 7, 3)
    return x.reshape(b, c, t * ft, h * fh, w * fw)[:, :, ft - 1 :]
