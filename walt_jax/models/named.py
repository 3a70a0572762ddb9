"""The published sizes by name."""

from dataclasses import replace

from walt_jax.models.denoiser.config import CrossAttentionConfig, DenoiserConfig
from walt_jax.models.discriminator import DiscriminatorConfig
from walt_jax.models.tokenizer.quantizers import Lfq
from walt_jax.models.tokenizer.tokenizer import TokenizerConfig

_IMAGES = {"dimensions": 2, "temporal_downsample": (False, False, False)}

# W.A.L.T's table 8; MAGVIT-v2's figure 7 and its public code for 18 bits and the discriminator.
TOKENIZERS = {
    "tokenizer-walt": TokenizerConfig(),
    "tokenizer-walt-2d": TokenizerConfig(**_IMAGES),
    "tokenizer-walt-imagenet": TokenizerConfig(multipliers=(1, 1, 2, 4), **_IMAGES),
    "tokenizer-magvit2": TokenizerConfig(latent_channels=18, quantizer=Lfq()),
    "tokenizer-magvit2-2d": TokenizerConfig(latent_channels=18, quantizer=Lfq(), **_IMAGES),
}
DISCRIMINATORS = {
    "discriminator-magvit2": DiscriminatorConfig(),
    "discriminator-magvit2-figure": DiscriminatorConfig(order="figure"),
    "discriminator-imagenet": DiscriminatorConfig(clip=(1, 256, 256)),
}


def tokenizer_like(latent_channels: int, *, images: bool) -> TokenizerConfig:
    """W.A.L.T's tokenizer, of videos or of images, with other channels."""
    published = TOKENIZERS["tokenizer-walt-2d" if images else "tokenizer-walt"]
    return replace(published, latent_channels=latent_channels)


# W.A.L.T's table 8. Its sizes are published to the nearest million; of the readings that fit them
# all, the plainest: one table entry a class of UCF-101 and a zero vector for none, Swin's bias a
# layer and head, one Dense for A_1. In ImageNet's the spatial layers see the whole 32 x 32 frame.
_UCF = DenoiserConfig(num_classes=101, null_class=False, self_conditioning=True)
# 419M at 24 layers holds modulation and gate of cross-attention too (vectors of 9 d); the sizes of
# the 3B model and of super-resolution hold neither. Joint training has spatial cross-attention.
_TEXT = DenoiserConfig(
    text_features=2048,
    self_conditioning=True,
    given="channels",
    cross_attention=CrossAttentionConfig(window=(1, 0, 0)),
)
_PLAIN = CrossAttentionConfig(window=(1, 0, 0), norm="plain")
# Low-resolution latents are an estimate already: no self-conditioning beside them.
_SUPER = replace(
    _TEXT,
    grid=(5, 64, 112),
    patch_size=(1, 4, 4),
    self_conditioning=False,
    given="none",
    upsampling=(1, 2, 2),
    windows=((1, 0, 0), (0, 8, 14)),
    cross_attention=_PLAIN,
)
DENOISERS = {
    "walt-l-ucf101": _UCF,
    "walt-l-ucf101-r4": replace(_UCF, adaln_rank=4),
    "walt-l-ucf101-r16": replace(_UCF, adaln_rank=16),
    "walt-l-ucf101-r64": replace(_UCF, adaln_rank=64),
    "walt-l-ucf101-r256": replace(_UCF, adaln_rank=256),
    "walt-l-ucf101-separate": replace(_UCF, conditioning="adaln_zero"),
    "walt-xl-ucf101": replace(_UCF, width=1152, num_layers=28),
    "walt-l-k600": DenoiserConfig(self_conditioning=True, given="channels"),
    "walt-l-imagenet": replace(_UCF, grid=(1, 32, 32), num_classes=1000, conditioning="adaln_zero"),
    "walt-l-t2v": _TEXT,
    "walt-base-3b": replace(
        _TEXT, width=1792, mlp_ratio=9216 / 1792, num_layers=52, cross_attention=_PLAIN
    ),
    "walt-sr1": replace(_SUPER, grid=(5, 32, 56), patch_size=(1, 2, 2), width=1408, num_layers=40),
    "walt-sr2": _SUPER,
}
# W.A.L.T-L for clips of any size, also packed: by windows, or by tokens with full attention.
_ANY = replace(_UCF, grid=(5, 32, 32), windows=((1, 0, 0), (5, 8, 8)), positions="fractional")
DENOISERS |= {
    "walt-l-any-size": _ANY,
    "walt-l-tokens": replace(
        _ANY, patch_size=(1, 2, 2), windows=((0, 0, 0),), relative_bias=False, image_identity=False
    ),
}

