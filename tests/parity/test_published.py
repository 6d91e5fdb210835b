"""Tiny random models of transformers as published checkpoints: read, what they compute, written again."""

import copy
import functools
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import published
from models.functional import Functional
from models.published.tensors import MODELS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

torch.set_num_threads(1)

VOCABULARY, PROMPT, NEW = 61, 20, 6
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, **SMALL}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e3, "factor": 2.0, "original_max_position_embeddings": 16}
GRANITE = {
    "num_local_experts": 0,
    "shared_intermediate_size": 48,
    "layer_types": ["linear_attention", "full_attention"],
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.7,
    "logits_scaling": 1.5,
    "tie_word_embeddings": True,
}
# Of which class, and how it differs from the defaults there.
CONFIGS = {
    "llama": ("Llama", {**ATTENTION, "head_dim": 16, "rope_parameters": LLAMA3, "attention_bias": True}),
    "mistral": ("Mistral", {**ATTENTION, "sliding_window": 7, "num_hidden_layers": 1}),
    "qwen2": (
        "Qwen2",
        {**ATTENTION, "rope_parameters": YARN, "tie_word_embeddings": True, "num_hidden_layers": 1},
    ),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 40,
            "eos_token_id": 2,
        },
    ),
    "opt": (
        "OPT",
        {
            **SMALL,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 40,
            "word_embed_proj_dim": 32,
        },
    ),
    "falcon_mamba": ("FalconMamba", {**SMALL, "state_size": 6, "mixer_rms_eps": 1e-3}),
    "granitemoehybrid": ("GraniteMoeHybrid", {**ATTENTION, **GRANITE}),
}
# What these compute is tested with vectors, in tests/golden/test_published.py.
MAMBA2 = {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}
HYBRID = {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 8}
NEMOTRON_H = {
    "layers_block_type": ["linear_attention", "mlp", "full_attention"],
    "ssm_state_size": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "head_dim": 8,
    "n_groups": 2,
    "chunk_size": 8,
}
WRITTEN = CONFIGS | {
    "mamba": ("Mamba", {**SMALL, "state_size": 6}),
    "mamba2": ("Mamba2", {**SMALL, **MAMBA2}),
    "bamba": ("Bamba", {**ATTENTION, **HYBRID, "attn_layer_indices": [1]}),
    "nemotron_h": (
        "NemotronH",
        {n: v for n, v in {**ATTENTION, **NEMOTRON_H}.items() if n != "num_hidden_layers"},
    ),
}
# Their rotary frequencies are float32 whatever the rest is.
FLOAT64 = {"llama": 1e-6, "mistral": 1e-6, "qwen2": 1e-6}
MARGIN = 4e-5


