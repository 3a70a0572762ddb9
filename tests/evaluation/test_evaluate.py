"""The command line: every way to a score, and every mistake as one sentence."""

import json
import shutil
import threading
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.util import tensor_util

from walt_jax import config as config_lib
from walt_jax import evaluate
from walt_jax.errors import UserError
from walt_jax.evaluation import scores
from walt_jax.evaluation.follow import follow
from walt_jax.media import write_mp4
from walt_jax.training.experiment import Experiment
from walt_jax.training.loop import train

TINY = ("--features", "tiny_features:load")
FEW = ("--protocol.num_frames=5", "--protocol.num_samples=4", "--steps=2", "--per_device=1")


@pytest.fixture
def folders(tmp_path):
    """Two folders of four videos, the second noisier."""
    rng = np.random.default_rng(0)
    for name, noise in (("real", 10), ("fake", 60)):
        (tmp_path / name).mkdir()
        for i in range(4):
            video = np.full((6, 16, 16, 3), 60 * i + 30) + rng.normal(0, noise, (6, 16, 16, 3))
            write_mp4(tmp_path / name / f"{i}.mp4", video.clip(0, 255).astype(np.uint8), 8)
    return tmp_path


def fvd(folders, *extra, real="real", fake="fake"):
    real = real if real.endswith(".npz") else folders / real
    evaluate.main([
        *("fvd", "--real", str(real), "--fake", str(folders / fake), *TINY),
        *("--out", str(folders / "out"), "--cache", str(folders / "cache")),
        *("--protocol.num_frames=6", *extra),
    ])  # fmt: skip
    return scores.read_scores(folders / "out")


def test_two_folders(folders, capsys):
    (score,) = fvd(folders)
    assert score.name == "frechet_fixture" and score.value > 1e-4
    assert "fvd" not in capsys.readouterr().out.replace("frechet_fixture", "")
    (statistics,) = (folders / "cache").glob("*.npz")
    again = fvd(folders, real=str(statistics))
    assert again[-1].folds == score.folds
    same = fvd(folders, fake="real")[-1]
    assert same.value < 1e-9 < score.value
    assert fvd(folders)[-1] == same  # the first is not written twice
    assert sorted(p.name for p in (folders / "out").iterdir()) == ["scores.jsonl"]


def test_the_kernel_distance_of_folders(folders):
    frechet, kernel = fvd(folders, "--kernel_videos=4")
    assert (frechet.name, kernel.name) == ("frechet_fixture", "kernel_fixture")
    (statistics,) = (folders / "cache").glob("*.npz")
    assert fvd(folders, "--kernel_videos=4", real=str(statistics))[-1].folds == kernel.folds
    with pytest.raises(UserError, match="features of 4 clips, too few for a kernel distance of 5"):
        fvd(folders, "--kernel_videos=5", real=str(statistics))


def test_a_network_of_frames_that_is_vouched_for(folders):
    (score,) = fvd(folders, "--features=tiny_features:load_frames", "--allow=trained")
    assert score.name == "fvd_tiny" and score.record["features"]["trained"] and score.value > 0
    (statistics,) = (folders / "cache").glob("*.npz")
    with np.load(statistics) as file:
        assert file["count"] == 24  # frames
    extra = ("--features=tiny_features:load_frames", "--allow=trained", "--protocol.num_real=4")
    with pytest.raises(UserError, match=r"protocol\.num_real: 0 -> 4"):
        fvd(folders, *extra, real=str(statistics))


@pytest.mark.parametrize(
    "extra, words",
    [
        (("--protocol.num_samples=3",), "holds 4 videos, but the protocol custom is of 1 x 3"),
        (("--protocol.num_frames=7",), "0.mp4 has 6 frames, too few"),
        (("--protocol.num_frames=3",), "needs clips of at least 4 frames"),
        (("--protocol.frames=3",), "Nothing reads protocol.frames"),
        (("--protocol=none",), "No protocol 'none'"),
        (("--features=nothing",), "No feature network is named 'nothing'"),
        (("--real", "nowhere"), "does not exist"),
        (("--real", "none.npz"), "does not exist"),
        (("--config.x=1",), r"Nothing reads the argument '--config\.x=1'"),
    ],
)
def test_mistakes_are_one_sentence(folders, extra, words):
    with pytest.raises(UserError, match=words) as error:
        fvd(folders, *extra)
    assert "\n" not in str(error.value)
    assert not (folders / "out" / "scores.jsonl").exists()


