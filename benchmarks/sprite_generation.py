"""What small models generate on sprite videos: captions, given frames, occlusion, actions, aspects.

    python -m benchmarks.sprite_generation [--out out/sprite_generation] [--only STUDY ...]

A tokenizer and a denoiser a study train on the built-in videos, and `walt_jax.data.sprite_readback`
looks at samples without knowing what was asked for. The tables and pictures of docs/sprites.md come
from here. Studies:

  captions  prompts that training never had, each of words that it had: of six the shape, colour and
            direction came over another background; of two, never together.
  given     image to video, extension forwards and backwards, interpolation: do given frames
            reappear, and do objects go on at their speed? The same model as for captions.
  scenes    objects that pass behind a bar, under a camera that pans, and one that looks away: from
            a video's first five frames and nothing else, do they come back as they were?
  actions   from a video's first frame and a letter a frame, its caption: which way the object goes.
  aspects   training on native aspects or on square crops, of as many tokens and steps: is the
            object wholly in the frame?

`--model DIR` judges the captions and given frames of another model, a workdir or an export.
`--out` gets `results.json`, `tables.md` and a picture a study. A run that was cut off goes on;
other options need another `--out`. Minutes are those of the training's steps alone.
"""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from benchmarks import sprite_judges as judges
from benchmarks.sprite_runs import (
    Results,
    Row,
    make_latents,
    make_records,
    make_run,
    real_clips,
)
from walt_jax import cli
from walt_jax.data.sprites import SpriteConfig, SpriteVideo
from walt_jax.diffusion import Constant, Ddim
from walt_jax.generation import Generator
from walt_jax.generation.walt import ASSETS
from walt_jax.media import frame_grid

EVERY = SpriteConfig(
    shapes=("square", "triangle"),
    # Of medium brightness: latents are mostly background, and what differs much is learnt first.
    backgrounds=("gray", "yellow"),
    aspects=("1:1",),
    seconds=(2.2, 2.3),
    fps=(8, 16),
    sizes=(0.4, 0.44),
    crossing=True,
)
# Classes and backgrounds whose captions are held out. Each class comes over the other background.
HELD_OUT = (
    ("red square left", "gray"),
    ("red triangle down", "yellow"),
    ("green triangle up", "yellow"),
    ("green square right", "gray"),
    ("blue square right", "yellow"),
    ("blue triangle left", "gray"),
)
# Classes held out over every background: harder, as colour and direction come with the other shape
# alone, and so say that shape, too.
HARD = ("blue square up", "yellow triangle down")
CAPTIONS = dataclasses.replace(EVERY, exclude=HARD)
FEW = dataclasses.replace(
    EVERY,
    colours=("red", "green", "blue"),
    backgrounds=("gray",),
)
SCENES = ("occluder", "pan", "away")
# Small enough that most are wholly in sight again before the last of nine frames.
HIDDEN = dataclasses.replace(FEW, scenes=SCENES, sizes=(0.34, 0.4), crossing=False)
FREE = dataclasses.replace(FEW, aspects=("5:3", "3:5", "1:1"), central=False)
# What the tokenizer of these studies sees.
MIXED = dataclasses.replace(FEW, scenes=("plain", "actions", *SCENES), crossing=False)
SQUARE, ASPECTS = ((64, 64),), {"1:1": (64, 64), "5:3": (48, 80), "3:5": (80, 48)}
GIVEN = {  # the latent frames that are given
    "image to video": (0,),
    "extend forwards": (0, 1),
    "extend backwards": (-1,),
    "interpolate": (0, -1),
}
TRUTH_SEED = 7  # of videos that nothing was trained on
TOLD = 5  # frames that a scene begins with: two latent frames
SHOWN, SHOWN_FRAMES = 6, 9  # videos in a picture, and frames of each


@dataclasses.dataclass(frozen=True)
class Model:
    """A denoiser of `configs/sprites_text.py` and the videos that it is trained on.

    Its tokenizer is one of TOKENIZERS.
    """

    videos: SpriteConfig
    number: int
    seed: int
    steps: int
    overrides: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = SQUARE
    caption: Callable[[Row], str | None] | None = None
    frames: int = 9
    fps: float = 4.0
    tokenizer: str = "mixed"


