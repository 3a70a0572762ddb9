"""The tasks of `walt.sample` and `python -m walt_jax.sample`: a request to videos.

Every one is a way of laying given pixels into a clip; the one sampler does the rest.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator

import numpy as np

from walt_jax.errors import UserError
from walt_jax.generation.long_video import generate_long
from walt_jax.generation.requests import Request, latent_mask, pixel_mask
from walt_jax.generation.sources import letterbox, name_of, read_mask
from walt_jax.tasks import Wanted

_LONG = 60.0  # seconds

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SampleTask:
    """A task.

    Attributes:
      name, summary: of it.
      make: a request to videos, uint8 (N, T, H, W, 3).
      sources: the least and the most pictures and videos that it takes; 0 for the most is any.
      reads: what else of a request it reads: seconds, mask, direction, strength, scheme.
    """

    name: str
    summary: str
    make: Callable[[Request], np.ndarray]
    sources: tuple[int, int | None] = (0, 0)
    reads: tuple[str, ...] = ()


def text_to_video(request: Request) -> np.ndarray:
    """Clips of prompts, of classes or of nothing said."""
    return request.draw()


def text_to_image(request: Request) -> np.ndarray:
    """One frame each, of a model that was trained on images too."""
    if not request.generator.images:
        raise UserError(
            "The task text_to_image makes images, and this checkpoint was trained on videos alone: "
            "take text_to_video, or train with config.images."
        )
    return request.draw(image=True)


def image_to_video(request: Request) -> np.ndarray:
    """Clips that start with a picture each, or with a video's first frame."""
    first = np.stack([request.read(i)[:1] for i in range(len(request.sources))])
    first = first[np.arange(request.count) % len(first)]
    clips = np.zeros((request.count, *_shape(request), 3), np.uint8)
    clips[:, :1] = first
    return request.draw(clips, _known(request, head=1))


def extend(request: Request) -> np.ndarray:
    """A video with what comes after it, or before it: clip by clip, each given the end (or the
    start) of what there is."""
    video = request.read(0)
    new = request.frames if request.seconds is None else None
    new = new or max(1, round(request.seconds * request.generator.fps))
    videos, stage = video[None], 0
    forward = request.direction == "forward"
    while videos.shape[1] < len(video) + new:
        if forward:
            latents = request.head(videos.shape[1])
            given = 1 + (latents - 1) * request.factors[0]
            clips = _laid(request, head=videos[:, -given:])
            made = request.draw(clips, _known(request, head=given), stage=stage)[:, given:]
            videos = _joined(videos, made)
        else:
            given = request.tail(videos.shape[1]) * request.factors[0]
            clips = _laid(request, tail=_held(videos[:, :given], given))
            made = request.draw(clips, _known(request, tail=given), stage=stage)[:, :-given]
            videos = _joined(made, videos)
        stage += 1
        if request.seconds is None:
            return videos
    total = len(video) + new
    return videos[:, :total] if forward else videos[:, -total:]


def long(request: Request) -> np.ndarray:
    """Videos of any length, from a start or from nothing, all in memory."""
    return np.concatenate(list(long_pieces(request)), axis=1)


def long_pieces(request: Request) -> Iterator[np.ndarray]:
    """Videos of any length, uint8 (N, n, H, W, 3) at a time."""
    fps, factor = request.generator.fps, request.factors[0]
    if tuple(request.size) != tuple(request.generator.video_shape[1:]):
        height, width = request.generator.video_shape[1:]
        raise UserError(f"Long videos have the size {height}x{width}: leave size out.")
    frames = 1 + factor * max(1, round((request.seconds or _LONG) * fps / factor))
    start = None
    if request.sources:
        start = request.read(0)
        if len(start) >= frames:
            raise UserError(
                f"{name_of(request.sources[0])} has {len(start)} frames at {fps:g} fps, and a long "
                f"video of {frames} is asked for, the start counted in: give more seconds than "
                f"{len(start) / fps:.3g}."
            )
        start = start[None, : len(start) - (len(start) - 1) % factor].repeat(request.count, axis=0)
    text, negative = (
        None if said is None else request.generator.texts(said)
        for said in (request.prompts, request.negative_prompts)
    )
    return generate_long(
        request.generator,
        frames,
        Wanted(label=request.labels, text=text, negative=negative),
        scheme=request.scheme,
        count=request.count,
        start=start,
        seed=request.seed,
        **request.options,
    )


def interpolate(request: Request) -> np.ndarray:
    """Clips from the last frame of one picture or video to the start of another."""
    first, last = request.read(0), request.read(1)
    return _between(request, first[None], last[None])


def connect(request: Request) -> np.ndarray:
    """Two videos with what comes between them."""
    first, last = request.read(0), request.read(1)
    made = _between(request, first[None], last[None])[:, 1 : -request.factors[0]]
    return _joined(first[None], made, last[None])


def loop(request: Request) -> np.ndarray:
    """A video and the way back to its start, so that it may be repeated without a seam; a picture's
    or a prompt's likewise."""
    if request.sources:
        videos, stage = request.read(0)[None], 0
    else:
        videos, stage = request.draw(), 1
    made = _between(request, videos, videos, stage=stage)[:, 1 : -request.factors[0]]
    return _joined(videos, made)


