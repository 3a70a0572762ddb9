"""W.A.L.T's denoiser in PyTorch: the layers of `walt_jax.models.Denoiser`, to compare with.

Written from torch.nn alone, for class-conditional networks with AdaLN-LoRA, relative position bias,
learned positions and normed queries and keys: the defaults of `DenoiserConfig`. Modules are named
as they are there, so that the parameters carry over by path. Latents are (B, T, H, W, C).
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from walt_jax.kernels import resolve_window
from walt_jax.models import DenoiserConfig

Window = tuple[int, int, int]
EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention within windows of the grid."""

    def __init__(self, config: DenoiserConfig, window: Window) -> None:
        super().__init__()
        width, self.heads = config.width, config.num_heads
        self.window = resolve_window(config.tokens, window)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.q_scale = nn.Parameter(torch.ones(width // self.heads))
        self.k_scale = nn.Parameter(torch.ones(width // self.heads))
        offsets = [2 * w - 1 for w in self.window]
        self.table = nn.Parameter(torch.zeros(*offsets, self.heads))
        places = np.stack(np.unravel_index(np.arange(math.prod(self.window)), self.window))
        between = places[:, :, None] - places[:, None] + np.array(self.window)[:, None, None] - 1
        index = torch.from_numpy(np.ravel_multi_index(tuple(between), offsets))
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        windows = _to_windows(x, self.window)
        heads = self.qkv(windows).unflatten(-1, (3, self.heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (windows, heads, tokens, features)
        q = functional.layer_norm(q, q.shape[-1:], self.q_scale, eps=EPS)
        k = functional.layer_norm(k, k.shape[-1:], self.k_scale, eps=EPS)
        bias = self.table.flatten(0, 2)[self.index].permute(2, 0, 1)[None].to(q.dtype)
        y = functional.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=bias)
        y = self.out(y.transpose(1, 2).flatten(2))
        return _from_windows(y, self.window, x.shape)


class Modulation(nn.Module):
    """AdaLN-LoRA's low-rank term of one layer."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.lora_a = nn.Linear(config.width, config.adaln_rank, bias=False)
        self.lora_b = nn.Linear(config.adaln_rank, 6 * config.width, bias=False)

    def forward(self, condition: Tensor) -> Tensor:
        return self.lora_b(self.lora_a(condition))


class Layer(nn.Module):
    """Attention and MLP, modulated and gated."""

    def __init__(self, config: DenoiserConfig, window: Window) -> None:
        super().__init__()
        width, wide = config.width, round(config.width * config.mlp_ratio)
        self.modulation = Modulation(config)
        self.attention = Attention(config, window)
        self.up, self.down = nn.Linear(width, wide), nn.Linear(wide, width)

    def forward(self, x: Tensor, shared: Tensor, condition: Tensor) -> Tensor:
        vectors = (shared + self.modulation(condition))[:, None, None, None].chunk(6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        x = x + gate1 * self.attention(_modulated(x, shift1, scale1))
        hidden = functional.gelu(self.up(_modulated(x, shift2, scale2)), approximate="tanh")
        return x + gate2 * self.down(hidden)


class TimeEmbedding(nn.Module):
    """Sinusoids through two Dense layers."""

    def __init__(self, width: int, sinusoids: int = 256) -> None:
        super().__init__()
        half = sinusoids // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.dense_in, self.dense_out = nn.Linear(sinusoids, width), nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        waves = torch.cat([angles.cos(), angles.sin()], -1)
        return self.dense_out(functional.silu(self.dense_in(waves)))


class TorchDenoiser(nn.Module):
    """Latents, times and classes to the target.

    Args:
      config: sizes, with patches of one latent; `dtype` and `remat` are not read.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        width, (t, h, w) = config.width, config.grid
        self.grid = config.grid
        self.patch_in = nn.Linear(config.latent_channels, width)
        self.spatial_embedding = nn.Parameter(torch.zeros(h * w, width))
        self.temporal_embedding = nn.Parameter(torch.zeros(t, width)) if t > 1 else None
        self.time = TimeEmbedding(width)
        self.class_embedding = nn.Parameter(
            torch.zeros(config.num_classes + config.null_class, width)
        )
        self.adaln = nn.Linear(width, 6 * width)
        windows = config.windows * (config.num_layers // len(config.windows))
        self.layers = nn.ModuleList(Layer(config, window) for window in windows)
        self.adaln_out = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(width, config.latent_channels)

    def forward(self, z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        places = self.spatial_embedding.unflatten(0, self.grid[1:])
        if self.temporal_embedding is not None:
            places = places + self.temporal_embedding[:, None, None]
        x = self.patch_in(z) + places
        condition = self.time(t.float()) + self.class_embedding[label]
        shared = self.adaln(functional.silu(condition))
        for layer in self.layers:
            x = layer(x, shared, condition)
        shift, scale = self.adaln_out(functional.silu(condition))[:, None, None, None].chunk(2, -1)
        return self.patch_out(_modulated(x, shift, scale))


def torch_state(params: Mapping) -> dict[str, Tensor]:
    """A nested dict of arrays (parameters, or gradients of them) under torch's names and shapes.

    Kernels (C, F) become torch's weights, a stack of groups of layers becomes the layers one after
    another.
    """
    groups = params["stages"][0]["layers"]
    repeats = len(groups[0]["up"]["bias"])
    flat = dict(_flatten({k: v for k, v in params.items() if k != "stages"}, ""))
    for i in range(repeats * len(groups)):
        layer = dict(_flatten(groups[i % len(groups)], ""))
        flat |= {f"layers.{i}.{name}": array[i // len(groups)] for name, array in layer.items()}
    return {
        re.sub(r"kernel$", "weight", name): torch.tensor(a.T if name.endswith("kernel") else a)
        for name, a in flat.items()
    }


def evaluate(model: nn.Module, z: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """The network without gradients, waited for."""
    with torch.no_grad():
        out = model(z, t, label)
    if z.is_cuda:
        torch.cuda.synchronize()
    return out


@torch.no_grad()
def sample(
    model: nn.Module,
    noise: Tensor,
    label: Tensor,
    none: Tensor,
    scale: float,
    plan: Sequence[tuple[float, ...]],
) -> Tensor:
    """Latents by deterministic DDIM, of a network that predicts v, with guidance by class.

    Args:
      noise: (B, T, H, W, C), x at the last time.
      label, none: int (B,), classes, and the label of no class.
      scale: of guidance.
      plan: of each step the time, and signal and noise before and after it.
    """
    x, labels = noise, torch.cat([none, label])
    for t, signal, level, signal_after, level_after in plan:
        times = torch.full((2 * len(x),), t, device=x.device)
        without, told = model(torch.cat([x, x]), times, labels).chunk(2)
        v = without + scale * (told - without)
        x0, eps = signal * x - level * v, level * x + signal * v
        x = signal_after * x0 + level_after * eps
    return x


def differentiate(model: nn.Module, z: Tensor, t: Tensor, label: Tensor, target: Tensor) -> float:
    """The mean squared error to the target; its gradients are left in `.grad`."""
    model.zero_grad()
    loss = (model(z, t, label).float() - target).square().mean()
    loss.backward()
    return loss.item()


def step(optimizer: torch.optim.Optimizer, model: nn.Module, *inputs: Tensor) -> float:
    """One update, waited for."""
    loss = differentiate(model, *inputs)
    optimizer.step()
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return loss


_RENAMED = (  # a layer has one attention here, and that one window
    ("attentions.0.biases.0.", "attention."),
    ("attentions.0.norm.", "attention."),
    ("attentions.0.", "attention."),
    ("embed.", ""),
)


def _flatten(tree: Mapping, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            name = f"{prefix}{key}"
            for theirs, ours in _RENAMED:
                name = name.replace(theirs, ours)
            yield name, np.asarray(value)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def _to_windows(x: Tensor, window: Window) -> Tensor:
    """(B, T, H, W, D) to (windows, tokens in a window, D)."""
    (b, t, h, w, d), (wt, wh, ww) = x.shape, window
    x = x.view(b, t // wt, wt, h // wh, wh, w // ww, ww, d).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(-1, wt * wh * ww, d)


def _from_windows(x: Tensor, window: Window, shape: Any) -> Tensor:
    (b, t, h, w, d), (wt, wh, ww) = shape, window
    x = x.view(b, t // wt, h // wh, w // ww, wt, wh, ww, d).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(shape)
