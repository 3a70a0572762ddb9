"""Reads shape, colour and direction of the moving object back from a video, by classic vision.

The judge of class-conditional samples: it knows the names of `walt_jax.data.sprites`, not which
video it looks at. In order: the background is the median colour along the frame's border, and bars
that cross the whole frame are left out; the object is what differs from it (Otsu's threshold on the
colour distance, over the whole video), one component a frame, all of one colour; its shape is the
template that correlates best with the average of the frames, aligned on the object; its direction
is the median slope of its path. What is not clear is None: a video of noise has no shape.

Coordinates are those of `sprites`: (x, y) in pixels, (0, 0) at the centre of the top left pixel.
"""

import dataclasses
import functools

import cv2
import numpy as np

from walt_jax.data.sprites import COLOURS, DIRECTIONS, SHAPES, shape_mask

_WORK_SIDE = 64  # larger videos are read at this short side
_MIN_CONTRAST = 35.0  # RGB distance of an object from the background
_BAR_CONTRAST = 60.0  # RGB distance of a bar from the background
_AREAS = (0.008, 0.35)  # of an object, in squared short sides
_FOUND = 0.25  # share of its usual area that must show for the object to count as found
_CLEAR = 0.85  # and for the frame to tell of shape and motion
_MIN_TRAVEL = 0.08  # short sides over the whole video, for a direction
_STRAIGHT = 1.5  # the motion along the axis, over that across it, for a direction
_MIN_STEP = 0.002  # short sides a frame, for an action
_TEMPLATE, _PATCH = 36, 44  # px; the patch leaves the template room to find its place
_UNIT = 18.0  # px; square root of the object's area in patch and template
_SCALES, _BLURS = (0.9, 1.0, 1.1), (0.8, 1.6, 2.6, 3.6)  # of the templates
_MIN_MATCH, _MIN_LEAD = 0.9, 0.004  # correlation with the best template, and lead on the second
_MAX_COLOUR = 60.0  # Lab distance to the nearest colour


@dataclasses.dataclass(frozen=True)
class ReadBack:
    """What is seen in a video of T frames.

    To judge a part, such as what comes back from behind an occluder, read that part alone.

    Attributes:
      shape, colour, direction: names, or None if unclear. Direction is that of the whole video.
      found: bool (T,), the object (of its one colour) is in the frame, at least a quarter of it.
      clear: bool (T,), all of it is in sight: away from the frame's border, cut by nothing.
      centres: float32 (T, 2), its centre of gravity, px; NaN where it is not found.
      areas: float32 (T,), px; 0 where it is not found.
      velocity: float32 (2,), px/s, median over the video; NaN if it cannot be told.
      directions: per frame, the name of the movement from it to the next frame, or None if the
        object is at rest, moves between two directions or is not clear. The last repeats.
      inside: bool (T,), found and not touching the frame's border.
    """

    shape: str | None
    colour: str | None
    direction: str | None
    found: np.ndarray
    clear: np.ndarray
    inside: np.ndarray
    centres: np.ndarray
    areas: np.ndarray
    velocity: np.ndarray
    directions: tuple[str | None, ...]

    @property
    def label_name(self) -> str | None:
        """The class as `sprites` writes it, "red square left"; None if a part of it is None."""
        parts = (self.colour, self.shape, self.direction)
        return None if None in parts else " ".join(parts)

    @property
    def speed(self) -> float:
        """The object's speed, px/s; NaN if it cannot be told."""
        return float(np.linalg.norm(self.velocity))

    @property
    def persistence(self) -> float:
        """The share of frames in which the object is found."""
        return float(self.found.mean())

    @property
    def wholly_inside(self) -> bool:
        """The object is found, and touches the border in no frame in which it is."""
        return bool(self.found.any() and self.inside[self.found].all())


