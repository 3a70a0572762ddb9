"""W.A.L.T's first super-resolution: 17x128x224 to 17x256x448 (2312.06662, sections 3.5 and 5.3).

    python -m walt_jax.prepare --input videos.csv --output out/videos_256 --short-side 256
    python -m walt_jax.train --config configs/walt_sr1.py --workdir out/walt_sr1 \
        --config.task.tokenizer=out/tokenizer_t2v --config.data.path=out/videos_256

Each step shrinks the clips, encodes both resolutions by the tokenizer of
`configs/tokenizer_t2v.py`, and adds noise to the small latents; so the data are pixels, not
latents; T5 reads the captions in every step, too. All but what is here is
`configs/walt_t2v.py`'s, whose docstring says more. `walt_jax.generation.Generator.sample` takes the
low-resolution latents as `low`.

1.3B parameters (40 layers of width 1408, patches of 2x2; table 8), no self-conditioning: the
low-resolution latents are an estimate already.

Hardware: a TPU pod, say `--config.mesh.fsdp=16`; neither run nor measured by us at this size.
2.1e22 FLOPs, 73,000 chip-hours of TPU v5e at 40 % of its peak, if that is reached. Two thirds of
them are the tokenizer's, which encodes the clips anew in every step.
Expect no number: the paper scores its base models only.
Not in the paper and chosen by us, besides what is said there: t_max_noise, the largest time of the
noise on the small latents, a quarter of the process; averages of 2x2 pixels as small frames; videos
alone.
Variants: `debug` takes a few steps of a tiny network in seconds.
"""

from pathlib import Path

from ml_collections import ConfigDict

from walt_jax.config import load, to_dict, variants
from walt_jax.models.named import DENOISERS


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; see the file's docstring."""
    change = variants(arg, _VARIANTS, __file__)
    config = ConfigDict(load(f"{Path(__file__).with_name('walt_t2v.py')}:{arg}"))
    del config.images, config.image_batch_size, config.task.given
    config.task.model = to_dict(DENOISERS["walt-sr1"])
    config.task.low_noise = 0.25
    config.data.path = "out/videos_256"
    config.optimizer.learning_rate = 5e-4
    config.update(change)
    return config


_VARIANTS = {
    "": {"data": {"sizes": ((256, 448),)}, "num_steps": 675_000},
    "debug": {
        "task": {
            "model": {
                "grid": (2, 8, 8),
                "width": 16,
                "num_heads": 2,
                "num_layers": 2,
                "windows": ((1, 0, 0), (0, 2, 2)),
                "text_features": 8,
                "dtype": "float32",
            }
        },
        "data": {"sizes": ((64, 64),)},
    },
}
