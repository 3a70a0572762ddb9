"""What is summed over videos adds up, in any order and parts."""

import numpy as np
import pytest
import tiny_features

from walt_jax.data.sprites import SpriteConfig, sprite_video
from walt_jax.errors import UserError
from walt_jax.evaluation import frames
from walt_jax.evaluation.frechet import frechet_distance, inception_score, kernel_distance
from walt_jax.evaluation.measures import (
    FeatureSums,
    Frechet,
    InceptionScore,
    Means,
    ReadBack,
    Shown,
)
from walt_jax.evaluation.moments import Moments
from walt_jax.evaluation.protocols import Protocol

VIDEOS = np.random.default_rng(0).integers(0, 256, (12, 5, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def net():
    return tiny_features.load()


def in_parts(make, videos, *more):
    """Two measures, each of half of the videos in odd batches, joined by their states."""
    order = np.random.default_rng(1).permutation(len(videos))
    halves = []
    for numbers in np.array_split(order, 2):
        measure = make()
        for part in np.array_split(numbers, 3):
            measure.add(part, videos[part], *(m[part] for m in more))
        halves.append(measure)
    halves[0].absorb(halves[1].state())
    return halves[0]


def whole(make, videos, *more):
    measure = make()
    measure.add(np.arange(len(videos)), videos, *more)
    return measure


def test_each_fold_has_its_own_samples(net):
    reference = Moments.of(net(VIDEOS[:, :4]))
    protocol = Protocol(num_frames=4, num_samples=4, folds=3)
    found = in_parts(lambda: Frechet(net, protocol, reference), VIDEOS).results()
    direct = [Moments.of(net(VIDEOS[i : i + 4, :4])) for i in (0, 4, 8)]
    expected = [frechet_distance(m, reference) for m in direct]
    assert found.keys() == {"frechet_fixture"}
    np.testing.assert_allclose(found["frechet_fixture"], expected, rtol=1e-9)


def test_the_kernel_distance_of_what_is_kept(net):
    real = net(VIDEOS[:, 1:5])[:8]
    protocol = Protocol(num_frames=4, num_samples=12)
    make = lambda: Frechet(net, protocol, Moments.of(real), real)  # noqa: E731
    found, measure = in_parts(make, VIDEOS).results(), whole(make, VIDEOS)
    assert found.keys() == {"frechet_fixture", "kernel_fixture"}
    expected, _ = kernel_distance(real, net(VIDEOS[:8, :4]))
    np.testing.assert_allclose(found["kernel_fixture"], expected, rtol=1e-6)
    assert measure.record["kernel"] == {"real": 8, "samples": 8}


def test_sums_of_parts(net):
    ours, theirs = (f(lambda: FeatureSums(net), VIDEOS) for f in (in_parts, whole))
    assert ours.moments[0].count == 12
    np.testing.assert_allclose(ours.moments[0].outer, theirs.moments[0].outer, rtol=1e-12)


def test_a_trained_network_of_reconstructions_makes_an_rfvd(net):
    trained = type("Trained", (), {"name": "i3d", "trained": True, "dims": 6} | {
        k: getattr(net, k) for k in ("weights_hash", "min_frames", "resize")})()  # fmt: skip
    options = (Protocol(num_frames=4), Moments.empty(6))
    assert Frechet(trained, *options)._name == "fvd"
    assert Frechet(trained, *options, prefix="r")._name == "rfvd"
    assert Frechet(net, *options, prefix="r")._name == "frechet_fixture"


def sprites(count, config):
    videos, labels = [], []
    for i in range(count):
        video = sprite_video(config, 0, i)
        videos.append(video.frames[:: len(video.frames) // 8][:8])
        labels.append(config.class_names.index(video.label_name))
    return np.stack(videos), np.array(labels)


def test_real_sprites_are_read_back():
    config = SpriteConfig(aspects=("1:1",), backgrounds=("black",), sizes=(0.4, 0.4), short_side=64,
                          shapes=("square", "triangle"), colours=("red", "blue"))  # fmt: skip
    videos, labels = sprites(16, config)
    names = config.class_names
    found = in_parts(lambda: ReadBack(names, labels, 8.0), videos).results()
    assert found["read_back"] == (1.0,) and found["read_back/shape"] == (1.0,)
    wrong = (labels + 4) % len(names)  # another shape or colour, the same direction
    found = whole(lambda: ReadBack(names, wrong, 8.0, 2, 8), videos).results()
    assert found["read_back"] == (0.0, 0.0) and found["read_back/direction"] == (1.0, 1.0)


@pytest.mark.parametrize("name", ["cat", "red cat left", "red square left up"])
def test_what_is_no_sprite(name):
    with pytest.raises(UserError, match=f"class '{name}' is no sprite"):
        ReadBack(["red square left", name], np.zeros(2, int), 8.0)


def test_means_of_pairs():
    real = np.clip(VIDEOS, 0, 250)
    make = lambda: Means({"psnr": frames.psnr}, pairs=True)  # noqa: E731
    made = in_parts(make, real + np.uint8(5), real)
    np.testing.assert_allclose(made.results()["psnr"], 10 * np.log10(255**2 / 25), rtol=1e-6)


def test_means_of_folds():
    brightness = {"mean": lambda v: v.mean((1, 2, 3, 4))}
    made = in_parts(lambda: Means(brightness, folds=3, fold_size=4), VIDEOS).results()["mean"]
    np.testing.assert_allclose(made, VIDEOS.reshape(3, -1).mean(1))


def test_the_inception_score_of_each_fold(net):
    protocol = Protocol(num_frames=4, num_samples=6, folds=2)
    found = in_parts(lambda: InceptionScore(net, protocol), VIDEOS).results()
    logits = net(VIDEOS[:, :4])
    expected = [inception_score(part, splits=1)[0] for part in (logits[:6], logits[6:])]
    assert found.keys() == {"is_fixture"}
    np.testing.assert_allclose(found["is_fixture"], expected, rtol=1e-6)


def test_single_frames_all_count():
    """A fold's frames; of the first videos the middle ones are kept."""
    net = tiny_features.load_frames()
    sums = in_parts(lambda: FeatureSums(net, 3, 4, kept=3), VIDEOS)
    frames = [net(VIDEOS[:, i : i + 1]) for i in range(5)]
    assert [m.count for m in sums.moments] == [20] * 3
    np.testing.assert_allclose(sums.moments[1].total, sum(f[4:8].sum(0) for f in frames), rtol=1e-6)
    np.testing.assert_array_equal(sums.rows, frames[2][:3])
    protocol = Protocol(num_frames=5, num_samples=12)
    found = in_parts(lambda: InceptionScore(net, protocol), VIDEOS).results()["is_fixture"]
    expected, _ = inception_score(np.concatenate(frames), splits=1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_means_of_videos_and_texts():
    texts = ("a", "abc", "ab")  # in turn
    make = lambda: Means({"n": lambda v, said: [len(t) for t in said]}, texts=texts,  # noqa: E731
                         folds=3, fold_size=4)  # fmt: skip
    found = in_parts(make, VIDEOS).results()["n"]
    assert found == (7 / 4, 9 / 4, 8 / 4)


def test_the_first_videos_are_shown():
    np.testing.assert_array_equal(
        in_parts(lambda: Shown(5, VIDEOS.shape[1:4]), VIDEOS).videos, VIDEOS[:5]
    )
