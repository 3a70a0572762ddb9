"""`walt_jax.load` and what it samples: given frames, seeds, meshes, files."""

import json
import os
from pathlib import Path

import av
import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

import walt_jax
from walt_jax import export, sample
from walt_jax.errors import UserError
from walt_jax.generation import walt as walt_module
from walt_jax.generation.sources import read_mask, read_prompts, read_source
from walt_jax.media import write_gif, write_mp4, write_png
from walt_jax.parallel import MeshConfig, make_mesh
from walt_jax.parallel.mesh import parse_mesh

CLIPS = Path(os.environ.get("WALT_TEST_DATA", Path(__file__).parents[3] / "shared" / "clips"))
PICTURE = {"task": "image_to_video", "steps": 2, "seed": 3, "progress": False}


@pytest.fixture(scope="module")
def pictures():
    """Three smooth pictures, uint8 (3, 32, 32, 3)."""
    y, x = np.mgrid[:32, :32] / 8
    made = [np.stack([np.sin(k * x + y), np.cos(k * y), np.sin(k + x)], -1) for k in (1, 2, 3)]
    return np.uint8(127 + 100 * np.stack(made))


@pytest.fixture(scope="module")
def made(walt, pictures):
    """Three videos of three pictures, on eight devices."""
    return walt.sample(["a", "b", "c"], image=list(pictures), **PICTURE)


def far(a, b):
    return int(np.abs(a.astype(int) - b).max())


def test_a_given_picture_reappears_as_the_tokenizer_has_it(walt, pictures, made):
    assert made.shape == (3, 9, 32, 32, 3) and made.dtype == np.uint8
    first = walt.decode(np.stack([walt.encode(picture) for picture in pictures]))
    assert far(made[:, :1], first) <= 1
    assert far(made[0, 1:], made[1, 1:]) > 10


def test_a_video_depends_on_its_seed_number_and_request_alone(walt, given_run, pictures, made):
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    alone = walt_jax.load(given_run, mesh=one)
    again = alone.sample(list("abc"), image=list(pictures[[0, 2, 2]]), batch_size=2, **PICTURE)
    assert far(again[[0, 2]], made[[0, 2]]) <= 1
    assert far(again[1], made[1]) > 10
    two = walt.sample(["a", "b"], image=list(pictures[:2]), **PICTURE)
    assert far(two, made[:2]) <= 1
    other = walt.sample(["a", "b"], image=list(pictures[:2]), **PICTURE | {"seed": 4})
    assert far(other[:, 1:], made[:2, 1:]) > 10 and far(other[:, :1], made[:2, :1]) <= 1


@pytest.mark.slow
def test_weights_may_be_divided(given_run, pictures, made):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    walt = walt_jax.load(given_run, mesh=mesh)
    again = walt.sample(["a", "b", "c"], image=list(pictures), **PICTURE)
    assert far(again, made) <= 1


def test_encode_and_decode(walt, pictures, tmp_path):
    video = np.repeat(pictures, 3, axis=0)
    z = walt.encode(video)
    assert z.shape == (3, 4, 4, 8) and z.dtype == np.float32
    np.testing.assert_array_equal(walt.encode(np.stack([video[::-1], video]))[1], z)
    back = walt.decode(z)
    assert back.shape == (9, 32, 32, 3) and back.dtype == np.uint8
    np.testing.assert_array_equal(walt.decode(z[None])[0], back)
    write_mp4(tmp_path / "v.mp4", np.repeat(pictures, 4, axis=0), 4.0)
    assert walt.encode(tmp_path / "v.mp4").shape == (3, 4, 4, 8)  # 9 of 12 frames
    with pytest.raises(UserError, match="A video of 3 frames does not fit"):
        walt.encode(pictures)
    with pytest.raises(UserError, match=r"are \(t, h, w, 8\), or several, got \(4, 4, 8\)"):
        walt.decode(z[0])
    assert (walt.step, walt.fps, walt.video_shape) == (7, 4.0, (9, 32, 32))
    assert walt.label_names == walt.generator.label_names


def unreachable(_):
    raise RuntimeError("no host\nand more")


