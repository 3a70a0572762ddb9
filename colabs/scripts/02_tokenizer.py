# %% [markdown]
# # The tokenizer: what is kept of a video
#
# Diffusion works on the latents of a causal 3D tokenizer (MAGVIT-v2's). Here it encodes a video, of
# your own if you like, and gives it back; then its bits are counted beside those of H.264.

# %%
import tempfile
from pathlib import Path

import av
import matplotlib.pyplot as plt
import numpy as np

import walt_jax
from walt_jax.data.sprites import SpriteConfig, sprite_video
from walt_jax.data.video import read_video
from walt_jax.generation.sources import read_source
from walt_jax.media import write_mp4
from walt_jax.notebook import show_videos

VIDEO = ""  # a path of your own; without one a sprite is drawn

walt = walt_jax.load("sprites")
frames, height, width = walt.video_shape
if VIDEO:
    video = read_source(VIDEO, walt.fps, (height, width))
    video = video[: walt.generator.sizes.fitting(min(len(video), frames))]
else:
    sprites = SpriteConfig(
        shapes=("triangle",),
        backgrounds=("gray", "yellow"),
        aspects=("1:1",),
        fps=(int(walt.fps),),
        seconds=(2.2, 2.3),
        sizes=(0.4, 0.44),
        crossing=True,
    )
    video = sprite_video(sprites, seed=5, index=0).frames[:frames]
print(f"{len(video)} frames of {video.shape[1]}x{video.shape[2]}")

# %% [markdown]
# ## There and back
#
# Nine frames become three latent ones: the first stands for the first frame alone, so that a
# picture is a video of one frame; each other one for four. Height and width shrink eight times.

# %%
latents = walt.encode(video)
back = walt.decode(latents)
error = np.abs(video.astype(int) - back).clip(0, 63).astype(np.uint8) * 4
print(f"{video.size} bytes -> {latents.shape}: {video.size / latents.size:.0f} times fewer numbers")
show_videos([video, back, error], walt.fps, ["video", "decoded", "difference, times 4"])


# %% [markdown]
# ## Frame by frame
#
# Peak signal-to-noise ratio: 10 dB more is a tenth of the squared error. Groups of four frames
# share a latent frame.


# %%
def psnr(a, b):
    """In dB, of each frame."""
    return 10 * np.log10(255**2 / np.square(a.astype(float) - b).mean((1, 2, 3)))


figure, axis = plt.subplots(figsize=(7, 2.5))
axis.plot(psnr(video, back), "o-")
for edge in range(1, len(video), 4):
    axis.axvline(edge - 0.5, color="0.8")
axis.set(xlabel="frame", ylabel="PSNR (dB)")
plt.show()

# %% [markdown]
# ## Causal
#
# The latents of a beginning are those of the whole: what comes later changes nothing. This is why
# videos can be extended, and streams encoded piece by piece.

# %%
beginning = walt.encode(video[:5])
print("largest difference:", np.abs(latents[:2] - beginning).max())

# %% [markdown]
# ## How many bits?
#
# Latents have zero mean and unit variance in each channel. Rounded to a few bits each, how much is
# lost? H.264 at several qualities beside it; only its pictures are counted, not the file's header.


# %%
def rounded(z, bits):
    """To so many bits, evenly between -3 and 3 standard deviations."""
    steps = 2**bits - 1
    return np.clip(np.round((z + 3) / 6 * steps), 0, steps) / steps * 6 - 3


def h264(quality):
    """Bits a pixel, and PSNR."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "video.mp4"
        write_mp4(file, video, walt.fps, crf=quality)
        with av.open(str(file)) as container:
            size = sum(packet.size for packet in container.demux(video=0))
        decoded = read_video(file).frames
    return 8 * size / video[..., 0].size, psnr(video, decoded).mean()


bits = [2, 3, 4, 5, 6, 8]
ours = [(b * latents.size, psnr(video, walt.decode(rounded(latents, b))).mean()) for b in bits]
ours = [(count / video[..., 0].size, quality) for count, quality in ours]
theirs = [h264(quality) for quality in (45, 40, 35, 30, 25, 20)]
figure, axis = plt.subplots(figsize=(7, 3.5))
axis.plot(*zip(*ours), "o-", label="latents, rounded")
axis.plot(*zip(*theirs), "s-", label="H.264")
for (x, y), b in zip(ours, bits):
    axis.annotate(f"{b} bits", (x, y), textcoords="offset points", xytext=(4, -10), fontsize=8)
axis.set(xlabel="bits a pixel", ylabel="PSNR (dB)", xscale="log")
axis.legend()
plt.show()

# %% [markdown]
# A tokenizer is not made to be a codec: its latents are to be easy to generate. This one is tiny
# and has seen sprites alone. Tokenizers with codes (LFQ) have their bits built in: see
# docs/tokenizer.md, and `python -m walt_jax.evaluate tokenizer` for scores on a dataset.
