"""Formats of published checkpoints without their libraries: ranks, memories, beacons, and misfits."""

import dataclasses
import functools
import json
import math

import numpy as np
import pytest
from flax import nnx

from configs.overrides import load
from layers.mamba2 import Mamba2Config
from layers.mlp import MLPConfig
from models import published
from models.beacon_config import BeaconLMConfig
from models.config import LMConfig
from models.hmt_config import HMTConfig
from models.published.blocks import sources
from models.published.inverse import compared
from models.published.state_space import plain_tensors
from models.published.tensors import parameter_shapes, slots
from tests.conftest import GOLDEN, ROOT

LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MEGATRON = {
    "padded_vocab_size": 64,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 8,
    "group_query_attention": True,
    "num_query_groups": 4,
    "kv_channels": 4,
    "mamba_state_dim": 4,
    "mamba_head_dim": 4,
    "mamba_num_groups": 4,
    "hybrid_override_pattern": "M-*-M-",
    "untie_embeddings_and_output_weights": True,
}


def random_params(config):
    """Every parameter at random, by path."""
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(config)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def nested(flat):
    return nnx.traversals.unflatten_mapping(flat)


@functools.cache
def megatron(ranks):
    """The files of a random hybrid as Megatron-LM writes them, and its parameters."""
    config = published.config_from(MEGATRON)
    params = random_params(config)
    kinds = {"M": "mixer", "*": "self_attention", "-": "mlp"}
    files = [{} for _ in range(ranks)]

    def put(name, parts, axis=0):
        """Each rank has its share of every part."""
        for rank, file in enumerate(files):
            own = [np.split(part, ranks, axis=axis)[rank] for part in parts]
            file[name] = np.concatenate(own, axis=axis)

    for i, (symbol, (prefix, index)) in enumerate(zip(config.layers, slots(config))):
        at = f"decoder.layers.{i}."

        def get(dotted, prefix=prefix, index=index):
            value = params[*prefix, *dotted.split(".")]
            value = value if index is None else value[index]
            return value.T if dotted.endswith("kernel") else value

        norm = get("norm.scale")
        before = {"M": "mixer.in_proj", "*": "self_attention.linear_qkv", "-": "mlp.linear_fc1"}[symbol]
        for file in files:
            file[f"{at}{before}.layer_norm_weight"] = norm
            file[f"{at}{before}._extra_state"] = np.zeros(3)
        at += kinds[symbol] + "."
        if symbol == "M":
            put(f"{at}in_proj.weight", [get(f"mixer.in_{n}.kernel") for n in ("z", "x", "B", "C", "dt")])
            convs = [get(f"mixer.conv.{n}.weight").T[:, None] for n in "xBC"]
            put(f"{at}conv1d.weight", convs)
            put(f"{at}conv1d.bias", [get(f"mixer.conv.{n}.bias") for n in "xBC"])
            for name in ("A_log", "D", "dt_bias"):
                put(at + name, [get(f"mixer.{name}")])
            put(f"{at}norm.weight", [get("mixer.norm.scale")])
            put(f"{at}out_proj.weight", [get("mixer.out.kernel")], axis=1)
        elif symbol == "*":
            q, k, v = (get(f"mixer.{n}.kernel").reshape(4, -1, 16) for n in "qkv")  # 4 groups
            grouped = np.concatenate([q, k, v], axis=1).reshape(-1, 16)
            put(f"{at}linear_qkv.weight", [grouped])
            put(f"{at}linear_proj.weight", [get("mixer.out.kernel")], axis=1)
        else:
            put(f"{at}linear_fc1.weight", [get("mixer.up.kernel")])
            put(f"{at}linear_fc2.weight", [get("mixer.down.kernel")], axis=1)
    put("embedding.word_embeddings.weight", [params["embed", "table"]])
    put("output_layer.weight", [params["head", "kernel"].T])
    for file in files:
        file["decoder.final_norm.weight"] = params["norm", "scale"]
    return config, files, params


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_megatron_ranks_are_put_together(ranks):
    config, files, params = megatron(ranks)
    weights = files[0]
    if ranks > 1:
        weights = {f"mp_rank_{r:02d}/{n}": w for r, file in enumerate(files) for n, w in file.items()}
    assert published.detect(MEGATRON) == "megatron_hybrid"
    found = published.params_from(config, weights, "megatron_hybrid")
    for path, value in nnx.traversals.flatten_mapping(found).items():
        np.testing.assert_array_equal(value, params[path], err_msg=str(path))


