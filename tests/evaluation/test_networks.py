"""Inception, C3D, VideoMAE and CLIP with random weights against the same networks in PyTorch."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from walt_jax.errors import UserError
from walt_jax.evaluation import c3d, clip, features, inception, videomae
from walt_jax.weights import taker

FRAMES = np.random.default_rng(0).integers(0, 256, (3, 1, 40, 56, 3)).astype(np.uint8)


def drawn(shapes):
    """Random weights that keep the variance; norms that count."""
    rng, out = np.random.default_rng(1), {}
    for name, shape in shapes.items():
        noise = rng.standard_normal(shape, np.float32)
        if name.endswith(("var", "norm.weight", "norm1.weight", "norm2.weight", "bn.weight")):
            out[name] = 1 + 0.2 * np.abs(noise)
        elif len(shape) > 1:
            out[name] = noise * np.float32(math.prod(shape[1:]) ** -0.5)
        else:
            out[name] = 0.1 * noise
    return out


def close(ours, theirs, within=2e-5):
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < within * np.abs(theirs).max()


# Inception


def torch_inception():
    """torchvision's network with the averages and the last pooling of FID's file."""
    torch = pytest.importorskip("torch")
    blocks = pytest.importorskip("torchvision.models.inception")
    F = torch.nn.functional
    network = blocks.Inception3(num_classes=1008, aux_logits=False, init_weights=False)

    def pooled(block, pool):
        def forward(x):
            plain = F.avg_pool2d
            try:
                F.avg_pool2d = lambda x, **how: pool(x, kernel_size=3, stride=1, padding=1)
                return torch.cat(type(block)._forward(block, x), 1)
            finally:
                F.avg_pool2d = plain

        block.forward = forward

    def average(x, **how):
        # The sum of those that are there over their number.
        ones = torch.ones_like(x[:1, :1])
        mean = torch._C._nn.avg_pool2d
        return mean(x, 3, 1, 1) / mean(ones, 3, 1, 1)

    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        pooled(getattr(network, f"Mixed_{name}"), average)
    pooled(network.Mixed_7c, F.max_pool2d)
    return network.eval()


@pytest.mark.slow
def test_inception_is_torchvisions(tmp_path):
    torch = pytest.importorskip("torch")
    twin = torch_inception()
    state = {n: v for n, v in twin.state_dict().items() if "tracked" not in n}
    state = drawn({name: tuple(v.shape) for name, v in state.items()})
    twin.load_state_dict({n: torch.from_numpy(v) for n, v in state.items()}, strict=False)
    save_file(state, tmp_path / "inception.safetensors")
    x = torch.from_numpy(FRAMES[:, 0]).permute(0, 3, 1, 2) / 255
    x = torch.nn.functional.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
    kept = []
    twin.avgpool.register_forward_hook(lambda module, before, after: kept.append(after))
    with torch.no_grad():
        logits = twin(2 * x - 1) - twin.fc.bias
    net = features.load("inception", str(tmp_path / "inception.safetensors"))
    close(net(FRAMES), kept[0][:, :, 0, 0])
    scores = features.load("inception-logits", str(tmp_path / "inception.safetensors"))
    close(scores(FRAMES), logits)
    assert features.score_name(net) == "frechet_fixture"
    with pytest.raises(UserError, match=r"needs 1 frame a video, 4 given.*single_frames"):
        net(np.zeros((1, 4, 32, 32, 3), np.uint8))


def test_inception_takes_the_published_tensors():
    """94 convolutions with norms, and 2048 features."""
    asked = []

    def take(name, shape):
        asked.append((name, math.prod(shape)))
        return np.ones(shape, np.float32)

    units = inception.assemble(take)
    assert len(units) == 94
    weights = sum(size for name, size in asked if "running" not in name)
    assert weights == 21_785_568  # those of torchvision's network without its head
    assert units["Mixed_7c.branch3x3dbl_3b"]["kernel"].shape == (3, 1, 384, 384)


# C3D


@pytest.mark.slow
def test_c3d_is_that_of_pytorch(tmp_path):
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    shapes, channels = {"mean": (3, 16, 128, 171)}, 3
    layers = {"conv1a": 64, "conv2a": 128, "conv3a": 256, "conv3b": 256}
    layers |= dict.fromkeys(("conv4a", "conv4b", "conv5a", "conv5b"), 512)
    for name, width in layers.items():
        shapes |= {f"{name}/W": (width, channels, 3, 3, 3), f"{name}/b": (width,)}
        channels = width
    channels = 512 * 4 * 4
    for name, width in (("fc6", 4096), ("fc7", 4096), ("fc8", 101)):
        shapes |= {f"{name}/W": (width, channels), f"{name}/b": (width,)}
        channels = width
    state = drawn(shapes) | {"mean": np.random.default_rng(2).uniform(80, 120, shapes["mean"])}
    np.savez(tmp_path / "c3d_ucf101.npz", **state)
    videos = np.random.default_rng(3).integers(0, 256, (2, 16, 20, 30, 3)).astype(np.uint8)
    w = {n: torch.from_numpy(np.float32(v)) for n, v in state.items()}
    x = torch.from_numpy(videos).float().flatten(0, 1).permute(0, 3, 1, 2)
    x = F.interpolate(x, (112, 112), mode="bilinear", align_corners=True)
    x = x.unflatten(0, (2, 16)).transpose(1, 2).flip(1) - w["mean"][:, :, 8:120, 8:120]
    for name in layers:
        x = F.relu(F.conv3d(x, w[f"{name}/W"], w[f"{name}/b"], padding=1))
        if name == "conv1a":
            x = F.max_pool3d(x, (1, 2, 2))
        elif name in ("conv2a", "conv3b", "conv4b", "conv5b"):
            x = F.max_pool3d(x, 2, ceil_mode=True)
    x = x.flatten(1)
    for name in ("fc6", "fc7", "fc8"):
        x = F.linear(x if name == "fc6" else F.relu(x), w[f"{name}/W"], w[f"{name}/b"])
    net = features.load("c3d", str(tmp_path / "c3d_ucf101.npz"), allow=("trained",))
    close(net(videos), x)
    assert net.trained and net.dims == 101 and net.resize == "bilinear-corners"
    with pytest.raises(UserError, match="c3d needs 16 frames a video, 17 given: make shorter"):
        net(np.zeros((1, 17, 20, 30, 3), np.uint8))


# Transformers


def torch_encoder(state, names, depth, heads, activation, epsilon):
    """PyTorch's own encoder, with our random weights under the published `names`."""
    torch = pytest.importorskip("torch")
    width, mlp = state[names["up"].format(0) + ".weight"].shape[::-1]
    layer = torch.nn.TransformerEncoderLayer(
        width, heads, mlp, 0.0, activation, epsilon, batch_first=True, norm_first=True
    )
    encoder = torch.nn.TransformerEncoder(layer, depth, enable_nested_tensor=False).eval()
    for i, block in enumerate(encoder.layers):
        get = lambda part, i=i: torch.from_numpy(state[names["at"].format(i) + part])  # noqa: E731
        qkv = [names["qkv"](get, p) for p in ("weight", "bias")]
        with torch.no_grad():
            block.self_attn.in_proj_weight.copy_(qkv[0])
            block.self_attn.in_proj_bias.copy_(qkv[1])
            pairs = (
                (block.self_attn.out_proj, names["out"]),
                (block.norm1, names["norm1"]),
                (block.norm2, names["norm2"]),
                (block.linear1, names["up"]),
                (block.linear2, names["down"]),
            )
            for module, name in pairs:
                module.weight.copy_(torch.from_numpy(state[name.format(i) + ".weight"]))
                module.bias.copy_(torch.from_numpy(state[name.format(i) + ".bias"]))
    return encoder


