"""I3D in PyTorch as its common ports are written: a convolution, a norm and a ReLU a unit."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from walt_jax.evaluation import i3d_weights


def same(x: torch.Tensor, window: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    """Zeros around, as TensorFlow's SAME puts them; what is pooled is never negative."""
    pads = []
    for size, k, s in zip(x.shape[:1:-1], window[::-1], strides[::-1]):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads) if any(pads) else x


class Unit(nn.Module):
    def __init__(self, shape: tuple[int, ...], stride: int = 1) -> None:
        super().__init__()
        *window, into, out = shape
        self.window, self.strides = tuple(window), (stride,) * 3
        self.conv = nn.Conv3d(into, out, self.window, self.strides, bias=False)
        self.norm = nn.BatchNorm3d(out, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.conv(same(x, self.window, self.strides))))


class TorchI3D(nn.Module):
    """Videos (B, 3, T, 224, 224) in [-1, 1] to logits (B, 400), averaged over time."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.ModuleDict(
            {
                name.replace("/", ":"): Unit(shape, 2 if name == "Conv3d_1a_7x7" else 1)
                for name, shape in i3d_weights.units()
            }
        )
        self.logits = nn.Conv3d(1024, 400, 1)

    def load(self, tensors: dict[str, np.ndarray]) -> None:
        """Takes the tensors of `i3d_weights`."""
        with torch.no_grad():
            for name, _ in i3d_weights.units():
                unit = self.unit(name)
                kernel = tensors[f"{name}/{i3d_weights.KERNEL}"].transpose(4, 3, 0, 1, 2)
                unit.conv.weight.copy_(torch.from_numpy(kernel.copy()))
                to = (unit.norm.bias, unit.norm.running_mean, unit.norm.running_var)
                for part, target in zip(i3d_weights.NORM, to):
                    target.copy_(torch.from_numpy(tensors[f"{name}/{part}"].copy()))
            kernel, bias = (tensors[f"{i3d_weights.LOGITS}/conv_3d/{p}"] for p in "wb")
            self.logits.weight.copy_(torch.from_numpy(kernel.transpose(4, 3, 0, 1, 2).copy()))
            self.logits.bias.copy_(torch.from_numpy(bias.copy()))

    def unit(self, name: str) -> Unit:
        return self.units[name.replace("/", ":")]

    def pool(self, x: torch.Tensor, window: tuple, strides: tuple) -> torch.Tensor:
        return F.max_pool3d(same(x, window, strides), window, strides)

    def mixed(self, x: torch.Tensor, name: str) -> torch.Tensor:
        a, b1, b2, c1, c2, d = (self.unit(f"{name}/{role}") for role in i3d_weights.roles(name))
        pooled = self.pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([a(x), b2(b1(x)), c2(c1(x)), d(pooled)], 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.unit("Conv3d_1a_7x7")(x), (1, 3, 3), (1, 2, 2))
        x = self.unit("Conv3d_2c_3x3")(self.unit("Conv3d_2b_1x1")(x))
        x = self.pool(x, (1, 3, 3), (1, 2, 2))
        for name in i3d_weights.MIXED:
            if name == "Mixed_4b":
                x = self.pool(x, (3, 3, 3), (2, 2, 2))
            if name == "Mixed_5b":
                x = self.pool(x, (2, 2, 2), (2, 2, 2))
            x = self.mixed(x, name)
        return self.logits(F.avg_pool3d(x, (2, 7, 7), 1)).mean((2, 3, 4))
