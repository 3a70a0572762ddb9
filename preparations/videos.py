"""Curation of videos: scene cuts, scores as columns, near-duplicates, thresholds.

    python -m walt_jax.prepare --input videos --output out/videos --config preparations/videos.py

Other thresholds decode nothing: give the same command with --config.filter.motion="(0.05, None)"
and --overwrite; it begins at out/videos.scored, where all clips are with their scores. Or filter
any prepared dataset into another:

    python -m walt_jax.prepare --input out/videos.scored --output out/sharp \
        --config.filter.sharpness="(100.0, None)"

The thresholds below are starting points. Scores depend on the content and on --short-side, so look
at the histograms of report.html before choosing. Aesthetics and image-text match need a CLIP model
exported to ONNX (docs/curation.md), captions an OpenAI-compatible endpoint in $OPENAI_BASE_URL:

    --config.scores.clip="{'image': {'source': 'vision_model.onnx'}, ...}"
    --config.captions.endpoint="{'model': 'NAME'}"

Variants: `text` also looks for text in the picture (RapidOCR, the slowest score); `score` filters
nothing; `debug` cuts and scores at 64 pixels.
"""

from ml_collections import ConfigDict

from walt_jax.config import variants


def get_config(arg: str = "") -> ConfigDict:
    """The preparation; see the file's docstring."""
    variant = variants(arg, {name: name for name in ("", "text", "score", "debug")}, __file__)
    config = ConfigDict()
    config.cut = {
        "detector": "adaptive",
        "min_clip_seconds": 1.0,
        "max_seconds": 20.0,
    }
    config.scores = {
        "motion": True,
        "sharpness": True,
        "letterbox": True,
        "black_frames": True,
        "text_area": variant == "text",
        "phash": True,
    }
    config.captions = {"sidecar": ".txt"}
    config.filter = {
        "motion": (0.01, None),
        "sharpness": (10.0, None),
        "letterbox": (None, 0.1),
        "black_frames": (None, 0.25),
        "duplicate_bits": 6,
    }
    if variant == "text":
        config.filter.text_area = (None, 0.1)
    if variant == "score":
        config.filter = {}
    if variant == "debug":
        config.short_side = 64
    return config
