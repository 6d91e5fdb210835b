"""HMT against its authors' code, on GPT-2 and Llama backbones: all of every segment, loss, gradients."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.attention import AttentionConfig
from layers.mlp import MLPConfig
from models import published
from models.functional import Functional
from models.hmt import HMT
from models.hmt_config import HMTConfig, MemoryConfig
from objectives.hmt import last_targets
from tests.conftest import GOLDEN

FILES = ("hmt_gpt2_1seg", "hmt_gpt2_2seg", "hmt_gpt2_3seg", "hmt_gpt2_stage1", "hmt_llama_3seg")


def config_of(meta):
    memory = MemoryConfig(
        segment=meta["segment_size"],
        sensory=meta["sensory_k"],
        recall="attention" if meta["stage"] == 2 else "last",
        summary_fraction=meta["sum_fraction"],
        queue=meta["ltm_context"],
        recall_dim=meta["hidden_dim"],
    )
    shape = {
        "vocab_size": meta["vocab"],
        "vocab_multiple": 1,
        "d_model": meta["d"],
        "pattern": "*-" * meta["layers"],
        "memory": memory,
    }
    if meta["arch"] == "llama":
        return HMTConfig(
            **shape,
            attention=AttentionConfig(num_heads=meta["heads"], num_kv_heads=meta["kv_heads"]),
            mlp=MLPConfig(hidden=32),
            norm_eps=1e-6,
            tie_embeddings=False,
        )
    return HMTConfig(
        **shape,
        attention=AttentionConfig(num_heads=meta["heads"], position="none", qkv_bias=True, out_bias=True),
        mlp=MLPConfig(hidden=32, activation="gelu_tanh", use_bias=True),
        norm="layer",
        max_positions=21,
    )


class Golden:
    """A file's vectors, and what our model of its weights gives for its tokens."""

    def __init__(self, file):
        with np.load(GOLDEN / f"{file}.npz") as archive:
            self.vectors = dict(archive)
        self.meta = meta = json.loads(str(self.vectors.pop("meta_json")))
        self.config = config = config_of(meta)
        functional = Functional.create(lambda rngs: HMT(config, rngs=rngs))
        base = {n.removeprefix("base/"): v for n, v in self.vectors.items() if n.startswith("base/")}
        weights = {f"memory_cell.model.{name}": value for name, value in base.items()}
        width, rank = config.d_model, config.memory.recall_dim
        for name, theirs, shape in (
            ("mem", "topic_T", (1, width)),
            ("memory_cell.memory", "memory_init", (1, width)),
            ("cross_attn.wq.weight", "wq", (rank, width)),
            ("cross_attn.wk.weight", "wk", (rank, width)),
        ):
            weights[name] = self.vectors.get(f"hmt/{theirs}", np.zeros(shape))  # stage 1 has not all
        self.params = published.params_from(config, weights, f"{meta['arch']}_hmt")
        ids = self.vectors["input_ids"].astype(np.int32)
        self.tokens = ids
        weights = np.ones(ids.shape, np.float32)
        weights[:, -1] = 0  # there is no target for the last token
        batch = {"targets": np.roll(ids, -1, axis=1), "weights": weights}

        def loss(params):
            model = functional.bind(params)
            hidden, state, out = model(jnp.asarray(ids), training=True)
            logits = model.logits(hidden)
            log_p = jax.nn.log_softmax(logits)
            nll = -jnp.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]
            counted = last_targets(jnp.asarray(batch["weights"]), meta["mask_size"])
            return (nll * counted).sum() / counted.sum(), {**out, "logits": logits}

        (self.loss, self.out), self.grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(self.params)

        @jax.jit
        def evaluate(params):
            model = functional.bind(params)
            return model.logits(model(jnp.asarray(ids))[0])

        self.evaluate = evaluate


load = functools.cache(Golden)


@pytest.fixture(scope="module", params=FILES)
def golden(request):
    return load(request.param)


def close(actual, expected, atol=5e-5, rtol=0.0):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def test_every_segment(golden):
    size, memory = golden.meta["segment_size"], golden.config.memory
    for n in range(golden.meta["n_segments"]):
        found = {name.split("/")[1]: v for name, v in golden.vectors.items() if name.startswith(f"seg{n}/")}
        close(golden.out["logits"][:, n * size : (n + 1) * size], found.pop("logits"))
        close(golden.out["memory"][n], found.pop("memory_M")[:, 0])
        if "summary_S" in found:
            close(golden.out["summary"][n], found.pop("summary_S")[:, 0])
        if "prompt_P" in found:
            close(golden.out["prompt"][n], found.pop("prompt_P")[:, 0])
        if "retrieval_weights" in found:
            close(golden.out["weights"][n, :, :n], found.pop("retrieval_weights")[:, 0], atol=2e-5)
            assert (np.asarray(golden.out["weights"][n, :, n:]) == 0).all()
            close(jnp.moveaxis(golden.out["memory"][:n], 0, 1), found.pop("memory_queue"))
        if "sensory_ids" in found:
            np.testing.assert_array_equal(
                golden.tokens[:, n * size - memory.sensory : n * size], found.pop("sensory_ids")
            )
        assert not found


def test_loss_and_gradients(golden):
    close(golden.loss, golden.vectors["loss"], atol=2e-5)
    grads = golden.grads["memory"]
    ours = {"memory_init": grads["prompt"][None], "topic_T": grads["topic"][None]}
    ours |= {name: grads[name]["kernel"].T for name in ("wq", "wk")}
    ours["base_embed"] = golden.grads["embed"]["table"]
    compared = [name for name in ours if f"grad/{name}" in golden.vectors]
    assert len(compared) == (5 if golden.meta["stage"] == 2 else 2)
    for name in compared:
        close(ours[name], golden.vectors[f"grad/{name}"], atol=2e-4, rtol=1e-3)
    for name in set(ours) - set(compared):
        assert not np.asarray(ours[name]).any()


def test_evaluation_gives_the_same():
    golden = load("hmt_llama_3seg")
    logits = golden.evaluate(golden.params)
    kept = golden.vectors["logits_kept"]
    close(logits[:, -kept.shape[1] :], kept)