def block_shapes(at, width, mlp, names):
    norm1, norm2, out, up, down = names
    shapes = {}
    for name in (norm1, norm2):
        shapes |= {f"{at}.{name}.weight": (width,), f"{at}.{name}.bias": (width,)}
    for name, o, i in ((out, width, width), (up, mlp, width), (down, width, mlp)):
        shapes |= {f"{at}.{name}.weight": (o, i), f"{at}.{name}.bias": (o,)}
    return shapes


@pytest.mark.slow
def test_videomae_is_that_of_pytorch(tmp_path):
    torch = pytest.importorskip("torch")
    width, depth = 384, 2
    shapes = {
        "patch_embed.proj.weight": (width, 3, 2, 16, 16),
        "patch_embed.proj.bias": (width,),
        "fc_norm.weight": (width,),
        "fc_norm.bias": (width,),
    }
    for i in range(depth):
        names = ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")
        shapes |= block_shapes(f"blocks.{i}", width, 4 * width, names)
        shapes[f"blocks.{i}.attn.qkv.weight"] = (3 * width, width)
        shapes |= {f"blocks.{i}.attn.{p}_bias": (width,) for p in "qv"}
    state = drawn(shapes)
    torch.save(
        {"model": {n: torch.from_numpy(v) for n, v in state.items()}, "epoch": 3},
        tmp_path / "videomae.pth",
    )

    def qkv(get, part):
        if part == "weight":
            return get(".attn.qkv.weight")
        q, v = get(".attn.q_bias"), get(".attn.v_bias")
        return torch.cat([q, torch.zeros_like(q), v])

    parts = {"out": "attn.proj", "up": "mlp.fc1", "down": "mlp.fc2"}
    parts |= {"norm1": "norm1", "norm2": "norm2"}
    names = {k: "blocks.{}." + v for k, v in parts.items()} | {"at": "blocks.{}", "qkv": qkv}
    encoder = torch_encoder(state, names, depth, 6, "gelu", 1e-6)
    video = np.random.default_rng(3).integers(0, 256, (1, 16, 60, 50, 3)).astype(np.uint8)
    x = torch.from_numpy(video[0]).permute(0, 3, 1, 2) / 255
    x = torch.nn.functional.interpolate(x, (224, 224), mode="bilinear", align_corners=False)
    w = {n: torch.from_numpy(v) for n, v in state.items()}
    kernel, bias = (w[f"patch_embed.proj.{p}"] for p in ("weight", "bias"))
    x = torch.nn.functional.conv3d(x.transpose(0, 1)[None], kernel, bias, stride=(2, 16, 16))
    x = x.flatten(2).transpose(1, 2)
    # Position 3 by the formula of the authors' program: angle 3 / 10000^(2 (j // 2) / D).
    table = videomae.positions(x.shape[1], width)
    assert table[3, 10] == pytest.approx(math.sin(3 / 10000 ** (10 / width)), rel=1e-5)
    assert table[3, 11] == pytest.approx(math.cos(3 / 10000 ** (10 / width)), rel=1e-5)
    with torch.no_grad():
        x = encoder(x + torch.from_numpy(table)).mean(1)
        norm = (w["fc_norm.weight"], w["fc_norm.bias"])
        expected = torch.nn.functional.layer_norm(x, (width,), *norm, eps=1e-6)
    net = features.load("videomae", str(tmp_path / "videomae.pth"))
    assert net.dims == width and net.name == "videomae"
    close(net(video), expected, 1e-4)


