"""The byte encoder's table of words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.errors import UserError
from walt_jax.models import Network
from walt_jax.models.text import ByteEncoder, ByteEncoderConfig
from walt_jax.models.text.bytes import to_bytes, word_hashes

CONFIG = ByteEncoderConfig(
    width=8, num_layers=0, num_heads=2, max_bytes=24, words=64, dtype="float32"
)


def coded(*texts):
    return jnp.asarray(np.stack([to_bytes(text, 24) for text in texts]))


def test_a_word_is_known_at_its_last_byte_wherever_it_stands():
    hashes, ends = word_hashes(coded("a red  fox", "red dog", "", "redder"))
    found = [np.asarray(h)[np.asarray(e)] for h, e in zip(hashes, ends)]
    assert [len(row) for row in found] == [3, 2, 0, 1]
    assert found[0][1] == found[1][0]  # "red"
    assert len({*found[0].tolist(), *found[1].tolist(), *found[3].tolist()}) == 5
    spaces = np.asarray(coded("a red  fox")[0]) == ord(" ")
    assert not np.any(np.asarray(hashes[0])[spaces])


def test_tokens_are_words_and_a_bag_of_them_without_layers():
    network = Network.of(lambda rngs: ByteEncoder(CONFIG, rngs=rngs))
    params = network.init(jax.random.key(0))
    params["place_embedding"] = jnp.zeros_like(params["place_embedding"])
    tokens, mask = network.bind(params)(coded("red fox", "fox red", "red dog"))
    assert tokens.shape == (3, 12, 8)
    words = [np.asarray(t)[np.asarray(m)] for t, m in zip(tokens, mask)]
    np.testing.assert_allclose(words[0], words[1][::-1], atol=1e-6)
    np.testing.assert_allclose(words[0][0], words[2][0], atol=1e-6)
    assert np.abs(words[0][1] - words[2][1]).max() > 0.1


def test_the_most_words_that_fit_are_all_tokens():
    network = Network.of(lambda rngs: ByteEncoder(CONFIG, rngs=rngs))
    params = network.init(jax.random.key(0))
    _, mask = network.bind(params)(coded("a b c d e f g h i j k l m", "", "word"))
    assert mask.sum(1).tolist() == [12, 0, 1]
    _, mask = network.bind(params)(coded("a b c d e f g h i j k l m")[:, :23])
    assert mask.sum(1).tolist() == [12]


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [({"num_layers": 0}, "needs words"), ({"words": -1}, "0 or more"), ({"width": 0}, "positive")],
)
def test_sizes_that_make_no_encoder_are_refused(sizes, sentence):
    with pytest.raises(UserError, match=sentence):
        ByteEncoderConfig(**sizes)
