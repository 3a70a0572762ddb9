"""One layer each of Latte, STDiT and U-ViT against torch twins written after their papers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_denoisers import SMALL

from walt_jax.models import Network
from walt_jax.models.denoiser import CrossAttentionConfig
from walt_jax.models.denoiser.block import Context, Group
from walt_jax.parallel import Layout

torch = pytest.importorskip("torch")
functional, nn = torch.nn.functional, torch.nn

WIDTH, HEADS, GRID = 32, 4, (3, 4, 4)
PLAIN = dataclasses.replace(
    SMALL, windows=((1, 0, 0), (0, 1, 1)), relative_bias=False, qk_norm=False
)


class Weights:
    """Random torch weights that keep the path and layout that the JAX layer reads them by."""

    def __init__(self, seed):
        self.random, self.tree = np.random.default_rng(seed), {}

    def put(self, path, *shape):
        value = (0.2 * self.random.standard_normal(shape)).astype(np.float32)
        node = self.tree
        *parents, leaf = (int(part) if part.isdigit() else part for part in path.split("/"))
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value[None]  # a stack of one group
        return torch.from_numpy(value)

    def linear(self, path, features_in, features):
        layer = nn.Linear(features_in, features)
        layer.weight.data = self.put(f"{path}/kernel", features_in, features).T
        layer.bias.data = self.put(f"{path}/bias", features)
        return layer

    def norm(self, path, eps):
        layer = nn.LayerNorm(WIDTH, eps=eps)
        layer.weight.data = self.put(f"{path}/scale", WIDTH)
        layer.bias.data = self.put(f"{path}/shift", WIDTH)
        return layer


def attend(q, k, v, mask=None):
    """(N, L, D) by heads."""
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def spatial(x, f):
    """f over the tokens of each frame; x (B, T, S, D)."""
    return f(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def temporal(x, f):
    """f over the frames of each place."""
    return spatial(x.transpose(1, 2), f).transpose(1, 2)


def modulated(x, shift, scale):
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def ours(config, tree, x_BTSD, skip_BTSD=None, **context):
    """The group of layers with these weights, on a grid of GRID; (B, T, S, D)."""
    network = Network.of(lambda rngs: Group(config, config.stages[-1], rngs))
    params = jax.tree.map(lambda x: x[0], tree)
    assert jax.tree.structure(params) == jax.tree.structure(network.shapes())
    grids = [
        None if x is None else jnp.asarray(x.reshape(len(x), *config.tokens, -1).numpy())
        for x in (x_BTSD, skip_BTSD)
    ]
    context = {name: jnp.asarray(value.numpy()) for name, value in context.items()}
    out = jax.jit(lambda p, a, b: network.bind(p)(a, b, Context(**context), Layout()))(
        params, *grids
    )
    return np.asarray(out).reshape(x_BTSD.shape)


def close(out, expected):
    assert expected.abs().max() > 1
    np.testing.assert_allclose(out, expected.detach().numpy(), atol=1e-4, rtol=1e-4)


def test_latte():
    """A spatial block and a temporal one, each a DiT block with its own adaLN (variant 1)."""
    weights = Weights(0)
    torch.manual_seed(0)
    x, c = torch.randn(2, 3, 16, WIDTH), torch.randn(2, WIDTH)
    expected = x
    for i, along in enumerate((spatial, temporal)):
        at = f"layers/{i}"
        qkv = weights.linear(f"{at}/attentions/0/qkv", WIDTH, 3 * WIDTH)
        out = weights.linear(f"{at}/attentions/0/out", WIDTH, WIDTH)
        up, down = weights.linear(f"{at}/up", WIDTH, 128), weights.linear(f"{at}/down", 128, WIDTH)
        ada = weights.linear(f"{at}/modulation/dense", WIDTH, 6 * WIDTH)
        vectors = ada(functional.silu(c))[:, None, None].chunk(6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        attention = lambda y: out(attend(*qkv(y).chunk(3, -1)))  # noqa: B023, E731
        expected = expected + gate1 * along(modulated(expected, shift1, scale1), attention)
        hidden = functional.gelu(up(modulated(expected, shift2, scale2)), approximate="tanh")
        expected = expected + gate2 * down(hidden)
    config = dataclasses.replace(PLAIN, conditioning="adaln_zero")
    close(ours(config, weights.tree, x, condition_BD=c), expected)


def test_stdit():
    """Open-Sora 1.0: adaLN-single, spatial, temporal, cross-attention to padded text, MLP."""
    weights, at = Weights(1), "layers/0"
    torch.manual_seed(1)
    x, shared = torch.randn(2, 3, 16, WIDTH), torch.randn(2, 6 * WIDTH)
    text, mask = torch.randn(2, 5, WIDTH), torch.arange(5) < torch.tensor([[3], [5]])
    table = weights.put(f"{at}/modulation/table", 6 * WIDTH)
    vectors = (table + shared)[:, None, None].chunk(6, -1)
    shift1, scale1, gate1, shift2, scale2, gate2 = vectors
    expected = x
    for i, along in enumerate((spatial, temporal)):
        qkv = weights.linear(f"{at}/attentions/{i}/qkv", WIDTH, 3 * WIDTH)
        out = weights.linear(f"{at}/attentions/{i}/out", WIDTH, WIDTH)
        attention = lambda y: out(attend(*qkv(y).chunk(3, -1)))  # noqa: B023, E731
        read = expected if i else modulated(expected, shift1, scale1)
        expected = expected + gate1 * along(read, attention)
    q, kv = (
        weights.linear(f"{at}/cross/q", WIDTH, WIDTH),
        weights.linear(f"{at}/cross/kv", WIDTH, 64),
    )
    out = weights.linear(f"{at}/cross/out", WIDTH, WIDTH)
    read = attend(q(expected.flatten(1, 2)), *kv(text).chunk(2, -1), mask[:, None, None])
    expected = expected + out(read).unflatten(1, expected.shape[1:3])
    up, down = weights.linear(f"{at}/up", WIDTH, 128), weights.linear(f"{at}/down", 128, WIDTH)
    hidden = functional.gelu(up(modulated(expected, shift2, scale2)), approximate="tanh")
    expected = expected + gate2 * down(hidden)
    config = dataclasses.replace(
        PLAIN,
        num_layers=1,
        order="block",
        conditioning="adaln_single",
        text_features=6,
        cross_attention=CrossAttentionConfig(queries=False, norm="none"),
    )
    context = {"condition_BD": shared, "shared_BD": shared}
    memory = {"memory_BMD": text, "memory_mask_BM": mask}
    close(ours(config, weights.tree, x, **context, **memory), expected)


def test_uvit():
    """A block of the second half: concatenation and Dense, then a pre-norm transformer layer."""
    weights, at = Weights(2), "layers/0"
    torch.manual_seed(2)
    x, skip = torch.randn(2, 3, 16, WIDTH), torch.randn(2, 3, 16, WIDTH)
    join = weights.linear("skip", 2 * WIDTH, WIDTH)
    qkv = weights.linear(f"{at}/attentions/0/qkv", WIDTH, 3 * WIDTH)
    out = weights.linear(f"{at}/attentions/0/out", WIDTH, WIDTH)
    up, down = weights.linear(f"{at}/up", WIDTH, 128), weights.linear(f"{at}/down", 128, WIDTH)
    norm1, norm2 = (weights.norm(f"{at}/norms/{i}", 1e-5) for i in (0, 1))
    y = join(torch.cat([x, skip], -1)).flatten(1, 2)
    y = y + out(attend(*qkv(norm1(y)).chunk(3, -1)))
    y = y + down(functional.gelu(up(norm2(y)), approximate="tanh"))
    config = dataclasses.replace(
        PLAIN, windows=((0, 0, 0),), num_layers=3, skips=True, conditioning="in_context"
    )
    out = ours(config, weights.tree, x, skip, condition_BD=torch.zeros(2, WIDTH))
    close(out, y.unflatten(1, x.shape[1:3]))