_SILENT = ("task.text=None", "task.model.text_features=0", "data.caption_bytes=0")
_SILENT = (*_SILENT, "task.model.pooled_text=False")
_FROM_FRAMES = (*_SILENT, "task.given={'first':0.8,'first_frames':(1,2)}")
_ALONE = (*_SILENT, "task.model.given='none'", "task.given={}", "task.model.relative_bias=False")
_ALONE = (*_ALONE, "task.model.positions=fractional")


def _told(truth: Row) -> str | None:
    """The caption, of videos that are not held out."""
    return None if (truth["label_name"], truth["background"]) in HELD_OUT else truth["caption"]


LETTERS = "lrud"  # of an action, in the order of directions
# Clips are whole videos, so that letters and frames go together.
ACTIONS = dataclasses.replace(FEW, scenes=("actions",), seconds=(2.0, 2.0), fps=(4,))
_FIRST = "task.given={'first':0.8,'first_frames':(1,)}"
MODELS = {
    "captions": Model(CAPTIONS, 3000, 0, 9000, caption=_told, tokenizer="plain"),
    "scenes": Model(HIDDEN, 1500, 2, 3000, _FROM_FRAMES),
    "actions": Model(
        ACTIONS, 1200, 4, 3000, (_FIRST,), caption=lambda truth: spelt(truth["actions"])
    ),
    "native": Model(FREE, 720, 3, 1500, _ALONE, tuple(ASPECTS.values())),
    "square": Model(FREE, 720, 3, 1500, _ALONE),
}
# Videos, their number and seed, and what changes in the config. The frame rate is the denoisers': a
# tokenizer of slower motion, and of other scenes, made latents whose shapes and directions were not
# learnt. The mixed one goes on from the model's that comes with the package.
TOKENIZERS = {
    "plain": (CAPTIONS, 960, 0, ()),
    "mixed": (MIXED, 800, 1, (f"task.init_from={ASSETS / 'sprites'}", "num_steps=1500")),
}


def main() -> None:
    args = _arguments()
    bench = Bench(args)
    for name in args.only or STUDIES:
        STUDIES[name](bench)
    print(f"{args.out}: results.json, tables.md and pictures")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/sprite_generation"))
    parser.add_argument("--only", nargs="+", choices=STUDIES, metavar="STUDY", help="these studies")
    parser.add_argument("--model", type=Path, help="its captions and given frames, untrained")
    parser.add_argument("--samples", type=int, default=240, help="judged, of each row")
    parser.add_argument("--sampling-steps", type=int, default=30, help="of DDIM")
    parser.add_argument("--guidance", type=float, default=3.0, help="by caption")
    return parser.parse_args()


