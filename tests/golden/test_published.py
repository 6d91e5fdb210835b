"""Mamba, Mamba-2, Bamba, Nemotron-H with published weights against transformers and the authors' code."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import pattern, published
from models.functional import Functional
from models.lm import LM
from tests.conftest import GOLDEN

# In float64 the reference's rotary frequencies are still float32, hence Bamba's.
TOLERANCE = {"float32": 2e-5, "float64": 1e-10}
BAMBA_TOLERANCE = {"float32": 2e-5, "float64": 1e-7}
FILES = ("hf_mamba", "hf_mamba2", "hf_bamba", "hf_nemotronh")
PIECES = (6, 12)


class Golden:
    """A file's vectors, and our model of its config holding its weights, computing in ``dtype``."""

    def __init__(self, file: str, dtype: str):
        with np.load(GOLDEN / f"{file}.npz") as archive:
            self.vectors = dict(archive)
        self.meta = json.loads(str(self.vectors.pop("__meta__")))
        self.format = published.detect(self.meta["config"])
        self.dtype, self.tolerance = dtype, TOLERANCE[dtype]
        if file == "hf_bamba":
            self.tolerance = BAMBA_TOLERANCE[dtype]
        config = published.config_from(self.meta["config"])
        config.dtype = config.residual_dtype = config.attention.cache_dtype = dtype
        if self.format == "nemotron_h":  # its code clamps dt in prefill only
            config.mamba2.prefill_dt_min = self.meta["config"]["time_step_min"]
        self.config = config
        self.params = published.params_from(config, self.weights, self.format, dtype)
        self.tokens = self.vectors["input_ids"].astype(np.int32)
        functional = Functional.create(lambda rngs: LM(config, rngs=rngs))
        self.lm = functional.bind

        @jax.jit
        def run(params, tokens, state, segment_ids):
            lm = functional.bind(params)
            hidden, state, out = lm(tokens, state, segment_ids=segment_ids)
            return lm.logits(hidden), state, {"hidden": hidden, **out}

        self._run = run

    @property
    def weights(self):
        return {n.removeprefix("w."): v for n, v in self.vectors.items() if n.startswith("w.")}

    def run(self, tokens, state=None, segment_ids=None):
        """Logits, state and named intermediates."""
        return self._run(self.params, tokens, state, segment_ids)

    def init_state(self, max_len=64):
        state = self.lm(self.params).init_state(len(self.tokens), max_len)
        wide = lambda s: s.astype(self.dtype) if s.dtype == jnp.float32 else s  # noqa: E731
        return jax.tree.map(wide, state)

    def close(self, actual, name, where=...):
        """Compare with a vector, that of its own precision where there is one."""
        expected = self.vectors[name]
        if self.dtype == "float64":
            expected = self.vectors[f"{name}_f64"]
        assert actual.dtype == self.dtype
        np.testing.assert_allclose(actual[where], expected[where], rtol=0, atol=self.tolerance)


load = functools.cache(Golden)


@pytest.fixture(params=[(f, d) for d in TOLERANCE for f in FILES], ids="-".join)
def golden(request):
    file, dtype = request.param
    with jax.enable_x64(dtype == "float64"):
        yield load(file, dtype)


@pytest.fixture(params=FILES)
def golden32(request):
    return load(request.param, "float32")


def test_logits(golden):
    logits, state, out = golden.run(golden.tokens)
    assert state is None and out["hidden"].dtype == out["residual"].dtype == golden.dtype
    golden.close(logits, "logits")


def test_left_padding(golden):
    mask = golden.vectors["attention_mask_leftpad"].astype(np.int32)
    assert not mask[0, 0] and mask[1, 0]
    logits, _, _ = golden.run(golden.tokens, golden.init_state(), mask)
    golden.close(logits, "logits_leftpad", where=mask != 0)


def prefill(golden, cuts):
    """Logits of the prompt and the state after it, the prompt read in pieces."""
    pieces = np.split(golden.tokens[:, : golden.meta["prefill"]], cuts, axis=1)
    state, logits = golden.init_state(), []
    for piece in pieces:
        out, state, _ = golden.run(piece, state)
        logits.append(out)
    return jnp.concatenate(logits, axis=1), state