def inpaint(request: Request) -> np.ndarray:
    """A video's clip with a part of its frame painted anew; the latents' blocks beside it stay,
    with their pixels."""
    if request.mask is None:
        raise UserError("The task inpaint needs a mask: a box or a picture, white where to paint.")
    return _painted(request, request.read(0), read_mask(request.mask, request.size))


def outpaint(request: Request) -> np.ndarray:
    """A video's clip in a frame of another aspect, beside it painted anew; or with a mask that says
    what is."""
    if request.mask is not None:
        return inpaint(request)
    return _painted(request, *letterbox(request.sources[0], request.generator.fps, request.size))


def edit(request: Request) -> np.ndarray:
    """A video's clip, noised to `strength` and denoised as the prompt says (SDEdit, 2108.01073)."""
    return request.draw(start=_clip(request, request.read(0))[None])


def _painted(request: Request, video: np.ndarray, painted: np.ndarray) -> np.ndarray:
    clip = _clip(request, video)[None]
    known = np.repeat(~painted[None], request.frames, axis=0)
    given = pixel_mask(latent_mask(known, request.factors), request.factors)
    if not given.any():
        raise UserError(
            "The mask leaves no whole block of "
            f"{request.factors[1]}x{request.factors[2]} pixels: paint less of the frame."
        )
    return np.where(given[None, ..., None], clip, request.draw(clip, known))


def _between(request: Request, before: np.ndarray, after: np.ndarray, stage: int = 0) -> np.ndarray:
    """Clips whose first frame is the last of `before`, (N or 1, T, H, W, 3), and whose last latent
    frame is the first of `after`; a picture stands still in it."""
    ft = request.factors[0]
    head, tail = before[:, -1:], after[:, :ft]
    if tail.shape[1] < ft:
        tail = np.concatenate([tail, tail[:, -1:].repeat(ft - tail.shape[1], axis=1)], axis=1)
    known = _known(request, head=1, tail=ft)
    return request.draw(_laid(request, head=head, tail=tail), known, stage=stage)


def _laid(
    request: Request, head: np.ndarray | None = None, tail: np.ndarray | None = None
) -> np.ndarray:
    """Clips with frames (N, T', H, W, 3) at their starts and ends."""
    ends = [x for x in (head, tail) if x is not None]
    clips = np.zeros((len(ends[0]), *_shape(request), 3), np.uint8)
    if head is not None:
        clips[:, : head.shape[1]] = head
    if tail is not None:
        clips[:, -tail.shape[1] :] = tail
    return clips


def _known(request: Request, head: int = 0, tail: int = 0) -> np.ndarray:
    known = np.zeros(_shape(request), bool)
    known[:head] = True
    known[request.frames - tail :] = True
    return known


def _held(frames: np.ndarray, count: int) -> np.ndarray:
    """At least `count` frames (N, T, H, W, 3): the first is held as long as it takes."""
    missing = count - frames.shape[1]
    return np.concatenate([frames[:, :1].repeat(missing, axis=1), frames], axis=1)


def _clip(request: Request, video: np.ndarray) -> np.ndarray:
    if len(video) < request.frames:
        raise UserError(
            f"{name_of(request.sources[0])} has {len(video)} frames at {request.generator.fps:g} "
            f"fps, and the task {request.task} takes clips of {request.frames}: give a longer one."
        )
    if len(video) > request.frames:
        logger.info(
            "%s: the first %d frames are taken.", name_of(request.sources[0]), request.frames
        )
    return video[: request.frames]


def _joined(*parts: np.ndarray) -> np.ndarray:
    """One after another: (N or 1, T, H, W, 3), one standing for all."""
    rows = max(map(len, parts))
    return np.concatenate([np.broadcast_to(p, (rows, *p.shape[1:])) for p in parts], axis=1)


def _shape(request: Request) -> tuple[int, int, int]:
    return request.frames, *request.size


_ONE, _TWO = (1, 1), (2, 2)
TASKS = {
    task.name: task
    for task in (
        SampleTask(
            "text_to_video", "prompts, classes, or nothing", text_to_video, reads=("seconds",)
        ),
        SampleTask("text_to_image", "the same, one frame", text_to_image),
        SampleTask("image_to_video", "pictures, moving", image_to_video, (1, None), ("seconds",)),
        SampleTask("extend", "a video, longer", extend, _ONE, ("seconds", "direction")),
        SampleTask("long", "minutes, by a scheme", long, (0, 1), ("seconds", "scheme")),
        SampleTask("interpolate", "from one to another", interpolate, _TWO, ("seconds",)),
        SampleTask("connect", "two videos, joined", connect, _TWO, ("seconds",)),
        SampleTask("loop", "without a seam", loop, (0, 1), ("seconds",)),
        SampleTask("inpaint", "a part painted anew", inpaint, _ONE, ("seconds", "mask")),
        SampleTask("outpaint", "a larger frame", outpaint, _ONE, ("seconds", "mask")),
        SampleTask("edit", "a video, redrawn", edit, _ONE, ("seconds", "strength")),
    )
}
