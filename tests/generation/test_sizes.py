"""What sizes, lengths and rates a model admits."""

import dataclasses

import pytest

from walt_jax.errors import UserError
from walt_jax.generation.sizes import Sizes
from walt_jax.models import DenoiserConfig
from walt_jax.models.named import DENOISERS

FACTORS = (4, 8, 8)
FIXED = Sizes((5, 16, 28), FACTORS, 8.0)
ANY = Sizes((5, 32, 32), FACTORS, 8.0, steps=(1, 2, 4))
BOUNDED = dataclasses.replace(ANY, bounded=True)


def test_steps_are_those_of_patches_windows_and_upsampling():
    model = dataclasses.replace(
        DENOISERS["walt-l-any-size"], windows=((1, 0, 0), (5, 8, 4)), patch_size=(1, 2, 2),
        relative_bias=False,
    )  # fmt: skip
    assert Sizes.of(model, FACTORS, 8.0) == Sizes((5, 32, 32), FACTORS, 8.0, (5, 16, 8))
    tokens = DENOISERS["walt-l-tokens"]
    assert Sizes.of(tokens, FACTORS, 8.0).steps == (1, 2, 2)
    assert not Sizes.of(tokens, FACTORS, 8.0).bounded
    small = dataclasses.replace(tokens, positions="factorised")
    assert Sizes.of(small, FACTORS, 8.0).bounded
    assert Sizes.of(DenoiserConfig(), FACTORS, 8.0).steps is None


def test_pixels_and_latents():
    assert FIXED.video_shape == (17, 128, 224)
    assert ANY.latents(33, (128, 64)) == (9, 16, 8)
    assert ANY.pixels((9, 16, 8)) == (33, 128, 64)
    assert [FIXED.fitting(n) for n in (1, 4, 5, 16, 17, 18)] == [1, 1, 5, 13, 17, 17]


@pytest.mark.parametrize(
    ("sizes", "asked", "size"),
    [
        (FIXED, None, (128, 224)),
        (FIXED, "128x224", (128, 224)),
        (FIXED, "7:4@128", (128, 224)),
        (FIXED, "16:9@169", (128, 224)),  # a square of as many pixels
        (ANY, None, (256, 256)),
        (ANY, "64x160", (64, 160)),
        (ANY, (64, 160), (64, 160)),
        (ANY, "512", (512, 512)),
        (ANY, "1:1@256", (256, 256)),
        (ANY, "9:16@256", (320, 192)),
        (ANY, "16:9@256", (192, 320)),
        (BOUNDED, "64", (64, 64)),
    ],
)
def test_sizes_that_fit(sizes, asked, size):
    assert sizes.size(asked) == size


def test_the_size_that_an_aspect_becomes_is_said(caplog):
    with caplog.at_level("INFO", logger="walt_jax"):
        assert ANY.size("9:16@64") == (96, 32)
        ANY.size("64x64")
    assert [r.message for r in caplog.records] == ["The size 9:16@64 is 96x32 here."]


def test_a_video_gives_its_aspect():
    assert ANY.size(None, like=(720, 1280)) == (192, 320)
    assert FIXED.size(None, like=(720, 1280)) == (128, 224)
    assert BOUNDED.size(None, like=(720, 1280)) == (256, 256)  # 320 is more than it has


@pytest.mark.parametrize(
    ("sizes", "asked", "sentence"),
    [
        (FIXED, "9:16@256", "Frames of 341x192 do not fit this model: it samples 128x224 alone"),
        (FIXED, "64", "Frames of 64x64 do not fit"),
        (ANY, "64x80", "multiples of 16 pixels and widths of 32, such as 256x256"),
        (ANY, "0x32", "do not fit"),
        (ANY, "1:1@8", "A resolution of 8 is too small"),
        (BOUNDED, "512", "at most 256x256"),
        (ANY, "large", "'large' is no size: write width:height@resolution"),
        (ANY, "0:1@256", "is no size"),
    ],
)
def test_sizes_that_do_not_fit_are_one_sentence(sizes, asked, sentence):
    with pytest.raises(UserError, match=sentence):
        sizes.size(asked)


def test_seconds_are_the_nearest_frames():
    assert FIXED.frames() == 17
    assert FIXED.frames(2) == FIXED.frames(2.125) == FIXED.frames(2.2) == 17
    assert [ANY.frames(s) for s in (0.1, 1, 2, 4.05)] == [1, 9, 17, 33]
    groups = dataclasses.replace(ANY, steps=(5, 2, 4))  # windows of 5 latent frames
    assert [groups.frames(s) for s in (0.1, 2, 4, 5)] == [17, 17, 37, 37]
    assert BOUNDED.frames(1) == 9
    with pytest.raises(UserError, match=r"4 seconds are 33 frames at 8 fps.*has 17 \(2.12 s\)"):
        FIXED.frames(4)
    with pytest.raises(UserError, match="1 seconds are 9 frames"):
        FIXED.frames(1)
    with pytest.raises(UserError, match="has 17 or less"):
        BOUNDED.frames(4)
    with pytest.raises(UserError, match="longer than 0 seconds"):
        ANY.frames(0)


def test_rates_are_parts_of_the_models():
    assert [FIXED.every(fps) for fps in (None, 8, 4, 8 / 3, 2)] == [1, 1, 2, 3, 4]
    for fps in (6, 16, 0, -1, float("nan")):
        with pytest.raises(UserError, match="fps do not fit this model, which makes 8"):
            FIXED.every(fps)
