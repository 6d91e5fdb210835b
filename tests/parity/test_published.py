"""Tiny random models as transformers saves them: imported, what they compute, exported, loaded again."""

import copy
import json
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.generate import Generator
from eval.opened import load_config, open_run
from eval.sampling import Sampling
from layers.types import Context
from models import walk
from models.functional import Functional
from models.published.tensors import MODELS
from tests.published_checkpoints import bits, read_all
from tools.convert.exporting import export_run
from tools.convert.importing import PUBLISHED, import_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

torch.set_num_threads(1)

VOCABULARY, PROMPT, PIECE, NEW = 61, 20, 10, 6
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
# Of which class, and how it differs from the defaults there.
CONFIGS = {
    "llama": ("Llama", {**ATTENTION, "head_dim": 16, "rope_parameters": LLAMA3, "attention_bias": True}),
    "mistral": ("Mistral", {**ATTENTION, "sliding_window": 7}),
    "qwen2": (
        "Qwen2",
        {**ATTENTION, "rope_parameters": YARN, "tie_word_embeddings": True},
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
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 40,
            "word_embed_proj_dim": 32,
        },
    ),
    "falcon_mamba": ("FalconMamba", {**SMALL, "state_size": 6, "mixer_rms_eps": 1e-3}),
    "granitemoehybrid": ("GraniteMoeHybrid", {**ATTENTION, **GRANITE}),
    "mamba": ("Mamba", {**SMALL, "state_size": 6}),
    "mamba2": ("Mamba2", {**SMALL, **MAMBA2}),
    "bamba": ("Bamba", {**ATTENTION, **HYBRID, "attn_layer_indices": [1]}),
    "nemotron_h": (
        "NemotronH",
        {n: v for n, v in {**ATTENTION, **NEMOTRON_H}.items() if n != "num_hidden_layers"},
    ),
}
# Their rotary frequencies are float32 whatever the rest is.
FLOAT64 = {"llama": 1e-6, "mistral": 1e-6, "qwen2": 1e-6, "bamba": 1e-6}
NO_POSITIONS = ("opt", "mamba", "mamba2", "falcon_mamba", "bamba", "nemotron_h")  # is given none
NO_EMBEDDING = ("mamba", "mamba2", "falcon_mamba")  # in its hidden states, but the last layer before the norm
TOLERANCE, MARGIN = 2e-5, 4e-5


def randomised(model):
    """The model with every parameter random, biases and norms included, such that logits are of order 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2 if parameter.ndim > 1 else 0.1)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter += 1
            if name.endswith("dt_bias"):
                parameter[0] = -9.0  # a dt that Nemotron-H clamps
            if name.endswith("decoder.embed_positions.weight"):
                parameter[:2] = 0.0  # of OPT, which no token reads
    return model.eval()


class Pair:
    """A model of transformers, and the run that is imported from its files."""

    def __init__(self, name, root):
        kind, options = CONFIGS[name]
        config = getattr(transformers, f"{kind}Config")(**options)
        model_class = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
        self.model_class = getattr(transformers, model_class)
        self.theirs = randomised(self.model_class(config))
        self.saved, self.run = root / "saved", root / "run"
        self.theirs.save_pretrained(self.saved, max_shard_size="20KB")
        import_checkpoint(self.saved, self.run, say=lambda _: None)
        config = load_config(self.run)
        if name == "nemotron_h":
            config.model.mamba2.prefill_dt_min = 1e-3
        self.name, self.opened = name, open_run(self.run, config=config)
        rows = np.random.default_rng(0).integers(3, VOCABULARY, (2, PROMPT))
        self.tokens, self.prompt = rows.astype(np.int32), torch.tensor(rows)

    def forward(self, mask):
        """What transformers makes of the prompt where ``mask`` is 1."""
        given = {"attention_mask": mask, "position_ids": torch.clamp(mask.cumsum(axis=1) - 1, min=0)}
        if self.name in NO_POSITIONS:
            del given["position_ids"]
        with torch.no_grad():
            return self.theirs(self.prompt, **given, output_hidden_states=True)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


def greedy(model, prompt):
    """Ids after the prompt and their logits, decoded by transformers with its cache."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = model.generate(prompt, **settings, return_dict_in_generate=True, output_logits=True)
    return made.sequences[:, prompt.shape[1] :].numpy(), torch.stack(made.logits, dim=1).numpy()


def margins(logits):
    """Of the best over the second best."""
    second, best = np.moveaxis(np.sort(logits)[..., -2:], -1, 0)
    return best - second


