# %% [markdown]
# # What FVD measures
#
# The Fréchet video distance compares two sets of videos by a network's features: a Gaussian is put
# to each set, and the distance of the Gaussians is the score. Published FVD takes the features of
# an I3D that was trained on Kinetics, whose weights are downloaded (docs/evaluation.md). Here a few
# statistics of pixels stand in, so that the notebook needs nothing: its numbers compare with each
# other, not with papers.

# %%
import cv2
import matplotlib.pyplot as plt
import numpy as np

import walt_jax
from walt_jax.data.sprites import SpriteConfig, sprite_video
from walt_jax.evaluation.frechet import frechet_distance, kernel_distance
from walt_jax.evaluation.moments import Moments
from walt_jax.notebook import show_videos

N = 192  # videos a set; papers take thousands
SPREAD = np.array([0.3] * 6 + [0.02] * 6)  # of each number over videos, about
walt = walt_jax.load("sprites")
frames = walt.video_shape[0]
sprites = SpriteConfig(
    shapes=("square", "triangle"),
    backgrounds=("gray", "yellow"),
    aspects=("1:1",),
    fps=(int(walt.fps),),
    seconds=(2.2, 2.3),
    sizes=(0.4, 0.44),
    crossing=True,
)


def drawn(count, seed):
    """Sprite videos and their captions."""
    made = [sprite_video(sprites, seed, index) for index in range(count)]
    return np.stack([video.frames[:frames] for video in made]), [video.caption for video in made]


def features(videos):
    """A vector a video: colours, and how they change in the frame and in time, fine and coarse."""
    x = videos / 255.0
    found = [x.mean((1, 2, 3)), x.std((1, 2, 3))]
    for scale in (1, 4):
        n, t, h, w, c = x.shape
        small = x.reshape(n, t, h // scale, scale, w // scale, scale, c).mean((3, 5))
        squares = [np.square(np.diff(small, axis=a)).mean((1, 2, 3, 4)) for a in (1, 2, 3)]
        found += [np.sqrt(square)[:, None] for square in squares]
    return np.concatenate(found, axis=1) / SPREAD


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
# more: noise, blur, and, though each frame is a real one, frames out of order or standing
# still. A set without some classes is told by its spread alone.

# %%
rng = np.random.default_rng(0)
blurred = np.stack([[cv2.blur(frame, (5, 5)) for frame in video] for video in other])
noisy = np.clip(other + rng.normal(0, 5, other.shape), 0, 255).astype(np.uint8)
shuffled = np.stack([video[rng.permutation(frames)] for video in other])
still = other[:, :1].repeat(frames, axis=1)
red = other[["red" in caption for caption in captions]]
sets = {
    "other real videos": other,
    "noise": noisy,
    "blur": blurred,
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
axis.set(xlabel="Fréchet distance to real videos", xscale="log")
figure.tight_layout()
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
# The distance of two sets of the same kind falls with their size (here the mean of 20 splits): a
# score of 96 videos must not stand beside one of 2048. The kernel distance (KVD) does not fall so;
# it is below 0 here, as both sets are drawn from one pool without repetition. Every score of
# `walt_jax.evaluate` carries its protocol, and scores of other protocols are not compared.

# %%
sizes = [24, 48, 96, N]
pool = np.concatenate([ours, found["other real videos"]])


def mean_over_splits(score, n):
    """Of two random sets of n real videos each."""
    splits = [rng.permutation(len(pool))[: 2 * n] for _ in range(20)]
    return np.mean([score(pool[rows[:n]], pool[rows[n:]]) for rows in splits])


figure, axes = plt.subplots(1, 2, figsize=(9, 3))
axes[0].plot(sizes, [mean_over_splits(distance, n) for n in sizes], "o-")
kernel = [mean_over_splits(lambda a, b: kernel_distance(a, b)[0], n) for n in sizes]
axes[1].plot(sizes, kernel, "o-")
axes[1].axhline(0, color="0.8")
for axis, name in zip(axes, ("Fréchet distance", "kernel distance")):
    axis.set(xlabel="videos on each side", title=f"{name} of real to real")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## A real score
#
# With I3D's weights (docs/evaluation.md), a run's checkpoint is scored by
# `python -m walt_jax.evaluate checkpoint --workdir out/walt --protocol custom --real out/records`;
# evaluators in the config do it while training. docs/scores.md has the protocols.
