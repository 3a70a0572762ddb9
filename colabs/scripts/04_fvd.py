# %% [markdown]
# # What FVD measures
#
# The Fréchet video distance compares two sets of videos by a network's features: a Gaussian is put
# to each set, and the distance of the Gaussians is the score. Published FVD takes the features of
# an I3D that was trained on Kinetics, whose weights are downloaded (docs/evaluation.md). Here the
# tokenizer of the sprite model stands in, so that the notebook needs nothing: its numbers compare
# with each other, not with papers.

# %%
import matplotlib.pyplot as plt
import numpy as np

import walt_jax
from walt_jax.data.sprites import SpriteConfig, sprite_video
from walt_jax.evaluation.frechet import frechet_distance, kernel_distance
from walt_jax.evaluation.moments import Moments
from walt_jax.notebook import show_videos

N = 64  # videos a set; papers take thousands
walt = walt_jax.load("sprites")
frames = walt.video_shape[0]
sprites = SpriteConfig(
    backgrounds=("black", "white", "gray", "yellow"),
    aspects=("1:1",),
    fps=(8,),
    seconds=(2.2, 2.3),
    sizes=(0.38, 0.44),
)


def drawn(count, seed):
    """Sprite videos and their captions."""
    made = [sprite_video(sprites, seed, index) for index in range(count)]
    return np.stack([video.frames[:frames] for video in made]), [video.caption for video in made]


def features(videos):
    """A vector a video: how each latent channel lies, varies in the frame, and moves."""
    z = walt.encode(videos)
    moved = np.abs(np.diff(z, axis=1))
    return np.concatenate([z.mean((1, 2, 3)), z.std((1, 2, 3)), moved.mean((1, 2, 3))], axis=1)


def distance(a, b):
    """Of two sets of features."""
    return frechet_distance(Moments.of(a), Moments.of(b))


real, _ = drawn(N, seed=0)
other, captions = drawn(N, seed=1)
show_videos(real[:8], walt.fps, height=96)

# %% [markdown]
# ## What it sees
#
# Another set of real videos is nearly, not quite, at distance 0. What is done to that set costs
# more: noise, coarse pixels, and, though each frame is a real one, frames out of order or standing
# still. A set without some classes is told by its spread alone.

# %%
rng = np.random.default_rng(0)
coarse = other[:, :, ::4, ::4].repeat(4, axis=2).repeat(4, axis=3)
noisy = np.clip(other + rng.normal(0, 20, other.shape), 0, 255).astype(np.uint8)
shuffled = np.stack([video[rng.permutation(frames)] for video in other])
still = other[:, :1].repeat(frames, axis=1)
red = other[["red" in caption for caption in captions]]
sets = {
    "other real videos": other,
    "noise": noisy,
    "coarse pixels": coarse,
    "frames out of order": shuffled,
    "standing still": still,
    "red ones alone": red,
}
ours = features(real)
found = {name: features(videos) for name, videos in sets.items()}
scores = {name: distance(ours, theirs) for name, theirs in found.items()}
figure, axis = plt.subplots(figsize=(7, 3))
axis.barh(list(scores), list(scores.values()))
axis.invert_yaxis()
axis.set(xlabel="Fréchet distance to real videos")
plt.show()

# %% [markdown]
# ## Samples of the model
#
# Fewer steps of the sampler and no guidance, or more of both: which samples are nearer to real
# ones, of the same captions? So few videos tell little, and score worse than many would.

# %%
count = 12
print(f"as many real videos: {distance(ours, found['other real videos'][:count]):.3f}")
for steps, guidance in ((4, 1.0), (12, 1.0), (12, 3.0)):
    samples = walt.sample(captions[:count], steps=steps, guidance=guidance, progress=False)
    score = distance(ours, features(samples))
    print(f"{steps:2} steps, guidance {guidance:g}: {score:.3f}")

# %% [markdown]
# ## How many videos?
#
# The distance of two sets of the same kind falls with their size: a score of 64 videos must not
# stand beside one of 2048. The kernel distance (KVD) has no such bias, only noise. Every score of
# `walt_jax.evaluate` carries its protocol, and scores of other protocols are not compared.

# %%
sizes = [28, 36, 44, 54, N]
theirs = found["other real videos"]
figure, axes = plt.subplots(1, 2, figsize=(9, 3))
axes[0].plot(sizes, [distance(ours[:n], theirs[:n]) for n in sizes], "o-")
axes[1].plot(sizes, [kernel_distance(ours[:n], theirs[:n])[0] for n in sizes], "o-")
axes[1].axhline(0, color="0.8")
for axis, name in zip(axes, ("Fréchet distance", "kernel distance")):
    axis.set(xlabel="videos on each side", title=f"{name} of real to real")
plt.show()

# %% [markdown]
# ## A real score
#
# With I3D's weights (docs/evaluation.md), a run's checkpoint is scored by
# `python -m walt_jax.evaluate checkpoint --workdir out/walt --protocol custom --real out/records`;
# evaluators in the config do it while training. docs/scores.md has the protocols.