def test_megatron_ranks_that_do_not_divide():
    config, files, _ = megatron(4)
    weights = {f"mp_rank_{r:02d}/{n}": w for r in range(3) for n, w in files[r].items()}
    with pytest.raises(ValueError, match="do not divide into 3 parts|cannot be dealt to 3"):
        published.params_from(config, weights, "megatron_hybrid")


def archive(file):
    with np.load(GOLDEN / f"{file}.npz") as vectors:
        return json.loads(str(vectors["meta_json"])), dict(vectors)


@pytest.mark.parametrize("file, backbone", [("beacon_llama_r4", "llama"), ("beacon_qwen2_r4", "qwen2")])
def test_beacon_weights_of_the_authors(file, backbone):
    meta, vectors = archive(file)
    weights = {n.removeprefix("param/"): v for n, v in vectors.items() if n.startswith("param/")}
    raw = {
        **LLAMA,
        "model_type": backbone,
        "vocab_size": meta["vocab"],
        "hidden_size": meta["d"],
        "intermediate_size": weights["model.layers.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": meta["layers"],
        "num_attention_heads": meta["heads"],
        "num_key_value_heads": meta["kv_heads"],
        "rms_norm_eps": meta["rms_eps"],
        "beacon_window": meta["window"],
        "beacon_stride": meta["window"],
        "beacon_ratio": list(meta["ratio"]),
        "beacon_param": ["q", "k", "v"],
        "beacon_attn": "full-coverage",
        "beacon_pos": "interleave",
        "beacon_sink_size": 0,
    }
    format, config = published.detect(raw, weights), published.config_from(raw)
    assert format == f"{backbone}_beacon" and type(config) is BeaconLMConfig
    assert config.beacon.window == meta["window"] and config.beacon.ratios == tuple(meta["ratio"])
    params = published.params_from(config, weights, format)
    np.testing.assert_array_equal(params["beacon_embed"], weights["model.beacon_embed_tokens.weight"][0])
    again = published.weights_from(config, params, format)
    assert set(again) == set(weights)
    for name, value in weights.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    with pytest.raises(ValueError, match="can only be read"):
        published.raw_from(config, format)


@pytest.mark.parametrize("file, backbone", [("hmt_llama_3seg", "llama"), ("hmt_gpt2_3seg", "gpt2")])
def test_hmt_weights_of_the_authors(file, backbone):
    meta, vectors = archive(file)
    own = {"memory_init": "memory_cell.memory", "topic_T": "mem"}
    own |= {n: f"cross_attn.{n}.weight" for n in ("wq", "wk")}
    weights = {f"memory_cell.model.{n[5:]}": v for n, v in vectors.items() if n.startswith("base/")}
    weights |= {name: vectors[f"hmt/{theirs}"] for theirs, name in own.items()}
    weights["memory_cell.mem_map.linear.weight"] = np.zeros((meta["d"], meta["d"]))
    raw = {
        **LLAMA,
        "model_type": backbone,
        "vocab_size": meta["vocab"],
        "hidden_size": meta["d"],
        "intermediate_size": 32,
        "num_hidden_layers": meta["layers"],
        "num_attention_heads": meta["heads"],
        "num_key_value_heads": meta.get("kv_heads", meta["heads"]),
        "hmt": {"segment": meta["segment_size"], "sensory": meta["sensory_k"]},
    }
    if backbone == "gpt2":
        raw = {
            "model_type": "gpt2",
            "vocab_size": meta["vocab"],
            "n_embd": meta["d"],
            "n_layer": meta["layers"],
            "n_head": meta["heads"],
            "n_inner": 32,
            "n_positions": 21,
            "hmt": raw["hmt"],
        }
    shapes = {name: value.shape for name, value in weights.items()}
    format, config = published.detect(raw, weights), published.config_from(raw, shapes)
    assert format == f"{backbone}_hmt" and type(config) is HMTConfig
    assert config.memory.recall_dim == meta["hidden_dim"] and config.memory.segment == meta["segment_size"]
    params = published.params_from(config, weights, format)
    np.testing.assert_array_equal(params["memory"]["wq"]["kernel"], vectors["hmt/wq"].T)
    np.testing.assert_array_equal(params["memory"]["topic"], vectors["hmt/topic_T"][0])
    later = {
        "memory_cell.memory": "memory_cell.init_pre_memory_state",
        "mem": "summary_cell.sum_prompt_embeds",
    }
    renamed = {later.get(name, name): value for name, value in weights.items()}
    same = published.params_from(config, renamed, format)
    np.testing.assert_array_equal(same["memory"]["topic"], params["memory"]["topic"])
    assert dataclasses.asdict(config.memory) == published.raw_from(config, format)["hmt"]
    with pytest.raises(ValueError, match="hmt.segments is unknown; known are segment"):
        published.config_from({**raw, "hmt": {"segments": 1}}, shapes)


def test_a_shard_at_a_time():
    """Every way to cut a parameter gives what the whole has, and asks for no more of the file."""
    raw = {**LLAMA, "num_hidden_layers": 3}
    config = published.config_from(raw)
    config.vocab_multiple = 16
    params = random_params(config)
    params["embed", "table"][61:] = 0
    params["head", "kernel"][:, 61:] = 0
    weights = published.weights_from(config, nested(params), "llama")
    shapes = {name: value.shape for name, value in weights.items()}
    sources = published.parameter_sources(config, "llama", shapes)
    asked = []

    def read(name, box):
        asked.append((name, weights[name][box].size))
        return weights[name][box]

    for path, source in sources.items():
        for axis, size in enumerate(source.shape):
            halves = []
            for first, end in ((0, size // 2), (size // 2, size)):
                index = [slice(None)] * len(source.shape)
                index[axis] = slice(first, end)
                halves.append(source.read(read, index, np.float16))
                assert sum(n for _, n in asked) <= halves[-1].size
                asked.clear()
            whole = np.concatenate(halves, axis=axis)
            np.testing.assert_array_equal(whole, params[path].astype(np.float16), err_msg=str(path))
    assert sources["norm", "scale"].names == ["model.norm.weight"]


def test_positions_of_opt_begin_at_row_two():
    raw = {
        "model_type": "opt",
        "vocab_size": 61,
        "hidden_size": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 10,
    }
    config = published.config_from(raw)
    params = random_params(config)
    weights = published.weights_from(config, nested(params), "opt")
    table = weights["model.decoder.embed_positions.weight"]
    assert table.shape == (12, 16) and not table[:2].any()
    np.testing.assert_array_equal(table[2:], params["embed", "positions"])
    hub = {n.removeprefix("model."): w for n, w in weights.items()}  # as in some files
    hub["lm_head.weight"] = hub["decoder.embed_tokens.weight"]
    again = nnx.traversals.flatten_mapping(published.params_from(config, hub, "opt"))
    np.testing.assert_array_equal(again["embed", "positions"], params["embed", "positions"])
    assert published.tied_head(config, "opt", hub) == ("lm_head.weight", "decoder.embed_tokens.weight")
    with pytest.raises(ValueError, match="lm_head.weight differs from decoder.embed_tokens.weight"):
        published.params_from(config, hub | {"lm_head.weight": hub["lm_head.weight"] + 1}, "opt")


@pytest.mark.parametrize("symbol, file", [("S", "s4_layer_dplr"), ("D", "s4_layer_diag"), ("d", "dss")])
def test_state_space_layers_have_the_names_and_layouts_of_their_authors(symbol, file):
    prefix = "layer_uni_w." if symbol == "d" else "w0."
    with np.load(GOLDEN / f"{file}.npz") as g:
        theirs = {n.removeprefix(prefix): g[n] for n in g.files if n.startswith(prefix)}
    theirs.pop("layer.kernel.l_kernel", None)
    linear = "output_linear" if symbol == "d" else "output_linear.0"
    width = theirs[f"{linear}.weight"].shape[1]
    config = LMConfig(d_model=width, pattern=f"-({symbol})2", mlp=MLPConfig(hidden=4))
    config.s4.d_state = config.s4d.d_state = config.dss.d_state = 8
    shapes = parameter_shapes(config)
    tensors = plain_tensors(config, shapes)
    count = lambda shapes: sum(math.prod(shape) for shape in shapes)  # noqa: E731
    assert count(t.shape for t in tensors) == count(shapes.values())
    assert {"embed.table", "backbone.runs.1.layers.0.norm.scale"} < {t.name for t in tensors}
    layer = {t.name.removeprefix("layers.2."): t for t in tensors if t.name.startswith("layers.2.")}
    assert {name: t.shape for name, t in layer.items()} == {n: w.shape for n, w in theirs.items()}
    found = sources(((name, t) for name, t in layer.items()), shapes)

    def ours(*path):
        at = ("backbone", "runs", 1, "layers", 0, "mixer", *path)
        return found[at].read(lambda name, box: theirs[name][box])[1]  # the second of two

    out, *gate = np.split(theirs[f"{linear}.weight"], 1 if symbol == "d" else 2)
    np.testing.assert_array_equal(ours("out", "kernel"), out.T.astype(np.float32))
    if gate:
        np.testing.assert_array_equal(ours("gate", "kernel"), gate[0].T.astype(np.float32))
        np.testing.assert_array_equal(ours("inv_dt"), theirs["layer.kernel.inv_dt"][:, 0].astype(np.float32))
        np.testing.assert_array_equal(ours("B"), theirs["layer.kernel.B"][0].astype(np.float32))
    else:
        np.testing.assert_array_equal(ours("Lambda_im"), theirs["kernel.Lambda"][:, 1].astype(np.float32))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"model_type": "lama"}, "model_type='lama' is unknown; known are .*; the nearest is 'llama'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "'mscale'.*not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types=.*mixes",
        ),
        ({"model_type": "opt", "word_embed_proj_dim": 8}, "word_embed_proj_dim=8"),
        ({"beacon_window": 8, "beacon_param": ["q"]}, r"beacon_param=\['q'\] is not supported"),
    ],
)
def test_what_is_not_supported_is_named(changed, message):
    raw = {**LLAMA, "ffn_dim": 24, **changed}
    with pytest.raises(ValueError, match=message):
        published.config_from(raw)