def randomised(model):
    """The model with every parameter random, biases and norms included, such that logits are of order 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2 if parameter.ndim > 1 else 0.1)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter += 1
    return model.eval()


class Pair:
    """A model of transformers, and ours of its config and tensors."""

    def __init__(self, name: str):
        kind, options = WRITTEN[name]
        self.config_class = getattr(transformers, f"{kind}Config")
        self.model_class = getattr(
            transformers, f"{'GPT2LMHeadModel' if kind == 'GPT2' else kind + 'ForCausalLM'}"
        )
        self.theirs = randomised(self.model_class(self.config_class(**options)))
        self.raw = json.loads(self.theirs.config.to_json_string(use_diff=False))
        self.weights = {n: w.numpy().copy() for n, w in self.theirs.state_dict().items()}
        self.format, self.config = published.detect(self.raw), published.config_from(self.raw)
        self.params = published.params_from(self.config, self.weights, self.format)
        rows = np.random.default_rng(0).integers(3, VOCABULARY, (2, PROMPT))
        self.prompt = torch.tensor(rows)

    def functional(self, dtype):
        self.config.dtype = self.config.residual_dtype = self.config.attention.cache_dtype = dtype
        return Functional.create(lambda rngs: MODELS[type(self.config)](self.config, rngs=rngs))

    def logits(self, tokens, mask=None, positions=None):
        given = {"attention_mask": mask, "position_ids": positions}
        if self.format not in ("llama", "mistral", "qwen2", "gpt2", "granitemoehybrid"):
            del given["position_ids"]
        with torch.no_grad():
            return self.theirs(tokens, **given).logits.numpy()


load = functools.cache(Pair)


@pytest.fixture(params=CONFIGS)
def pair(request):
    return load(request.param)


def test_logits_in_float32_with_and_without_padding(pair):
    functional = pair.functional("float32")

    @jax.jit
    def run(params, tokens, segment_ids):
        lm = functional.bind(params)
        return lm.logits(lm(tokens, segment_ids=segment_ids)[0])

    mask = np.ones((2, PROMPT), np.int64)
    for padding in (0, 5):
        mask[0, :padding] = 0
        positions = torch.tensor(np.maximum(mask.cumsum(axis=1) - 1, 0))
        expected = pair.logits(pair.prompt, torch.tensor(mask), positions)
        assert expected.std() > 0.3
        logits = np.asarray(run(pair.params, pair.prompt.numpy().astype(np.int32), mask.astype(np.int32)))
        real = mask != 0
        np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=2e-5)
        best, second = np.sort(expected)[..., -1], np.sort(expected)[..., -2]
        clear = real & (best - second > MARGIN)
        np.testing.assert_array_equal(logits.argmax(-1)[clear], expected.argmax(-1)[clear])


def test_greedy_text_token_by_token_in_float64(pair):
    wide = mock.patch.object(
        torch, "float32", torch.float64
    )  # what their code computes in float32 regardless
    with jax.enable_x64(True), wide, mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        model = copy.deepcopy(pair.theirs).double()
        theirs = model.generate(
            pair.prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        with torch.no_grad():
            expected = model(theirs).logits.numpy()
        functional = pair.functional("float64")

        @jax.jit
        def step(params, token, state):
            lm = functional.bind(params)
            hidden, state, _ = lm(token, state)
            return lm.logits(hidden[:, 0]), state

        params = jax.tree.map(lambda p: jnp.asarray(p, "float64"), pair.params)
        state = functional.bind(params).init_state(2, PROMPT + NEW)
        state = jax.tree.map(lambda s: s.astype("float64") if s.dtype == jnp.float32 else s, state)
        ours = pair.prompt.numpy().astype(np.int32)
        found = []
        for t in range(PROMPT + NEW):
            logits, state = step(params, ours[:, t : t + 1], state)
            found.append(np.asarray(logits))
            if t >= PROMPT - 1:
                ours = np.concatenate([ours, found[-1].argmax(-1)[:, None].astype(np.int32)], axis=1)
    np.testing.assert_array_equal(ours[:, :-1], theirs.numpy())
    np.testing.assert_allclose(
        np.stack(found, axis=1), expected, rtol=0, atol=FLOAT64.get(pair.format, 1e-10)
    )


@pytest.mark.parametrize("pair", [*WRITTEN], indirect=True)
def test_written_again_it_is_the_same_model(pair):
    raw = json.loads(json.dumps(published.raw_from(pair.config, pair.format)))
    weights = published.weights_from(pair.config, pair.params, pair.format)
    assert raw["model_type"] == pair.format
    model = pair.model_class(pair.config_class.from_dict(raw)).eval()
    missing, unexpected = model.load_state_dict(
        {n: torch.tensor(w) for n, w in weights.items()}, strict=False
    )
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    with torch.no_grad():
        found = model(pair.prompt).logits.numpy()
    # Not equal: the size of chunks is no part of a model, and is not written.
    np.testing.assert_allclose(found, pair.logits(pair.prompt), rtol=0, atol=5e-6)
    for name, value in weights.items():
        expected = pair.weights[name]
        if name.endswith("embed_positions.weight"):  # two rows that no token reads
            value, expected = value[2:], expected[2:]
        np.testing.assert_array_equal(value, expected, err_msg=name)
