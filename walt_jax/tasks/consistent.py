"""Whether the parts of a denoiser's task go together."""

from typing import TYPE_CHECKING

from walt_jax.errors import UserError
from walt_jax.tasks.given import given_mistakes

if TYPE_CHECKING:
    from walt_jax.tasks.denoiser import DenoiserTask


def check(task: "DenoiserTask") -> None:
    """Refuses a task whose parts do not.

    Raises:
      UserError: one sentence.
    """
    task.sampler.check(task.diffusion)
    task.diffusion.process.grid(task.sampler.num_steps)  # refuses more than there are
    for wrong, sentence in _mistakes(task):
        if wrong:
            raise UserError(f"config.task.{sentence}.")


def _mistakes(task: "DenoiserTask") -> list[tuple[bool, str]]:
    model, target = task.model, task.diffusion.target
    shares = ("self_conditioning", "class_dropout", "text_dropout", "low_noise")
    wrong = [name for name in shares if not 0 <= getattr(task, name) <= 1]
    width = task.text.width if task.text else 0
    return [
        (bool(wrong), f"{' and '.join(wrong)} must lie in 0 to 1"),
        (
            model.learned_sigma != target.learns_variance,
            f"model.learned_sigma={model.learned_sigma} does not go with the target "
            f"{target.name}: it belongs to eps_sigma and to no other",
        ),
        (
            model.text_features != width,
            f"model.text_features={model.text_features} must be the width of config.task.text, "
            f"{width}: set both, or neither",
        ),
        *given_mistakes(task.given, model),
    ]
