"""The TPU interpreter that simulates the chip's memories: it finds races and reads of memory nobody wrote."""

import dataclasses

import jax
from jax.experimental.pallas import tpu as pltpu

CHECKED = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, uninitialized_memory="nan")


def assert_no_races(run, *args):
    """``run(*args)``, whose kernels are called with ``interpret=CHECKED``; fails if one has a race."""
    result = jax.block_until_ready(run(*args))
    if "on_race" not in {field.name for field in dataclasses.fields(CHECKED)}:  # later versions raise
        from jax._src.pallas.mosaic.interpret import interpret_pallas_call

        assert interpret_pallas_call.races is not None, "no kernel ran under the race detector"
        assert not interpret_pallas_call.races.races_found
    return result