def read_back(
    frames: np.ndarray,
    fps: float = 1.0,
    *,
    shapes: tuple[str, ...] = ("square", "circle", "triangle"),
    colours: tuple[str, ...] = ("red", "green", "blue", "yellow"),
    directions: tuple[str, ...] = ("left", "right", "up", "down"),
    forced: bool = False,
) -> ReadBack:
    """Finds the one moving object of a video.

    Args:
      frames: uint8 (T, H, W, 3), sRGB; T >= 1, H and W >= 8.
      fps: frames a second; with the default 1, speeds are in px a frame.
      shapes, colours, directions: the names to tell apart, from the tables in `sprites`.
      forced: name the nearest shape, colour and direction of an object that is found, however
        unclear they are. Blind guesses are then right by chance, one in the number of names.

    Raises:
      ValueError: frames of another type or shape.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"read_back takes uint8 (T, H, W, 3), got {frames.dtype} {frames.shape}.")
    if min(frames.shape[1:3]) < 8:
        raise ValueError(f"read_back takes frames of at least 8x8, got {frames.shape[1:3]}.")
    height, width = frames.shape[1:3]
    shrink = min(1.0, _WORK_SIDE / min(height, width))
    size = round(width * shrink), round(height * shrink)
    scale = np.array([width, height]) / size
    small = [cv2.resize(f, size, interpolation=cv2.INTER_AREA) for f in frames]
    rgb = np.stack([cv2.GaussianBlur(f.astype(np.float32), (0, 0), 0.8) for f in small])
    side = min(size)

    count = len(frames)
    masks, likeness, colour_rgb, bars = _segment(rgb)
    regions = [_largest(mask) for mask in masks]
    areas = np.array([region.sum() for region in regions], np.float32)
    usual = np.percentile(areas[areas > 0], 75) if areas.any() else 0.0
    if not _AREAS[0] * side**2 <= usual <= _AREAS[1] * side**2:
        areas[:] = usual = 0
    found = (areas >= _FOUND * usual) & (areas > 0)
    inside, clear = found.copy(), found.copy()
    centres = np.full((count, 2), np.nan, np.float32)
    for t in np.flatnonzero(found):
        centres[t] = _centre(regions[t], likeness[t])
        edge = regions[t].copy()
        edge[1:-1, 1:-1] = False
        inside[t] = not edge.any()
        cut = (_grow(regions[t], 3) & bars).any()
        clear[t] = inside[t] and not cut and areas[t] >= _CLEAR * usual

    telling = clear if clear.sum() > 1 else found
    shape = _name_shape(likeness, centres, areas, telling, shapes, forced)
    velocity = _slope(centres, telling)
    travel = velocity * (count - 1)
    return ReadBack(
        shape=shape,
        colour=_name_colour(colour_rgb, colours, forced) if found.any() else None,
        direction=_name_direction(travel, _MIN_TRAVEL * side, directions, forced),
        found=found,
        clear=clear,
        inside=inside,
        centres=((centres + 0.5) * scale - 0.5).astype(np.float32),
        areas=(np.where(found, areas, 0) * scale.prod()).astype(np.float32),
        velocity=(velocity * scale * fps).astype(np.float32),
        directions=_steps(centres, clear, _MIN_STEP * side, directions),
    )


def _segment(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Splits float32 frames (T, H, W, 3) in object and background.

    Returns:
      masks: bool (T, H, W), the pixels of the object's colour.
      likeness: float32 (T, H, W), 0 like the background ... 1 like the object, by projection of
        the colour on the line between them; not clipped, so that noise averages out.
      colour: float32 (3,), the object's.
      bars: bool (H, W), what bars that cross the frame cover.
    """
    ring = np.concatenate([rgb[:, [0, -1]].reshape(-1, 3), rgb[:, :, [0, -1]].reshape(-1, 3)])
    ground = np.median(ring, axis=0)
    # No object fills half of a row or column through the whole video; a bar fills all of it.
    bars = np.zeros(rgb.shape[1:3], bool)
    for axis in (0, 1):
        lines = np.median(rgb, axis=(0, 1 + axis))
        found = np.linalg.norm(lines - ground, axis=-1) > _BAR_CONTRAST
        bars |= found[None, :] if axis == 0 else found[:, None]
    bars = _grow(bars, 3)
    open_ = ~bars

    distance = np.linalg.norm(rgb - ground, axis=-1) * open_
    threshold = max(_otsu(distance[:, open_]), _MIN_CONTRAST)
    core = np.stack([cv2.erode(m, np.ones((3, 3))) for m in (distance > threshold).astype("uint8")])
    if not core.any():
        nothing = np.zeros(distance.shape, np.float32)
        return nothing > 0, nothing, ground, bars
    colour = np.median(rgb[core > 0], axis=0)
    line = colour - ground
    likeness = (rgb - ground) @ line / max(line @ line, 1.0)
    astray = np.linalg.norm(rgb - ground - likeness[..., None] * line, axis=-1)
    masks = (likeness > 0.5) & (astray < 0.5 * np.linalg.norm(line)) & open_
    return masks, likeness * open_, colour, bars


def _grow(mask: np.ndarray, size: int) -> np.ndarray:
    """A mask, bool (H, W), widened by half of an odd number of px on every side."""
    return cv2.dilate(mask.astype(np.uint8), np.ones((size, size), np.uint8)) > 0


def _otsu(values: np.ndarray) -> float:
    """Otsu's threshold of non-negative values; 0 if there are none."""
    if not values.size:
        return 0.0
    top = max(float(values.max()), 1e-6)
    levels = np.round(values.reshape(-1, 1) * (255 / top)).astype(np.uint8)
    return cv2.threshold(levels, 0, 255, cv2.THRESH_OTSU)[0] * top / 255


