"""The pod check: memory, collectives and verdicts of small models compiled for TPU slices, without a TPU."""

import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

import train
from benchmarks.hlo_bytes import Instruction
from configs.base import Experiment
from layers.attention import AttentionConfig
from layers.mamba2 import Mamba2Config
from layers.mlp import MLPConfig
from models.config import LMConfig
from runtime import aot
from runtime.mesh import AXES, MeshConfig
from tasks.lm import LMTaskConfig
from tools.aot import suggest
from tools.aot.check import check
from tools.aot.collectives import axes_of
from tools.aot.explain import summary
from tools.aot.programs import OutOfMemory, setup_on
from tools.aot.show import show
from tools.aot.topologies import GIB, TopologyError, describe

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable())),
]


def hybrid(**mesh):
    return Experiment(
        name="small",
        model=LMConfig(
            vocab_size=512,
            d_model=128,
            pattern="M*-",
            mamba2=Mamba2Config(d_state=64, headdim=32, chunk_size=128),
            attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=64),
            mlp=MLPConfig(hidden=256),
            tie_embeddings=False,
            dtype="bfloat16",
            remat="full",
        ),
        task=LMTaskConfig(source="nowhere/*.bin", vocab_size=512, seq_len=512, batch_size=8),
        mesh=MeshConfig(**mesh),
    )


@pytest.fixture(scope="module")
def report():
    """Of a hybrid on 16 devices, with every kind of sharding but data."""
    config = hybrid(data=1, fsdp=4, tensor=2, sequence=2)
    return check(config, describe("v5e:4x4"), ["train", "prefill", "decode"], lambda _: None)


@pytest.fixture(scope="module")
def step(report):
    return report["programs"][0]


def found(step, name):
    """(kind, axes) of the collectives that a row of the table explains."""
    rows = summary(step["collectives"])
    return {(r["kind"], *r["axes"]) for r in rows if name in r["expected"].split(", ")}


def test_the_train_step_has_its_kernels_and_its_state_in_memory(report, step):
    assert {"ssd_forward", "ssd_backward", "attention_forward", "causal_conv1d_forward"} <= set(
        step["kernels"]
    )
    parts = step["memory"]["parts"]
    # Matrices lie on fsdp and tensor; vectors, and the table's rows, are on more devices than one.
    least, most = 4 * report["parameters"] / 8, 4 * report["parameters"] / 4
    assert least < parts["parameters"] < most
    assert parts["optimizer"] == pytest.approx(2 * parts["parameters"], rel=0.01)
    assert parts["batch"] == 5 * 4 * (8 * 512) / 8  # five arrays; rows on fsdp, time on sequence
    assert step["memory"]["total"] < 0.1 * GIB
    assert step["verdict"].startswith("fits, ") and report["fits"]
    assert step["buffers"][0]["bytes"] >= step["buffers"][1]["bytes"] > 0


def test_every_collective_is_expected(step):
    assert step["unexplained"] == []
    assert ("all-gather", "fsdp") in found(step, "parameters")
    assert ("reduce-scatter", "fsdp") in found(step, "gradients")
    assert ("all-reduce", "tensor") in found(step, "partial products")
    assert found(step, "loss over the vocabulary") == {("all-reduce", "tensor")}
    assert found(step, "gated norm") == {("all-reduce", "tensor")}
    assert ("all-gather", "sequence") in found(step, "carry")
    assert ("collective-permute", "sequence") in found(step, "halo")
    assert found(step, "ring") == {("collective-permute", "sequence")}
    assert found(step, "norms") and found(step, "loss and metrics")


def test_what_sequence_parallel_layers_send_does_not_grow_unseen(step):
    """One gather of summaries forward, one when the layer is computed again."""
    carries = [c for c in step["collectives"] if c["expected"] == "carry" and c["kind"] == "all-gather"]
    assert [c["times"] for c in carries] == [1, 1]
    state = 8 / 2 * 32 * 64  # heads, half of them on a device, x headdim x d_state
    assert all(state < math.prod(c["shapes"][0]) / (2 * 2) < 1.1 * state for c in carries)


def test_an_accumulated_step_is_explained_too():
    """Parts of the batch are taken, and gradients are summed behind the loop over them."""
    config = hybrid(data=1, fsdp=4, sequence=2)
    config.optim.accumulation, config.task.batch_size = 2, 16
    (step,) = check(config, describe("v5e:2x4"), ["train"], lambda _: None)["programs"]
    assert step["unexplained"] == []
    assert found(step, "gradients of an accumulated batch")


