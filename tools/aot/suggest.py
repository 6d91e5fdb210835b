"""Which mesh, remat policy and accumulation to try: a short model of memory and time, and a ranking.

One device of a mesh (data, fsdp, tensor, sequence), with P parameters of which P_t are trained, D the width
of the residual stream, S sub-layers, and t = B L / (data fsdp sequence accumulation) tokens at a time:

    memory  = 4 P' + 12 P_t'                       parameters; two moments and the gradient, float32
            + 2 P / (S tensor) * 4                 matrices of two sub-layers, gathered, and their gradients
            + t S D * residual                     what remat keeps: the residual stream of every sub-layer,
            + t W 2 / tensor      (dots, none)     the W outputs of products with matrices,
            + t W 4 / tensor      (none)           and what is made of them in float32
            + t W / S * 12 / tensor + 8 t D        one sub-layer at work
    compute = flops * (full 4/3, dots 1.05, none 1) / (devices * peak * EFFICIENCY)
    traffic = accumulation * 3 * 2 P / tensor      FSDP: gathered forward and backward, gradients scattered
            + 8 P' (data > 1)                      gradients summed over data
            + accumulation * 6 S t D * 2           tensor > 1: two sums a sub-layer and pass, each sent twice
            + accumulation * 4 (sequence - 1) t K  sequence > 1: keys, values and gradients on a ring,
            + accumulation * 12 rows states        and summaries of the states, of every piece of time
    time    = max(compute, traffic / link) + min(compute, traffic / link) / 2

P' is what one device holds of P. Half of the smaller term is taken to hide behind the other. The model ranks;
what fits is for the compiler to say.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh

import train
from models.config import REMAT
from models.functional import parameter_count
from runtime import mesh as meshes
from runtime.clock import accelerator_peak
from runtime.freeze import freeze
from runtime.optimizer import trained_parameters
from tools.aot.topologies import Topology

EFFICIENCY = 0.5  # of the peak, in matrix products of a good size
REPEATED = {"full": 4 / 3, "dots": 1.05, "none": 1.0}
TENSOR = 16  # devices that a layer is split over, at most
ACCUMULATION = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A choice of mesh, remat and accumulation, with what the model above says of it.

    Attributes:
        memory: bytes on a device. seconds: of a step.
    """

    mesh: dict[str, int]
    remat: str
    accumulation: int
    memory: float
    seconds: float

    @property
    def overrides(self) -> dict[str, Any]:
        """Fields of the config by name."""
        fields: dict[str, Any] = {f"mesh.{axis}": size for axis, size in self.mesh.items()}
        return fields | {"model.remat": self.remat, "optim.accumulation": self.accumulation}

    @property
    def command(self) -> str:
        """As options of the command line."""
        return " ".join(f"--config.{name}={value}" for name, value in self.overrides.items())


def suggest(setup: train.Setup, topology: Topology) -> list[Candidate]:
    """All that the sizes of model and batch divide into: those that should fit first, the fastest first.

    Raises:
        ValueError: nothing divides.
    """
    devices = len(topology.devices)
    found = [
        _candidate(setup, topology, mesh, remat, accumulation)
        for mesh in _meshes(setup, devices)
        for remat in REMAT
        for accumulation in ACCUMULATION
        if _divides(setup, mesh, accumulation)
    ]
    if not found:
        raise ValueError(
            f"no mesh of {devices} devices divides task.batch_size={setup.config.task.batch_size}, "
            f"task.seq_len={setup.config.task.seq_len} and the model; change one of them"
        )
    room = 0.9 * topology.chip.hbm
    return sorted(found, key=lambda c: (c.memory > room and c.memory, c.seconds))


def apply(config: Any, candidate: Candidate) -> None:
    """Set the fields of ``config``."""
    for name, value in candidate.overrides.items():
        *parents, field = name.split(".")
        owner = config
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, field, value)


