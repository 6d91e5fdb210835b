"""One of the two processes of test_runtime.py: ``runtime_worker.py INDEX COORDINATOR WORKDIR``."""

import os
import pathlib
import signal
import sys
import time

import jax

INDEX, COORDINATOR, WORKDIR = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(COORDINATOR, 2, INDEX)

import numpy as np  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec  # noqa: E402

import runtime.checkpoint  # noqa: E402
from runtime.checkpoint import CheckpointConfig, Checkpoints  # noqa: E402
from runtime.feed import Feed, local_rows  # noqa: E402
from runtime.preemption import Preemption  # noqa: E402

B, L = 8, 16
SHAPES = [
    (4, 1, 1, 1),
    (2, 1, 2, 1),
    (1, 1, 4, 1),
    (1, 1, 1, 4),
    (1, 2, 2, 1),
    (2, 1, 1, 2),
    (1, 1, 2, 2),
    (1, 2, 1, 2),
]


def make_mesh(shape, order=(0, 1, 2, 3)) -> Mesh:
    devices = np.array([jax.devices()[i] for i in order]).reshape(shape)
    return Mesh(devices, ("data", "fsdp", "tensor", "sequence"), axis_types=(AxisType.Auto,) * 4)


class Rows:
    """Rows ``rows`` of the global batches."""

    def __init__(self, rows: slice):
        self.rows = rows

    @staticmethod
    def whole(step: int) -> dict[str, np.ndarray]:
        tokens = 1000 * step + 100 * np.arange(B)[:, None] + np.arange(L)[None]
        return {"tokens": tokens.astype(np.int32), "label": np.arange(B, dtype=np.int32)}

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return {name: array[self.rows] for name, array in self.whole(step).items()}


def feed_everywhere() -> None:
    """Also with the devices of the two processes interleaved along each axis."""
    meshes = [make_mesh(shape, order) for shape in SHAPES for order in ((0, 1, 2, 3), (0, 2, 1, 3))]
    for mesh in meshes:
        sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "sequence"))
        replicate = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
        with Feed(Rows(local_rows(sharding, B)), sharding, B, start_step=3, end_step=5) as feed:
            for step, batch in feed:
                for name, array in replicate(batch).items():
                    np.testing.assert_array_equal(array, Rows.whole(step)[name])
    print(f"fed {len(meshes)} meshes")


def main() -> None:
    feed_everywhere()
    sharding = NamedSharding(make_mesh((1, 2, 2, 1)), PartitionSpec("fsdp", "tensor"))
    state = {"w": jax.device_put(np.arange(64, dtype=np.float32).reshape(8, 8), sharding)}
    wanted = {"w": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=sharding)}
    with Checkpoints(WORKDIR, CheckpointConfig(every=1)) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.save(2, state, wait=True)
        if INDEX == 0:
            for path in (pathlib.Path(WORKDIR) / "checkpoints" / "2" / "d").iterdir():
                path.write_bytes(b"")
        multihost_utils.sync_global_devices("damaged")
        state, step = checkpoints.restore(wanted)
        print(f"corrupt: restored {step}")

        checkpoints.save(3, state, wait=True)
        if INDEX == 1:
            fail_once_to_read()
        state, step = checkpoints.restore(wanted)
        print(f"one process failed: restored {step}")

        with Preemption() as preemption:
            for step in range(2, 2000):
                time.sleep(0.005)
                if INDEX == 1 and step == 20:
                    os.kill(os.getpid(), signal.SIGINT)
                if preemption.should_stop(step):
                    checkpoints.save(step, state, wait=True)
                    print(f"stopped at {step}")
                    break
    jax.distributed.shutdown()


def fail_once_to_read() -> None:
    read = runtime.checkpoint.try_restore

    def fail(*arguments):
        runtime.checkpoint.try_restore = read
        return None, "OSError: simulated"

    runtime.checkpoint.try_restore = fail


if __name__ == "__main__":
    main()
