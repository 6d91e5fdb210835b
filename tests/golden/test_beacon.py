"""Activation Beacon against the authors' code, both versions: logits, caches, loss, gradients, decoding."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from layers.attention import AttentionConfig
from layers.beacon_ratios import BeaconConfig
from layers.mlp import MLPConfig
from layers.rope import RopeConfig
from models.beacon import BeaconLM
from models.beacon_config import BeaconLMConfig
from models.functional import Functional
from models.loss import chunked_cross_entropy
from tests.conftest import GOLDEN

SINGLE = [f"beacon_llama_{name}" for name in ("r2", "r4", "r8", "mixseq", "sink")] + ["beacon_qwen2_r4"]
FIRST_VERSION = ["beaconv1_stepexp_r4", "beaconv1_fullcov_r4"]
FILES = [*SINGLE, *FIRST_VERSION, "beacon_llama_decode"]
TOP = {
    ("embed", "table"): "model.embed_tokens.weight",
    ("norm", "scale"): "model.norm.weight",
    ("head", "kernel"): "lm_head.weight",
}
NORMS = ("input_layernorm", "post_attention_layernorm")
PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}


class Golden:
    """A file's vectors, and our model of its config."""

    def __init__(self, file):
        with np.load(GOLDEN / f"{file}.npz") as archive:
            self.vectors = dict(archive)
        meta = self.meta = json.loads(str(self.vectors["meta_json"]))
        ratios = tuple(meta["ratio"])
        variant = "interleaved" if meta.get("pos") == "interleave" else meta["attn"]
        self.config = BeaconLMConfig(
            vocab_size=meta["vocab"],
            vocab_multiple=1,
            d_model=meta["d"],
            pattern=f"(*-){meta['layers']}",
            norm_eps=meta["rms_eps"],
            tie_embeddings=False,
            attention=AttentionConfig(
                num_heads=meta["heads"],
                num_kv_heads=meta["kv_heads"],
                rope=RopeConfig(theta=meta["rope_theta"]),
                qkv_bias=meta.get("arch") == "qwen2",
            ),
            mlp=MLPConfig(hidden=self.vectors["param/model.layers.0.mlp.gate_proj.weight"].shape[0]),
            beacon=BeaconConfig(
                window=meta["window"],
                ratios=ratios,
                mix="sequence",
                eval_ratios=ratios,
                variant=variant,
                sinks=meta.get("sink", 0),
                own_out="o" in meta["beacon_param"],
            ),
        )
        self.config.validate()
        self.model = Functional.create(lambda rngs: BeaconLM(self.config, rngs=rngs))
        self.tokens = jnp.asarray(self.vectors["input_ids"], jnp.int32)
        self.windows = [
            {name: self.vectors[f"win{i}/{name}"] for name in ("input_ids", "position_ids", "logits")}
            for i in range(int(self.vectors["n_windows"]))
        ]
        self.params = self.tree("param")

    def tree(self, kind):
        """Published tensors as a tree of ours: "param", or "grad" of what they have gradients for."""
        paths = {path: self._read(kind, path) for path in flatten_dict(self.model.shapes)}
        return unflatten_dict({path: value for path, value in paths.items() if value is not None})

    def _read(self, kind, path):
        if path == ("beacon_embed",):
            return self.vectors[f"{kind}/model.beacon_embed_tokens.weight"][0]
        if path in TOP:
            value = self.vectors.get(f"{kind}/{TOP[path]}")
            return value if value is None or path[0] != "head" else value.T
        _, _, _, _, place, part, *rest = path
        if part == "norm":
            name = f"{NORMS[place]}.weight"
        elif place == 1:
            name = f"mlp.{rest[0]}_proj.weight"
        else:
            beacon = "beacon_" if rest[0] == "beacon" else ""
            end = "weight" if rest[-1] == "kernel" else "bias"
            name = f"self_attn.{beacon}{PROJECTIONS[rest[-2]]}.{end}"
        layers = [f"{kind}/model.layers.{i}.{name}" for i in range(self.meta["layers"])]
        if layers[0] not in self.vectors:
            return None
        return np.stack([self.vectors[name].T for name in layers])

    def logits(self):
        """Of all raw tokens and of all beacons, in order."""
        slots = [(w["input_ids"], w["logits"]) for w in self.windows]
        ids, logits = (np.concatenate(parts, axis=1) for parts in zip(*slots))
        is_beacon = ids[0] == self.meta["vocab"]
        return logits[:, ~is_beacon], logits[:, is_beacon]

    def positions(self):
        """Rotary positions of all raw tokens and of all beacons, in order."""
        ids = np.concatenate([w["input_ids"][0] for w in self.windows])
        new = [w["position_ids"][0, -w["input_ids"].shape[1] :] for w in self.windows]
        return [np.concatenate(new)[(ids == self.meta["vocab"]) == kind] for kind in (False, True)]

    def nll(self, logits):
        """Nats of every label but those that do not count (-100)."""
        labels = self.vectors["labels"][:, 1:] if "labels" in self.vectors else self.tokens[:, 1:]
        log_p = jax.nn.log_softmax(logits[:, :-1])
        picked = -jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return picked[labels >= 0]


