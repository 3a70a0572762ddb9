"""DiT against a torch twin written after the paper, and its weights from a torch file."""

import dataclasses
import io
import pickle
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from small_denoisers import SMALL, evaluate, random_params

from walt_jax.errors import UserError
from walt_jax.models.denoiser import import_dit
from walt_jax.weights import load_weights

torch = pytest.importorskip("torch")
nn = torch.nn

CONFIG = dataclasses.replace(
    SMALL,
    grid=(1, 8, 8),
    latent_channels=4,
    patch_size=(1, 2, 2),
    num_layers=2,
    windows=((0, 0, 0),),
    relative_bias=False,
    image_identity=False,
    positions="sincos",
    qk_norm=False,
    conditioning="adaln_zero",
    num_classes=5,
    learned_sigma=True,
)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, length, width = x.shape
        q, k, v = self.qkv(x).reshape(b, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, length, width))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


def modulated(x, shift, scale):
    normed = nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    return normed * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """adaLN-Zero (2212.09748, figure 3)."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn, self.mlp = Attention(width, heads), Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate1[:, None] * self.attn(modulated(x, shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulated(x, shift2, scale2))


class Twin(nn.Module):
    """A DiT with the public checkpoints' names: patches of 2, a class token for none."""

    def __init__(self, width=32, heads=4, depth=2, channels=4, size=8, classes=5):
        super().__init__()
        self.width, self.channels = width, channels
        self.x_embedder, self.t_embedder = nn.Module(), nn.Module()
        self.y_embedder, self.final_layer = nn.Module(), nn.Module()
        self.x_embedder.proj = nn.Conv2d(channels, width, 2, 2)
        self.t_embedder.mlp = nn.Sequential(
            nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.y_embedder.embedding_table = nn.Embedding(classes + 1, width)
        self.pos_embed = nn.Parameter(self.positions(size // 2), requires_grad=False)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.final_layer.linear = nn.Linear(width, 4 * 2 * channels)

    def positions(self, side):
        table = torch.zeros(1, side * side, self.width)
        quarter = self.width // 4
        for place in range(side * side):
            for half, at in enumerate((place % side, place // side)):  # the column comes first
                for i in range(quarter):
                    angle = torch.tensor(at / 10_000 ** (i / quarter))
                    table[0, place, 2 * half * quarter + i] = angle.sin()
                    table[0, place, (2 * half + 1) * quarter + i] = angle.cos()
        return table

    def forward(self, z_BCHW, t, label):
        x = self.x_embedder.proj(z_BCHW).flatten(2).transpose(1, 2) + self.pos_embed
        angles = t[:, None] * 10_000 ** (-torch.arange(128) / 128)
        c = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], 1))
        c = c + self.y_embedder.embedding_table(label)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer.adaLN_modulation(c).chunk(2, 1)
        x = self.final_layer.linear(modulated(x, shift, scale))
        side = z_BCHW.shape[-1] // 2
        x = x.reshape(-1, side, side, 2, 2, 2 * self.channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(len(x), 2 * self.channels, 2 * side, 2 * side)


@pytest.fixture(scope="module")
def twin():
    torch.manual_seed(0)
    model = Twin()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


def test_equals_the_twin_by_its_checkpoint(twin, tmp_path):
    torch.save(twin.state_dict(), tmp_path / "dit.pt")
    params = import_dit(load_weights(str(tmp_path / "dit.pt")), CONFIG)
    z, t, label = torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999]), torch.tensor([0, 4, 5])
    with torch.no_grad():
        expected = twin(z, t, label).permute(0, 2, 3, 1).numpy()
    ours = z.permute(0, 2, 3, 1)[:, None].numpy()
    out = evaluate(CONFIG, params, jnp.asarray(ours), t.numpy(), label=jnp.asarray(label.numpy()))
    assert out.shape == (3, 1, 8, 8, 8) and np.abs(expected).max() > 1
    np.testing.assert_allclose(out[:, 0], expected, atol=1e-4, rtol=1e-4)


def test_weights_of_another_model_are_refused(twin):
    tensors = {name: value.numpy() for name, value in twin.state_dict().items()}

    def refused(message, config=CONFIG, **changed):
        with pytest.raises(UserError, match=message):
            import_dit(tensors | changed, config)

    refused("hold no tensor 'blocks.2.attn.qkv.weight'", dataclasses.replace(CONFIG, num_layers=3))
    refused("Nothing reads the tensor 'blocks.1", dataclasses.replace(CONFIG, num_layers=1))
    refused("Nothing reads the tensor 'more'", more=np.zeros(3))
    refused("needs", dataclasses.replace(CONFIG, num_classes=7))
    refused("nothing for .*spatial_embedding", dataclasses.replace(CONFIG, positions="learned"))


# Torch files.


def test_torch_files_of_all_kinds_of_tensors(tmp_path):
    base = torch.arange(24.0).reshape(2, 3, 4)
    saved = {
        "float": base,
        "turned": base.permute(2, 0, 1)[1:],
        "part": base[1, 1:, ::2],
        "half": base.half(),
        "bfloat": base.bfloat16(),
        "long": torch.arange(5),
        "truth": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": nn.Parameter(base[0]),
    }
    torch.save(
        {"model": saved, "epoch": 3, "name": "x", "more": [1, (2.5, None)]}, tmp_path / "w.pt"
    )
    read = load_weights(str(tmp_path / "w.pt"))
    assert set(read) == {f"model.{name}" for name in saved}
    for name, tensor in saved.items():
        array = read[f"model.{name}"]
        assert str(array.dtype) == str(tensor.dtype).removeprefix("torch.")
        expected = tensor.detach().float().numpy()
        np.testing.assert_array_equal(array.astype(np.float32), expected)


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_code_in_a_torch_file_is_refused_and_not_run(tmp_path, capsys):
    path = tmp_path / "evil.pt"
    for program in (pickle.dumps({"a": Evil()}, protocol=2), b"cos\nsystem\n(S'id'\ntR."):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", program)
        with pytest.raises(UserError, match=r"damaged, no \.pt file"):
            load_weights(str(path))
    assert capsys.readouterr().out == ""


def test_a_tensor_behind_its_storage_is_refused(tmp_path):
    """A stride that reaches other memory of the process."""
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(4)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in files if name.endswith("data.pkl"))
    assert files[name].count(b"K\x04") == 2  # the storage's size and the tensor's
    at = files[name].rindex(b"K\x04")
    files[name] = files[name][:at] + b"K\x7f" + files[name][at + 2 :]
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        for file, data in files.items():
            archive.writestr(file, data)
    with pytest.raises(UserError, match=r"damaged, no \.pt file"):
        load_weights(str(tmp_path / "w.pt"))


def test_other_conditionings_see_the_class_and_the_time():
    """DiT's three other ways (section 3.2), of which the plain ones have no gates."""
    z, label = jnp.asarray(np.random.default_rng(0).normal(size=(3, 1, 8, 8, 4))), [0, 0, 1]
    z = jnp.broadcast_to(z[:1], z.shape).astype(jnp.float32)
    for way in ("in_context", "cross_attention", "adaln"):
        config = dataclasses.replace(CONFIG, conditioning=way)
        params = random_params(config)
        out = evaluate(config, params, z, [5, 700, 5], label=jnp.asarray(label))
        assert out.shape == (3, 1, 8, 8, 8)
        assert jnp.abs(out[0] - out[1]).max() > 1e-3 < jnp.abs(out[0] - out[2]).max(), way