def _meshes(setup: train.Setup, devices: int) -> Iterator[dict[str, int]]:
    """Factorisations of ``devices`` that the parameters divide into."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for tensor in (n for n in divisors if n <= TENSOR):
        for sequence in (n for n in divisors if devices // tensor % n == 0):
            for data in (n for n in divisors if devices // tensor // sequence % n == 0):
                fsdp = devices // tensor // sequence // data
                sizes = dict(zip(meshes.AXES, (data, fsdp, tensor, sequence)))
                try:
                    meshes.param_shardings(_abstract(sizes), setup.model.axes, setup.model.shapes)
                except ValueError:
                    continue
                yield sizes


def _abstract(sizes: dict[str, int]) -> Any:
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def _divides(setup: train.Setup, sizes: dict[str, int], accumulation: int) -> bool:
    task, layout = setup.config.task, setup.config.mesh.sequence_layout
    try:
        meshes.check_batch(_abstract(sizes), task.batch_size, task.seq_len, accumulation, layout=layout)
    except ValueError:
        return False
    return True


def _candidate(
    setup: train.Setup, topology: Topology, sizes: dict[str, int], remat: str, accumulation: int
) -> Candidate:
    config, model, chip = setup.config, setup.model, topology.chip
    shardings = meshes.param_shardings(_abstract(sizes), model.axes, model.shapes)
    held = jax.tree.map(lambda p, s: math.prod(s.shard_shape(p.shape)), model.shapes, shardings)
    roles = freeze(model.roles, config.train.freeze, config.train.unfreeze)
    trained = trained_parameters(config.optim, roles, model.axes, model.shapes)
    mine = sum(jax.tree.leaves(held))
    mine_trained = (
        mine if trained is None else sum(jax.tree.leaves(jax.tree.map(lambda n, t: n * t, held, trained)))
    )

    parameters, layers, width = parameter_count(model.shapes), len(config.model.layers), config.model.d_model
    outside = 2 * config.model.padded_vocab_size * width
    made = (parameters - outside) / width  # numbers that products with matrices make of a token
    tensor, sequence = sizes["tensor"], sizes["sequence"]
    rows = config.task.batch_size / (sizes["data"] * sizes["fsdp"] * accumulation)
    t = rows * config.task.seq_len / sequence
    residual = 4 if config.model.residual_dtype == "float32" else 2
    memory = 4 * mine + 12 * mine_trained + 8 * parameters / (layers * tensor)
    memory += t * layers * width * residual + t * made / layers * 12 / tensor + 8 * t * width
    memory += t * made * {"full": 0, "dots": 2, "none": 6}[remat] / tensor

    traffic = accumulation * 6 * parameters / tensor if sizes["fsdp"] > 1 else 0.0
    traffic += 8 * mine_trained if sizes["data"] > 1 else 0
    traffic += accumulation * 12 * layers * t * width if tensor > 1 else 0
    if sequence > 1:
        states, ring = _carried(setup)
        traffic += accumulation * (4 * (sequence - 1) * t * ring + 12 * sequence * rows * states) / tensor
    flops = setup.objective.flops_per_step(model.bind(model.shapes)) * REPEATED[remat]
    peak = (accelerator_peak(topology.kind) or math.inf) / chip.devices
    compute = flops / (len(topology.devices) * peak * EFFICIENCY)
    sent = traffic * chip.devices / chip.link
    seconds = max(compute, sent) + min(compute, sent) / 2
    return Candidate(sizes, remat, accumulation, memory, seconds)


def _carried(setup: train.Setup) -> tuple[float, float]:
    """Numbers of all recurrent states of a row, and bytes of keys and values of a token in all layers."""
    model = setup.model
    state = jax.eval_shape(lambda p: model.bind(p).init_state(1, 2), model.shapes)
    longer = jax.eval_shape(lambda p: model.bind(p).init_state(1, 3), model.shapes)
    pairs = list(zip(jax.tree.leaves(state), jax.tree.leaves(longer)))
    fixed = sum(a.size for a, b in pairs if a.size == b.size)
    growing = sum((b.size - a.size) * b.dtype.itemsize for a, b in pairs)
    return fixed, growing