load = functools.cache(Golden)


def run(golden, state=None):
    """Logits of the raw tokens and of the beacons there are, the slots, the state."""

    @jax.jit
    def call(params, tokens, state):
        lm = golden.model.bind(params)
        hidden, state, out = lm(tokens, state)
        return lm.logits(hidden), lm.logits(out["beacons"]), out["slots"], state

    raw, beacons, slots, state = call(golden.params, golden.tokens, state)
    there = np.flatnonzero(slots.segment_ids[0, slots.raw :])
    return raw, beacons[:, there], slots, there, state


@pytest.mark.parametrize("file", ["beacon_llama_mixseq", *FIRST_VERSION])
def test_one_pass_equals_window_after_window(file):
    golden = load(file)
    raw, beacons, slots, there, _ = run(golden)
    want_raw, want_beacons = golden.logits()
    np.testing.assert_allclose(raw, want_raw, atol=5e-5)
    np.testing.assert_allclose(beacons, want_beacons, atol=5e-5)
    positions = slots.positions[0, : slots.raw], slots.positions[0, slots.raw :][there]
    for found, want in zip(positions, golden.positions()):
        np.testing.assert_array_equal(found, want)
    if "labels" in golden.vectors:
        np.testing.assert_allclose(golden.nll(raw).mean(), golden.vectors["loss"], rtol=1e-5)


@pytest.mark.parametrize("file", FILES)
def test_logits_and_caches_with_a_state(file):
    golden = load(file)
    room = golden.tokens.shape[1] + golden.meta.get("decode", 0)
    state = golden.model.bind(golden.params).init_state(len(golden.tokens), room)
    raw, beacons, _, there, state = run(golden, state)
    want_raw, want_beacons = golden.logits()
    np.testing.assert_allclose(raw, want_raw, atol=5e-5)
    np.testing.assert_allclose(beacons[:, : want_beacons.shape[1]], want_beacons, atol=5e-5)
    assert len(there) >= want_beacons.shape[1]
    sinks = golden.config.beacon.sinks
    (repeats,) = state["layers"]
    for layer, (attention, _) in enumerate(repeats):
        for name in ("k", "v"):
            memory, window = (attention[c][name].swapaxes(1, 2) for c in ("memory", "window"))
            held = golden.vectors[f"cache/beacon_{name}/{layer}"]
            parts = {"beacon": (memory[:, :, sinks:], held)}
            if sinks:
                parts["sink"] = memory, golden.vectors[f"cache/sink_{name}/{layer}"]
            if f"cache/raw_{name}/{layer}" in golden.vectors:
                parts["raw"] = window, golden.vectors[f"cache/raw_{name}/{layer}"]
            for part, (found, want) in parts.items():
                found = found[:, :, : want.shape[2]]
                np.testing.assert_allclose(found, want, atol=2e-5, err_msg=f"{part} {name} {layer}")
    if "decode/logits" in golden.vectors:
        check_decoding(golden, state)


def check_decoding(golden, state):
    """One token after another, across the end of a window."""

    @jax.jit
    def step(params, token, state):
        lm = golden.model.bind(params)
        hidden, state, _ = lm(token, state)
        return lm.logits(hidden), state

    ids, found = jnp.asarray(golden.vectors["decode/input_ids"], jnp.int32), []
    for t in range(ids.shape[1]):
        logits, state = step(golden.params, ids[:, t : t + 1], state)
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), golden.vectors["decode/logits"], atol=5e-5)
    assert int(state["tokens"][0]) // golden.meta["window"] > golden.tokens.shape[1] // golden.meta["window"]


def test_training_loss_and_gradients():
    golden = load("beacon_llama_train")
    want = flatten_dict(golden.tree("grad"))
    assert len(want) == 4, "the embedding, and the queries, keys and values of the stacked layers"
    labels = jnp.asarray(golden.vectors["labels"][:, 1:])

    @jax.jit
    def loss(params):
        lm = golden.model.bind(params)
        hidden, _, out = lm(golden.tokens, deterministic=False)
        nll, _ = chunked_cross_entropy(lm, hidden[:, :-1], jnp.maximum(labels, 0))
        return jnp.sum(nll * (labels >= 0)) / jnp.sum(labels >= 0), (
            lm.logits(hidden),
            out["slots"].positions,
        )

    (value, (logits, positions)), grads = jax.value_and_grad(loss, has_aux=True)(golden.params)
    np.testing.assert_allclose(value, golden.vectors["loss"], rtol=1e-5)
    np.testing.assert_allclose(logits, golden.logits()[0], atol=5e-5)
    np.testing.assert_array_equal(positions[0, : golden.tokens.shape[1]], golden.positions()[0])
    found = flatten_dict(grads)
    for path, value in want.items():
        np.testing.assert_allclose(found[path], value, atol=2e-4, rtol=1e-3, err_msg=str(path))
