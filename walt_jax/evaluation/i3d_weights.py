"""I3D's weights from the files in which they are found, and which weights they are.

Read: TensorFlow's checkpoint (a folder, its prefix, or its data file alone), the TF-Hub module (a
folder or .tar.gz), and .pt, .pth, .safetensors and .npz files with the official names or those of
the two common PyTorch ports. No code in them is run.
"""

import hashlib
import io
import math
import tarfile
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from etils import epath

from walt_jax.errors import UserError
from walt_jax.evaluation.crc32c import crc32c
from walt_jax.weights import git_blob_id, parse, read_file

# Where FVD's weights are published: the data file of the checkpoint, and its git blob id.
PUBLISHED = (
    "https://raw.githubusercontent.com/google-deepmind/kinetics-i3d/master/data/checkpoints/"
    "rgb_scratch/model.ckpt.data-00000-of-00001"
)
PUBLISHED_BLOB = "fa7df95674dbf3579e7fccd954e51e706b4734c1"
BLOBS = {
    PUBLISHED_BLOB: "rgb_scratch",
    "a867b87ac3a9097d200598b1d48a1b890d8ec744": "rgb_scratch",  # VideoGPT, TATS: .pt
    "2958652e0c9c48a65010c0ebda5c9cfd4edc7c18": "rgb_imagenet",  # the other checkpoint
    "2a7c22e23e6c74f50a0166ce61110bccd2ab48bb": "rgb_imagenet",  # kinetics_i3d_pytorch: .pth
    "73a4fd1d87eb3dbd97f33a9779fa1caa3d28111a": "rgb_imagenet",  # pytorch-i3d: .pt
}
# Of all tensors in the official layout: sha256 over names and checksums, and over names and bytes.
_SCRATCH_CHECKSUMS = "516a98aedd2fcfa62de345add673cc1b12606d375897b0c306161620185daa1f"
_FIXTURE_BYTES = "77c627b98229c29016bd69589bcda6ba2a04438b6c25b34b5df2507d96018cb7"

