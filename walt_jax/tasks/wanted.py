"""What a denoiser is to show, and how guidance takes it apart."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from walt_jax.diffusion import Scale
from walt_jax.errors import UserError
from walt_jax.models import DenoiserConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Wanted:
    """What clips are to show; arrays have the batch first, None is what is not said.

    Attributes:
      label: int32 (B,), classes; `num_classes` for none.
      text: uint8 (B, M), captions as bytes; all 0 for none.
      given: (B, T, H, W, C), clean latents; given_mask: bool (B, T, H, W), where they are given.
      low: (B, T, H / fh, W / fw, C), latents of the clips at low resolution.
      times: int32 (B, T), which latent frames of a long video the clips' are; the first T where not
        said.
      start: (B, T, H, W, C), clean latents that sampling starts from, noised, instead of noise.
    """

    label: jax.Array | None = None
    text: jax.Array | None = None
    given: jax.Array | None = None
    given_mask: jax.Array | None = None
    low: jax.Array | None = None
    times: jax.Array | None = None
    start: jax.Array | None = None

    def check(self, model: DenoiserConfig, grid: Sequence[int]) -> None:
        """Refuses what a model cannot show on a grid (T, H, W) of latents.

        Raises:
          UserError: something is said that the model was not built for, or lacking.
        """
        takes = {
            "label": (model.num_classes > 0, f"num_classes={model.num_classes}"),
            "text": (model.text_features > 0, f"text_features={model.text_features}"),
            "low": (model.upsampling is not None, f"upsampling={model.upsampling}"),
        }
        for name, (built, why) in takes.items():
            if (getattr(self, name) is not None) != built:
                verb = "needs" if built else "takes no"
                advice = "give it" if built else "leave it out"
                raise UserError(
                    f"Sampling from this model {verb} {name!r}, it was built with {why}: {advice}."
                )
        if self.given is not None and model.given == "none":
            raise UserError(
                "Sampling from this model takes no 'given', it was built with given='none': leave "
                "it out."
            )
        if self.times is not None and not model.frame_times:
            raise UserError(
                "Sampling from this model takes no 'times', it was built with frame_times=False: "
                "leave them out."
            )
        if (self.given is None) != (self.given_mask is None):
            raise UserError("Sampling takes 'given' and 'given_mask' together: give both.")
        for name in ("given", "given_mask", "start"):
            array = getattr(self, name)
            if array is not None and tuple(array.shape[1:4]) != tuple(grid):
                raise UserError(
                    f"Sampling on a grid of {tuple(grid)} latents takes {name!r} of that shape, "
                    f"not {tuple(array.shape[1:4])}: encode clips of that size."
                )

    def steps(
        self, num_classes: int, guidance: Scale, given_guidance: Scale
    ) -> tuple[list["Wanted"], list[Scale]]:
        """From nothing said to all of it, with the scale of each step, as `guide` takes them.

        Low-resolution latents are always said: training never leaves them out.

        Args:
          num_classes: the label of no class.
          guidance: scale of class and text.
          given_guidance: scale of the given latents.
        """
        steps: list[Wanted] = [self]
        scales: list[Scale] = []
        if self.label is not None or self.text is not None:
            silent = dataclasses.replace(
                self,
                label=None if self.label is None else jnp.full_like(self.label, num_classes),
                text=None if self.text is None else jnp.zeros_like(self.text),
            )
            steps, scales = [silent, self], [guidance]
        if self.given is not None:
            nothing = jnp.zeros_like(self.given_mask)
            steps = [dataclasses.replace(steps[0], given_mask=nothing), *steps]
            scales = [given_guidance, *scales]
        return steps, scales
