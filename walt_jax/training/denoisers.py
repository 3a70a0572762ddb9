"""Starting a denoiser from the weights of another run."""

import jax

from walt_jax import config as config_lib
from walt_jax.errors import UserError
from walt_jax.models import Denoiser, DenoiserConfig, Network, Params
from walt_jax.models.denoiser import transfer
from walt_jax.models.text import TextConfig
from walt_jax.parallel import MeshConfig, make_mesh
from walt_jax.training.checkpoints import Checkpoints

TEXT = "text"  # the text encoder's name beside the denoiser's own parameters


def start_from(
    workdir: str,
    config: DenoiserConfig,
    network: Network[Denoiser],
    text: TextConfig | None = None,
) -> Params:
    """The moving average of the run in `workdir`, made to fit `config`, on the host.

    With the text encoder of that run, where both have one.

    Raises:
      UserError: the folder holds no denoiser's run, or one that does not fit.
    """
    task = config_lib.read_resolved(workdir)["task"]
    if task["name"] != "denoiser":
        raise UserError(
            f"config.task.init_from={workdir} is a run of another task: give a denoiser's workdir."
        )
    old = config_lib.build(DenoiserConfig, task["model"], f"{workdir}: task.model")
    with Checkpoints(workdir, read_only=True) as checkpoints:
        params = checkpoints.restore_part(("ema",))["ema"]
    encoder = params.pop(TEXT, None)
    sizes = task.get("text")
    old_text = sizes and config_lib.build(TextConfig, sizes, f"{workdir}: task.text")
    if old_text and text and not text.reads_as(old_text):
        raise UserError(
            f"The text encoder of config.task.init_from={workdir} is {old_text}, but "
            f"config.task.text is {text}: make it the same."
        )
    with jax.set_mesh(make_mesh(MeshConfig(), jax.local_devices(backend="cpu")[:1])):
        fresh = jax.device_get(network.init(jax.random.key(0)))
    return transfer(params, old, config, fresh) | ({TEXT: encoder} if encoder and text else {})


def without_text(params: Params) -> Params:
    """The denoiser's weights alone."""
    return {name: value for name, value in params.items() if name != TEXT}
