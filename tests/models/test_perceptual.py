"""Perceptual distances against twins in torch, with random weights under torchvision's names."""

import dataclasses
import itertools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from walt_jax import config
from walt_jax.errors import UserError
from walt_jax.models.perceptual import LpipsVgg, Perceptual, ResNet50Logits, unit_length
from walt_jax.parallel import Layout, MeshConfig, make_mesh
from walt_jax.parallel.sharding import batch_sharding, place, replicated

VGG = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool") + (512,) * 3
RESNET = {"layer1": (64, 3), "layer2": (128, 4), "layer3": (256, 6), "layer4": (512, 3)}


def vgg_tensors():
    """Random weights of LPIPS by name; linear weights are positive, as the published ones."""
    rng, tensors, channels = np.random.default_rng(0), {}, 3
    position = 0  # torchvision counts convolutions, ReLUs and poolings
    for width in VGG:
        if width != "pool":
            shape = (width, channels, 3, 3)
            tensors[f"features.{position}.weight"] = _kernel(rng, shape)
            tensors[f"features.{position}.bias"] = 0.1 * _normal(rng, (width,))
            channels = width
        position += 1 if width == "pool" else 2
    for i, width in enumerate((64, 128, 256, 512, 512)):
        tensors[f"lin{i}.model.1.weight"] = np.abs(_normal(rng, (1, width, 1, 1)))
    return tensors


def resnet_tensors():
    """Random weights and batch statistics of a ResNet-50 by name."""
    rng, tensors = np.random.default_rng(1), {}

    def layer(conv, norm, *shape):
        tensors[f"{conv}.weight"] = _kernel(rng, shape)
        for part in ("weight", "running_var"):
            tensors[f"{norm}.{part}"] = rng.uniform(0.5, 1.5, shape[0]).astype(np.float32)
        for part in ("bias", "running_mean"):
            tensors[f"{norm}.{part}"] = 0.1 * _normal(rng, shape[:1])
        tensors[f"{norm}.num_batches_tracked"] = np.array(7)

    layer("conv1", "bn1", 64, 3, 7, 7)
    channels = 64
    for name, (width, count) in RESNET.items():
        for i in range(count):
            at = f"{name}.{i}"
            layer(f"{at}.conv1", f"{at}.bn1", width, channels, 1, 1)
            layer(f"{at}.conv2", f"{at}.bn2", width, width, 3, 3)
            layer(f"{at}.conv3", f"{at}.bn3", 4 * width, width, 1, 1)
            if i == 0:
                layer(f"{at}.downsample.0", f"{at}.downsample.1", 4 * width, channels, 1, 1)
            channels = 4 * width
    tensors["fc.weight"] = 0.02 * _normal(rng, (1000, channels))
    tensors["fc.bias"] = _normal(rng, (1000,))
    return tensors


def _normal(rng, shape):
    return rng.standard_normal(shape, np.float32)


def _kernel(rng, shape):
    return _normal(rng, shape) * np.float32(math.prod(shape[1:]) ** -0.5)


def torch_lpips(tensors, x, y):
    """LPIPS from torch.nn; (N, 3, H, W) in [-1, 1] to (N,)."""
    torch = pytest.importorskip("torch")
    nn = torch.nn
    layers, channels = [], 3
    for width in VGG:
        if width == "pool":
            layers += [nn.MaxPool2d(2, 2)]
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    features = nn.Sequential(*layers)
    named = {k: torch.from_numpy(v) for k, v in tensors.items()}
    state = {k.removeprefix("features."): v for k, v in named.items() if k.startswith("features.")}
    features.load_state_dict(state)
    features.requires_grad_(False)
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]

    def taps(image):
        found, image = [], (image - shift) / scale
        for i, layer in enumerate(features):
            image = layer(image)
            if i in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
                length = image.square().sum(1, keepdim=True).sqrt()
                found.append(image / (length + 1e-10))
        return found

    total = 0.0
    for i, (a, b) in enumerate(zip(taps(x), taps(y), strict=True)):
        weighted = nn.functional.conv2d((a - b).square(), named[f"lin{i}.model.1.weight"])
        total = total + weighted.mean((1, 2, 3))
    return total


def torch_resnet(tensors, x):
    """Logits of a ResNet-50 from torch.nn; (N, 3, H, W) in [-1, 1] to (N, 1000)."""
    torch = pytest.importorskip("torch")
    nn = torch.nn

    class Bottleneck(nn.Module):
        def __init__(self, channels, width, stride, first):
            super().__init__()
            self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(4 * width)
            self.downsample = None
            if first:
                self.downsample = nn.Sequential(
                    nn.Conv2d(channels, 4 * width, 1, stride, bias=False),
                    nn.BatchNorm2d(4 * width),
                )

        def forward(self, x):
            y = self.bn1(self.conv1(x)).relu()
            y = self.bn2(self.conv2(y)).relu()
            y = self.bn3(self.conv3(y))
            return (y + (x if self.downsample is None else self.downsample(x))).relu()

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(64)
            channels = 64
            for name, (width, count) in RESNET.items():
                blocks = []
                for i in range(count):
                    stride = 2 if i == 0 and name != "layer1" else 1
                    blocks.append(Bottleneck(channels, width, stride, i == 0))
                    channels = 4 * width
                self.add_module(name, nn.Sequential(*blocks))
            self.fc = nn.Linear(channels, 1000)

        def forward(self, x):
            x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, padding=1)
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
            return self.fc(x.mean((2, 3)))

    network = ResNet().eval().requires_grad_(False)
    network.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()})
    x = nn.functional.interpolate(x, (224, 224), mode="bilinear", align_corners=False)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    return network(((x + 1) / 2 - mean) / std)


