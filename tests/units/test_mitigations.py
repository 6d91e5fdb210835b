"""Mitigations of overfilled states: against dense formulas, in pieces, packed; switched off, not there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.decimation import DecimateConfig, kept_places
from layers.longmamba import DOUBLINGS, DtFilter, DtFilterConfig, nearest_row
from layers.mamba import Mamba, MambaConfig
from layers.mamba2 import Mamba2, Mamba2Config
from layers.mitigations import MitigationConfig
from layers.prefix_scan import prefix_ssd
from layers.state_limits import capped_ssd, empty_window, window_sums, windowed_ssd
from layers.types import Context
from models.functional import Functional
from pallas_kernels.mamba2 import gated_ssd

LENGTH, PIECE, WINDOW = 16, 4, 3
HEADS, HEADDIM, STATES = 4, 2, 3
# Documents of one token and longer than the window, over the ends of pieces; padding around them.
IDS = np.array(
    [[0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 3, 3, 3, 3, 3, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 2, 2]],
    np.int32,
)


@pytest.fixture(scope="module")
def inputs():
    """u, log_decay, B, C."""
    draw = np.random.default_rng(0).normal
    shapes = ((HEADS, HEADDIM), (HEADS,), (2, STATES), (2, STATES))
    u, decay, B, C = (jnp.asarray(draw(size=(2, LENGTH, *shape)), jnp.float32) for shape in shapes)
    return u, -0.1 * jnp.abs(decay), B, C


def dense(u, log_decay, B, C, seen):
    """y_t = sum_s seen[t, s] exp(sum of log decays of real tokens in (s, t]) (C_t . B_s) u_s."""
    real = jnp.asarray(IDS != 0)
    total = jnp.cumsum(jnp.where(real[..., None], log_decay, 0), axis=1)
    decay = total[:, :, None] - total[:, None]  # [B, t, s, H]
    scores = jnp.einsum("btgn,bsgn->btsg", C, B).repeat(2, axis=-1)
    weights = scores * jnp.exp(jnp.where(seen[..., None], decay, -jnp.inf))
    return jnp.einsum("btsh,bshp->bthp", weights, u)


def same_document():
    return (IDS[:, :, None] == IDS[:, None]) & (IDS != 0)[:, :, None]


def in_pieces(run, parts, carried):
    """The pieces one after another; each gets canonical ids and what the one before left."""
    segment, ys = np.zeros(2, np.int32), []
    for start in range(0, LENGTH, PIECE):
        ids = IDS[:, start : start + PIECE]
        y, carried = run(*(np.asarray(t)[:, start : start + PIECE] for t in parts), carried, ids, segment)
        ys.append(y)
        segment = np.where(ids.any(axis=1), np.max(ids, axis=1), segment)
    return jnp.concatenate(ys, axis=1)


def context(ids, segment):
    return Context.create(*ids.shape, segment_ids=ids, previous_segment=segment)


def test_window_reads_the_last_tokens_of_its_document_alone(inputs):
    """Values and gradients of the dense formula; the same in pieces."""
    place = np.cumsum(IDS != 0, axis=1)
    seen = same_document() & (place[:, :, None] - place[:, None] < WINDOW) & np.tri(LENGTH, dtype=bool)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, LENGTH, HEADS, HEADDIM)), jnp.float32)

    def fast(*parts):
        y = windowed_ssd(*parts, WINDOW, segment_ids=jnp.asarray(IDS), chunk_size=8)[0]
        return jnp.sum(y * weights), y

    def formula(*parts):
        y = dense(*parts, seen)
        return jnp.sum(y * weights), y

    (got, want) = (jax.jit(jax.grad(f, argnums=(0, 1, 2, 3), has_aux=True))(*inputs) for f in (fast, formula))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=2e-5), got, want)

    @jax.jit
    def piece(u, a, B, C, carried, ids, segment):
        ctx = context(ids, segment)
        state, rest = ctx.carried(carried)
        y, state, rest = windowed_ssd(
            u, a, B, C, WINDOW, initial_state=state, carried=rest, segment_ids=ctx.segment_ids, chunk_size=8
        )
        return y, (state, rest)

    empty = (
        jnp.zeros((2, HEADS, HEADDIM, STATES)),
        empty_window(2, WINDOW, HEADS, HEADDIM, 2, STATES),
    )
    np.testing.assert_allclose(in_pieces(piece, inputs, empty), want[1], atol=2e-5)


@pytest.mark.parametrize("window", [1, 6, 16])
def test_sums_over_a_window(window):
    a = np.random.default_rng(0).normal(size=(1, 10, 2))
    want = [a[:, max(0, i + 1 - window) : i + 1].sum(axis=1) for i in range(10)]
    got = window_sums(jnp.asarray(a, jnp.float32), window)
    np.testing.assert_allclose(got, np.stack(want, axis=1), atol=1e-5)


def test_a_bounded_state_stays_within_its_bound_in_one_piece_and_in_many(inputs):
    cap = jnp.asarray([0.5, 1.0, jnp.inf, 0.2])

    @jax.jit
    def piece(u, a, B, C, state, ids, segment):
        ctx = context(ids, segment)
        state = ctx.carried(state)
        y, state, _ = capped_ssd(u, a, B, C, cap, initial_state=state, segment_ids=ctx.segment_ids)
        return y, state

    def whole(*parts):
        return capped_ssd(*parts, cap, segment_ids=jnp.asarray(IDS))

    y, state, _ = jax.jit(whole)(*inputs)
    assert (np.sqrt(np.square(state).sum(axis=(2, 3))) <= cap * (1 + 1e-6)).all()
    np.testing.assert_allclose(in_pieces(piece, inputs, jnp.zeros_like(state)), y, atol=1e-5)
    unbounded = dense(*inputs, same_document() & np.tri(LENGTH, dtype=bool))
    np.testing.assert_allclose(y[:, :, 2], unbounded[:, :, 2], atol=1e-5)  # the head without a bound
    assert np.abs(y - unbounded)[:, :, 0].max() > 0.1
    grads = jax.jit(jax.grad(lambda *parts: jnp.sum(jnp.sin(whole(*parts)[0])), argnums=(0, 1, 2, 3)))(
        *inputs
    )
    assert all(np.isfinite(g).all() for g in grads)


def test_a_prefix_is_read_both_ways_and_nothing_else_is(inputs):
    ids = jnp.asarray(IDS)
    prefix = np.isin(np.arange(LENGTH), [1, 2, 3, 10, 11]) & (IDS != 0)  # the first documents' beginnings
    y, state = jax.jit(lambda *parts: prefix_ssd(*parts, jnp.asarray(prefix), segment_ids=ids))(*inputs)
    forward = dense(*inputs, same_document() & np.tri(LENGTH, dtype=bool))
    np.testing.assert_allclose(y[:, :, :2], forward[:, :, :2], atol=1e-5)
    assert not np.any(state[:, 2:])
    u, decay, B, C = (np.asarray(t, np.float64) for t in inputs)
    S, want = np.zeros((2, 2, HEADDIM, STATES)), np.zeros((2, LENGTH, 2, HEADDIM))
    document = np.zeros(2)
    for t in reversed(range(LENGTH)):
        for row in range(2):
            if IDS[row, t]:
                kept = np.exp(decay[row, t, 2:]) if prefix[row, t] and document[row] == IDS[row, t] else 0.0
                S[row] = np.reshape(kept, (-1, 1, 1)) * S[row] + u[row, t, 2:, :, None] * B[row, t, 1]
                want[row, t], document[row] = S[row] @ C[row, t, 1], IDS[row, t]
    np.testing.assert_allclose(y[:, :, 2:], want, atol=1e-5)
    odd = [t[:, :, :3] if t.shape[2] == HEADS else t for t in inputs]
    with pytest.raises(ValueError, match="3 heads in 2 groups do not split"):
        prefix_ssd(*odd, jnp.asarray(prefix))


SMALL = {"d_state": 4, "headdim": 8, "chunk_size": 8}


def layer_of(d_model=16, **settings):
    config = Mamba2Config(**SMALL, **settings)
    model = Functional.create(lambda rngs: Mamba2(d_model, config, rngs=rngs))
    return model, model.init(jax.random.key(0))


def outputs(model, params, x, **context):
    return model.bind(params)(x, None, Context.create(*x.shape[:2], **context))[0]


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(2).normal(size=(2, LENGTH, 16)), jnp.float32)


def test_switched_off_it_is_the_program_without(x):
    """The same equations, in the same order, as the projections around the op alone; no more state."""
    model, params = layer_of()
    ids = jnp.asarray(IDS)

    def plain(params, x, state):
        layer, ctx = model.bind(params), Context.create(*x.shape[:2], segment_ids=ids)
        before = ctx.carried(state)
        y, tails, final = gated_ssd(
            layer.inputs(x),
            layer.weights(),
            layer.form(x.shape[1]),
            conv_state=before["conv"],
            initial_state=before["ssm"],
            segment_ids=ctx.segment_ids,
        )
        return layer.out(y), {"conv": tails, "ssm": final}

    def switched(params, x, state):
        return model.bind(params)(x, state, Context.create(*x.shape[:2], segment_ids=ids))

    state = model.bind(params).init_state(*x.shape[:2])
    programs = [str(jax.make_jaxpr(f)(params, x, state)) for f in (plain, switched)]
    assert programs[0] == programs[1] and set(state) == {"conv", "ssm"}
    lowered = [jax.jit(f).lower(params, x, state).as_text().count("stablehlo.") for f in (plain, switched)]
    assert lowered[0] == lowered[1]


def test_settings_that_change_nothing_give_what_the_layer_gives(x):
    """Switched on, but without effect: another program, the same numbers."""
    model, params = layer_of()
    want = jax.jit(lambda x: outputs(model, params, x))(x)
    settings = {
        "norm": {"mitigation": MitigationConfig(state_norm=1.0)},
        "filter": {"dt_filter": DtFilterConfig(scale=1.0, length=4)},
    }
    for name, setting in settings.items():
        model, fresh = layer_of(**setting)
        got = jax.jit(lambda x, model=model, p={**fresh, **params}: outputs(model, p, x))(x)
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=name)


def test_a_layer_with_a_window_streams(x):
    """One pass and single tokens; packed."""
    model, params = layer_of(mitigation=MitigationConfig(window=WINDOW, decay_factor=0.99, insert_factor=0.5))
    whole = jax.jit(lambda x: outputs(model, params, x, segment_ids=jnp.asarray(IDS)))(x)

    @jax.jit
    def piece(x, state, segment, ids):
        return model.bind(params)(x, state, context(ids, segment))

    state, segment, ys = model.bind(params).init_state(2, LENGTH), np.zeros(2, np.int32), []
    for t in range(LENGTH):
        y, state = piece(np.asarray(x)[:, t : t + 1], state, segment, IDS[:, t : t + 1])
        segment, ys = np.where(IDS[:, t] != 0, IDS[:, t], segment), [*ys, y]
    np.testing.assert_allclose(jnp.concatenate(ys, axis=1), whole, atol=2e-5)


def test_the_filter_skips_by_length_in_global_channels_of_a_prompt():
    config = DtFilterConfig(scale=2.0)
    dt_filter = DtFilter(2, "heads", config)
    thresholds = jnp.zeros((DOUBLINGS, 2)).at[1:].set(0.1 * jnp.arange(1.0, DOUBLINGS)[:, None])
    graphdef, values = nnx.split(dt_filter)
    for name, value in (
        ("thresholds", thresholds),
        ("retention", jnp.asarray([0.5, 0.01])),
        ("base", jnp.asarray([4.0])),
    ):
        values[name] = values[name].replace(value)
    dt_filter = nnx.merge(graphdef, values)
    dt = jnp.full((1, LENGTH, 2), 0.3)
    kept = dt_filter(dt, Context.create(1, LENGTH)) > 0
    # Thresholds 2 x 0 (to 4 tokens and, being the nearest, to 6), 2 x 0.1 (to 12), 2 x 0.2: 0.4 > 0.3.
    assert kept[0, :, 0].tolist() == [True] * 12 + [False] * 4
    assert kept[..., 1].all()  # forgets by itself
    dt_filter.config = dataclasses.replace(config, length=LENGTH)
    assert not (dt_filter(dt, Context.create(1, LENGTH))[..., 0] > 0).any()
    one = Context.create(1, 1, previous_position=jnp.asarray([LENGTH]))
    assert (dt_filter(dt[:, :1], one) > 0).all()  # decoding
    rows = nearest_row(jnp.asarray([1, 4, 6, 7, 12, 13, 10**6]), jnp.asarray([4.0]))
    assert rows.tolist() == [0, 0, 0, 1, 1, 2, DOUBLINGS - 1]


def test_kept_places_of_rows_of_several_lengths():
    score = jnp.asarray([[5.0, 1, 4, 2, 3, 0, 9, 9], [9.0, 8, 7, 6, 5, 4, 3, 2]])
    ids = jnp.asarray([[1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1]])
    places = kept_places(score, 2, 2, ids)
    assert places[0].tolist() == [0, 2, 4, 5] and places[1].tolist() == [2, 3, 6, 7]
    assert kept_places(score, 7, 2).shape == (2, 8)


@pytest.mark.parametrize("kind", [Mamba2, Mamba])
def test_a_decimating_layer_skips_what_it_drops(kind, x):
    """At the tokens kept: as if the others had dt = 0. The carried state goes where its segment is left."""
    config = Mamba2Config(**SMALL) if kind is Mamba2 else MambaConfig(d_state=4, ones=1, zeros=1)
    layer, masked = (kind(16, config, rngs=nnx.Rngs(0)) for _ in range(2))
    kept: list = []
    masked.dt_filter = lambda dt, ctx: jnp.where(kept[0][..., None], dt, 0)
    state = jax.tree.map(lambda s: np.full(s.shape, 0.1, np.float32), layer.init_state(2, LENGTH))
    ids = jnp.asarray([[1] * 16, [1] * 2 + [2] * 14])

    @jax.jit
    def run(x, state):
        ctx = Context.create(2, LENGTH, segment_ids=ids, previous_segment=jnp.ones(2, jnp.int32))
        y, after, places = layer.decimated(x, state, ctx, 5, 3)
        kept.append(jnp.zeros((2, LENGTH), bool).at[jnp.arange(2)[:, None], places].set(True))
        want, whole = masked(x, state, ctx)
        return (y, after), (jnp.take_along_axis(want, places[..., None], axis=1), whole)

    got, want = run(x, state)
    assert got[0].shape == (2, 8, 16)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5), got, want)


def test_a_layer_reads_the_prefix_of_its_context_both_ways(x):
    """And the first token after it (which should be fixed); of later ones nothing is seen."""
    model, params = layer_of(mitigation=MitigationConfig(bidirectional_prefix=True))
    prefix = jnp.arange(LENGTH) < 6

    @jax.jit
    def run(x, prefix):
        return outputs(model, params, x, prefix=jnp.broadcast_to(prefix, x.shape[:2]))

    def reached(at, prefix):
        moved = np.abs(np.asarray(run(x.at[:, at].add(1.0), prefix) - run(x, prefix))).max(axis=(0, 2))
        return np.flatnonzero(moved > 1e-6)[0]

    assert reached(5, prefix) == 0 and reached(6, prefix) == 0 and reached(7, prefix) == 7
    assert reached(5, jnp.zeros_like(prefix)) == 5


@pytest.mark.parametrize(
    "config, message",
    [
        (MitigationConfig(decay_factor=1.5), r"mitigation.decay_factor=1.5 should lie in \(0, 1\]"),
        (MitigationConfig(insert_factor=0.0), "mitigation.insert_factor=0.0 should be positive"),
        (MitigationConfig(window=0), "mitigation.window=0 should be at least 1 token"),
        (MitigationConfig(state_norm=-1.0), "mitigation.state_norm=-1.0 should be positive"),
        (MitigationConfig(window=4, state_norm=1.0), "window and .*state_norm are both set"),
    ],
)
def test_settings_that_cannot_work(config, message):
    with pytest.raises(ValueError, match=message):
        Mamba2(16, Mamba2Config(**SMALL, mitigation=config), rngs=nnx.Rngs(0))


def test_polarised_heads_and_states_keep_their_place():
    with pytest.raises(ValueError, match="mamba2.ones=2 and mamba2.zeros=2 .* number of heads, 4"):
        Mamba2(16, Mamba2Config(**SMALL, ones=2, zeros=2), rngs=nnx.Rngs(0))
    layer = Mamba2(16, Mamba2Config(**SMALL, ones=1, zeros=1), rngs=nnx.Rngs(0))
    A = layer.weights().A
    assert layer.A_log.shape == (2,) and A[0] == 0 and A[-1] == -100 and (A[1:3] < 0).all()
    layer = Mamba(16, MambaConfig(d_state=4, ones=1, zeros=2), rngs=nnx.Rngs(0))
    assert layer.A_log.shape == (32, 4) and layer.to_B.kernel.shape[1] == 7
    assert layer.init_state(1, 1)["ssm"].shape == (1, 32, 7)


def test_what_reads_time_in_order_is_refused_where_time_is_sharded(x):
    layer = Mamba2(16, Mamba2Config(**SMALL, mitigation=MitigationConfig(window=4)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="use mesh.sequence=1"):
        layer(x, None, Context.create(2, LENGTH, sequence_axis="sequence"))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"layers": (1,)}, "sub-layer 1 of 'M-m' is no Mamba or Mamba-2; those are .0, 2."),
        ({"layers": (2, 0)}, "should rise"),
        ({"layers": (0,), "tail": 0}, "tail=0 should be at least 1"),
        ({"layers": (0,), "beta": 1.5}, "beta=1.5 should lie"),
    ],
)
def test_decimation_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        DecimateConfig(**settings).validate("M-m")
