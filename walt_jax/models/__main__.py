"""`python -m walt_jax.models [--json]`: every named model with its number of parameters."""

import json
from collections.abc import Sequence

from flax import nnx

from walt_jax import cli
from walt_jax.models.build import count
from walt_jax.models.denoiser import Denoiser
from walt_jax.models.discriminator import Discriminator
from walt_jax.models.named import DENOISERS, DISCRIMINATORS, TOKENIZERS
from walt_jax.models.text import CLIP_SIZES, T5_SIZES, ClipEncoder, T5Encoder
from walt_jax.models.tokenizer import Tokenizer


def parameter_counts() -> dict[str, dict[str, int]]:
    """Name -> parameters in all (`total`) and of each sub-network; no array is allocated."""
    kinds = (
        (Tokenizer, TOKENIZERS),
        (Discriminator, DISCRIMINATORS),
        (Denoiser, DENOISERS),
        (T5Encoder, T5_SIZES),
        (ClipEncoder, CLIP_SIZES),
    )
    counts = {}
    for kind, named in kinds:
        for name, config in named.items():
            model = nnx.eval_shape(lambda k=kind, c=config: k(c, rngs=nnx.Rngs(0)))
            shapes = nnx.to_pure_dict(nnx.split(model)[1])
            parts = {part: count(tree) for part, tree in shapes.items()}
            counts[name] = {"total": sum(parts.values()), **parts}
    return counts


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and prints."""
    parser = cli.Parser(
        description="Every named model with its number of parameters.", allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="as JSON, with every sub-network")
    args = parser.parse_args(argv)
    counts = parameter_counts()
    if args.json:
        print(json.dumps(counts, indent=2))
        return
    for name, parts in counts.items():
        print(f"{name:32} {parts['total']:>15,}")


if __name__ == "__main__":
    cli.run(main)