def test_logits_and_hidden_states_in_float32(pair):
    functional = pair.opened.model

    @jax.jit
    def run(params, tokens, segment_ids):
        lm = functional.bind(params)
        return lm.logits(lm(tokens, segment_ids=segment_ids)[0])

    @jax.jit
    def layers(params, tokens):
        """The residual stream before the first layer and after each, and what the head reads."""
        lm, ctx = functional.bind(params), Context.create(*tokens.shape)
        visits = [*walk.walk(lm, walk.embed(lm, tokens, ctx), ctx)]
        streams = [visits[0].x, *(visit.out for visit in visits)]
        return [*streams, walk.final_norm(lm, streams[-1])]

    mask = np.ones((2, PROMPT), np.int64)
    for padding in (5, 0):
        mask[0, :padding], mask[0, padding:] = 0, 1
        theirs = pair.forward(torch.tensor(mask))
        expected, real = theirs.logits.numpy(), mask != 0
        assert expected.std() > 0.3
        logits = np.asarray(run(pair.opened.params, pair.tokens, mask.astype(np.int32)))
        np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=TOLERANCE)
        clear = real & (margins(expected) > MARGIN)
        np.testing.assert_array_equal(logits.argmax(-1)[clear], expected.argmax(-1)[clear])
    found = layers(pair.opened.params, pair.tokens)
    count = len(theirs.hidden_states) - 1
    depth = (len(found) - 2) // count  # sub-layers of a layer
    streams = found[:-1:depth]
    listed = streams[1:] if pair.name in NO_EMBEDDING else streams[:-1]
    for ours, expected in zip([*listed, found[-1]], theirs.hidden_states, strict=True):
        np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=TOLERANCE)


def test_greedy_text_after_two_pieces_in_float64(pair):
    wide = mock.patch.object(torch, "float32", torch.float64)  # what is computed in float32 regardless
    with jax.enable_x64(True), wide, mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        model = copy.deepcopy(pair.theirs).double()
        ids, expected = greedy(model, pair.prompt)
        with torch.no_grad():
            of_prompt = model(pair.prompt).logits.numpy()
        config = copy.deepcopy(pair.opened.config.model)
        config.dtype = config.residual_dtype = config.attention.cache_dtype = "float64"
        functional = Functional.create(lambda rngs: MODELS[type(config)](config, rngs=rngs))

        @jax.jit
        def step(params, tokens, state):
            lm = functional.bind(params)
            hidden, state, _ = lm(tokens, state)
            return lm.logits(hidden), state

        params = jax.tree.map(lambda p: jnp.asarray(p, "float64"), pair.opened.params)
        state = functional.bind(params).init_state(2, PROMPT + NEW)
        state = jax.tree.map(lambda s: s.astype("float64") if s.dtype == jnp.float32 else s, state)
        found, tokens = [], [pair.tokens[:, :PIECE], pair.tokens[:, PIECE:]]
        while len(found) < NEW + 1:
            logits, state = step(params, tokens[len(found)], state)
            found.append(np.asarray(logits))
            if len(found) > 1:
                tokens.append(found[-1][:, -1:].argmax(-1).astype(np.int32))
    np.testing.assert_array_equal(np.concatenate(tokens[2:], axis=1), ids)
    found, tolerance = np.concatenate(found, axis=1), FLOAT64.get(pair.name, 1e-10)
    np.testing.assert_allclose(found[:, :PROMPT], of_prompt, rtol=0, atol=tolerance)
    np.testing.assert_allclose(found[:, PROMPT - 1 :], expected, rtol=0, atol=tolerance)


def test_greedy_text_of_the_run_in_float32(pair):
    ids, logits = greedy(pair.theirs, pair.prompt)
    done = Generator(pair.opened, piece=PIECE).generate(
        [*pair.tokens], Sampling(temperature=0.0), max_new_tokens=NEW
    )
    clear = np.cumprod(margins(logits) > MARGIN, axis=1) != 0  # after a tie the texts may part
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(np.stack([one.ids for one in done])[clear], ids[clear])


def test_written_again_it_is_the_same_model(pair, tmp_path):
    expected = pair.forward(torch.ones_like(pair.prompt)).logits.numpy()
    export_run(str(pair.run), tmp_path / "same")
    assert bits(read_all(tmp_path / "same")) == bits(read_all(pair.saved))
    # As from a run that was trained here: its config.json is made of our config alone.
    shutil.copytree(pair.run, tmp_path / "run", ignore=shutil.ignore_patterns(PUBLISHED))
    export_run(str(tmp_path / "run"), tmp_path / "made", format=pair.name)
    assert json.loads((tmp_path / "made" / "config.json").read_text())["model_type"] == pair.name
    # Then not equal: the size of chunks is no part of a model, and is not written.
    for name, tolerance in (("same", 0), ("made", 5e-6)):
        model = loaded(pair.model_class, tmp_path / name)
        with torch.no_grad():
            found = model(pair.prompt, attention_mask=torch.ones_like(pair.prompt)).logits.numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def loaded(model_class, directory):
    """The model that transformers loads, which misses nothing and leaves nothing out."""
    model, told = model_class.from_pretrained(directory, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()
