"""Published configs, the errors of a checkpoint that does not fit, and the sizes of the published models."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.overrides import load
from layers.mamba2 import Mamba2Config
from models import published
from models.config import LMConfig
from models.functional import Functional, parameter_count
from models.lm import LM
from tests.conftest import GOLDEN, ROOT


@functools.cache
def archive(file):
    with np.load(GOLDEN / f"{file}.npz") as vectors:
        weights = {n.removeprefix("w."): vectors[n] for n in vectors.files if n.startswith("w.")}
        return json.loads(str(vectors["__meta__"]))["config"], weights


def read(file, **changed):
    """The published config and weights of a golden file, both free to change."""
    raw, weights = archive(file)
    return {**raw, **changed}, dict(weights)


def test_misfits_are_listed_by_name():
    raw, weights = read("hf_mamba2")
    config = published.config_from(raw)
    del weights["backbone.layers.1.mixer.D"]
    weights["backbone.layers.2.mixer.D"] = weights["backbone.layers.0.mixer.D"]
    weights["backbone.layers.0.mixer.in_proj.weight"] = np.zeros((199, 32))
    weights["backbone.embeddings.weight"] = np.zeros((60, 32))
    with pytest.raises(ValueError) as error:
        published.params_from(config, weights, "mamba2")
    assert str(error.value).splitlines()[1:] == [
        "  missing backbone.layers.1.mixer.D (8,); the nearest is backbone.layers.2.mixer.D",
        "  unexpected backbone.layers.2.mixer.D",
        "  backbone.embeddings.weight is (60, 32), expected (61, 32)",
        "  backbone.layers.0.mixer.in_proj.weight is (199, 32), expected (200, 32)",
    ]


def test_names_of_the_hub_are_accepted_once():
    raw, weights = read("hf_nemotronh")
    config = published.config_from(raw)
    hub = {name.replace("model.", "backbone.", 1): value for name, value in weights.items()}
    a, b = (published.params_from(config, w, "nemotron_h") for w in (weights, hub))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    with pytest.raises(ValueError, match=r"unexpected \w+\.norm_f\.weight$"):
        published.params_from(
            config, weights | {"backbone.norm_f.weight": hub["backbone.norm_f.weight"]}, "nemotron_h"
        )
    del raw["layers_block_type"]
    assert published.config_from(raw | {"hybrid_override_pattern": "M-*-M"}) == config


def test_padded_vocabulary():
    raw, weights = read("hf_mamba2")
    config = published.config_from(raw)
    config.vocab_multiple = 16
    params = published.params_from(config, weights, "mamba2")
    table, head = params["embed"]["table"], params["head"]["kernel"]
    np.testing.assert_array_equal(table[:61], weights["backbone.embeddings.weight"])
    np.testing.assert_array_equal(head[:, :61], weights["lm_head.weight"].T)
    assert table.shape == (64, 32) and not table[61:].any() and not head[:, 61:].any()
    assert published.weights_from(config, params, "mamba2")["lm_head.weight"].shape == (61, 32)
    # The authors' files keep the padding.
    weights = published.weights_from(config, params, "mamba2_original")
    assert weights["lm_head.weight"].shape == (64, 32)
    again = published.params_from(config, weights, "mamba2_original")
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_tied_head_may_be_repeated_but_not_differ():
    raw, weights = read("hf_mamba2", tie_word_embeddings=True)
    config = published.config_from(raw)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from backbone\.embeddings\.weight"):
        published.params_from(config, weights, "mamba2")
    weights["lm_head.weight"] = weights["backbone.embeddings.weight"]
    repeated = published.params_from(config, weights, "mamba2")
    del weights["lm_head.weight"]
    jax.tree.map(np.testing.assert_array_equal, repeated, published.params_from(config, weights, "mamba2"))


def test_what_a_format_cannot_hold():
    raw, weights = read("hf_nemotronh")
    config = published.config_from(raw)
    params = published.params_from(config, weights, "nemotron_h")
    with pytest.raises(ValueError, match=r"has layers \[M\*\]\[-\] only"):
        published.weights_from(config, params, "bamba")
    config.attention.qk_norm = True
    with pytest.raises(ValueError, match=r"no names for .*mixer\.k_norm\.scale"):
        published.weights_from(config, params, "nemotron_h")


@pytest.mark.parametrize(
    ("file", "changed", "message"),
    [
        ("hf_mamba2", {"model_type": "rwkv"}, "'rwkv' is unknown"),
        ("hf_mamba2", {"hidden_act": "gelu", "rms_norm": False}, "hidden_act='gelu'.*; rms_norm=False"),
        ("hf_mamba2", {"num_heads": 4}, r"num_heads \* head_dim = 32 must be .* = 64"),
        ("hf_bamba", {"rope_scaling": {"factor": 2.0}}, "rope_scaling"),
        ("hf_bamba", {"mamba_d_head": 16}, "mamba_d_head=16"),
        ("hf_nemotronh", {"layers_block_type": ["linear_attention", "moe"]}, "unknown symbol 'E'"),
        ("hf_nemotronh", {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers=1"),
        ("orig_mamba2", {"ssm_cfg": {"layer": "Mamba3"}}, r"ssm_cfg.layer='Mamba3' is unknown"),
        ("orig_mamba2", {"attn_layer_idx": [1]}, r"attn_layer_idx=\(1,\)"),
    ],
)
def test_configs_that_are_refused(file, changed, message):
    with pytest.raises(ValueError, match=message):
        published.config_from(read(file, **changed)[0])


def test_a_missing_field_is_named():
    raw, _ = read("hf_mamba2")
    del raw["n_groups"], raw["state_size"]
    with pytest.raises(ValueError, match="state_size is missing; n_groups is missing"):
        published.config_from(raw)


def test_the_authors_defaults_of_mamba():
    raw = {"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True}
    config = published.config_from(raw | {"pad_vocab_size_multiple": 8})
    expected = LMConfig(vocab_size=50277, vocab_multiple=8, d_model=768, pattern="(m)24")
    expected.mamba.dt_rank = 48
    assert config == expected
    assert parameter_count(functional(config).shapes) == 129_135_360


def test_the_authors_defaults():
    raw = {"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"}}
    raw |= {"rms_norm": True, "pad_vocab_size_multiple": 16, "tie_embeddings": True, "attn_layer_idx": []}
    expected = LMConfig(vocab_size=50277, vocab_multiple=16, d_model=768, pattern="(M)24")
    assert published.config_from(raw) == expected and expected.mamba2 == Mamba2Config()
    assert parameter_count(functional(expected).shapes) == 128_989_632


def functional(config):
    return Functional.create(lambda rngs: LM(config, rngs=rngs))


def config_of(name):
    return load(str(ROOT / "configs" / f"{name}.py")).model


def mamba2_count(layers, width, vocabulary=50288, state=128, headdim=64, taps=4):
    """Tied embedding, final norm; a layer: norm, in_proj (z x B C dt), conv, A dt D, gated norm, out_proj."""
    inner, heads = 2 * width, 2 * width // headdim
    projections = width * (2 * inner + 2 * state + heads) + inner * width
    conv = (inner + 2 * state) * (taps + 1)
    return vocabulary * width + width + layers * (width + projections + conv + 3 * heads + inner)


@pytest.mark.parametrize(
    ("size", "layers", "width", "count"),
    [
        ("130m", 24, 768, 128_989_632),
        ("370m", 48, 1024, 368_346_624),
        ("780m", 48, 1536, 780_161_280),
        ("1_3b", 48, 2048, 1_343_757_312),
        ("2_7b", 64, 2560, 2_702_599_680),
    ],
)
def test_sizes_of_the_published_models(size, layers, width, count):
    model = functional(config_of(f"mamba2_{size}"))
    assert parameter_count(model.shapes) == count == mamba2_count(layers, width)


def forward(config):
    """The forward pass as a function, and the shapes of its arguments."""
    model = functional(config)

    def run(params, tokens):
        lm = model.bind(params)
        return lm.logits(lm(tokens)[0])

    return run, (model.shapes, jax.ShapeDtypeStruct((2, 512), jnp.int32))


def test_the_hybrid_has_the_published_size():
    config = config_of("mamba2_hybrid_8b")
    assert [config.layers.count(symbol) for symbol in "M*-"] == [24, 4, 28]
    run, args = forward(config)
    assert abs(parameter_count(args[0]) - 8.655e9) < 1e6
    logits = jax.eval_shape(run, *args)
    assert logits.shape == (2, 512, 256_000) and logits.dtype == jnp.float32


def equations(jaxpr):
    """Number of equations, those of inner jaxprs included."""
    inner = [
        leaf.jaxpr if isinstance(leaf, jax.extend.core.ClosedJaxpr) else leaf
        for equation in jaxpr.eqns
        for leaf in jax.tree.leaves(
            equation.params,
            is_leaf=lambda p: isinstance(p, (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr)),
        )
        if isinstance(leaf, (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr))
    ]
    return len(jaxpr.eqns) + sum(map(equations, inner))


@pytest.mark.parametrize("unit", ["M", "M-*-"])
def test_the_program_does_not_grow_with_depth(unit):
    sizes = []
    for repeats in (6, 48):
        config = LMConfig(d_model=64, pattern=f"({unit}){repeats}", remat="full")
        run, args = forward(config)
        loss = lambda params, tokens, run=run: run(params, tokens).sum()  # noqa: E731
        sizes.append(equations(jax.make_jaxpr(jax.grad(loss))(*args).jaxpr))
    assert sizes[0] == sizes[1]