# DiT's table 1: width, layers, heads; on 32 x 32 latents of 4 channels (256 pixels, ImageNet).
_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
_DIT = DenoiserConfig(
    grid=(1, 32, 32),
    latent_channels=4,
    windows=((0, 0, 0),),
    image_identity=False,
    relative_bias=False,
    positions="sincos",
    qk_norm=False,
    conditioning="adaln_zero",
    num_classes=1000,
    learned_sigma=True,
)


def _sized(config: DenoiserConfig, size: str, patch: int = 2) -> DenoiserConfig:
    width, num_layers, num_heads = _SIZES[size]
    return replace(
        config,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        patch_size=(1, patch, patch),
    )


DENOISERS |= {f"dit-{s}-{p}": _sized(_DIT, s, p) for s in _SIZES for p in (2, 4, 8)}
_XL = _sized(_DIT, "xl")
DENOISERS |= {
    "dit-xl-2-in-context": replace(_XL, conditioning="in_context"),
    "dit-xl-2-cross-attention": replace(
        _XL,
        conditioning="cross_attention",
        cross_attention=CrossAttentionConfig(queries=False),
    ),
    "dit-xl-2-adaln": replace(_XL, conditioning="adaln"),
}

# Videos of 16 frames of 256 pixels, encoded frame by frame to 32 x 32 latents of 4 channels.
_VIDEO = replace(_DIT, grid=(16, 32, 32), num_classes=0)
_FACTORISED = ((1, 0, 0), (0, 1, 1))
# VDT's size leaves no room for a modulation of each layer: time is added to the tokens.
_VDT = replace(
    _VIDEO, windows=((0, 1, 1), (1, 0, 0)), order="block", conditioning="added", given="in_place"
)
_READS_GIVEN = CrossAttentionConfig(queries=False)
DENOISERS |= {
    "latte-xl-2": replace(_sized(_VIDEO, "xl"), windows=_FACTORISED),
    "vdt-l": _sized(_VDT, "xl"),
    "vdt-l-adaln": replace(_sized(_VDT, "xl"), conditioning="adaln", given="adaln"),
    "vdt-l-cross-attention": replace(
        _sized(_VDT, "xl"), given="cross_attention", cross_attention=_READS_GIVEN
    ),
    "vdt-l-tokens": replace(_sized(_VDT, "xl"), given="tokens"),
    "stdit-xl-2": replace(
        _sized(_VIDEO, "xl"),
        windows=_FACTORISED,
        order="block",
        conditioning="adaln_single",
        text_features=4096,
        cross_attention=CrossAttentionConfig(queries=False, norm="none"),
    ),
    # ViViT's four models (2103.15691, section 3.3) as denoisers, at DiT-B's size.
    "vivit-b-1": _sized(_VIDEO, "b"),
    "vivit-b-2": replace(_sized(_VIDEO, "b"), windows=_FACTORISED, order="stages"),
    "vivit-b-3": replace(_sized(_VIDEO, "b"), windows=_FACTORISED, order="block"),
    "vivit-b-4": replace(_sized(_VIDEO, "b"), windows=_FACTORISED, order="heads"),
    # Sora as the literature reconstructs it: full attention, or spatial and causal temporal.
    "sora-xl-2": replace(_sized(_VIDEO, "xl"), text_features=4096),
    "sora-xl-2-causal": replace(
        _sized(_VIDEO, "xl"), windows=_FACTORISED, causal=True, text_features=4096
    ),
}

# U-ViT's table 1: width, layers, heads; all is tokens, half of the layers have skips.
_UVITS = {"s": (512, 13, 8), "m": (768, 17, 12), "l": (1024, 21, 16), "h": (1152, 29, 16)}
DENOISERS |= {
    f"uvit-{size}-2": replace(
        _DIT,
        positions="learned",
        patch_size=(1, 2, 2),
        conditioning="in_context",
        time_mlp=False,
        learned_sigma=False,
        skips=True,
        output_conv=True,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
    )
    for size, (width, num_layers, num_heads) in _UVITS.items()
}
