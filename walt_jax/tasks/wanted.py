"""What a denoiser is to show, and how guidance takes it apart."""

import dataclasses

import jax
import jax.numpy as jnp

from walt_jax.diffusion import Scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Wanted:
    """What clips are to show; arrays have the batch first, None is what is not said.

    Attributes:
      label: int32 (B,), classes; `num_classes` for none.
      text: uint8 (B, M), captions as bytes; all 0 for none.
      given: (B, T, H, W, C), clean latents; given_mask: bool (B, T, H, W), where they are given.
      low: (B, T, H / fh, W / fw, C), latents of the clips at low resolution.
    """

    label: jax.Array | None = None
    text: jax.Array | None = None
    given: jax.Array | None = None
    given_mask: jax.Array | None = None
    low: jax.Array | None = None

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