def test_generation_is_compiled_too(report):
    prefill, decode = report["programs"][1:]
    for program in (prefill, decode):
        assert program["unexplained"] == []
        assert program["fits"] and "state" in program["memory"]["parts"]
    assert "ssd_forward" in prefill["kernels"]
    assert decode["memory"]["parts"]["parameters"] == report["programs"][0]["memory"]["parts"]["parameters"]


def test_the_tables_tell(report):
    console = Console(width=200, record=True, file=io.StringIO())
    show(report, console)
    text = console.export_text()
    for part in (
        "all-gather",
        "FSDP: a matrix",
        "halo",
        "train: fits",
        "decode: fits",
        "v5e:4x4",
        "ssd_forward",
    ):
        assert part in text
    assert "unexplained" not in text


def test_what_cannot_fit_is_told_with_its_share_and_a_way_out():
    config = hybrid(data=4)
    config.model.pattern, config.model.d_model, config.model.vocab_size = "-", 1024, 2**20
    config.task.vocab_size, config.task.seq_len, config.task.batch_size = 2**20, 128, 4
    config.model.tie_embeddings = True
    report = check(config, describe("v5e:2x2"), ["train"], lambda _: None)
    (step,) = report["programs"]
    assert not report["fits"]
    assert step["verdict"].startswith("does not fit: needs ") and "has 15.75 GiB" in step["verdict"]
    assert "the largest share is" in step["verdict"]
    assert "--config.mesh.data=1 --config.mesh.fsdp=4" in step["verdict"]
    assert step["memory"]["parts"]["optimizer"] >= 8 * 2**30


@pytest.mark.parametrize(
    "name, said",
    [
        ("v5e:3x3", "no slice '3x3' of v5e"),
        ("v5x:2x2", "did you mean 'v5"),
        ("", "there is no chip ''"),
    ],
)
def test_an_unknown_topology_lists_those_there_are(name, said):
    with pytest.raises(TopologyError) as error:
        describe(name)
    assert said in str(error.value)
    assert "v5e:16x16" in str(error.value) and "v5p:4x4x8" in str(error.value)


def test_suggestions_divide_and_put_first_what_fits():
    config = hybrid(data=1)
    with setup_on(config, describe("v5e:2x2").devices[:1]) as setup:
        ranked = suggest.suggest(setup, describe("v5e:4x4"))
    assert all(math.prod(c.mesh.values()) == 16 for c in ranked)
    assert [c.seconds for c in ranked] == sorted(c.seconds for c in ranked)  # all fit
    assert all(8 % (c.mesh["data"] * c.mesh["fsdp"] * c.accumulation) == 0 for c in ranked)
    suggest.apply(config, ranked[0])
    assert {axis: getattr(config.mesh, axis) for axis in AXES} == ranked[0].mesh
    train.meshes.mesh_shape(config.mesh, 16)


def test_a_refusal_of_the_compiler_is_read():
    error = OutOfMemory(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
        "(384.00G) exceeds available HBM (15.75G)."
    )
    assert error.needed == 384 * GIB
    error = OutOfMemory(
        "Ran out of memory in memory space hbm. Used 24.50G of 15.75G hbm. Exceeded by 8.75G."
    )
    assert error.needed == 24.5 * GIB


@pytest.mark.parametrize(
    "attributes, axes",
    [
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}, x", ("tensor",)),
        ("replica_groups=[4,2]<=[8], x", ("sequence",)),
        ("replica_groups=[2,4]<=[2,4]T(1,0), x", ("fsdp", "sequence")),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", ("fsdp",)),
        ("replica_groups={}, x", ("fsdp", "tensor", "sequence")),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b','c'}, x", ("tensor", "sequence")),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}, x", ("sequence",)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, x", ("fsdp",)),
        ("source_target_pairs={{0,1},{2,3},{4,5},{6,7}}, x", ("sequence",)),
    ],
)
def test_groups_of_devices_are_mesh_axes(attributes, axes):
    mesh = SimpleNamespace(shape=dict(zip(AXES, (1, 2, 2, 2))), axis_names=AXES, size=8)
    assert axes_of(mesh, Instruction("x", "f32[]", "all-reduce", (), attributes, False)) == axes
    assert np.prod([mesh.shape[axis] for axis in axes]) > 1