class Bench:
    """What the studies work with: options, models and results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self.out, self.samples = args, args.out, args.samples
        options = {k: str(v) for k, v in vars(args).items() if k not in ("out", "only")}
        self.results = Results(self.out, options)

    def generator(self, name: str) -> Generator:
        """One of `MODELS`, trained unless it is there."""
        if self._args.model is not None:
            return Generator.load(self._args.model)
        model, folder = MODELS[name], self.out / name
        tokenizer = self._tokenizer(model.tokenizer)
        records = make_records(folder, model.videos, model.number, model.seed, model.caption)
        data = {"path": str(records), "num_frames": model.frames, "fps": model.fps}
        data["sizes"] = model.sizes
        overrides = (
            f"task.model.grid={(1 + (model.frames - 1) // 4, 8, 8)}",
            f"data.num_frames={model.frames}",
            f"data.fps={model.fps}",
            f"task.tokenizer={tokenizer}",
            f"data.path={make_latents(folder, tokenizer, data, epochs=2)}",
            f"data.sizes={model.sizes}",
            f"num_steps={model.steps}",
            *model.overrides,
        )
        run = folder / "run"
        self.results.fill("trainings", name, lambda: make_run(run, "sprites_text.py", overrides))
        return Generator.load(run)

    def _tokenizer(self, name: str) -> Path:
        """One of `TOKENIZERS`, likewise."""
        (*videos, changes), folder = TOKENIZERS[name], self.out / f"tokenizer_{name}"
        overrides = (f"data.path={make_records(folder, *videos)}", *changes)
        run = folder / "run"
        train = functools.partial(make_run, run, "sprites_text.py:tokenizer", overrides)
        self.results.fill("trainings", folder.name, train)
        return run

    def sample(self, generator: Generator, **wanted: object) -> np.ndarray:
        """Videos uint8 (N, T, H, W, 3) by the options' sampler; guided where there are prompts."""
        guidance = self._args.guidance if "prompts" in wanted else 1.0
        return generator.sample(
            **wanted,
            sampler=Ddim(num_steps=self._args.sampling_steps),
            guidance=Constant(guidance),
            batch_size=24,
        )

    def show(self, name: str, rows: Sequence[tuple[str, np.ndarray]]) -> None:
        """Writes a picture: for each row a text over frames of uint8 (T, H, W, 3)."""
        strips = []
        for text, video in rows:
            strip = frame_grid(video[None], columns=SHOWN_FRAMES)
            line = np.full((18, strip.shape[1], 3), 255, np.uint8)
            font = cv2.FONT_HERSHEY_SIMPLEX
            cv2.putText(line, text, (2, 13), font, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
            strips += [line, strip]
        width = max(strip.shape[1] for strip in strips)
        strips = [
            np.pad(s, ((0, 0), (0, width - s.shape[1]), (0, 0)), constant_values=255)
            for s in strips
        ]
        file = self.out / f"{name.replace(' ', '_')}.jpg"
        cv2.imwrite(str(file), np.concatenate(strips)[..., ::-1])


def captions(bench: Bench) -> None:
    """Captions that training had, and such that it never had."""
    generator = bench.generator("captions")
    pairs = set(itertools.product(EVERY.class_names, EVERY.backgrounds))
    hard = {pair for pair in pairs if pair[0] in HARD}
    kinds = {
        "of a new combination": set(HELD_OUT),
        "of a new shape, colour and direction": hard,
        "of training": pairs - hard - set(HELD_OUT),
    }

    def measure(table: str, truths: Sequence[SpriteVideo]) -> Row:
        prompts = [truth.caption for truth in truths]
        videos = bench.sample(generator, prompts=prompts)
        bench.show(f"captions {table}", list(zip(prompts, videos))[:12])
        return judges.attributes(videos, truths, EVERY)

    for table, wanted in kinds.items():
        real, truths = real_clips(
            EVERY,
            generator,
            bench.samples,
            seed=TRUTH_SEED,
            labels=sorted({EVERY.class_names.index(name) for name, _ in wanted}),
            use=lambda truth, wanted=wanted: (truth.label_name, truth.background) in wanted,
        )
        bench.results.fill(
            f"captions {table}",
            "real videos",
            functools.partial(judges.attributes, real, truths, EVERY),
        )
        bench.results.fill(
            f"captions {table}", "samples", functools.partial(measure, table, truths)
        )


def given(bench: Bench) -> None:
    """Tasks of given latents, with captions, of classes seen and unseen alike."""
    generator = bench.generator("captions")
    real, truths = real_clips(EVERY, generator, bench.samples // 2, seed=TRUTH_SEED + 1)
    latents = generator.encode(real)
    rebuilt = generator.decode(latents)
    prompts = [truth.caption for truth in truths]

    def judge(videos: np.ndarray, known: np.ndarray) -> Row:
        # The first latent frame is one frame of pixels, each other one four.
        pixels = np.concatenate([known[:1], np.repeat(known[1:], 4)])
        return judges.continued(videos, rebuilt, pixels, truths, generator.fps, EVERY)

    def measure(task: str, known: np.ndarray) -> Row:
        mask = np.broadcast_to(known[:, None, None], latents.shape[:-1])
        videos = bench.sample(generator, prompts=prompts, given=latents, given_mask=mask)
        bench.show(task, _beside(rebuilt, videos))
        return judge(videos, known)

    for task, frames in GIVEN.items():
        known = np.zeros(latents.shape[1], bool)
        known[list(frames)] = True
        bench.results.fill(
            task, "real videos, reconstructed", functools.partial(judge, rebuilt, known)
        )
        bench.results.fill(task, "samples", functools.partial(measure, task, known))


def scenes(bench: Bench) -> None:
    """Objects out of sight and moving cameras, from the first five frames and nothing else."""
    generator = bench.generator("scenes")
    for scene in SCENES:
        config = dataclasses.replace(HIDDEN, scenes=(scene,))
        real, truths = real_clips(config, generator, bench.samples // 2, seed=TRUTH_SEED + 2)
        tails = [judges.in_sight_again(truth.visible) for truth in truths]
        use = [i for i, tail in enumerate(tails) if tail is not None]
        truths, tails = [truths[i] for i in use], [max(tails[i], TOLD) for i in use]
        latents = generator.encode(real[use])
        rebuilt = generator.decode(latents)

        def measure(scene: str, latents: np.ndarray, rebuilt: np.ndarray, *about: Sequence) -> Row:
            mask = np.zeros(latents.shape[:-1], bool)
            mask[:, :2] = True
            videos = bench.sample(generator, given=latents, given_mask=mask)
            bench.show(scene, _beside(rebuilt, videos))
            return judges.returned(videos, *about, generator.fps, FEW)

        about = truths, tails
        real_row = functools.partial(judges.returned, rebuilt, *about, generator.fps, FEW)
        bench.results.fill(scene, "real videos, reconstructed", real_row)
        bench.results.fill(
            scene, "samples", functools.partial(measure, scene, latents, rebuilt, *about)
        )


def actions(bench: Bench) -> None:
    """Videos from their first frame and an action a frame."""
    generator = bench.generator("actions")
    real, truths = real_clips(ACTIONS, generator, bench.samples, seed=TRUTH_SEED + 3)
    asked = np.stack([truth.actions for truth in truths])
    latents = generator.encode(real)
    rebuilt = generator.decode(latents)
    mask = np.zeros(latents.shape[:-1], bool)
    mask[:, :1] = True

    def measure() -> Row:
        prompts = [spelt(row) for row in asked]
        videos = bench.sample(generator, prompts=prompts, given=latents, given_mask=mask)
        bench.show("actions", _beside(rebuilt, videos))
        return judges.followed(videos, asked, FEW)

    real_row = functools.partial(judges.followed, rebuilt, asked, FEW)
    bench.results.fill("actions", "real videos, reconstructed", real_row)
    bench.results.fill("actions", "samples", measure)


def spelt(actions: Sequence[int]) -> str:
    """Actions as a caption."""
    return "".join(LETTERS[action] for action in actions)


def aspects(bench: Bench) -> None:
    """Native aspects and square crops: is the object wholly in the frame?"""
    for name, sizes in (("square", {"1:1": SQUARE[0]}), ("native", ASPECTS)):
        generator = bench.generator(name)

        def measure(name: str, generator: Generator, sizes: Mapping[str, tuple[int, int]]) -> Row:
            videos, (_, *factors) = {}, generator.tokenizer.config.factors
            frames = generator.task.model.grid[0]
            for aspect, size in sizes.items():
                grid = frames, *(side // factor for side, factor in zip(size, factors))
                number = bench.samples // len(sizes)
                videos[aspect] = bench.sample(generator, grid=grid, count=number)
            shown = [(a, clips[i]) for a, clips in videos.items() for i in range(2)]
            bench.show(f"{name} aspects", shown)
            return judges.whole_in_frame(videos, FEW)

        bench.results.fill(
            "native aspect or square crop", name, functools.partial(measure, name, generator, sizes)
        )


STUDIES = {
    "captions": captions,
    "given": given,
    "scenes": scenes,
    "actions": actions,
    "aspects": aspects,
}


def _beside(rebuilt: np.ndarray, videos: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Reconstructions of real videos and samples in turns."""
    pairs = [(("the real video", r), ("sample", v)) for r, v in zip(rebuilt, videos)]
    return [row for pair in pairs[: SHOWN // 2] for row in pair]


if __name__ == "__main__":
    cli.run(main)
