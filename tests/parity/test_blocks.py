"""The same blocks, configured as GPT-2, Llama and Qwen2, against transformers with random weights."""

import jax
import numpy as np
import pytest

from layers.attention import AttentionConfig
from layers.mlp import MLPConfig
from layers.rope import RopeConfig
from models.config import LMConfig
from models.functional import Functional
from models.lm import LM
from models.published.tensors import params_from_weights
from tests.golden.hf_names import GPT2, LLAMA, gpt2_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def gpt2():
    theirs = transformers.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=40, layer_norm_epsilon=1e-3
    )
    ours = LMConfig(
        vocab_size=61,
        d_model=32,
        pattern="(*-)3",
        attention=AttentionConfig(num_heads=4, position="none", qkv_bias=True, out_bias=True),
        mlp=MLPConfig(hidden=128, activation="gelu_tanh", use_bias=True),
        norm="layer",
        norm_eps=1e-3,
        max_positions=40,
    )
    return transformers.GPT2LMHeadModel(theirs), ours, GPT2


def llama():
    theirs = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=False,
    )
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, rope=RopeConfig(theta=500.0))
    ours = LMConfig(
        vocab_size=61,
        d_model=32,
        pattern="(*-)3",
        attention=attention,
        mlp=MLPConfig(hidden=48),
        norm_eps=1e-3,
        tie_embeddings=False,
    )
    return transformers.LlamaForCausalLM(theirs), ours, LLAMA


def qwen2():
    theirs = transformers.Qwen2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )
    ours = LMConfig(
        vocab_size=61,
        d_model=32,
        pattern="(*-)2",
        attention=AttentionConfig(num_heads=4, num_kv_heads=1, qkv_bias=True, rope=RopeConfig(theta=1e6)),
        mlp=MLPConfig(hidden=48),
        norm_eps=1e-6,
    )
    return transformers.Qwen2ForCausalLM(theirs), ours, LLAMA


def randomised(model):
    """The model with every parameter random, biases and norms included, such that logits are of order 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2 if parameter.ndim > 1 else 0.1)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter += 1
    return model.eval()


@pytest.mark.parametrize("build", [gpt2, llama, qwen2])
def test_logits_equal_transformers(build):
    theirs, config, names = build()
    theirs = randomised(theirs)
    weights = {name: value.numpy() for name, value in theirs.state_dict().items()}
    weights = gpt2_weights(weights) if build is gpt2 else weights
    params = params_from_weights(config, weights, names)
    functional = Functional.create(lambda rngs: LM(config, rngs=rngs))

    @jax.jit
    def run(params, tokens, segment_ids):
        lm = functional.bind(params)
        return lm.logits(lm(tokens, segment_ids=segment_ids)[0])

    tokens = np.random.default_rng(0).integers(0, 61, (2, 24))
    padded = np.ones_like(tokens)
    padded[0, :5] = 0
    for mask in (np.ones_like(tokens), padded):
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)  # as its generation counts them
        given = (torch.tensor(a) for a in (tokens, mask, positions))
        with torch.no_grad():
            expected = theirs(**dict(zip(("input_ids", "attention_mask", "position_ids"), given))).logits
        assert expected.std() > 0.5
        logits = run(params, tokens.astype(np.int32), mask.astype(np.int32))[..., :61]
        real = mask != 0
        np.testing.assert_allclose(logits[real], expected.numpy()[real], rtol=0, atol=2e-5)