def test_prefill_and_greedy_decoding(golden):
    logits, state = prefill(golden, () if golden.dtype == "float64" else PIECES)
    found = [logits[:, -1]]
    for _ in range(golden.vectors["greedy_tokens"].shape[1] - 1):
        chosen = found[-1].argmax(axis=-1).astype(jnp.int32)
        logits, state, _ = golden.run(chosen[:, None], state)
        found.append(logits[:, -1])
    assert {s.dtype for s in jax.tree.leaves(state)} <= {jnp.dtype(golden.dtype), jnp.dtype(jnp.int32)}
    found = jnp.stack(found, axis=1)
    np.testing.assert_array_equal(found.argmax(axis=-1), golden.vectors["greedy_tokens"])
    golden.close(found, "greedy_logits")


def test_hidden_states(golden32):
    _, _, out = golden32.run(golden32.tokens)
    expected = golden32.vectors["hidden_states"]
    np.testing.assert_allclose(out["hidden"], expected[-1], rtol=0, atol=2e-5)
    # The others do not list the last block's output before the norm.
    if golden32.format in ("mamba", "mamba2"):
        np.testing.assert_allclose(out["residual"], expected[-2], rtol=0, atol=2e-5)


def mamba_states(golden, state):
    """State of every Mamba or Mamba-2 sub-layer, in order."""
    runs = zip(pattern.runs(golden.config.layers), state["layers"])
    return [
        layer
        for (unit, _), repeats in runs
        for states in repeats
        for symbol, layer in zip(unit, states)
        if symbol in "mM"
    ]


def test_states_after_prefill_in_pieces(golden32):
    logits, state = prefill(golden32, PIECES)
    expected = golden32.vectors["logits"][:, : golden32.meta["prefill"]]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)
    layers = mamba_states(golden32, state)
    assert len(layers) == len(golden32.vectors["cache_ssm_layers"])
    for i, layer in enumerate(layers):
        conv = layer["conv"]
        if isinstance(conv, dict):
            conv = np.concatenate([conv[name] for name in ("x", "B", "C")], axis=-1)
        theirs = golden32.vectors["prefill_conv_states"][i].swapaxes(1, 2)  # the last K, we keep K - 1
        np.testing.assert_allclose(conv, theirs[:, 1:], rtol=0, atol=2e-5)
        theirs = golden32.vectors["prefill_recurrent_states"][i]
        np.testing.assert_allclose(layer["ssm"], theirs, rtol=0, atol=2e-5)


def test_nemotron_h_without_the_clamp_agrees_with_itself():
    golden = Golden("hf_nemotronh", "float32")
    assert published.config_from(golden.meta["config"]).mamba2.prefill_dt_min is None
    golden.config.mamba2.prefill_dt_min = None
    whole, _, _ = golden.run(golden.tokens)
    state, steps = golden.init_state(), []
    for t in range(golden.tokens.shape[1]):
        logits, state, _ = golden.run(golden.tokens[:, t : t + 1], state)
        steps.append(logits)
    np.testing.assert_allclose(np.concatenate(steps, axis=1), whole, rtol=0, atol=2e-5)
    # The difference the clamp makes, which the reference has between prefill and decoding.
    assert np.abs(whole - golden.vectors["logits"]).max() > 1e-4


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_authors_checkpoint(name):
    original, hf = load(f"orig_{name}", "float32"), load(f"hf_{name}", "float32")
    assert original.format == f"{name}_original"
    assert dataclasses.replace(original.config, vocab_multiple=1) == hf.config
    logits, _, _ = original.run(original.tokens)
    original.close(logits, "logits")
    np.testing.assert_allclose(logits, hf.vectors["logits"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("file", [*FILES, "orig_mamba", "orig_mamba2"])
def test_round_trip_of_weights(file):
    golden = load(file, "float32")
    again = published.weights_from(golden.config, golden.params, golden.format)
    # Some vectors were made from a model in memory, whose names are not those of its files.
    names = published.FORMATS[golden.format].names
    weights = {names.rename(name): value for name, value in golden.weights.items()}
    if golden.config.tie_embeddings:  # the file repeats the embedding as the head
        del weights["lm_head.weight"]
    assert set(again) == set(weights)
    for name, value in weights.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
