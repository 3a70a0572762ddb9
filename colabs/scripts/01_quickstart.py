# %% [markdown]
# # Samples in a minute
#
# walt_jax trains W.A.L.T-style video diffusion models. A small one comes with the package: it read
# captions of moving sprites, such as *a red square moves left over a gray background*. On a CPU
# every cell takes seconds; on an accelerator most of that is compilation.

# %%
import numpy as np

import walt_jax
from walt_jax.notebook import show_videos

walt = walt_jax.load("sprites")  # or the workdir of your own run, or a folder of walt_jax.export
frames, height, width = walt.video_shape
print(f"step {walt.step}: {frames} frames of {height}x{width} at {walt.fps:g} fps")

# %% [markdown]
# ## From text
#
# One video a prompt. `guidance` says how strongly the prompt is followed, `steps` how finely noise
# is taken away. Video *i* depends on the seed, on *i* and on its prompt only: ask again, and it is
# the same, on any device.

# %%
prompts = [
    "a red square moves left over a gray background",
    "a green triangle moves up over a yellow background",
    "a blue square moves right over a yellow background",
    "a red triangle moves down over a gray background",
]
options = {"guidance": 3.0, "steps": 25, "progress": False}
videos = walt.sample(prompts, seed=1, **options)
show_videos(videos, walt.fps, prompts)

# %% [markdown]
# ## What the model works on
#
# The tokenizer makes latents of a video: the first stands for one frame, each later one for the
# next four. All diffusion happens there.

# %%
latents = walt.encode(videos[0])
print(f"{videos[0].size} bytes -> {latents.shape}, {latents.size} numbers")
show_videos([videos[0], walt.decode(latents)], walt.fps, ["video", "decoded again"])

# %% [markdown]
# ## From a picture
#
# The first frame is given; what is to happen, the prompt says.

# %%
picture = videos[0][0]
ways = [f"a red square moves {way} over a gray background" for way in ("left", "up", "down")]
moved = walt.sample(ways, task="image_to_video", image=picture, **options)
show_videos(moved, walt.fps, ways)

# %% [markdown]
# ## Longer
#
# `extend` goes on from the last frames of a video; `direction="backward"` leads up to its first.

# %%
longer = walt.sample(prompts[2], task="extend", video=videos[2], seconds=1, **options)
show_videos([videos[2], longer[0]], walt.fps, ["video", "and a second more"])

# %% [markdown]
# ## Between
#
# The first and the last frames are given.

# %%
between = walt.sample(
    prompts[0], task="interpolate", image=[videos[0][0], videos[0][-1]], num=2, **options
)
ends = np.stack([videos[0][0], videos[0][-1]])[:, None]
show_videos([*ends, *between], walt.fps, ["first", "last", "between", "another way"])

# %% [markdown]
# ## Next
#
# - `python -m walt_jax.sample --workdir sprites --prompt "a blue square moves up" --out out/s`
#   writes videos and a page; docs/sampling.md has every task.
# - `02_tokenizer` looks at the tokenizer, `03_train_walt` trains a model of your own.
