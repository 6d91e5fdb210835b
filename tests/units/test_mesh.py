"""Mesh shapes, the rules table, shardings of the train state, and messages that name what does not fit."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from runtime.mesh import (
    RULES,
    MeshConfig,
    batch_sharding,
    carry_shardings,
    check_batch,
    describe,
    make_mesh,
    mesh_shape,
    param_shardings,
    state_shardings,
)
from runtime.optimizer import GroupConfig, OptimConfig, make_optimizer
from runtime.schedule import ScheduleConfig
from runtime.state import WHOLE, init_state

AXES = {
    "embed": ("vocab", "embed"),
    "blocks": {
        "kernel": ("layers", "embed", "inner"),
        "A_log": ("layers", "heads"),
        "norm": ("layers", "norm"),
    },
    "head": ("embed", "vocab_out"),
}
ROLES = {
    "embed": "embedding",
    "blocks": {"kernel": "matrix", "A_log": "dynamics/A", "norm": "vector"},
    "head": "head",
}


def parameters():
    return {
        "embed": jnp.ones((7, 4)),
        "blocks": {"kernel": jnp.ones((3, 4, 6)), "A_log": jnp.ones((3, 2)), "norm": jnp.ones((3, 4))},
        "head": jnp.ones((4, 8)),
    }


def test_make_mesh_has_auto_axes_and_resolves_the_rest():
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert describe(mesh) == "8 cpu devices, 1 process: data 2, fsdp 2, tensor 2, sequence 1"
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    assert describe(one) == "1 cpu device, 1 process: data 1, fsdp 1, tensor 1, sequence 1"


@pytest.mark.parametrize(
    "config, message",
    [
        (MeshConfig(data=-1, tensor=3), "the given sizes multiply to 3, which does not divide 8 devices"),
        (MeshConfig(data=2, fsdp=2), "the sizes multiply to 4 but there are 8 devices"),
        (MeshConfig(data=-1, fsdp=-1), "at most one -1"),
        (MeshConfig(data=0), "mesh.data=0"),
        (MeshConfig(sequence_layout="spiral"), "mesh.sequence_layout='spiral' is unknown; use one of"),
    ],
)
def test_mesh_that_does_not_fit(config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        mesh_shape(config, 8)


def test_specs_follow_the_table(mesh):
    shardings = param_shardings(mesh(1, 2, 2, 2), AXES, jax.eval_shape(parameters))
    assert shardings["embed"].spec == P(None, "fsdp")  # never over the vocabulary
    assert shardings["blocks"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert shardings["blocks"]["A_log"].spec == P(None, "tensor")
    assert shardings["blocks"]["norm"].spec == P(None, None)
    assert shardings["head"].spec == P("fsdp", "tensor")
    assert set(RULES.values()) <= {None, "fsdp", "tensor"}


def test_indivisible_dimensions_are_all_named(mesh):
    shapes = jax.eval_shape(parameters)
    with pytest.raises(ValueError) as error:
        param_shardings(mesh(1, 1, 4, 2), AXES, shapes)
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert lines[0] == (
        "parameter blocks/A_log of shape (3, 2), axes ('layers', 'heads'): dimension 'heads' of size 2 is "
        "split over mesh.tensor=4, which does not divide it; use a multiple of 4 (such as 4), or mesh.tensor "
        "in [1, 2]."
    )
    assert "blocks/kernel" in lines[1] and "use a multiple of 4 (such as 8)" in lines[1]


@pytest.mark.parametrize(
    "names, message",
    [
        (("embed", "embed"), "two dimensions map to one mesh axis (fsdp, fsdp)"),
        (("embed", "heads_and_inner"), "unknown logical axis 'heads_and_inner'"),
        (("embed",), "1 axis names for 2 dimensions"),
    ],
)
def test_wrong_axis_names(mesh, names, message):
    with pytest.raises(ValueError, match=re.escape("parameter head of shape (4, 8)")) as error:
        param_shardings(mesh(2, 2, 2, 1), AXES | {"head": names}, jax.eval_shape(parameters))
    assert message in str(error.value)


def test_every_leaf_of_the_state_is_sharded_as_its_parameter(mesh):
    mesh = mesh(1, 2, 2, 2)
    config = OptimConfig(
        name="muon",
        ema_decay=0.9,
        skip_nonfinite=True,
        groups={"dynamics": GroupConfig(lr_factor=0.1), "vector": GroupConfig(algorithm="frozen")},
        schedule=ScheduleConfig("plateau"),
    )
    tx = make_optimizer(config, ROLES, AXES, jax.eval_shape(parameters), 10)

    def init():
        return init_state(parameters(), tx, config, {"ssm": jnp.zeros((2, 4, 3)), "mean": jnp.zeros(4)})

    abstract = jax.eval_shape(init)
    params = param_shardings(mesh, AXES, abstract.params)
    carry = carry_shardings(mesh, abstract.extras["carry"], {"ssm": 1, "mean": WHOLE})
    shardings = state_shardings(mesh, tx, abstract, params, {"carry": carry})
    assert jax.tree.structure(shardings) == jax.tree.structure(abstract)
    assert all(isinstance(s, NamedSharding) for s in jax.tree.leaves(shardings))
    state = jax.jit(init, out_shardings=shardings)()
    assert state.extras["ema"]["blocks"]["kernel"].sharding.spec == P(None, "fsdp", "tensor")
    assert state.extras["carry"]["ssm"].sharding.spec == P(None, ("data", "fsdp"))
    # Moments of shape [3, 4, 6] can only be Muon's momentum, [4, 8] only Adam's two moments of the head.
    specs = [(x.shape, x.sharding.spec) for x in jax.tree.leaves(state.opt_state)]
    assert [s for shape, s in specs if shape == (3, 4, 6)] == [P(None, "fsdp", "tensor")]
    assert [s for shape, s in specs if shape == (4, 8)] == [P("fsdp", "tensor")] * 2
    assert all(s == P() for shape, s in specs if shape == ())
    assert not [shape for shape, _ in specs if shape == (3, 4)]  # frozen: no moments


def test_state_of_plain_adam_has_shardings_too(mesh):
    tx = optax.adam(1e-3)
    abstract = jax.eval_shape(lambda: init_state(parameters(), tx, OptimConfig()))
    mesh = mesh(2, 2, 2, 1)
    shardings = state_shardings(mesh, tx, abstract, param_shardings(mesh, AXES, abstract.params))
    assert jax.tree.structure(shardings) == jax.tree.structure(abstract)
    assert shardings.opt_state[0].mu["head"].spec == P("fsdp", "tensor")


def test_batch_goes_over_data_and_fsdp_and_sequence(mesh):
    mesh = mesh(2, 2, 1, 2)
    tokens = jax.device_put(jnp.zeros((8, 16)), batch_sharding(mesh))
    assert tokens.addressable_shards[0].data.shape == (2, 8)
    assert jax.device_put(jnp.zeros(8), batch_sharding(mesh, ndim=1)).addressable_shards[0].data.shape == (2,)


@pytest.mark.parametrize(
    "batch_size, seq_len, microbatches, message",
    [
        (6, 16, 1, "task.batch_size=6 must be a multiple of 4"),
        (12, 16, 2, "mesh.data 2 x mesh.fsdp 2 x optim.accumulation 2; 16 would work"),
        (0, 16, 1, "task.batch_size=0"),
        (8, 15, 1, "task.seq_len=15 must be a multiple of mesh.sequence=2; 16 would work"),
    ],
)
def test_batch_that_does_not_fit(mesh, batch_size, seq_len, microbatches, message):
    mesh = mesh(2, 2, 1, 2)
    check_batch(mesh, 16, 16, 2)
    check_batch(mesh, 16, 16, 2, layout="zigzag")
    with pytest.raises(ValueError, match=r"task.seq_len=14 .* 4 = 2 x mesh.sequence=2 .*zigzag.*; 16 would"):
        check_batch(mesh, 16, 14, layout="zigzag")
    with pytest.raises(ValueError, match=re.escape(message)):
        check_batch(mesh, batch_size, seq_len, microbatches)


@dataclasses.dataclass(frozen=True)
class SliceDevice:
    """As much of a device as the layout of a mesh looks at."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "any"
    process_index: int = 0


def test_data_axis_is_laid_across_slices():
    devices = [SliceDevice(id=i, slice_index=i % 2) for i in range(8)]
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2), devices)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1, "sequence": 1}
    slices = [{d.slice_index for d in row.flat} for row in mesh.devices]
    assert slices == [{0}, {0}, {1}, {1}]
    with pytest.raises(ValueError, match="mesh.data=1 must be a multiple of the number of slices, 2"):
        make_mesh(MeshConfig(data=1, fsdp=-1), devices)
