"""Quantizers: public oracles, brute force over all codes, gradients, meshes, packed codes."""

import itertools
import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax import config
from walt_jax.errors import UserError
from walt_jax.models.tokenizer import quantizers
from walt_jax.models.tokenizer.quantizers import Identity, Kl, Lfq, Quantizer
from walt_jax.parallel import Layout, MeshConfig, make_mesh
from walt_jax.tasks import sample_keys


def normal(shape, seed=0, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape)


def all_codes(bits):
    """(2^bits, bits) signs, bit i of weight 2^i."""
    return Lfq().from_codes(jnp.arange(2**bits), bits)


def test_chosen_by_name():
    quantizer = config.build(Quantizer, {"name": "lfq", "entropy_weight": 0.2})
    assert quantizer == Lfq(entropy_weight=0.2)
    assert config.build(Quantizer, config.to_dict(quantizer)) == quantizer
    assert [q.encoder_channels(8) for q in (Identity(), Kl(), Lfq())] == [8, 16, 8]
    assert [q.num_codes(8) for q in (Identity(), Kl(), Lfq())] == [None, None, 256]


def test_none_is_the_identity():
    h = normal((2, 1, 2, 2, 4))
    np.testing.assert_array_equal(Identity()(h), h)
    assert Identity().losses(h, 0) == (0.0, {})


def test_kl_against_the_closed_form():
    """KL(N(1, e^2) || N(0, 1)) = (1 + e^2 - 1 - 2) / 2 an element, summed over 24 of them."""
    h = jnp.concatenate([jnp.ones((2, 2, 2, 2, 3)), jnp.full((2, 2, 2, 2, 3), 2.0)], axis=-1)
    loss, metrics = Kl(weight=0.5).losses(h, 0)
    np.testing.assert_allclose(metrics["kl"], 24 * (math.e**2 - 2) / 2, rtol=1e-6)
    np.testing.assert_allclose(loss, 0.5 * metrics["kl"], rtol=1e-6)


def test_kl_draws_by_row():
    h = jnp.concatenate([jnp.full((4, 1, 16, 16, 8), 3.0), jnp.full((4, 1, 16, 16, 8), -1.0)], -1)
    keys = sample_keys(jax.random.key(0), 4)
    z = Kl()(h, keys)
    np.testing.assert_array_equal(Kl()(h), 3.0)
    np.testing.assert_allclose(z.mean(), 3.0, atol=0.03)
    np.testing.assert_allclose(z.std(), math.exp(-0.5), atol=0.03)
    np.testing.assert_array_equal(Kl()(h[2:3], keys[2:3]), z[2:3])
    assert not np.any(z[0] == z[1])


@pytest.mark.parametrize(
    ("bits", "loss", "commitment", "entropy"),
    [(8, -0.331989, 0.10211816, -0.43410715), (16, -0.3675179, 0.1005669, -0.46808478)],
)
def test_lfq_gives_the_values_of_the_public_test(bits, loss, commitment, entropy):
    """The values that praxis' quantizer_test expects, with its weights after annealing."""
    with jax.threefry_partitionable(False):
        h = jax.random.normal(jax.random.PRNGKey(123), (1, 3, 6, 6, bits))
    ours, metrics = jax.jit(Lfq().losses)(h, 2000)
    np.testing.assert_allclose(ours, loss, rtol=2e-6)
    np.testing.assert_allclose(0.25 * metrics["commitment"], commitment, rtol=1e-6)
    difference = metrics["entropy_sample"] - metrics["entropy_codebook"]
    np.testing.assert_allclose(0.1 * difference, entropy, rtol=1e-6)


def brute_force_entropies(h, temperature):
    """The two terms by the softmax over all codes."""
    logits = 2.0 * h.reshape(-1, h.shape[-1]) @ all_codes(h.shape[-1]).T / temperature
    p = jax.nn.softmax(logits, axis=-1)
    mean = p.mean(0)
    sample = -(p * jax.nn.log_softmax(logits, axis=-1)).sum(-1).mean()
    return sample, -(mean * jnp.log(mean + 1e-5)).sum()


