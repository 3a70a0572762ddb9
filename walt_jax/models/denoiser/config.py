"""Sizes of a denoiser: a list of attention windows and a way of conditioning."""

import dataclasses
from typing import Literal

import numpy as np

from walt_jax.errors import UserError
from walt_jax.kernels import resolve_window
from walt_jax.kernels.window_attention import IMPLEMENTATIONS, Window

FULL: Window = (0, 0, 0)
MODULATED = ("adaln_lora", "adaln_zero", "adaln", "adaln_single")


@dataclasses.dataclass(frozen=True)
class CrossAttentionConfig:
    """How a layer reads text, and what else comes as tokens beside the grid.

    Attributes:
      queries: keys = values = concat[queries, text] (W.A.L.T, section 3.2), or text alone.
      window: of the queries among the keys; None is the layer's own. W.A.L.T has None for videos
        alone and (1, 0, 0) in every layer for images and videos together. Without `queries` it
        does not matter.
      norm: "modulated" like self-attention and gated (the 9-vector AdaLN), "plain" without
        modulation or gate, or "none" (PixArt, STDiT).
    """

    queries: bool = True
    window: tuple[int, int, int] | None = None
    norm: Literal["modulated", "plain", "none"] = "modulated"


@dataclasses.dataclass(frozen=True)
class Stage:
    """Equal groups of layers, one after another.

    Attributes:
      blocks: one group: for each layer the windows of its attentions.
      repeats: groups.
      skip: what a group does with long skip connections: nothing, "save" or "read".
    """

    blocks: tuple[tuple[Window, ...], ...]
    repeats: int
    skip: Literal["", "save", "read"] = ""


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """Sizes of a denoiser; the defaults are W.A.L.T-L on 17 frames of 128 pixels (24/1024/16).

    Attributes:
      grid: (T, H, W) of the latents. Where T > 1 the network also takes images, T = 1.
      latent_channels: channels of the latents.
      patch_size: (pt, ph, pw) of the patches that become tokens.
      width: of the transformer; num_heads: heads, dividing it; mlp_ratio: MLP width / width.
      num_layers: layers, a multiple of the windows where these take turns.
      windows: the attention windows in token units; 0 = whole axis.
      order: how several windows share the layers. "alternate": they take turns (W.A.L.T, Latte);
        "block": one after another in each layer, before its one MLP (VDT, STDiT, ViViT's model 3);
        "heads": side by side, each with its share of the heads (ViViT's model 4); "stages": all
        layers of the first, then of the next (ViViT's model 2).
      causal: attention hides later frames.
      image_identity: images pass the attention of windows over several frames by an identity mask
        (W.A.L.T's joint training); otherwise they attend within the window's part of one frame.
      relative_bias: Swin's relative position bias in every layer and head.
      positions: absolute positions, "learned" tables, "sincos" (fixed: DiT, Latte), or
        "sincos_space" (fixed in a frame, learned over frames: videos from a DiT of images). With
        NaViT's two the network takes clips of any size, also packed, and `grid` is that of samples:
        "factorised", a learned table an axis, for sizes up to the grid; "fractional", such tables
        of the share of the axis, for any. Then windows that span an axis have no relative_bias.
      frame_times: the frames of a clip lie anywhere in a long video, and the network is told where
        (FDM, 2205.11495); positions over frames come from that alone, so that windows over several
        frames have no relative_bias.
      qk_norm: layer norm of queries and keys in each head (ViT-22B).
      skips: U-ViT's long skip connections between the first and the last half of the layers.
      output_conv: U-ViT's 3 x 3 convolution of each frame after the last layer.
      conditioning: how time, class and noise level act. "adaln_lora": one Dense for all layers and
        a low-rank term of each (W.A.L.T, equation 3); "adaln_zero": a Dense a layer with gates;
        "adaln": without gates; "cross_attention": as tokens that layers read; "in_context": as
        tokens beside the others (these four: DiT, 2212.09748, section 3.2; U-ViT is the last);
        "adaln_single": one Dense for all layers and a table of each (PixArt, STDiT); "added": to
        every token at the input.
      adaln_rank: rank r of "adaln_lora".
      time_mlp: sinusoids of the time pass two Dense layers; U-ViT's do not.
      num_classes: classes, 0 for none; the label `num_classes` stands for no class.
      null_class: that label has a learned entry as the others have; otherwise its vector is 0.
      text_features: width of the text encoder's tokens, 0 for no text (T5-XL: 2048).
      pooled_text: the mean of the text's tokens, normalised, also joins time and class (Imagen,
        2205.11487, section 2.3).
      cross_attention: how text is read.
      given: how given (clean) latents and their mask enter. "channels": concatenated with the noisy
        ones (W.A.L.T's frame prediction); "in_place": instead of the noisy ones (VDT's unified
        mask); "adaln", "cross_attention", "tokens": VDT's three ways (2305.13311, section 3.2),
        their mean to the condition, as keys, or as frames of tokens beside the others.
      self_conditioning: an estimate of x_0 enters by channels.
      upsampling: (ft, fh, fw) of the grid over that of low-resolution latents which enter by
        channels, with their noise level in the condition; None without. ft is 1.
      learned_sigma: twice the channels come out, the target and the variance (2102.09672).
      attention: implementation of window attention; None chooses by platform and shape.
      remat: recompute each group of layers in the backward pass.
      kept: what of self-attention and the MLP is kept all the same: "qkv" (3 times a layer's
        input in size), "attention" (once) and "up" (mlp_ratio times).
      offloaded: likewise, but in the memory of the chips' hosts; also "input", the input of each
        group of layers, which is all that `remat` keeps on the chips.
      dtype: what matrices compute in; parameters, softmax and statistics are float32.
    """

    grid: tuple[int, int, int] = (5, 16, 16)
    latent_channels: int = 8
    patch_size: tuple[int, int, int] = (1, 1, 1)
    width: int = 1024
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_layers: int = 24
    windows: tuple[tuple[int, int, int], ...] = ((1, 0, 0), (0, 8, 8))
    order: Literal["alternate", "block", "heads", "stages"] = "alternate"
    causal: bool = False
    image_identity: bool = True
    relative_bias: bool = True
    positions: Literal["learned", "sincos", "sincos_space", "factorised", "fractional"] = "learned"
    frame_times: bool = False
    qk_norm: bool = True
    skips: bool = False
    output_conv: bool = False
    conditioning: Literal[
        "adaln_lora",
        "adaln_zero",
        "adaln",
        "adaln_single",
        "cross_attention",
        "in_context",
        "added",
    ] = "adaln_lora"
    adaln_rank: int = 2
    time_mlp: bool = True
    num_classes: int = 0
    null_class: bool = True
    text_features: int = 0
    pooled_text: bool = False
    cross_attention: CrossAttentionConfig = CrossAttentionConfig()
    given: Literal["none", "channels", "in_place", "adaln", "cross_attention", "tokens"] = "none"
    self_conditioning: bool = False
    upsampling: tuple[int, int, int] | None = None
    learned_sigma: bool = False
    attention: Literal[IMPLEMENTATIONS] | None = None
    remat: bool = True
    kept: tuple[Literal["qkv", "attention", "up", "down"], ...] = ()
    offloaded: tuple[Literal["input", "qkv", "attention", "up", "down"], ...] = ()
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"

    def __post_init__(self) -> None:
        for wrong, sentence in self._mistakes():
            if wrong:
                raise UserError(f"config.task.model.{sentence}.")
        for window in (*self.windows, self.cross_attention.window or FULL):
            resolve_window(self.tokens, window)

    def _mistakes(self) -> list[tuple[bool, str]]:
        sizes = ("grid", "latent_channels", "patch_size", "width", "num_heads", "num_layers")
        small = [(n, getattr(self, n)) for n in (*sizes, "adaln_rank", "mlp_ratio", "upsampling")]
        small = [(n, v) for n, v in small if v is not None and np.min(v) <= 0]
        if small or np.min(self.windows or 0) < 0:
            name, value = small[0] if small else ("windows", self.windows)
            return [(True, f"{name} must be {'positive' if small else '0 or more'}, got {value}")]
        turns = max(1, len(self.windows)) if self.order in ("alternate", "stages") else 1
        extra = self.conditioning == "in_context" or self.given == "tokens"
        twice = set(self.kept) & set(self.offloaded)
        return [
            (bool(twice), f"kept and offloaded both have {', '.join(sorted(twice))}: choose one"),
            (
                bool(self.offloaded) and not self.remat,
                f"offloaded={self.offloaded} is of what remat would recompute: set remat to True",
            ),
            (not self.windows, "windows is empty: give one window at least"),
            (
                any(g % p for g, p in zip(self.grid, self.patch_size)),
                f"grid {self.grid} is no multiple of patch_size {self.patch_size}",
            ),
            (
                self.num_layers % turns != 0,
                f"num_layers={self.num_layers} must be a multiple of the {turns} windows that take "
                "turns",
            ),
            (
                self.width % self.num_heads != 0,
                f"width={self.width} must be a multiple of num_heads={self.num_heads}",
            ),
            (
                self.order == "heads" and self.num_heads % max(1, len(self.windows)) != 0,
                f"num_heads={self.num_heads} must be a multiple of the {len(self.windows)} windows "
                "that share the heads",
            ),
            (
                self.positions.startswith("sincos") and self.width % 4 != 0,
                f"width={self.width} must be a multiple of 4 for positions={self.positions!r}",
            ),
            (
                self.skips and (self.order == "stages" or self.num_layers // turns % 2 == 0),
                f"skips=True needs an odd number of groups of layers and one stage, and "
                f"num_layers={self.num_layers} with order={self.order!r} are not that",
            ),
            (
                self.frame_times and (self.any_size or self.patch_size[0] > 1),
                "frame_times=True needs patches of one frame and clips of one size, not "
                f"patch_size={self.patch_size} and positions={self.positions!r}",
            ),
            (
                self.frame_times and self.relative_bias and any(w[0] != 1 for w in self.windows),
                f"relative_bias has no offsets between frames that lie anywhere (frame_times=True) "
                f"and that windows={self.windows} join: set it to False",
            ),
            (
                self.pooled_text and not self.text_features,
                "pooled_text=True pools text, and text_features=0 is none: set both, or neither",
            ),
            (
                extra and self.relative_bias,
                f"relative_bias has no offsets for the tokens of conditioning="
                f"{self.conditioning!r} and given={self.given!r}: set it to False",
            ),
            (
                self.conditioning == "in_context" and set(self.windows) != {FULL},
                f"windows={self.windows} must be full attention, (0, 0, 0), for "
                "conditioning='in_context'",
            ),
            (
                self.conditioning == "in_context"
                and (self.causal or self.given == "tokens" or self.reads),
                "conditioning='in_context' goes with full attention alone: no causal, no text, and "
                "given by 'channels', 'in_place' or 'adaln'",
            ),
            (
                self.given == "tokens" and (self.causal or any(w[0] > 1 for w in self.windows)),
                f"given='tokens' needs windows of one frame or of all, not causal; windows="
                f"{self.windows}, causal={self.causal}",
            ),
            (
                self.upsampling is not None
                and (
                    self.upsampling[0] != 1
                    or any(g % f for g, f in zip(self.grid, self.upsampling))
                ),
                f"upsampling={self.upsampling} must be (1, fh, fw) and divide the grid {self.grid}",
            ),
        ]

    @property
    def tokens(self) -> Window:
        """(T, H, W) of the tokens."""
        t, h, w = (g // p for g, p in zip(self.grid, self.patch_size))
        return t, h, w

    @property
    def any_size(self) -> bool:
        """Whether clips of other sizes than the grid's are taken."""
        return self.positions in ("factorised", "fractional")

    @property
    def modulated(self) -> bool:
        """Whether the condition shifts and scales what the layers read."""
        return self.conditioning in MODULATED

    @property
    def reads(self) -> bool:
        """Whether layers have cross-attention."""
        return "cross_attention" in (self.conditioning, self.given) or self.text_features > 0

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The layers as groups to scan over."""
        if self.order == "stages":
            repeats = self.num_layers // len(self.windows)
            return tuple(Stage(((window,),), repeats) for window in self.windows)
        if self.order == "alternate":
            group = tuple((window,) for window in self.windows)
        else:
            group = (self.windows,)
        repeats = self.num_layers // len(group)
        if not self.skips:
            return (Stage(group, repeats),)
        half = repeats // 2
        return Stage(group, half, "save"), Stage(group, 1), Stage(group, half, "read")