def test_what_a_format_has_no_place_for_is_named():
    config = published.config_from(LLAMA)
    assert published.config_from(published.raw_from(config, "llama")) == dataclasses.replace(
        config, attention=dataclasses.replace(config.attention, head_dim=4)
    )
    config.attention.qk_norm = True
    with pytest.raises(ValueError, match="'llama' has no place for model.attention.qk_norm=True"):
        published.raw_from(config, "llama")
    with pytest.raises(ValueError, match="has no place for"):
        published.raw_from(LMConfig(pattern="M", mamba2=Mamba2Config(ones=1)), "mamba2")


def test_older_spellings_of_rotary_scaling():
    for scaling in ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}):
        rope = published.config_from({**LLAMA, "rope_theta": 5e5, "rope_scaling": scaling}).attention.rope
        assert (rope.theta, rope.scaling, rope.factor) == (5e5, "linear", 4.0)
    older = published.config_from({**LLAMA, "rope_scaling": {"type": "yarn", "factor": 2.0}}).attention.rope
    assert older.original_max_position == LLAMA["max_position_embeddings"]


def test_arguments_of_the_published_hybrid_are_our_config_of_it():
    ours = load(str(ROOT / "configs" / "mamba2_hybrid_8b.py")).model
    raw = {
        "padded_vocab_size": 256_000,
        "hidden_size": 4096,
        "ffn_hidden_size": 16_384,
        "num_attention_heads": 32,
        "group_query_attention": True,
        "num_query_groups": 8,
        "kv_channels": 128,
        "hybrid_override_pattern": "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-",
        "untie_embeddings_and_output_weights": True,
        "position_embedding_type": "none",
    }
    assert compared(published.config_from(raw)) == compared(ours)