@pytest.mark.parametrize(
    ("bits", "temperature", "scale"),
    [(2, 1.0, 0.3), (8, 0.01, 1.0), (9, 0.01, 0.005), (18, 0.01, 0.01)],
)
def test_factorised_equals_brute_force(bits, temperature, scale):
    h = normal((1, 2, 2, 3, bits), seed=bits, scale=scale)
    quantizer = Lfq(temperature=temperature)

    def factorised(h):
        _, metrics = quantizer.losses(h, 0)
        return metrics["entropy_sample"], metrics["entropy_codebook"]

    def values_and_gradient(entropies):
        def both(h):
            sample, codebook = entropies(h)
            return sample - 2.0 * codebook, (sample, codebook)

        return jax.jit(jax.value_and_grad(both, has_aux=True))(h)

    ours = values_and_gradient(factorised)
    theirs = values_and_gradient(lambda h: brute_force_entropies(h, temperature))
    np.testing.assert_allclose(ours[0][1], theirs[0][1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-4 * np.abs(theirs[1]).max())


def test_a_uniform_codebook_of_18_bits():
    """The 1e-5 in the logarithm costs 1.29 of ln(2^18) = 12.48 nats."""
    _, metrics = jax.jit(Lfq().losses)(jnp.zeros((1, 1, 2, 2, 18)), 0)
    np.testing.assert_allclose(metrics["entropy_sample"], 18 * math.log(2), rtol=1e-6)
    np.testing.assert_allclose(metrics["entropy_codebook"], -math.log(2**-18 + 1e-5), rtol=1e-5)
    np.testing.assert_allclose(metrics["entropy_codebook"], 11.19, atol=0.005)


def test_above_18_bits_the_entropies_of_groups_are_averaged():
    h = normal((1, 2, 3, 3, 24), scale=0.01)
    groups = [range(8), range(8, 16), range(16, 24), *(range(i, 24, 3) for i in range(3))]
    brute = jax.jit(brute_force_entropies, static_argnums=1)
    sample, codebook = zip(*(brute(h[..., list(g)], 0.01) for g in groups))
    _, metrics = jax.jit(Lfq().losses)(h, 0)
    np.testing.assert_allclose(metrics["entropy_codebook"], np.mean(codebook), rtol=1e-5)
    np.testing.assert_allclose(metrics["entropy_sample"], np.sum(sample) / 2, rtol=1e-5)


def test_all_codes_of_a_video_batch_fit_in_memory():
    """8 clips of 17x128x128: the softmax over all codes would take 10.7 GB, this a quarter."""
    h = normal((8, 5, 16, 16, 18), scale=0.01)
    step = jax.jit(jax.value_and_grad(lambda h: Lfq().losses(h, 0)[0])).lower(h).compile()
    assert step.memory_analysis().temp_size_in_bytes < 2.5e8
    loss, gradient = step(h)
    assert np.isfinite(loss) and np.all(np.isfinite(gradient)) and np.any(gradient != 0)


@pytest.mark.parametrize(("step", "weight"), [(0, 0.4), (1000, 0.25), (2000, 0.1), (9000, 0.1)])
def test_the_entropy_weight_is_annealed(step, weight):
    h = normal((1, 1, 4, 4, 6))
    loss, m = jax.jit(Lfq().losses)(h, jnp.int32(step))
    expected = 0.25 * m["commitment"] + weight * (m["entropy_sample"] - m["entropy_codebook"])
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_signs_pass_gradients_straight_through():
    h = jnp.array([-1e9, -3.3, -1e-9, 0.0, 0.3, 1e9]).reshape(1, 1, 1, 1, 6)
    weights = jnp.arange(6.0)
    np.testing.assert_array_equal(Lfq()(h).ravel(), [-1, -1, -1, 1, 1, 1])
    gradient = jax.grad(lambda h: (Lfq()(h) * weights).sum())(h)
    np.testing.assert_array_equal(gradient.ravel(), weights)


def test_the_commitment_pulls_to_the_codes():
    h = jnp.array([-0.4, 2.0]).reshape(1, 1, 1, 1, 2)
    gradient = jax.jit(jax.grad(lambda h: Lfq(entropy_weight=0.0).losses(h, 0)[0]))(h)
    np.testing.assert_allclose(gradient.ravel(), 0.25 * np.array([0.6, 1.0]), rtol=1e-6)


@pytest.mark.parametrize("quantizer", [Lfq(), Kl()])
def test_extremes_give_no_nan(quantizer):
    step = jax.jit(jax.value_and_grad(lambda h: quantizer.losses(h, 0)[0]))
    for value in (0.0, 100.0, -100.0, 1e-30):
        h = jnp.full((1, 2, 2, 2, 18), value).at[0, 0, 0].mul(-1.0)
        loss, gradient = step(h)
        assert np.isfinite(loss) and np.all(np.isfinite(gradient))


def test_a_mesh_does_not_matter():
    """Batch, rows and columns divided over 8 devices: the same loss, without a gather."""
    h = normal((4, 2, 4, 4, 12), scale=0.01)
    layout = Layout(make_mesh(MeshConfig(data=2, tensor=2, context=2)))

    def value_and_grad(layout):
        return jax.jit(jax.value_and_grad(lambda h: Lfq().losses(layout.pixels(h), 0)[0]))

    alone = value_and_grad(Layout())(h)
    divided = value_and_grad(layout).lower(layout.pixels(h)).compile()
    assert "all-gather" not in divided.as_text()
    loss, gradient = divided(layout.pixels(h))
    np.testing.assert_allclose(loss, alone[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, alone[1], atol=1e-5 * np.abs(alone[1]).max())


def test_codes_count_in_binary():
    signs = np.array(list(itertools.product([-1, 1], repeat=4)), np.float32)[:, ::-1]
    codes = Lfq().codes(signs.reshape(1, 4, 2, 2, 4))
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes.ravel(), np.arange(16))
    h = normal((2, 1, 2, 3, 31))
    np.testing.assert_array_equal(Lfq().from_codes(Lfq().codes(h), 31), Lfq()(h))


def test_code_use():
    codes = jnp.array([[0, 1, 1], [5, 5, 5]])
    counts = quantizers.code_counts(codes, 8)
    np.testing.assert_array_equal(counts, [1, 2, 0, 0, 0, 3, 0, 0])
    entropy = -sum(p * math.log(p) for p in (1 / 6, 2 / 6, 3 / 6))
    np.testing.assert_allclose(quantizers.perplexity(counts), math.exp(entropy), rtol=1e-6)
    np.testing.assert_allclose(quantizers.perplexity(jnp.ones(8)), 8, rtol=1e-6)
    assert quantizers.share_used(counts) == 3 / 8


@hypothesis.given(data=st.data(), bits=st.integers(2, 31))
@hypothesis.settings(max_examples=50, deadline=None)
def test_packed_codes_come_back(data, bits):
    shape = data.draw(hnp.array_shapes(max_dims=4, max_side=7, min_side=0))
    codes = data.draw(hnp.arrays(np.int32, shape, elements=st.integers(0, 2**bits - 1)))
    packed = quantizers.pack_codes(codes, bits)
    assert packed.dtype == np.uint8 and packed.size == math.ceil(codes.size * bits / 8)
    back = quantizers.unpack_codes(packed, bits, shape)
    assert back.dtype == np.int32 and back.shape == shape
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Lfq(temperature=0.0), "temperature=0.0 .* must be positive"),
        (lambda: Lfq().encoder_channels(40), "latent_channels=40 .* choose 2 to 31"),
        (lambda: quantizers.pack_codes(np.array([3, 2**18]), 18), "3 to 262144 .* 18 bits"),
        (lambda: quantizers.pack_codes(np.array([-1]), 18), "-1 to -1 .* 18 bits"),
        (lambda: quantizers.unpack_codes(np.zeros(9, np.uint8), 18, (1, 5)), "9 bytes .* 5 codes"),
    ],
)
def test_what_does_not_fit_is_one_sentence(call, message):
    with pytest.raises(UserError, match=message):
        call()
