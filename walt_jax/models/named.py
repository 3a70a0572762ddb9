"""The published sizes by name."""

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
