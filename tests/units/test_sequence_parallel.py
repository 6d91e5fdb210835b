"""Ops whose time is sharded over eight devices in zigzag order: values, gradients, collectives, balance."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.attention import AttentionConfig
from layers.bidirectional import Bidirectional
from layers.mamba2 import Mamba2, Mamba2Config
from layers.types import Context
from models.config import LMConfig
from models.functional import Functional
from models.lm import LM
from pallas_kernels import time_order
from pallas_kernels.attention import Alibi, Mask, Source, attention
from pallas_kernels.attention.sources import Tokens
from pallas_kernels.attention.tiling import Tiling
from pallas_kernels.causal_conv1d import causal_conv1d
from pallas_kernels.linear_scan import linear_scan
from pallas_kernels.long_conv import long_conv
from pallas_kernels.lti_ssm import lti_ssm, lti_ssm_dense
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.ssd import ssd

PARTS, LENGTH = 8, 64  # pieces of 4 tokens in zigzag order
BATCH, HEADS = 2, 2
CAUSAL = Mask(causal=True)
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


def segments(length):
    """Padding before, between and after; a document within a piece, one over several; a row of padding."""
    ids = np.zeros((BATCH, length), np.int32)
    for number, (start, stop) in enumerate([(5, 6), (6, 9), (9, 30), (33, 35), (36, length - 3)], 1):
        ids[0, start:stop] = number
    return jnp.asarray(ids)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def positive(seed, *shape):
    return jax.nn.softplus(normal(seed, *shape))


def complex_normal(seed, *shape):
    return jax.lax.complex(normal(seed, *shape), normal(seed + 50, *shape))


def _ssd(t, ids):
    return ssd(t["x"], t["dt"], -t["A"], t["B"], t["C"], t["D"], initial_state=t["state"], segment_ids=ids)


def _selective(t, ids):
    return selective_scan(t["x"], t["dt"], -t["A"], t["B"], t["C"], initial_state=t["state"], segment_ids=ids)


def _linear(t, ids):
    decay = jax.nn.sigmoid(t["x"])
    h, final = linear_scan(decay, t["B"], initial_state=t["state"], segment_ids=ids)
    back, first = linear_scan(decay, t["B"], initial_state=t["state"], segment_ids=ids, reverse=True)
    return h + 2 * back, final + 2 * first


def _conv(t, ids):
    return causal_conv1d(t["x"], t["weight"], initial_state=t["state"], segment_ids=ids, activation="silu")


def _lti(t, ids):
    log_A = jax.lax.complex(-t["A"], t["C"].real)
    parts = (t["x"], log_A, t["B"], t["C"])
    return lti_ssm(*parts, initial_state=t["state"], segment_ids=ids, reverse=True)


def _lti_dense(t, ids):
    A = 0.3 * t["A"]
    return lti_ssm_dense(t["x"], A, t["B"], t["C"], initial_state=t["state"], segment_ids=ids)


def _attention(t, ids, mask=CAUSAL, alibi=True, cache=True):
    q, k, v = t["q"], t["k"], t["v"]
    own = Source(k, v, kv_segment_ids=ids, mask=mask)
    far = jnp.tile(jnp.arange(-3, 0), (q.shape[0], 1))
    sources = [own, Source(t["k2"], t["v2"], kv_positions=far, mask=Mask(causal=True))] if cache else [own]
    bias = Alibi(jnp.asarray([0.5, 0.1])) if alibi else None
    out, lse = attention(q, sources, q_segment_ids=ids, bias=bias, return_lse=True)
    return out, jnp.where(lse > -1e29, lse, 0).swapaxes(1, 2)


def inputs_of(name, length):
    b, h = BATCH, HEADS
    return {
        "ssd": lambda: {
            "x": normal(0, b, length, h, 4),
            "dt": positive(1, b, length, h),
            "A": positive(2, h),
            "B": normal(3, b, length, 1, 4),
            "C": normal(4, b, length, 1, 4),
            "D": normal(5, h),
            "state": normal(6, b, h, 4, 4),
        },
        "selective_scan": lambda: {
            "x": normal(0, b, length, 4),
            "dt": positive(1, b, length, 4),
            "A": positive(2, 4, 2),
            "B": normal(3, b, length, 2),
            "C": normal(4, b, length, 2),
            "state": normal(6, b, 4, 2),
        },
        "long_conv": lambda: {"x": normal(0, b, length, PARTS), "kernel": normal(1, 2, PARTS, 12)},
        "linear_scan": lambda: {
            "x": normal(0, b, length, 4),
            "B": normal(1, b, length, 4),
            "state": normal(2, b, 4),
        },
        "causal_conv1d": lambda: {
            "x": normal(0, b, length, 4),
            "weight": normal(1, 4, 4),
            "state": normal(2, b, 3, 4),
        },
        "lti_ssm": lambda: {
            "x": normal(0, b, length, h),
            "A": positive(1, h, 2),
            "B": complex_normal(2, h, 2),
            "C": complex_normal(3, h, 2),
            "state": complex_normal(4, b, h, 2),
        },
        "lti_ssm_dense": lambda: {
            "x": normal(0, b, length, h),
            "A": normal(1, h, 2, 2),
            "B": normal(2, h, 2),
            "C": normal(3, h, 2),
            "state": normal(4, b, h, 2),
        },
    }.get(
        name,
        lambda: {
            "q": normal(0, b, length, h, 4),
            "k": normal(1, b, length, 1, 4),
            "v": normal(2, b, length, 1, 4),
            "k2": normal(3, b, 3, 1, 4),
            "v2": normal(4, b, 3, 1, 4),
        },
    )()


# run(inputs, segment_ids) -> y by token, and the final state (of attention the log-sum-exps by token).
OPS = {
    "long_conv": lambda t, ids: (
        long_conv(t["x"], t["kernel"], bidirectional=True) * (ids != 0)[..., None],
        jnp.zeros(()),
    ),
    "ssd": _ssd,
    "selective_scan": _selective,
    "linear_scan": _linear,
    "causal_conv1d": _conv,
    "lti_ssm": _lti,
    "lti_ssm_dense": _lti_dense,
    "attention": _attention,
    "attention_window": functools.partial(_attention, mask=Mask(causal=True, window=10), cache=False),
    "attention_both_ways": functools.partial(_attention, mask=Mask(), alibi=False, cache=False),
}
# Of a value with its gradients, in zigzag order: a permute a piece for a halo there and one back, one gather
# there and one scatter back for each direction of a recurrence. All-reduces add up the number itself, final
# states of the convolution, and the gradients of parameters, which every piece of time has a share in.
EXPECTED = {
    "ssd": {"all-gather": 1, "reduce-scatter": 1},
    "selective_scan": {"all-gather": 1, "reduce-scatter": 1},
    "linear_scan": {"all-gather": 2, "reduce-scatter": 2},
    "causal_conv1d": {"collective-permute": 4},
    "lti_ssm": {"all-gather": 1, "reduce-scatter": 1},
    "lti_ssm_dense": {"all-gather": 1, "reduce-scatter": 1},
    "attention": {"collective-permute": 4},
    "attention_window": {"collective-permute": 8},
    "long_conv": {"all-to-all": 4},
}
GROWING = {"attention", "attention_window", "long_conv"}  # keys on the ring, and a kernel as long as the row


def program(name):
    """``run(inputs, ids, weights)``: a number that y and the final state enter, and its gradients."""

    def loss(inputs, ids, weights):
        y, other = OPS[name](inputs, ids)
        total = jnp.sum(y.real * weights.reshape(BATCH, -1, *[1] * (y.ndim - 2)))
        if name.startswith("attention"):  # the log-sum-exp of every token
            return total + jnp.sum(jnp.sin(other) * weights[..., None])
        return total + jnp.sum(jnp.sin(other.real) + jnp.imag(other) ** 2)

    return jax.jit(jax.value_and_grad(loss, allow_int=True))


def arranged(name, order, length):
    """Arguments of :func:`program`, with tokens in ``order``."""
    inputs, ids = inputs_of(name, length), segments(length)
    place = functools.partial(time_order.arrange, order=order, parts=PARTS)
    inputs = {key: place(x) if by_token(x, length) else x for key, x in inputs.items()}
    return inputs, place(ids), place(normal(9, BATCH, length))


def by_token(x, length):
    return x.ndim > 2 and x.shape[1] == length


def on_mesh(arguments, length):
    """Tokens split over the sequence axis, all else whole; ids are whole as the model has them."""
    inputs, ids, weights = arguments
    mesh = jax.sharding.get_mesh()
    at = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))  # noqa: E731
    inputs = {k: at(x, None, "sequence") if by_token(x, length) else at(x) for k, x in inputs.items()}
    return inputs, at(ids), at(weights, None, "sequence")


def collectives(compiled):
    """Number of each kind and bytes of all results in a compiled program. Groups of one do nothing."""
    counts, size = dict.fromkeys(COLLECTIVES, 0), 0
    widths = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1, "c64": 8}
    found = re.findall(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\((.*)", compiled.as_text())
    for result, kind, rest in found:
        if _alone(rest):
            continue
        counts[kind] += 1
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
            size += widths[dtype] * int(np.prod([int(n) for n in shape.split(",") if n]))
    return {kind: n for kind, n in counts.items() if n}, size


def _alone(attributes):
    """Whether the groups of a collective are of one device: written in full, or over axes of a mesh."""
    if re.search(r"replica_groups=\{\{\d+\}", attributes):
        return True
    if not (found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes)):
        return False
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    return all(sizes[axis] == "1" for axis in re.findall(r"'(\w+)'", found[2]))


@pytest.fixture(scope="module")
def eight():
    auto = (jax.sharding.AxisType.Auto,) * 4
    names = ("data", "fsdp", "tensor", "sequence")
    return jax.make_mesh((1, 1, 1, PARTS), names, axis_types=auto)


@pytest.mark.parametrize("name", OPS)
def test_zigzag_is_unsharded(name, eight, monkeypatch):
    """Values and gradients with packed documents, incoming state and cotangent of the final state; and what
    is sent between devices does not grow with the length, but for the keys on the ring."""
    monkeypatch.setenv("LONGSPAN_IMPLEMENTATION", "reference")
    value, grads = jax.device_get(program(name)(*arranged(name, "contiguous", LENGTH)))
    monkeypatch.setenv("LONGSPAN_IMPLEMENTATION", "xla")
    with jax.set_mesh(eight), time_order.use("zigzag"):
        arguments = on_mesh(arranged(name, "zigzag", LENGTH), LENGTH)
        compiled = program(name).lower(*arguments).compile()
        got, got_grads = jax.device_get(compiled(*arguments))
        if name in EXPECTED:
            counts, size = collectives(compiled)
            counts.pop("all-reduce")
            assert counts == EXPECTED[name]
        if name in EXPECTED and name not in GROWING:
            longer = on_mesh(arranged(name, "zigzag", 2 * LENGTH), 2 * LENGTH)
            counts, size_of_longer = collectives(program(name).lower(*longer).compile())
            counts.pop("all-reduce")
            assert (counts, size_of_longer) == (EXPECTED[name], size)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    for key, want in grads.items():
        found = jnp.asarray(got_grads[key])
        found = time_order.restore(found, "zigzag", PARTS) if by_token(want, LENGTH) else found
        np.testing.assert_allclose(found, want, atol=2e-4, rtol=2e-4, err_msg=key)


@pytest.mark.parametrize("name", sorted(EXPECTED.keys() - GROWING))
def test_what_is_sent_in_contiguous_order_does_not_grow_with_the_length(name, eight, monkeypatch):
    monkeypatch.setenv("LONGSPAN_IMPLEMENTATION", "xla")
    sent = []
    with jax.set_mesh(eight):
        for length in (LENGTH, 2 * LENGTH):
            arguments = on_mesh(arranged(name, "contiguous", length), length)
            sent.append(collectives(program(name).lower(*arguments).compile()))
    assert sent[0] == sent[1] and sent[0][1] > 0


def test_reading_both_ways_in_zigzag_order(eight, monkeypatch):
    """A mixer that reads from the end too: packed rows, as unsharded."""
    monkeypatch.setenv("LONGSPAN_IMPLEMENTATION", "xla")
    config = Mamba2Config(d_state=4, headdim=4, chunk_size=8)
    mixer = Bidirectional(lambda rngs: Mamba2(8, config, rngs=rngs), rngs=nnx.Rngs(0))
    x, ids = normal(3, BATCH, LENGTH, 8), segments(LENGTH)
    real = (ids != 0)[..., None]

    def run(x, layout):
        ctx = Context.create(BATCH, LENGTH, segment_ids=ids).arranged(layout)
        return mixer(x, None, ctx)[0]

    want = jnp.where(real, run(x, "contiguous"), 0)
    with jax.set_mesh(eight), time_order.use("zigzag"):
        got = jax.jit(lambda x: run(x, "zigzag"))(time_order.arrange(x, "zigzag", PARTS))
    np.testing.assert_allclose(jnp.where(real, time_order.restore(got, "zigzag", PARTS), 0), want, atol=1e-5)


def test_orders():
    x = jnp.arange(3 * 64).reshape(3, 64)
    placed = time_order.arrange(x, "zigzag", PARTS)
    np.testing.assert_array_equal(time_order.restore(placed, "zigzag", PARTS), x)
    devices = [time_order.row_index(i, 8, PARTS, 2) for i in range(PARTS)]
    np.testing.assert_array_equal(placed[0], jnp.concatenate(devices))
    np.testing.assert_array_equal(devices[1], [4, 5, 6, 7, 56, 57, 58, 59])
    np.testing.assert_array_equal(time_order.row_index(1, 8, PARTS, 1), np.arange(8, 16))


def test_arranging_what_is_sharded_moves_each_token_once(eight):
    x = jnp.arange(2 * 64 * 3.0).reshape(2, 64, 3)
    placed = time_order.arrange(x, "zigzag", PARTS)
    x = jax.device_put(x, jax.NamedSharding(eight, jax.P(None, "sequence")))
    with jax.set_mesh(eight):
        run = jax.jit(lambda x: time_order.arrange_sharded(x, "zigzag"))
        back = jax.jit(lambda x: time_order.restore_sharded(x, "zigzag"))
        np.testing.assert_array_equal(run(x), placed)
        np.testing.assert_array_equal(back(run(x)), x)
        assert collectives(run.lower(x).compile()) == ({"collective-permute": 2}, x.nbytes // PARTS)


def test_a_length_that_does_not_fit_is_named(eight):
    assert time_order.usable("zigzag", 64) == "contiguous"  # no mesh
    with jax.set_mesh(eight), time_order.use("zigzag"):
        assert time_order.usable("zigzag", 64) == "zigzag"
        assert time_order.usable("zigzag", 1) == time_order.usable("zigzag", 72) == "contiguous"
        with pytest.raises(ValueError, match="causal_conv1d: 72 .* multiple of 16"):
            causal_conv1d(jnp.zeros((1, 72, 2)), jnp.zeros((4, 2)))
    with (
        pytest.raises(ValueError, match="sequence_layout='spiral' is unknown.*zigzag"),
        time_order.use("spiral"),
    ):
        pass


@functools.partial(jax.jit, static_argnums=(0, 1))
def tiles(pieces, mask):
    """Tiles [device, step] of 8 x 8 that a ring of eight devices with 64 tokens each computes."""

    def count(device, step):
        q, k = (
            Tokens(time_order.row_index(i, 64, PARTS, pieces)[None])
            for i in (device, (device - step) % PARTS)
        )
        tiling = Tiling.of(mask, (8, 8), 64, 64, q, k)
        return jnp.sum(tiling.high - tiling.low)

    index = jnp.arange(PARTS)
    return jax.vmap(lambda device: jax.vmap(lambda step: count(device, step))(index))(index)


def test_zigzag_gives_every_device_the_same_tiles_in_every_step():
    balanced, one_sided = tiles(2, CAUSAL), tiles(1, CAUSAL)
    assert balanced.sum() == one_sided.sum() == 64 * 65 // 2
    assert (balanced == balanced[:1]).all()
    assert balanced[0].tolist() == [36] + [32] * 7
    # The slowest device sets the pace of each step: contiguous order takes almost twice as long.
    assert one_sided.max(axis=0).sum() == 36 + 7 * 64


def test_long_and_narrow(eight, monkeypatch):
    """A convolution and an SSD over 32K tokens: values and gradients of one device."""
    monkeypatch.setenv("LONGSPAN_IMPLEMENTATION", "xla")
    length = 2**15
    t = {"x": normal(0, 1, length, 4), "weight": normal(1, 4, 4), "dt": 0.1 * positive(2, 1, length, 1)}

    def loss(t, order):
        x, _ = causal_conv1d(t["x"], t["weight"], activation="silu")
        y, state = ssd(x[:, :, None], t["dt"], -jnp.ones(1), x[:, :, None], x[:, :, None])
        return jnp.mean(time_order.restore_sharded(y, order) ** 2) + jnp.sum(state**2)

    run = jax.value_and_grad(loss)
    want = jax.device_get(jax.jit(lambda t: run(t, "contiguous"))(t))
    place = functools.partial(time_order.arrange, order="zigzag", parts=PARTS)
    placed = {key: place(x) if by_token(x, length) else x for key, x in t.items()}
    with jax.set_mesh(eight), time_order.use("zigzag"):
        value, grads = jax.device_get(jax.jit(lambda t: run(t, "zigzag"))(placed))
    np.testing.assert_allclose(value, want[0], rtol=1e-5)
    for key, g in grads.items():
        g = time_order.restore(jnp.asarray(g), "zigzag", PARTS) if by_token(g, length) else g
        scale = np.abs(want[1][key]).max()
        np.testing.assert_allclose(g / scale, want[1][key] / scale, atol=1e-4, err_msg=key)


def test_a_model_carries_its_state_in_zigzag_order(eight, monkeypatch):
    """Two pieces of packed rows: hidden states, and the cache of a windowed attention layer."""
    monkeypatch.setenv("LONGSPAN_IMPLEMENTATION", "xla")
    config = LMConfig(
        d_model=16,
        vocab_size=16,
        pattern="*",
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, window=20),
    )
    model = Functional.create(lambda rngs: LM(config, rngs=rngs))
    tokens, ids = np.arange(BATCH * 128).reshape(BATCH, 128) * 7 % 16, np.asarray(segments(128))

    @functools.partial(jax.jit, static_argnums=4)
    def step(params, state, tokens, ids, layout):
        y, state, _ = model.bind(params)(tokens, state, segment_ids=ids, sequence_layout=layout)
        return jnp.where((ids != 0)[..., None], y, 0), state

    def run(layout):
        first, state = step(params, start, tokens[:, :64], ids[:, :64], layout)
        second, state = step(params, jax.device_get(state), tokens[:, 64:], ids[:, 64:], layout)
        return jax.device_get((first, second, state))

    params = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    start = jax.device_get(jax.jit(lambda: model.bind(model.shapes).init_state(BATCH, 128))())
    want = run("contiguous")
    with jax.set_mesh(eight):
        got = run("zigzag")
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=2e-5, rtol=1e-4), got, want)
