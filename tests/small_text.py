"""Folders of tiny text encoders in Hugging Face's layout, with random weights."""

import json

import jax
import numpy as np
import safetensors.numpy

from walt_jax.models.text import ClipConfig, ClipTextConfig, T5Config, T5TextConfig
from walt_jax.parallel.sharding import path_of

WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "green", "square", "moves", "left", "up")
T5 = T5Config(
    width=16,
    mlp_width=24,
    head_width=4,
    num_heads=4,
    num_layers=2,
    vocabulary=16,
    buckets=8,
    max_distance=16,
    dtype="float32",
)
CLIP = ClipConfig(
    width=16,
    mlp_width=24,
    num_layers=3,
    num_heads=2,
    vocabulary=16,
    places=12,
    activation="gelu",
    dtype="float32",
)


def t5(folder, **changes):
    return T5TextConfig(**{"path": str(folder), "model": T5, "max_tokens": 6, **changes})


def clip(folder, **changes):
    return ClipTextConfig(**{"path": str(folder), "model": CLIP, "max_tokens": 6, **changes})


def about(text):
    """The config.json of an encoder."""
    m = text.model
    if isinstance(text, ClipTextConfig):
        return {
            "model_type": "clip_text_model",
            "hidden_size": m.width,
            "intermediate_size": m.mlp_width,
            "num_hidden_layers": m.num_layers,
            "num_attention_heads": m.num_heads,
            "vocab_size": m.vocabulary,
            "max_position_embeddings": m.places,
            "hidden_act": m.activation,
        }
    return {
        "model_type": "umt5" if m.bias_by_layer else "t5",
        "feed_forward_proj": "gated-gelu",
        "d_model": m.width,
        "d_ff": m.mlp_width,
        "d_kv": m.head_width,
        "num_heads": m.num_heads,
        "num_layers": m.num_layers,
        "vocab_size": m.vocabulary,
        "relative_attention_num_buckets": m.buckets,
        "relative_attention_max_distance": m.max_distance,
    }


def tensors(text, seed=0):
    """Random tensors by the names of the files."""
    rng, found = np.random.default_rng(seed), {}
    for place, leaf in jax.tree_util.tree_leaves_with_path(text.network.shapes()):
        path = path_of(place)
        name, stacked = text.tensors()[path][0], path.startswith("layers/")
        for layer in range(leaf.shape[0] if stacked else 1):
            x = 0.2 * rng.standard_normal(leaf.shape[stacked:]).astype(np.float32)
            x = 1 + x if path.endswith("scale") else x
            x = np.ascontiguousarray(x.T) if path.endswith("kernel") else x
            found[name.format(layer)] = x
    return found


def write(text, *, shards=1, seed=0, tokenizer=True):
    """Writes the folder that the config names; returns what is in it."""
    from pathlib import Path

    folder, found = Path(text.path), tensors(text, seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(about(text)))
    names = sorted(found)
    if shards == 1:
        safetensors.numpy.save_file(found, folder / "model.safetensors")
    else:
        index = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: found[name] for name in names[i::shards]}
            safetensors.numpy.save_file(part, folder / file)
            index |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    if tokenizer:
        write_tokenizer(folder)
    return found


def write_tokenizer(folder):
    """A tokenizer.json that knows WORDS and ends each text as T5's does."""
    tokens = [{"id": i, "content": w, "special": i < 3} for i, w in enumerate(WORDS)]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [plain | token for token in tokens if token["special"]],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "</s>", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate(WORDS)},
            "unk_token": "<unk>",
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(values))