def torch_logit_distance(tensors, x, y):
    return (torch_resnet(tensors, x) - torch_resnet(tensors, y)).square().mean(1)


MODELS = {
    "lpips": (vgg_tensors, torch_lpips, (2, 64, 48, 3)),
    "resnet50": (resnet_tensors, torch_logit_distance, (1, 64, 48, 3)),
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def case(request, tmp_path_factory):
    """A network with random weights, two batches of frames, and `run`, compiled once.

    run(x, y) gives distances and their gradients with respect to x and y.
    """
    make_tensors, twin, shape = MODELS[request.param]
    tensors, file = make_tensors(), tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_file(tensors, file)
    model = Perceptual.registry[request.param](weights=str(file))
    params = model.load()
    file.unlink()  # 60 and 100 MB

    def total(params, x, y):
        distance = model.distance(params, x, y)
        return distance.sum(), distance

    compiled = jax.jit(jax.value_and_grad(total, argnums=(1, 2), has_aux=True))

    def run(x, y, params=params):
        (_, distance), gradients = jax.device_get(compiled(params, x, y))
        return distance, *gradients

    rng = np.random.default_rng(2)
    x = rng.uniform(-1.0, 1.0, shape).astype(np.float32)
    y = np.clip(x + 0.3 * _normal(rng, shape), -1.0, 1.0)
    return types.SimpleNamespace(
        model=model, tensors=tensors, twin=twin, params=params, run=run, x=x, y=y
    )


def test_parameters_are_float32_on_the_host(case):
    leaves = jax.tree.leaves(case.params)
    assert all(isinstance(leaf, np.ndarray) and leaf.dtype == np.float32 for leaf in leaves)


def test_equals_the_twin_in_torch(case):
    torch = pytest.importorskip("torch")
    x, y = (torch.from_numpy(v.transpose(0, 3, 1, 2).copy()) for v in (case.x, case.y))
    y.requires_grad_(True)
    expected = case.twin(case.tensors, x, y)
    expected.sum().backward()
    distance, _, gradient = case.run(case.x, case.y)
    assert distance.dtype == np.float32
    np.testing.assert_allclose(distance, expected.detach().numpy(), rtol=1e-4)
    assert_close(gradient, y.grad.numpy().transpose(0, 2, 3, 1))


def assert_close(gradient, expected):
    """To 1 %: pixels that differ by 1e-7 turn so many ReLUs that gradients differ by 0.1 %."""
    assert np.isfinite(gradient).all()
    assert np.linalg.norm(gradient - expected) < 1e-2 * np.linalg.norm(expected)


def test_is_symmetric_and_differentiable_on_both_sides(case):
    distance, gradient_x, gradient_y = case.run(case.x, case.y)
    swapped, gradient_x2, gradient_y2 = case.run(case.y, case.x)
    np.testing.assert_allclose(distance, swapped, rtol=1e-4)
    assert_close(gradient_x, gradient_y2)
    assert_close(gradient_y, gradient_x2)


def test_equal_frames_are_at_distance_zero(case):
    """The compiler need not run both sides alike, so not to the last bit."""
    for equal, apart in zip(case.run(case.x, case.x), case.run(case.x, case.y), strict=True):
        assert np.abs(equal).max() < 1e-5 * np.abs(apart).max()
    assert (case.run(case.x, case.x)[0] < 1e-9).all()


def test_pixels_without_features_have_a_gradient():
    """Where every ReLU is off, the length is 0 and the gradient of its root infinite."""
    x = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_allclose(unit_length(x), [[0.0, 0.0], [0.6, 0.8]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: jnp.square(unit_length(x) - 1.0).sum())(x)).all()


@pytest.mark.parametrize("case", ["lpips"], indirect=True)
def test_bfloat16_convolutions(case):
    """They change the distance a little; it stays float32."""
    model = dataclasses.replace(case.model, dtype="bfloat16")
    distance = jax.jit(model.distance)(case.params, case.x, case.y)
    assert distance.dtype == jnp.float32
    assert 1e-5 < np.abs(distance / case.run(case.x, case.y)[0] - 1.0).max() < 0.02


def narrow(name):
    """Random parameters of a network of few channels: `distance` reads its widths from them."""
    rng = np.random.default_rng(3)

    def convolution(channels, width, size=3):
        scale = 2 * (size * size * channels) ** -0.5
        kernel = np.float32(scale) * _normal(rng, (size, size, channels, width))
        return {"kernel": kernel, "bias": 0.1 * _normal(rng, (width,))}

    if name == "lpips":
        widths = (3, 4, 4, 8, 8, 8)
        stages = [[convolution(a, b), convolution(b, b)] for a, b in itertools.pairwise(widths)]
        return {"stages": stages, "linear": [np.abs(_normal(rng, (w,))) for w in widths[1:]]}

    def block(channels):
        return {
            "conv1": convolution(channels, 4, 1),
            "conv2": convolution(4, 4),
            "conv3": convolution(4, 8, 1),
            "shortcut": convolution(channels, 8, 1),
        }

    fc = {"kernel": _normal(rng, (8, 16)), "bias": _normal(rng, (16,))}
    stages = [[block(channels)] for channels in (4, 8, 8, 8)]
    return {"conv1": convolution(3, 4, 7), "stages": stages, "fc": fc}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_eight_devices_equal_one(name):
    """Rows over context, columns over tensor: the compiler exchanges what convolutions reach."""
    model, params = Perceptual.registry[name](), narrow(name)
    x = np.random.default_rng(4).uniform(-1.0, 1.0, (4, 32, 32, 3)).astype(np.float32)
    frames = x, np.clip(x + 0.3 * _normal(np.random.default_rng(5), x.shape), -1.0, 1.0)

    def run(layout, *arguments):
        def loss(y, params, x):
            distance = model.distance(params, x, y, layout)
            return distance.mean(), distance

        gradient = jax.jit(jax.grad(loss, has_aux=True)).lower(*arguments).compile()
        return jax.device_get(gradient(*arguments)), gradient.as_text()

    (expected, distance), _ = run(Layout(), frames[1], params, frames[0])
    mesh = make_mesh(MeshConfig(data=2, tensor=2, context=2))
    params = place(params, jax.tree.map(lambda _: replicated(mesh), params))
    x, y = (place(v, batch_sharding(mesh)) for v in frames)
    with jax.set_mesh(mesh):
        (ours, of_frames), program = run(Layout(mesh), y, params, x)
    np.testing.assert_allclose(of_frames, distance, rtol=1e-4)
    assert_close(ours, expected)
    assert distance.min() > 0 and "collective-permute" in program  # the edges' exchange


# Configs and errors


@dataclasses.dataclass(frozen=True)
class Holder:
    perceptual: Perceptual | None = None


@pytest.mark.parametrize("cls", [LpipsVgg, ResNet50Logits])
def test_config_chooses_the_network_or_none(cls):
    name = next(k for k, v in Perceptual.registry.items() if v is cls)
    values = {"perceptual": {"name": name, "weights": "w.npz", "weight": 1}}
    built = config.build(Holder, values)
    assert built == Holder(cls(weights="w.npz", weight=1.0))
    assert config.build(Holder, config.to_dict(built)) == built
    assert config.build(Holder, config.override(values, ["perceptual=none"])) == Holder(None)
    assert config.build(Holder, {}) == config.build(Holder, config.to_dict(Holder())) == Holder()


@pytest.mark.parametrize(
    "override, parts",
    [
        ("perceptual.name=vgg", ("config.perceptual.name", "lpips, resnet50", "'vgg'")),
        ("perceptual.wait=1", ("config.perceptual.wait", "did you mean 'weight'?")),
        ("perceptual=lpips", ("config.perceptual", "group of keys", "'lpips'")),
    ],
)
def test_bad_config(override, parts):
    values = config.override({"perceptual": {"name": "lpips"}}, [override])
    with says(*parts):
        config.build(Holder, values)


def says(*parts):
    """Expects one sentence, on one line, that holds the parts in this order."""
    return pytest.raises(UserError, match=r"^[^\n]*" + r"[^\n]*".join(map(re.escape, parts)))


@pytest.mark.parametrize(
    "cls, tensors",
    [
        (LpipsVgg, ("VGG-16", "features.0.weight", "lin0.model.1.weight")),
        (ResNet50Logits, ("ResNet-50", "conv1.weight", "bn1.running_mean")),
    ],
)
def test_without_a_file_the_sentence_says_what_to_do(cls, tensors):
    with says("weights is empty", *tensors, "docs/weights.md", "--config.task.perceptual=none"):
        cls().load()


def test_missing_tensor(tmp_path):
    file = tmp_path / "w.npz"
    np.savez(file, **{"features.0.weight": np.zeros((64, 3, 3, 3))})
    with says("w.npz", "no tensor 'features.0.bias'", "VGG-16"):
        LpipsVgg(weights=str(file)).load()
    with says("w.npz", "no tensor 'conv1.weight'", "ResNet-50"):
        ResNet50Logits(weights=str(file)).load()


def test_tensor_of_another_shape(tmp_path):
    file = tmp_path / "w.npz"
    np.savez(file, **{"features.0.weight": np.zeros((32, 3, 3, 3))})
    with says("features.0.weight", "(32, 3, 3, 3)", "(64, 3, 3, 3)"):
        LpipsVgg(weights=str(file)).load()


def test_frames_too_small_for_lpips():
    frames = jnp.zeros((1, 8, 32, 3))
    with says("8x32", "16x16"):
        LpipsVgg().distance({}, frames, frames)