def test_statistics_of_another_protocol_are_refused(folders):
    fvd(folders)
    (statistics,) = (folders / "cache").glob("*.npz")
    with pytest.raises(UserError, match=r"made in another way \(protocol.num_frames: 6 -> 5\)"):
        fvd(folders, "--protocol.num_frames=5", real=str(statistics))


@pytest.fixture
def run(tmp_path, denoiser_run):
    return shutil.copytree(denoiser_run, tmp_path / "run")


def events(workdir, name):
    """step -> value, in all events files."""
    found = event_accumulator.EventAccumulator(str(workdir / "tensorboard"))
    found.Reload()
    return {e.step: float(tensor_util.make_ndarray(e.tensor_proto)) for e in found.Tensors(name)}


def test_checkpoints_then_the_report(run, tmp_path, capsys):
    common = ("checkpoint", "--workdir", str(run), *FEW)
    evaluate.main([*common, *TINY, "--step=all"])
    found = scores.read_scores(run)
    assert [s.step for s in found] == [2, 3] and len({s.folds for s in found}) == 2
    logged = events(run, "score/frechet_fixture")
    assert logged.keys() == {2, 3}
    np.testing.assert_allclose([logged[s.step] for s in found], [s.value for s in found], 1e-6)
    evaluate.main([*common, "--evaluator=read_back", "--raw"])
    assert {s.name for s in scores.read_scores(run)} >= {"read_back", "frechet_fixture"}
    raw = scores.read_scores(run)[-1]
    assert raw.step == 3 and raw.record["samples"]["weights"] == "raw"
    capsys.readouterr()
    evaluate.main(["report", "--workdir", str(run), "--out", str(tmp_path / "page")])
    page = (tmp_path / "page" / "index.html").read_text()
    assert "frechet_fixture" in page and "this is no FVD" in page
    pictures = [p.name for p in (tmp_path / "page").glob("*.png")]
    assert len(pictures) >= 3 and all(p in page for p in pictures)
    table = (tmp_path / "page" / "scores.md").read_text().splitlines()
    assert len(table) == 2 + 2 + 4 and "| fvd" not in "".join(table)


@pytest.mark.parametrize(
    "extra, words",
    [
        (("--step=7",), "no checkpoint of step 7: it has 2, 3"),
        (("--evaluator=reconstruction",), "scores runs of tokenizer.*leave it out"),
        (("--real=nowhere",), "nowhere does not exist"),
        (("--protocol.num_samples=0",), "how many samples"),
        (("--per_device=0",), "per_device=0 must be at least 1"),
        (("--evaluator=read_back", "--weights=w"), "reads --weights: leave it out"),
        (("--evaluator=fvd", "--evaluator=is", "--weights=w"), "--weights is of one network"),
        (("--evaluator=clip",), "needs a model of text: leave it out"),
    ],
)
def test_checkpoint_mistakes(run, extra, words):
    with pytest.raises(UserError, match=words):
        evaluate.main(["checkpoint", "--workdir", str(run), *FEW, *extra])