WIDTHS = {"vision_model": 128, "text_model": 64}


def clip_tensors():
    """A CLIP of 32x32 pixels, 50 tokens and two blocks a tower, with Hugging Face's names."""
    shapes = {
        "vision_model.embeddings.class_embedding": (128,),
        "vision_model.embeddings.patch_embedding.weight": (128, 3, 8, 8),
        "vision_model.embeddings.position_embedding.weight": (17, 128),
        "text_model.embeddings.token_embedding.weight": (50, 64),
        "text_model.embeddings.position_embedding.weight": (12, 64),
        "visual_projection.weight": (32, 128),
        "text_projection.weight": (32, 64),
    }
    norms = ("vision_model.pre_layrnorm", "vision_model.post_layernorm")
    for name in (*norms, "text_model.final_layer_norm"):
        width = WIDTHS[name.split(".")[0]]
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for tower, width in WIDTHS.items():
        for i in range(2):
            at = f"{tower}.encoder.layers.{i}"
            names = ("layer_norm1", "layer_norm2", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
            shapes |= block_shapes(at, width, 4 * width, names)
            for p in "qkv":
                shapes[f"{at}.self_attn.{p}_proj.weight"] = (width, width)
                shapes[f"{at}.self_attn.{p}_proj.bias"] = (width,)
    return drawn(shapes)


def torch_tower(state, tower):
    torch = pytest.importorskip("torch")
    at = f"{tower}.encoder.layers.{{}}"
    parts = {"out": "self_attn.out_proj", "up": "mlp.fc1", "down": "mlp.fc2"}
    parts |= {"norm1": "layer_norm1", "norm2": "layer_norm2"}
    names = {k: f"{at}.{v}" for k, v in parts.items()} | {"at": at}
    names["qkv"] = lambda get, part: torch.cat([get(f".self_attn.{p}_proj.{part}") for p in "qkv"])
    gelu = lambda x: x * torch.sigmoid(1.702 * x)  # noqa: E731
    return torch_encoder(state, names, 2, WIDTHS[tower] // 64, gelu, 1e-5)


@pytest.mark.slow
def test_clip_embeds_as_pytorch():
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    state = clip_tensors()
    w = {n: torch.from_numpy(v) for n, v in state.items()}
    file = clip.published.Published(taker(state, "w", "CLIP"), state.keys(), "", False)

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    pixels = np.random.default_rng(4).normal(size=(3, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        at = "vision_model.embeddings"
        kernel = w[f"{at}.patch_embedding.weight"]
        x = F.conv2d(torch.from_numpy(pixels).permute(0, 3, 1, 2), kernel, stride=8)
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([w[f"{at}.class_embedding"].expand(3, 1, -1), x], 1)
        x = norm(x + w[f"{at}.position_embedding.weight"], "vision_model.pre_layrnorm")
        x = torch_tower(state, "vision_model")(x)[:, 0]
        x = norm(x, "vision_model.post_layernorm") @ w["visual_projection.weight"].T
        close(clip.vision(clip.vision_params(file), pixels), F.normalize(x), 1e-4)
        ids, ends = np.random.default_rng(5).integers(0, 50, (2, 12)), np.array([4, 11])
        x = w["text_model.embeddings.token_embedding.weight"][torch.from_numpy(ids)]
        x = x + w["text_model.embeddings.position_embedding.weight"]
        mask = torch.nn.Transformer.generate_square_subsequent_mask(12)
        x = torch_tower(state, "text_model")(x, mask=mask)[torch.arange(2), torch.from_numpy(ends)]
        x = norm(x, "text_model.final_layer_norm") @ w["text_projection.weight"].T
        encoder, projection = clip.text_encoder(file), clip.text_projection(file)
        ids = np.where(np.arange(12) <= ends[:, None], ids, -1)
        close(clip.text(encoder, projection, jnp.asarray(ids)), F.normalize(x), 1e-4)


@pytest.mark.slow
def test_clip_matches_videos_and_texts(tmp_path):
    """The mean over frames of the cosine with the text."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<start>": 0, "<end>": 1, "red": 2, "blue": 3, "square": 4, "?": 5}
    model = tokenizers.models.WordLevel(words, unk_token="?")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    save_file(clip_tensors(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        clip.TextMatch.load(str(tmp_path))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    match = clip.TextMatch.load(str(tmp_path))
    videos = np.random.default_rng(6).integers(0, 256, (2, 3, 40, 64, 3)).astype(np.uint8)
    texts = ["red square", "a blue square"]
    found = match(videos, texts)
    embedded = match.texts(texts)
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, rtol=1e-5)
    frames = match.images(videos[1][:, None])
    assert found.shape == (2,)
    np.testing.assert_allclose(found[1], (frames @ embedded[1]).mean(), rtol=1e-5)
    # Of a wide frame only the square in its middle counts.
    wide = videos.copy()
    wide[:, :, :, :8] = 0
    np.testing.assert_allclose(match(wide, texts), found, atol=1e-5)
    assert abs(match(videos[..., ::-1], texts) - found).max() > 1e-4
    with pytest.raises(UserError, match="2 videos and 1 texts"):
        match(videos, texts[:1])


# Files


def test_missing_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("WALT_CACHE", str(tmp_path))
    for name, file in (
        ("inception", inception.FILE),
        ("c3d", c3d.FILE),
        ("videomae", videomae.FILE),
        ("clip", clip.FILE),
    ):
        with pytest.raises(UserError, match=f"{tmp_path}/{file.name} is missing: get .* there"):
            features.load(name)
        (tmp_path / "w.txt").write_text("text")
        with pytest.raises(UserError, match=r"no \.safetensors"):
            features.load(name, str(tmp_path / "w.txt"))
        np.savez(tmp_path / "w.npz", a=np.zeros(3))
        with pytest.raises(UserError, match=r"w\.npz has no tensor"):
            features.load(name, str(tmp_path / "w.npz"))


def test_published_files_are_known_by_their_hash(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.zeros(3))
    path = str(tmp_path / "w.npz")
    digest = inception.published.read(inception.FILE, path, ()).sha256
    known = inception.FILE._replace(sha256=digest[:8])
    assert inception.published.read(known, path, ()).trained
    assert not inception.published.read(inception.FILE, path, ()).trained
    assert inception.published.read(inception.FILE, path, ("trained",)).trained


def test_single_frames():
    videos = np.arange(2 * 3 * 4 * 5 * 3).reshape(2, 3, 4, 5, 3)
    frames = features.single_frames(videos)
    assert frames.shape == (6, 1, 4, 5, 3)
    np.testing.assert_array_equal(frames[4, 0], videos[1, 1])
