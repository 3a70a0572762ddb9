# %% [markdown]
# # Train a W.A.L.T
#
# From videos to samples: sprite videos are written, prepared and encoded by the tokenizer that
# comes with the package, and a small denoiser learns their classes. On a CPU it takes minutes,
# enough to see samples become what they are to be; with more steps they get there.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import display

import walt_jax
from walt_jax import config
from walt_jax.data.latents import encode_dataset
from walt_jax.data.pipeline import DataConfig
from walt_jax.data.preparation import prepare_dataset
from walt_jax.data.sprites import SpriteConfig, write_sprites
from walt_jax.generation.walt import find
from walt_jax.notebook import show_videos
from walt_jax.training.experiment import Experiment
from walt_jax.training.loop import train
from walt_jax.training.metrics import read_metrics
from walt_jax.training.tokenizers import load_tokenizer

STEPS = 600  # of training: 3000 give good samples
out = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Videos to latents
#
# A class is a shape, a colour and a direction. `prepare` makes records of video files, `encode`
# caches their latents, so that training never sees a pixel.

# %%
sprites = SpriteConfig(
    shapes=("square", "triangle"),
    colours=("red", "green", "blue"),
    backgrounds=("gray",),
    sizes=(0.4, 0.44),
    fps=(8,),
    seconds=(2.2, 2.3),
    crossing=True,
    short_side=64,
)
manifest = write_sprites(out / "videos", 192, sprites)
prepare_dataset(manifest, out / "records")
data = DataConfig(str(out / "records"), num_frames=9, fps=4.0, sizes=((64, 64),))
latents = encode_dataset(load_tokenizer(find("sprites")), data, out / "latents", epochs=1)
print(f"{len(latents)} clips of 9 frames, each {latents.read(0)['latents'].shape}")

# %% [markdown]
# ## Train
#
# An experiment is plain data; `configs/` has those of the papers. Attention alternates between
# frames, `(1, 0, 0)`, and windows of space and time, `(0, 4, 4)`. The same loop trains on a pod.

# %%
experiment = config.build(
    Experiment,
    {
        "task": {
            "name": "denoiser",
            "tokenizer": str(find("sprites")),
            "model": {
                "grid": (3, 8, 8),
                "patch_size": (1, 2, 2),
                "width": 128,
                "num_heads": 4,
                "num_layers": 6,
                "windows": ((1, 0, 0), (0, 4, 4)),
                "num_classes": len(sprites.class_names),
                "dtype": "float32",
            },
        },
        "data": {"path": str(out / "latents"), "num_frames": 9, "fps": 4.0, "sizes": ((64, 64),)},
        "num_steps": STEPS,
        "batch_size": 16,
        "optimizer": {"learning_rate": 2e-3, "warmup_steps": 50, "ema_decay": 0.98},
        "log_every": 25,
        "eval_every": STEPS,
        "checkpoint_every": STEPS // 3,
        "keep_checkpoints": 3,
    },
)
train(experiment, out / "walt", quiet=True)
steps, losses = read_metrics(out / "walt", "train/loss")
figure, axis = plt.subplots(figsize=(7, 2.5))
axis.plot(steps, losses)
axis.set(xlabel="step", ylabel="loss", yscale="log")
plt.show()

# %% [markdown]
# ## Watch samples improve
#
# The same noise and classes at three checkpoints.

# %%
labels = ["red square left", "green triangle up", "blue square right", "red triangle down"]
for step in (STEPS // 3, 2 * STEPS // 3, STEPS):
    walt = walt_jax.load(out / "walt", step=step)
    videos = walt.sample(label=labels, seed=0, steps=20, guidance=2.0, progress=False)
    display(show_videos(videos, walt.fps, [f"{step} steps: {name}" for name in labels]))

# %% [markdown]
# ## Next
#
# `python -m walt_jax.train --config configs/sprites_walt.py --workdir out/walt` is the command line
# of this; docs/denoiser.md says what a denoiser's config can be.
