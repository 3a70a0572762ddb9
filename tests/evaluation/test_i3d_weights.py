"""I3D's weights from every layout, and by what they are recognised."""

import hashlib
import json
import shutil
import tarfile
import urllib.error
import urllib.request

import i3d_fixture
import numpy as np
import pytest
from safetensors.numpy import save_file

from walt_jax.errors import UserError
from walt_jax.evaluation import features, i3d_weights
from walt_jax.evaluation.crc32c import crc32c

i3d_fixture.needs_fixture()
PREFIX = i3d_weights.PREFIX


def same(weights, kind="fixture"):
    assert weights.kind == kind and len(weights.tensors) == 230
    for name, tensor in i3d_fixture.tensors().items():
        np.testing.assert_array_equal(weights.tensors[name.removeprefix(PREFIX)], tensor)


def write_checkpoint(prefix, tensors):
    tf = pytest.importorskip("tensorflow")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[tensors[n] for n in names],
    )
    return prefix


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """As the network's authors publish it."""
    return write_checkpoint(tmp_path_factory.mktemp("tf") / "model.ckpt", i3d_fixture.tensors())


def test_names_and_places_are_the_official_ones():
    official = json.loads((i3d_fixture.folder() / "rgb_scratch.tensors.json").read_text())
    ours = {PREFIX + name: shape for name, shape in i3d_weights.shapes().items()}
    assert ours.keys() == official.keys()
    start = 0
    for name in sorted(ours):
        assert list(ours[name]) == official[name]["shape"] and start == official[name]["offset"]
        start += official[name]["size"]
    lines = "\n".join(f"{name} {official[name]['crc32c']}" for name in sorted(official))
    digest = hashlib.sha256(lines.encode()).hexdigest()
    assert digest == i3d_weights._SCRATCH_CHECKSUMS


def test_known_files():
    known = json.loads((i3d_fixture.folder() / "known_weight_files.json").read_text())["files"]
    for file in known:
        kind = i3d_weights.BLOBS.get(file["git_blob"])
        if "rgb_imagenet" in " ".join([file["what"], *file["where"]]) or "NOT" in file["what"]:
            assert kind == "rgb_imagenet"
        elif kind is not None:
            assert kind == "rgb_scratch"
    assert known[0]["git_blob"] == i3d_weights.PUBLISHED_BLOB


def test_npz_of_the_official_names(i3d_file):
    weights = i3d_weights.read(str(i3d_file))
    same(weights)
    assert weights.sha256 == hashlib.sha256(i3d_file.read_bytes()).hexdigest()


@pytest.mark.parametrize("naming", ["piergiaj", "hassony"])
def test_pytorch_namings(tmp_path, naming):
    state = i3d_fixture.maker().torch_state(i3d_fixture.tensors(), naming)
    save_file(state, tmp_path / "i3d.safetensors")
    same(i3d_weights.read(str(tmp_path / "i3d.safetensors")))


@pytest.mark.slow
@pytest.mark.parametrize("naming", ["piergiaj", "hassony"])
def test_pytorch_files(tmp_path, naming):
    torch = pytest.importorskip("torch")
    state = i3d_fixture.maker().torch_state(i3d_fixture.tensors(), naming)
    state = {name: torch.from_numpy(np.array(v)) for name, v in state.items()}
    torch.save(state, tmp_path / "i3d.pt")
    same(i3d_weights.read(str(tmp_path / "i3d.pt")))


def test_checkpoint(checkpoint):
    same(i3d_weights.read(str(checkpoint)))
    data = checkpoint.with_name("model.ckpt.data-00000-of-00001")
    by_folder = i3d_weights.read(str(checkpoint.parent))
    same(by_folder)
    assert by_folder.sha256 == hashlib.sha256(data.read_bytes()).hexdigest()
    assert by_folder.path == str(data)


def test_data_file_alone(checkpoint, tmp_path):
    shutil.copy(checkpoint.with_name("model.ckpt.data-00000-of-00001"), tmp_path)
    same(i3d_weights.read(str(tmp_path / "model.ckpt.data-00000-of-00001")))
    path = tmp_path / "model.ckpt.data-00000-of-00001"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="50818172 bytes and no index"):
        i3d_weights.read(str(path))