def _largest(mask: np.ndarray) -> np.ndarray:
    """The largest connected component of a mask, both bool (H, W)."""
    count, ids, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    if count == 1:
        return np.zeros_like(mask)
    return ids == 1 + np.argmax(stats[1:, cv2.CC_STAT_AREA])


def _centre(region: np.ndarray, likeness: np.ndarray) -> np.ndarray:
    """Centre of gravity (x, y) of a region with its soft edge, (H, W) each."""
    weights = np.clip(likeness, 0, 1) * _grow(region, 5)
    y, x = np.indices(weights.shape)
    return np.array([(weights * x).sum(), (weights * y).sum()]) / weights.sum()


@functools.cache
def _templates(shape: str) -> tuple[np.ndarray, ...]:
    """The shape at every scale and blur, float32 (_TEMPLATE, _TEMPLATE) each."""
    outline = SHAPES[shape].astype(np.float32)
    diameter = _UNIT / np.sqrt(cv2.contourArea(outline))
    middle = np.full(2, (_TEMPLATE - 1) / 2)
    size = (_TEMPLATE, _TEMPLATE)
    return tuple(
        cv2.GaussianBlur(shape_mask(shape, middle, diameter * scale, size), (0, 0), blur)
        for scale in _SCALES
        for blur in _BLURS
    )


def _name_shape(
    likeness: np.ndarray,
    centres: np.ndarray,
    areas: np.ndarray,
    use: np.ndarray,
    names: tuple[str, ...],
    forced: bool,
) -> str | None:
    """The shape that the frames marked in `use` show on average."""
    if not use.any():
        return None
    patch = np.zeros((_PATCH, _PATCH), np.float32)
    zoom = np.sqrt(np.median(areas[use])) / _UNIT
    for image, centre in zip(likeness[use], centres[use]):
        corner = centre - zoom * (_PATCH - 1) / 2
        matrix = np.array([[zoom, 0, corner[0]], [0, zoom, corner[1]]], np.float32)
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        patch += cv2.warpAffine(image.astype(np.float32), matrix, (_PATCH, _PATCH), flags=flags)
    matches = [
        max(cv2.matchTemplate(patch, t, cv2.TM_CCOEFF_NORMED).max() for t in _templates(name))
        for name in names
    ]
    order = np.argsort(matches)[::-1]
    lead = matches[order[0]] - (matches[order[1]] if len(order) > 1 else 0)
    clear = matches[order[0]] >= _MIN_MATCH and lead >= _MIN_LEAD
    return names[order[0]] if forced or clear else None


def _name_colour(rgb: np.ndarray, names: tuple[str, ...], forced: bool) -> str | None:
    """The nearest colour in Lab, where lightness counts half: shading is no change of colour."""
    table = np.array([rgb, *(COLOURS[name] for name in names)], np.float32)[None] / 255
    lab = cv2.cvtColor(table, cv2.COLOR_RGB2LAB)[0] * [0.5, 1, 1]
    distances = np.linalg.norm(lab[1:] - lab[0], axis=1)
    nearest = int(np.argmin(distances))
    return names[nearest] if forced or distances[nearest] < _MAX_COLOUR else None


def _slope(centres: np.ndarray, use: np.ndarray) -> np.ndarray:
    """Median velocity (2,) over all pairs of frames in `use` (Theil and Sen), px/frame; or NaN."""
    times = np.flatnonzero(use)
    if len(times) < 2:
        return np.full(2, np.nan)
    first, second = np.triu_indices(len(times), 1)
    gaps = times[second] - times[first]
    return np.median((centres[times[second]] - centres[times[first]]) / gaps[:, None], axis=0)


def _name_direction(
    move: np.ndarray, least: float, names: tuple[str, ...], forced: bool = False
) -> str | None:
    """The direction of a displacement (2,) in px; None if it is under `least`, or is slanted."""
    along = {name: float(move @ DIRECTIONS[name]) for name in names}
    best = max(along, key=along.get)
    across = np.abs(move * (1 - np.abs(DIRECTIONS[best]))).sum()
    if forced and np.isfinite(along[best]):
        return best
    # A NaN fails both comparisons.
    return best if along[best] >= least and along[best] >= _STRAIGHT * across else None


def _steps(
    centres: np.ndarray, clear: np.ndarray, least: float, names: tuple[str, ...]
) -> tuple[str | None, ...]:
    """The direction of the movement from each frame to the next; the last repeats."""
    places = np.where(clear[:, None], centres, np.nan)
    steps = [_name_direction(move, least, names) for move in np.diff(places, axis=0)] or [None]
    return (*steps, steps[-1])[: len(centres)]