def test_models_are_found_by_folder_export_and_name(given_run, tmp_path, monkeypatch):
    export.export(given_run, tmp_path / "tiny")
    assert walt_jax.load(tmp_path / "tiny").step == 7
    assert walt_jax.load(str(tmp_path / "tiny")).generator.images
    monkeypatch.setattr(walt_module, "ASSETS", tmp_path)
    assert walt_jax.load("tiny").step == 7
    with pytest.raises(UserError, match=r"huge holds no run.*has this name \(tiny\): give a"):
        walt_jax.load("huge")
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"reached \(no host\): see"),
    ):
        patch.setattr(type(epath.Path("x")), "exists", unreachable)
        walt_jax.load("gs://bucket/run")
    with pytest.raises(UserError, match="No checkpoint of step 9"):
        walt_jax.load(given_run, step=9)


def test_the_command_writes_files_and_their_settings(given_run, pictures, made, tmp_path, capsys):
    for i, picture in enumerate(pictures):
        write_png(tmp_path / f"{i}.png", picture)
    (tmp_path / "prompts.txt").write_text("b\n\nc\n")
    images = [f"--image={tmp_path / str(i)}.png" for i in range(3)]
    command = ["--workdir", str(given_run), "--task", "image_to_video", "--prompt", "a",
               "--prompts_file", str(tmp_path / "prompts.txt"), *images, "--steps", "2",
               "--seed", "3", "--mesh", "data=8"]  # fmt: skip
    out = tmp_path / "out"
    sample.main([*command, "--out", str(out), "--format", "gif", "--fps", "2"])
    assert f"3 videos in {out}; look at {out}/index.html" in capsys.readouterr().out
    assert {f.name for f in out.iterdir()} == {
        *("0000.gif", "0001.gif", "0002.gif", "grid.png", "index.html", "samples.jsonl")
    }
    with Image.open(out / "0001.gif") as gif:
        frames = []
        for t in range(gif.n_frames):
            gif.seek(t)
            frames.append(np.asarray(gif.convert("RGB")))
        assert gif.info["duration"] == 500 and gif.info["loop"] == 0
    assert np.abs(np.stack(frames) - made[1, ::2].astype(int)).mean() < 8
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a", "b", "c"]
    assert rows[2] | {"sampler": 0, "guidance": 0, "given_guidance": 0, "sources": 0} == {
        "file": "0002.gif", "shape": [5, 32, 32, 3], "number": 2, "prompt": "c",
        "task": "image_to_video", "model": str(given_run), "step": 7, "weights": "ema", "seed": 3,
        "fps": 2.0, "sampler": 0, "guidance": 0, "given_guidance": 0, "sources": 0,
    }  # fmt: skip
    assert rows[0]["sampler"]["name"] == "ddim" and rows[0]["sampler"]["num_steps"] == 2
    page = (out / "index.html").read_text()
    said = "image_to_video, step 7, 2 steps of ddim, constant guidance 1, 2 fps, from 2.png, seed 3"
    assert f"c ({said}, video 2)" in page
    assert [row["sources"] for row in rows] == [[str(tmp_path / f"{i}.png")] for i in range(3)]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--prompt", "x" * 25], "has 25 bytes, this model reads 24: make it shorter"),
        (["--size", "1:1@36x"], "is no size"),
        (["--mesh", "rows=2"], "'rows=2' is no mesh"),
        (["--mesh", "data=3"], "does not make 8 devices"),
        (["--num", "0"], "num must be at least 1"),
        (["--prompts_file", "none.txt"], "none.txt is no file"),
        (["--seed=-1"], "seed must lie in 0 to 4294967295, got -1"),
        (["--seconds", "inf"], "not for ever: got inf"),
        (["--seconds=-5", "--task", "long"], "not for ever: got -5"),
        (["--task", "extend", "--video", "none.mp4"], "none.mp4 does not exist"),
        (["--fps", "3"], "3 fps do not fit"),
        (["--fps", "nan"], "nan fps do not fit"),
        (["--guidance", "nan"], "guidance is a number such as 3, got nan"),
        (["--sampler", "euler4"], "invalid choice: 'euler4'"),
        (["--config.seed=1"], "takes the config of its --workdir"),
    ],
)
def test_bad_flags_are_one_sentence(given_run, tmp_path, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        sample.main(["--workdir", str(given_run), "--out", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_samples_are_not_made_for_a_folder_that_cannot_be(given_run, tmp_path, monkeypatch):
    monkeypatch.setattr(walt_jax, "load", lambda *_, **__: pytest.fail("it is loaded"))
    (tmp_path / "file").write_text("")
    for out, sentence in {
        tmp_path / "file": "cannot be made",
        "gs://b/o": "no local folder",
    }.items():
        with pytest.raises(UserError, match=sentence):
            sample.main(["--workdir", str(given_run), "--out", str(out)])


def test_prompts_are_text_a_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfa red square\n\n a dot \n")
    assert read_prompts(file) == ["a red square", "a dot"]
    for content, sentence in {b"\xff\xfe\x00": "no text in UTF-8", b"\n": "has no prompts"}.items():
        file.write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            read_prompts(file)


def test_a_model_is_shown_in_few_words(walt):
    assert len(repr(walt)) < 10_000


def test_meshes_in_words():
    assert parse_mesh("data=4,fsdp=2") == MeshConfig(data=4, fsdp=2)
    assert parse_mesh("fsdp=2") == MeshConfig(data=-1, fsdp=2)
    assert parse_mesh("fsdp=-1") == MeshConfig(data=1, fsdp=-1)


def test_videos_are_taken_at_the_models_rate_and_size(pictures, tmp_path, caplog):
    frames = np.repeat(pictures, 8, axis=0)  # 3 s at 8 fps
    write_mp4(tmp_path / "v.mp4", frames.repeat(2, axis=2), 8.0, crf=4)
    with caplog.at_level("INFO", logger="walt_jax"):
        video = read_source(tmp_path / "v.mp4", 4.0, (16, 16))
    assert video.shape == (13, 16, 16, 3)
    assert "8 fps, taken at 4: 13 frames" in caplog.text
    assert "32x64 is scaled and cropped to 16x16" in caplog.text
    assert np.abs(video[4:8].astype(int) - video[4]).max() < 40 < np.abs(
        video[0].astype(int) - video[11]).max()  # fmt: skip
    single = read_source(frames[0], 4.0, (32, 32))
    assert single.shape == (1, 32, 32, 3) and (single == frames[0]).all()


def test_a_mask_is_a_box_or_a_picture(tmp_path):
    box = read_mask("0.25,0,0.75,0.5", (16, 32))
    assert box.sum() == 8 * 16 and box[4:12, :16].all()
    write_png(tmp_path / "mask.png", np.uint8(255 * box)[..., None].repeat(3, -1))
    assert (read_mask(str(tmp_path / "mask.png"), (16, 32)) == box).all()
    assert (read_mask(box, (16, 32)) == box).all()


def test_gifs_repeat(pictures, tmp_path):
    write_gif(tmp_path / "x.gif", pictures, 8.0)
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.n_frames == 3 and 120 <= gif.info["duration"] <= 130


@pytest.mark.slow
@pytest.mark.skipif(not CLIPS.is_dir(), reason=f"no real clips in {CLIPS}: set WALT_TEST_DATA")
def test_real_clips_are_extended_connected_and_painted(given_run, tmp_path):
    bear, bee = CLIPS / "bear_320x240_vp9.webm", CLIPS / "bee_1280x720_h264.mp4"
    base = ["--workdir", str(given_run), "--steps", "2", "--prompt", "a"]
    cases = {
        "extend": ["--video", str(bear), "--seconds", "2"],
        "connect": ["--video", str(bear), "--video", str(bee), "--size", "32"],
        "outpaint": ["--video", str(bee), "--size", "32"],
        "edit": ["--video", str(bee), "--strength", "0.5", "--size", "32"],
    }
    for task, flags in cases.items():
        sample.main([*base, "--task", task, "--out", str(tmp_path / task), *flags])
        with av.open(str(tmp_path / task / "0000.mp4")) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) >= 9 and np.std(frames) > 1