PREFIX = "RGB/inception_i3d/"
LOGITS = "Logits/Conv3d_0c_1x1"
KERNEL = "conv_3d/w"
NORM = ("batch_norm/beta", "batch_norm/moving_mean", "batch_norm/moving_variance")
STEM = {
    "Conv3d_1a_7x7": (7, 7, 7, 3, 64),
    "Conv3d_2b_1x1": (1, 1, 1, 64, 64),
    "Conv3d_2c_3x3": (3, 3, 3, 64, 192),
}
# Widths of the input and of the six convolutions, in the order of `roles`.
MIXED = {
    "Mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "Mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "Mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "Mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "Mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "Mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "Mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "Mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "Mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}


class Weights(NamedTuple):
    """I3D's tensors.

    Attributes:
      tensors: official name without "RGB/inception_i3d/" -> float32; kernels (t, h, w, in, out).
      kind: 'rgb_scratch' (FVD's), 'rgb_imagenet', 'fixture' (stand-in weights of tests) or
        'unknown'.
      sha256: of the file that holds the tensors.
      path: of that file.
    """

    tensors: dict[str, np.ndarray]
    kind: str
    sha256: str
    path: str


class _Port(NamedTuple):
    """Names in a PyTorch port: stem and logits, the six roles, and the norm."""

    logits: str
    lower: bool
    roles: tuple[str, ...]
    norm: str


_PORTS = (
    _Port("logits", False, ("b0", "b1a", "b1b", "b2a", "b2b", "b3b"), "bn"),
    _Port(
        "conv3d_0c_1x1",
        True,
        ("branch_0", "branch_1.0", "branch_1.1", "branch_2.0", "branch_2.1", "branch_3.1"),
        "batch3d",
    ),
)


def roles(mixed: str) -> list[str]:
    """The six convolutions of an Inception module, by their official names."""
    return [
        "Branch_0/Conv3d_0a_1x1",
        "Branch_1/Conv3d_0a_1x1",
        "Branch_1/Conv3d_0b_3x3",
        "Branch_2/Conv3d_0a_1x1",
        # A slip of the official graph.
        "Branch_2/Conv3d_0a_3x3" if mixed == "Mixed_5b" else "Branch_2/Conv3d_0b_3x3",
        "Branch_3/Conv3d_0b_1x1",
    ]


def units() -> Iterator[tuple[str, tuple[int, ...]]]:
    """The 57 convolutions with norms: official name and the kernel's shape."""
    yield from STEM.items()
    for mixed, (width, a, b1, b2, c1, c2, d) in MIXED.items():
        one, three = (1, 1, 1), (3, 3, 3)
        shapes = (
            *((*one, width, a), (*one, width, b1), (*three, b1, b2)),
            *((*one, width, c1), (*three, c1, c2), (*one, width, d)),
        )
        for role, shape in zip(roles(mixed), shapes):
            yield f"{mixed}/{role}", shape


def shapes() -> dict[str, tuple[int, ...]]:
    """All 230 tensors: official name without the prefix -> shape."""
    out = {}
    for scope, shape in units():
        out[f"{scope}/{KERNEL}"] = shape
        out |= {f"{scope}/{part}": shape[-1:] for part in NORM}
    out[f"{LOGITS}/conv_3d/w"] = (1, 1, 1, 1024, 400)
    return out | {f"{LOGITS}/conv_3d/b": (400,)}


def read(source: str | None) -> Weights:
    """Reads and identifies I3D's weights.

    Args:
      source: a path (gs:// too), a URL that ends in #sha256=..., or None for the published ones;
        what is remote is downloaded once.

    Raises:
      UserError: missing, damaged, or no I3D of 400 classes.
    """
    if source is None:
        path, data = read_file(PUBLISHED, PUBLISHED_BLOB)
        return _identified(_from_data_file(path, data), path, data)
    if source.startswith(("http://", "https://")):
        source = str(read_file(source)[0])
    path = epath.Path(source).expanduser()
    if path.name.endswith((".gz", ".tgz")):
        return _from_archive(path)
    if path.suffix.lower() in (".pt", ".pth", ".safetensors", ".npz"):
        path, data = read_file(source)
        return _identified(_official(parse(path, data), path), path, data)
    return _from_checkpoint(path)


def _from_archive(path: epath.Path) -> Weights:
    _, data = read_file(str(path))
    with tempfile.TemporaryDirectory() as folder:
        try:
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                archive.extractall(folder, filter="data")
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(f"{path} is no .tar.gz archive ({error}): get it again.") from error
        return _from_checkpoint(epath.Path(folder))._replace(path=str(path))


def _from_checkpoint(path: epath.Path) -> Weights:
    """A folder, a prefix, or one of the two files."""
    prefix = str(path).removesuffix(".index").removesuffix(".data-00000-of-00001")
    if path.is_dir():
        found = [*path.glob("*.index"), *path.glob("variables/*.index")]
        if len(found) != 1:
            raise UserError(
                f"{path} holds {len(found)} TensorFlow checkpoints (*.index) instead of one: give "
                "the path of a checkpoint, without .index."
            )
        prefix = str(found[0]).removesuffix(".index")
    path, data = read_file(f"{prefix}.data-00000-of-00001")
    if not epath.Path(f"{prefix}.index").exists():
        return _identified(_from_data_file(path, data), path, data)
    import tensorflow as tf  # seconds to import, and only this file needs it

    try:
        checkpoint = tf.train.load_checkpoint(prefix)
        names = checkpoint.get_variable_to_shape_map()
        tensors = {name: checkpoint.get_tensor(name) for name in names}
    except (tf.errors.OpError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{prefix} is a damaged checkpoint ({reason}): get it again.") from error
    return _identified(_official(tensors, path), path, data)


def _from_data_file(path: epath.Path, data: bytes) -> dict[str, np.ndarray]:
    """The tensors lie one after another by name, as TensorFlow writes them."""
    sizes = shapes()
    if len(data) != 4 * sum(map(math.prod, sizes.values())):
        raise UserError(
            f"{path} has {len(data)} bytes and no index beside it: an I3D's checkpoint of 230 "
            "tensors has 50818176, so get it again, with its .index file."
        )
    tensors, start = {}, 0
    for name in sorted(sizes):
        count = math.prod(sizes[name])
        tensors[name] = np.frombuffer(data, "<f4", count, start).reshape(sizes[name])
        start += 4 * count
    return tensors


def _official(found: dict[str, np.ndarray], path: epath.Path) -> dict[str, np.ndarray]:
    """Tensors of any known naming under the official names, in the official layout."""
    if f"{PREFIX}{LOGITS}/conv_3d/w" in found:
        # The module has BN's vectors as (1, 1, 1, 1, C).
        flat = {n: v.reshape(-1) if "batch_norm" in n else v for n, v in found.items()}
        flat = {n.removeprefix(PREFIX): v for n, v in flat.items()}
        return _checked(flat, {name: name for name in shapes()}, path)
    port = next((p for p in _PORTS if f"{p.logits}.conv3d.weight" in found), None)
    if port is None:
        raise UserError(
            f"{path} holds no I3D whose names are known: give one of the files that "
            "docs/evaluation.md lists."
        )
    names, plain = {}, {}
    for scope, _ in units():
        mixed, _, role = scope.partition("/")
        stem = mixed[0].lower() + mixed[1:] if port.lower else mixed
        at = f"{stem}.{port.roles[roles(mixed).index(role)]}" if role else stem
        scale = found.get(f"{at}.{port.norm}.weight")
        if scale is not None and (scale != 1).any():
            raise UserError(
                f"{path}: {at}.{port.norm}.weight is not 1 everywhere, so that this is no I3D of "
                "the published kind: give one of the files that docs/evaluation.md lists."
            )
        names[f"{scope}/{KERNEL}"] = f"{at}.conv3d.weight"
        for part, ours in zip(("bias", "running_mean", "running_var"), NORM):
            names[f"{scope}/{ours}"] = f"{at}.{port.norm}.{part}"
    for part, ours in (("weight", "w"), ("bias", "b")):
        names[f"{LOGITS}/conv_3d/{ours}"] = f"{port.logits}.conv3d.{part}"
    for name in names.values():
        if name in found:
            v = found[name]
            plain[name] = v.transpose(2, 3, 4, 1, 0) if v.ndim == 5 else v
    return _checked(plain, names, path)


def _checked(
    tensors: dict[str, np.ndarray], names: dict[str, str], path: epath.Path
) -> dict[str, np.ndarray]:
    for ours, shape in shapes().items():
        there = tensors.get(names[ours])
        if there is None or there.shape != shape:
            has = "lacks" if there is None else f"has {there.shape} for"
            raise UserError(
                f"{path} {has} {names[ours]}, which is {shape} in the I3D of 400 classes: give one "
                "of the files that docs/evaluation.md lists."
            )
    return {ours: np.ascontiguousarray(tensors[names[ours]], np.float32) for ours in names}


def _identified(tensors: dict[str, np.ndarray], path: epath.Path, data: bytes) -> Weights:
    """By the file, or else by what is in it: any file with the official tensors is known."""
    kind = BLOBS.get(git_blob_id(data))
    official = {PREFIX + name: np.ascontiguousarray(v, "<f4").data for name, v in tensors.items()}
    if kind is None:
        digest = hashlib.sha256()
        for name in sorted(official):
            digest.update(name.encode() + bytes(official[name]))
        kind = "fixture" if digest.hexdigest() == _FIXTURE_BYTES else None
    if kind is None:
        lines = (f"{name} {crc32c(bytes(official[name])):08x}" for name in sorted(official))
        digest = hashlib.sha256("\n".join(lines).encode())
        kind = "rgb_scratch" if digest.hexdigest() == _SCRATCH_CHECKSUMS else "unknown"
    return Weights(tensors, kind, hashlib.sha256(data).hexdigest(), str(path))
