"""Starting a denoiser from the weights of another run."""

import jax

from walt_jax import config as config_lib
from walt_jax.errors import UserError
from walt_jax.models import Denoiser, DenoiserConfig, Network, Params
from walt_jax.models.denoiser import transfer
from walt_jax.models.text import ByteEncoder, ByteEncoderConfig
from walt_jax.parallel.sharding import path_of
from walt_jax.training.checkpoints import Checkpoints

TEXT = "text"  # the text encoder's name beside the denoiser's own parameters


def start_from(
    workdir: str,
    config: DenoiserConfig,
    network: Network[Denoiser],
    text: ByteEncoderConfig | None = None,
) -> Params:
    """The moving average of the run in `workdir`, made to fit `config`, on the host.

    With the text encoder of that run if it is of the sizes `text`.

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
    same = encoder and text == config_lib.build(ByteEncoderConfig, task["text"], TEXT)
    own = {TEXT: _like(encoder, Network.of(lambda r: ByteEncoder(text, rngs=r)))} if same else {}
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        fresh = network.init(jax.random.key(0))
        return jax.device_get(transfer(params, old, config, fresh)) | own


def _like(params: Params, network: Network) -> Params:
    """With the network's own keys: a checkpoint has turned numbers into strings."""
    leaves = {path_of(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_of(path)], network.shapes())