def test_hub_module(tmp_path):
    """Its norms' vectors are (1, 1, 1, 1, C); as a folder and as the archive that is served."""
    tensors = {
        name: v.reshape(1, 1, 1, 1, -1) if "batch_norm" in name else v
        for name, v in i3d_fixture.tensors().items()
    }
    write_checkpoint(tmp_path / "module" / "variables" / "variables", tensors)
    (tmp_path / "module" / "saved_model.pb").write_bytes(b"a graph")
    same(i3d_weights.read(str(tmp_path / "module")))
    with tarfile.open(tmp_path / "1.tar.gz", "w:gz", compresslevel=1) as archive:
        archive.add(tmp_path / "module", ".")
    same(i3d_weights.read(str(tmp_path / "1.tar.gz")))


def test_other_weights_are_refused_unless_asked_for(tmp_path, monkeypatch):
    tensors = dict(i3d_fixture.tensors())
    name = f"{PREFIX}Logits/Conv3d_0c_1x1/conv_3d/b"
    tensors[name] = tensors[name] + np.float32(1e-3)
    np.savez(tmp_path / "mine.npz", **tensors)
    path = str(tmp_path / "mine.npz")
    with pytest.raises(UserError, match=r"mine\.npz holds an I3D .* none of the published"):
        features.load("i3d", path)
    net = features.load("i3d", path, allow=("unknown",))
    assert features.score_name(net) == "frechet_fixture"  # untold what it was trained on
    blob = i3d_weights.git_blob_id((tmp_path / "mine.npz").read_bytes())
    monkeypatch.setitem(i3d_weights.BLOBS, blob, "rgb_imagenet")
    with pytest.raises(UserError, match=r"rgb_imagenet\); FVD's was trained from scratch"):
        features.load("i3d", path, allow=("unknown",))
    net = features.load("i3d", path, allow=("rgb_imagenet",))
    assert features.score_name(net) == "fvd_i3d_imagenet"


def test_other_contents_are_refused(tmp_path):
    def refuses(tensors, message):
        np.savez(tmp_path / "w.npz", **tensors)
        with pytest.raises(UserError, match=message):
            i3d_weights.read(str(tmp_path / "w.npz"))

    tensors = i3d_fixture.tensors()
    last = f"{PREFIX}Logits/Conv3d_0c_1x1/conv_3d/w"
    refuses({"a": np.zeros(3)}, "no I3D whose names are known")
    refuses({last: tensors[last]}, r"lacks Conv3d_1a_7x7/conv_3d/w, which is \(7, 7, 7, 3, 64\)")
    wide = tensors | {last: np.zeros((1, 1, 1, 1024, 600), np.float32)}
    refuses(wide, r"has \(1, 1, 1, 1024, 600\) for Logits.*400 classes")
    state = i3d_fixture.maker().torch_state(tensors, "piergiaj")
    state["Mixed_3b.b1a.bn.weight"] = state["Mixed_3b.b1a.bn.weight"] * 2
    refuses(state, r"Mixed_3b\.b1a\.bn\.weight is not 1 everywhere")
    with pytest.raises(UserError, match=r"holds 0 TensorFlow checkpoints"):
        i3d_weights.read(str(tmp_path))
    (tmp_path / "x.tar.gz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"no \.tar\.gz archive"):
        i3d_weights.read(str(tmp_path / "x.tar.gz"))


def test_published_weights_without_a_network(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setenv("WALT_CACHE", str(tmp_path))
    name = f"{i3d_weights.PUBLISHED_BLOB}.data-00000-of-00001"
    with pytest.raises(UserError, match=f"rgb_scratch/model.*{tmp_path}.*put it there as {name}"):
        features.load("i3d")
    (tmp_path / name).write_bytes(b"another file")
    with pytest.raises(UserError, match="git blob id"):
        features.load("i3d")


def test_a_url_with_its_hash(tmp_path, monkeypatch, i3d_file):
    digest = hashlib.sha256(i3d_file.read_bytes()).hexdigest()
    monkeypatch.setenv("WALT_CACHE", str(tmp_path))
    (tmp_path / f"{digest}.npz").symlink_to(i3d_file)  # downloaded before
    found = i3d_weights.read(f"https://example.org/i3d.npz#sha256={digest}")
    assert (found.kind, found.sha256) == ("fixture", digest)
    with pytest.raises(UserError, match=r"i3d\.npz has no sha256"):
        i3d_weights.read("https://example.org/i3d.npz")


def test_checksums_are_tensorflows():
    def bitwise(data):
        register = 0xFFFFFFFF
        for byte in data:
            register ^= byte
            for _ in range(8):
                register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
        return register ^ 0xFFFFFFFF

    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720's and the catalogues' check values
    assert crc32c(bytes(32)) == 0x8A9136AA
    rng = np.random.default_rng(0)
    for size in (4, 5, 16, 31, 64, 100, 1023, 4097):
        data = rng.bytes(size)
        assert crc32c(data) == bitwise(data)
