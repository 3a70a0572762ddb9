"""Parts of a checkpoint, read on their own."""

import jax
import jax.numpy as jnp
import numpy as np

from walt_jax.models import Network
from walt_jax.models.text import ByteEncoder, ByteEncoderConfig
from walt_jax.training.checkpoints import Checkpoints, Progress
from walt_jax.training.state import TrainState

DEEP = ByteEncoderConfig(width=8, num_layers=12, num_heads=2, max_bytes=4, dtype="float32")


def test_lists_of_more_than_ten_keep_their_order(tmp_path):
    """orbax names their entries "0", "1", "10", "11", "2" ..."""
    network = Network.of(lambda rngs: ByteEncoder(DEEP, rngs=rngs))
    params = network.init(jax.random.key(0))
    state = TrainState(jnp.zeros((), jnp.int32), params, params, {}, {})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, Progress(next_batch=3))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        restored = checkpoints.restore_part(("ema",))["ema"]
    assert list(restored["layers"]) == list(range(12))
    text = jnp.array([[1, 2, 3, 0]], jnp.uint8)
    expected = network.bind(params)(text)[0]
    np.testing.assert_allclose(network.bind(restored)(text)[0], expected, atol=1e-5)
