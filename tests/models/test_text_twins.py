"""Our text encoders against transformers' in PyTorch, of random weights."""

import dataclasses

import jax
import numpy as np
import pytest
from small_text import CLIP, T5, clip, t5

from walt_jax.models.text import FrozenText
from walt_jax.models.text.t5 import relative_buckets
from walt_jax.parallel import MeshConfig, make_mesh

torch = pytest.importorskip("torch", reason="the twins are PyTorch's: pip install '.[parity]'")
transformers = pytest.importorskip(
    "transformers", reason="the twins are transformers': pip install '.[parity]'"
)
pytestmark = pytest.mark.slow
LENGTHS = (9, 12, 1)


def tokens():
    """Ids of three texts (3, 12), -1 behind them."""
    ids = np.random.default_rng(0).integers(3, 16, (len(LENGTHS), max(LENGTHS))).astype(np.int32)
    return np.where(np.arange(ids.shape[1]) < np.array(LENGTHS)[:, None], ids, -1)


def saved(model, folder, **how):
    """The model with weights far from their start, in a folder as its users find it."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape)
            parameter.copy_(1 + noise if "norm" in name and "bias" not in name else noise)
    model.eval().save_pretrained(folder, **how)
    return model


def ours(text):
    """What is read of the folder gives for `tokens`: float32 (3, 12, D)."""
    frozen = FrozenText.load(text, make_mesh(MeshConfig(), jax.devices()[:1]))
    out = jax.jit(lambda f, ids: f(ids))(frozen, tokens())
    np.testing.assert_array_equal(out.mask, tokens() >= 0)
    return frozen, np.asarray(out.tokens)


def same(found, expected):
    """Equal where there are tokens, which are no small numbers."""
    mask = tokens() >= 0
    assert np.abs(expected.numpy()[mask]).mean() > 0.1
    np.testing.assert_allclose(found[mask], expected.numpy()[mask], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "shards"), [("T5", False), ("UMT5", True), ("MT5", False)])
def test_t5_is_transformers(tmp_path, family, shards):
    sizes = {
        "d_model": 16,
        "d_ff": 24,
        "d_kv": 4,
        "num_heads": 4,
        "num_layers": 2,
        "vocab_size": 16,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
        "feed_forward_proj": "gated-gelu",
    }
    config = getattr(transformers, f"{family}Config")(**sizes)
    how = {"max_shard_size": "2KB"} if shards else {}
    twin = saved(getattr(transformers, f"{family}EncoderModel")(config), tmp_path, **how)
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    model = dataclasses.replace(T5, bias_by_layer=family == "UMT5")
    _, found = ours(t5(tmp_path, model=model))
    ids = torch.tensor(tokens())
    with torch.no_grad():
        out = twin(ids.clamp(min=0), attention_mask=(ids >= 0).long()).last_hidden_state
    same(found, out)


@pytest.mark.parametrize(("activation", "skip"), [("quick_gelu", 0), ("gelu", 1)])
def test_clip_is_transformers(tmp_path, activation, skip):
    config = transformers.CLIPTextConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=16,
        max_position_embeddings=12,
        hidden_act=activation,
        bos_token_id=1,
        eos_token_id=2,
    )
    twin = saved(transformers.CLIPTextModel(config), tmp_path)
    text = clip(tmp_path, model=dataclasses.replace(CLIP, activation=activation), clip_skip=skip)
    frozen, found = ours(text)
    ids = torch.tensor(tokens())
    # The end is where they look for it: at the first of the largest ids.
    ids = ids.clamp(max=14)
    ids[torch.arange(3), torch.tensor(LENGTHS) - 1] = 15
    ends = np.where(tokens() >= 0, ids.numpy(), -1)
    ids = ids.clamp(min=0)
    with torch.no_grad():
        out = twin(ids, output_hidden_states=True)
        norm = getattr(twin, "text_model", twin).final_layer_norm
        hidden = norm(out.hidden_states[-1 - skip])
    if not skip:
        assert torch.equal(hidden, out.last_hidden_state)
    network = text.network.bind(frozen.params)
    found, pooled = jax.jit(network.states)(ends)
    same(np.asarray(found), hidden)
    np.testing.assert_allclose(pooled, out.pooler_output, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 16), (32, 100)])
def test_buckets_are_transformers(buckets, distance):
    attention = transformers.models.t5.modeling_t5.T5Attention
    offsets = torch.arange(600)[None] - torch.arange(600)[:, None]
    theirs = attention._relative_position_bucket(
        offsets, bidirectional=True, num_buckets=buckets, max_distance=distance
    )
    np.testing.assert_array_equal(relative_buckets(600, buckets, distance), theirs)
