"""Long videos and cascades by `python -m walt_jax.sample`."""

import json

import av
import numpy as np
import pytest
from runs import save_run

from walt_jax import config as config_lib
from walt_jax import sample
from walt_jax.errors import UserError
from walt_jax.generation.output import write_long
from walt_jax.media import write_mp4
from walt_jax.training.experiment import Experiment
from walt_jax.training.tokenizers import keep_tokenizer


def frames_of(path):
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def run(workdir, out, *flags):
    sample.main(["--workdir", str(workdir), "--out", str(out), "--steps", "2", *flags])
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return [frames_of(out / row["file"]) for row in rows], rows


def test_a_long_video_is_written_as_it_comes(given_run, tmp_path):
    """3 seconds at 4 fps: 13 frames of which 9 are a clip; every second one is written."""
    (video,), (row,) = run(
        given_run, tmp_path, "--task", "long", "--prompt", "a", "--seconds", "3", "--fps", "2"
    )
    assert video.shape == (7, 32, 32, 3) and row["shape"] == [7, 32, 32, 3]
    assert row["scheme"] == "frame_prediction" and row["seconds"] == 3
    assert (tmp_path / "index.html").exists() and (tmp_path / "grid.png").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--task", "long", "--scheme", "hierarchy2"], "frame_times=False"),
        (["--task", "long", "--size", "64x32"], "have the size 32x32"),
        (["--scheme", "hierarchy2"], "text_to_video reads no scheme"),
        (["--scheme", "hierarchy4"], "Argument --scheme: invalid choice: 'hierarchy4'.*see --help"),
        (["--cascade", "nowhere", "--num", "1"], "nowhere holds no run"),
    ],
)
def test_what_does_not_fit_is_one_sentence(given_run, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        run(given_run, tmp_path, *flags)


def test_a_long_video_is_longer_than_its_start(given_run, tmp_path):
    write_mp4(tmp_path / "v.mp4", np.zeros((20, 32, 32, 3), np.uint8), 4.0)
    flags = ["--task", "long", "--video", str(tmp_path / "v.mp4"), "--seconds", "4"]
    with pytest.raises(UserError, match=r"v.mp4 has 20 frames.*of 17.*give more seconds than 5\."):
        run(given_run, tmp_path / "out", *flags)


def test_every_nth_frame_is_written_across_pieces(tmp_path):
    """And a handful of frames, evenly, are kept for the grid, however many there are."""
    grey = np.arange(200, dtype=np.uint8)[None, :, None, None, None].repeat(16, 2).repeat(16, 3)
    video = grey.repeat(3, 4)
    row = {
        "task": "long",
        "step": 1,
        "seed": 0,
        "number": 0,
        "sampler": {"name": "ddim", "num_steps": 1},
        "guidance": {"name": "constant", "scale": 1.0},
    }
    pieces = [video[:, :13], video[:, 13:29], video[:, 29:]]
    write_long(tmp_path, iter(pieces), [row], fps=4.0, every=3)
    found = frames_of(tmp_path / "0000.mp4").mean((1, 2, 3))
    np.testing.assert_allclose(found, np.arange(0, 200, 3), atol=3)


def test_a_broken_run_leaves_no_file(tmp_path):
    def pieces():
        yield np.zeros((1, 5, 16, 16, 3), np.uint8)
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        write_long(tmp_path, pieces(), [{}], fps=4.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_cascade_makes_every_task_larger(given_run, denoiser_values, tmp_path):
    values = config_lib.override(
        dict(denoiser_values),
        [
            "task.model.num_classes=0",
            "task.model.grid=(3, 8, 8)",
            "task.model.windows=((1, 0, 0), (0, 2, 2))",
            "task.model.upsampling=(1, 2, 2)",
            "data.num_frames=9",
            "data.sizes=((64, 64),)",
        ],
    )
    larger = tmp_path / "larger"
    experiment = config_lib.build(Experiment, values)
    save_run(larger, experiment, (1,))
    keep_tokenizer(experiment.task.prepare(str(larger)).tokenizer, larger)
    flags = ["--cascade", str(larger), "--prompt", "a", "--prompt", "b"]
    videos, rows = run(given_run, tmp_path / "text", *flags)
    assert [video.shape for video in videos] == [(9, 64, 64, 3)] * 2
    assert rows[0]["cascade"] == [str(larger)]
    assert "enlarged by larger" in (tmp_path / "text" / "index.html").read_text()
    with pytest.raises(UserError, match="name this one as its cascade"):
        run(larger, tmp_path / "alone", "--prompt", "a")
    picture = tmp_path / "text" / "0000.mp4"
    videos, _ = run(
        given_run, tmp_path / "image", *flags, "--task", "image_to_video", "--image", str(picture)
    )
    assert [video.shape for video in videos] == [(9, 64, 64, 3)] * 2
    with pytest.raises(UserError, match="leave size and seconds out"):
        run(given_run, tmp_path / "wide", *flags, "--size", "32x64")