def test_a_run_without_checkpoints(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        evaluate.main(["checkpoint", "--workdir", str(tmp_path), *TINY, *FEW])


def test_reconstruction(tmp_path, tokenizer_run):
    run = shutil.copytree(tokenizer_run, tmp_path / "tokenizer")
    evaluate.main(["tokenizer", "--workdir", str(run), *TINY, "--protocol.num_frames=6"])
    psnr, ssim, frechet = scores.read_scores(run)
    assert (psnr.name, ssim.name, frechet.name) == ("psnr", "ssim", "frechet_fixture")
    assert -1 < ssim.value < 1
    assert 0 < psnr.value < 40 and frechet.value > 0
    assert psnr.record["reconstructions"]["count"] == 24
    evaluate.main(["tokenizer", "--workdir", str(run), "--protocol.num_frames=6", "--step=1",
                   "--evaluator=reconstruction", "--metrics", "ssim", "psnr"])  # fmt: skip
    again = scores.read_scores(run)[3:]
    assert [s.name for s in again] == ["ssim", "psnr"] and again[1].value != psnr.value
    with pytest.raises(UserError, match="names the weights of the metric lpips: give both"):
        evaluate.main(["tokenizer", "--workdir", str(run), "--lpips=w.npz"])


def test_follow_scores_what_comes(tmp_path, denoiser_run):
    """It waits for a run to begin, passes over what is damaged or gone, and ends with the run."""
    run, staged = tmp_path / "run", tmp_path / "run" / "checkpoints"

    def training():
        time.sleep(0.3)
        shutil.copytree(denoiser_run, run, ignore=shutil.ignore_patterns("checkpoints"))
        time.sleep(0.2)
        shutil.copytree(denoiser_run / "checkpoints" / "2", tmp_path / "2")
        staged.mkdir()
        (tmp_path / "2").rename(staged / "2")
        time.sleep(0.5)
        shutil.copytree(denoiser_run / "checkpoints" / "3", tmp_path / "3")
        (tmp_path / "3").rename(staged / "3")

    thread = threading.Thread(target=training)
    thread.start()
    evaluate.main(["follow", "--workdir", str(run), "--poll=0.1", *TINY, *FEW])
    thread.join()
    assert [s.step for s in scores.read_scores(run)] == [2, 3]
    assert events(run, "score/frechet_fixture").keys() == {2, 3}


def test_follow_passes_over_the_lost_and_gives_up_in_the_end(run, caplog):
    calls = []

    def score(step):
        calls.append(step)
        if step == 2:
            shutil.rmtree(run / "checkpoints" / "2")
            raise UserError("gone.")
        return []

    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"num_steps": 9}))
    assert follow(run, score, poll=0.05, patience=0.2, publish=False) == []
    assert calls == [2, 3]


@pytest.mark.slow
def test_the_loop_takes_its_evaluators(tmp_path, denoiser_values):
    sampling = {"changes": ("num_frames=5", "num_samples=4"), "num_steps": 2}
    tiny = {"name": "fvd", "features": "tiny_features:load", "sampling": sampling}
    evaluators = (tiny | {"every": 2}, tiny | {"weights": "1", "inline": False})
    values = denoiser_values | {"num_steps": 3, "evaluators": evaluators, "checkpoint_every": 1}
    experiment = config_lib.build(Experiment, values | {"keep_checkpoints": 3})
    last = train(experiment, tmp_path / "run", quiet=True)
    found = scores.read_scores(tmp_path / "run")
    assert [(s.name, s.step) for s in found] == [("frechet_fixture", 2), ("frechet_fixture", 3)]
    assert last["score/frechet_fixture"] == found[-1].value
    # The same by the command, which takes the config's evaluators, from the checkpoints.
    evaluate.main(["checkpoint", "--workdir", str(tmp_path / "run"), "--step=all"])
    again = scores.read_scores(tmp_path / "run")[2:]
    first = [s for s in again if s.record["features"] == found[0].record["features"]]
    assert [s.step for s in again] == [1, 1, 2, 2, 3, 3]
    for ours, theirs in zip(found, first[1:]):
        np.testing.assert_allclose(ours.folds, theirs.folds, rtol=1e-6)


def test_an_evaluator_that_cannot_work_stops_before_the_first_step(tmp_path, denoiser_values):
    sampling = {"changes": ("num_frames=9", "num_samples=4"), "num_steps": 2}
    values = denoiser_values | {"evaluators": ({"name": "read_back", "sampling": sampling},)}
    with pytest.raises(UserError, match="needs videos of 9 frames"):
        train(config_lib.build(Experiment, values), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "config.json").exists()
