"""Checkpoints: exact, atomic, on any mesh, never lost to a bad newest one or to a full disk."""

import functools
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from runtime.checkpoint import ArchitectureError, CheckpointConfig, CheckpointError, Checkpoints
from runtime.run_record import explain_config_change, load_config, save_config


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: Any
    extras: dict


def new_state(width: int = 8, depth: int = 2) -> State:
    """A small train state: f32, bf16, int8, a typed PRNG key, None, masked and empty nodes."""
    params = {
        "embed": jnp.arange(16.0 * width).reshape(16, width),
        "blocks": {str(i): {"kernel": jnp.full((width, width), i + 0.1, jnp.bfloat16)} for i in range(depth)},
    }

    def label(path, leaf):
        return "embed" if "embed" in str(path) else "matrix"

    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition(
            {"matrix": optax.adamw(1e-3), "embed": optax.sgd(1e-2, momentum=0.9)},
            lambda p: jax.tree_util.tree_map_with_path(label, p),
        ),
    )
    extras = {"key": jax.random.key(3), "none": None, "pair": (jnp.int8(-3), jnp.ones((4, 4))), "empty": {}}
    return State(jnp.int32(7), params, tx.init(params), extras)


def abstract(state, sharding=None):
    """``state`` as ShapeDtypeStructs; ``sharding(leaf)`` or the first device."""
    place = sharding or (lambda leaf: SingleDeviceSharding(jax.devices()[0]))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), state)


def numbers(leaf):
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(numbers(a), numbers(b))


def at_step(state, step):
    return state.replace(step=jnp.int32(step))


def save_steps(workdir, steps, state=None, **config):
    state = state or new_state()
    with Checkpoints(workdir, CheckpointConfig(**config)) as checkpoints:
        for step in steps:
            checkpoints.save(step, at_step(state, step))
    return state


def damage(workdir, step, how):
    """What a killed machine or a bad disk leaves of a checkpoint that has its final name."""
    root = workdir / "checkpoints" / str(step)
    if how == "no metadata":
        (root / "_METADATA").unlink()
    elif how == "no manifest":
        (root / "manifest.ocdbt").unlink()
    elif how == "truncated":
        for path in root.glob("**/d/*"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "empty":
        shutil.rmtree(root)
        root.mkdir()
    elif how == "no array metadata":
        shutil.rmtree(root / "array_metadatas")


def test_restores_exactly_what_was_saved(tmp_path):
    state = save_steps(tmp_path, [7])
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [7] and checkpoints.latest == 7
        found, step = checkpoints.restore(abstract(state))
    assert step == 7
    assert_same(found, at_step(state, 7))


def test_async_save_is_a_snapshot_under_donation(tmp_path):
    state = {"w": jax.random.normal(jax.random.key(0), (1024, 1024)), "n": jnp.int32(0)}
    before = jax.tree.map(np.array, state)
    update = functools.partial(jax.jit, donate_argnums=0)(lambda s: jax.tree.map(lambda x: x + 1, s))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        for _ in range(3):
            state = update(state)
        found, _ = checkpoints.restore(abstract(state))
    assert_same(found, jax.tree.map(jnp.asarray, before))


def test_restores_on_another_mesh_and_on_one_device(tmp_path, mesh):
    names = PartitionSpec(("data", "fsdp"), "tensor")

    def on(m):
        return lambda x: NamedSharding(m, names if x.ndim == 2 and x.shape[0] % 8 == 0 else PartitionSpec())

    state = new_state()
    first, second = mesh(1, 2, 2, 2), mesh(2, 4, 1, 1)
    placed = jax.tree.map(lambda x: jax.device_put(x, on(first)(x)), state)
    save_steps(tmp_path, [3], placed)
    with Checkpoints(tmp_path) as checkpoints:
        moved, _ = checkpoints.restore(abstract(state, on(second)))
        single, _ = checkpoints.restore(abstract(state))
    assert moved.params["embed"].sharding == NamedSharding(second, names)
    assert_same(moved, at_step(state, 3))
    assert_same(single, at_step(state, 3))
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match="cannot be sharded as asked"),
    ):
        checkpoints.restore(
            abstract(
                new_state(width=9),
                lambda x: NamedSharding(
                    first, PartitionSpec(None, "tensor") if x.ndim == 2 else PartitionSpec()
                ),
            )
        )


@pytest.mark.parametrize("how", ["no metadata", "no manifest", "truncated", "empty", "no array metadata"])
def test_bad_newest_falls_back_and_can_be_saved_again(tmp_path, how):
    state = save_steps(tmp_path, [10, 20])
    damage(tmp_path, 20, how)
    with Checkpoints(tmp_path, CheckpointConfig(keep_last=1)) as checkpoints:
        with pytest.warns(RuntimeWarning, match=r"step 20 at .*checkpoints/20: \w+"):
            found, step = checkpoints.restore(abstract(state))
        assert step == 10
        assert_same(found, at_step(state, 10))
        assert checkpoints.steps() == [10, 20], "reading changed the disk"
        with pytest.warns(RuntimeWarning, match="20.aside"):
            checkpoints.save(15, at_step(state, 15))
        checkpoints.save(20, at_step(state, 20))
        assert checkpoints.restore(abstract(state))[1] == 20
        assert checkpoints.steps() == [20]
    assert (tmp_path / "checkpoints" / "20.aside").exists()


def test_unfinished_save_is_invisible_and_cleared(tmp_path):
    state = save_steps(tmp_path, [10])
    root = tmp_path / "checkpoints"
    shutil.copytree(root / "10", root / "20.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(state))[1] == 10
        checkpoints.save(20, at_step(state, 20), wait=True)
    assert sorted(p.name for p in root.iterdir()) == ["10", "20"]


def test_never_starts_from_zero_when_nothing_can_be_read(tmp_path):
    state = save_steps(tmp_path, [10, 20])
    damage(tmp_path, 10, "truncated")
    damage(tmp_path, 20, "no manifest")
    with Checkpoints(tmp_path) as checkpoints:
        with (
            pytest.warns(RuntimeWarning),
            pytest.raises(CheckpointError, match="(?s)step 20 at .*step 10 at"),
        ):
            checkpoints.restore(abstract(state))
        with pytest.raises(CheckpointError, match=r"other steps: \[10\]"):
            checkpoints.restore(abstract(state), step=20)
        with pytest.raises(FileNotFoundError, match=r"of step 30 .*\[10, 20\]"):
            checkpoints.restore(abstract(state), step=30)


def test_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.latest is None and checkpoints.steps() == []
        with pytest.raises(FileNotFoundError, match="no checkpoint in"):
            checkpoints.restore({})
    assert not (tmp_path / "new").exists()


def test_another_architecture_is_explained(tmp_path):
    save_steps(tmp_path, [1, 2])
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ArchitectureError) as error:
            checkpoints.restore(abstract(new_state(width=12)))
        assert "params/embed: found float32[16,8], expected float32[16,12]" in str(error.value)
        assert "params/blocks/0/kernel: found bfloat16[8,8], expected bfloat16[12,12]" in str(error.value)
        assert "config.json" in str(error.value) and isinstance(error.value, ValueError)
        with pytest.raises(ArchitectureError, match="params/blocks/2/kernel: missing, expected bfloat16"):
            checkpoints.restore(abstract(new_state(depth=3)))
        with pytest.raises(ArchitectureError, match="params/blocks/1/kernel: found .*, not expected"):
            checkpoints.restore(abstract(new_state(depth=1)))
        state = new_state()
        state.params["embed"] = state.params["embed"].astype(jnp.bfloat16)
        with pytest.raises(
            ArchitectureError, match=r"embed: found float32\[16,8\], expected bfloat16\[16,8\]"
        ):
            checkpoints.restore(abstract(state))


def test_params_alone(tmp_path):
    state = save_steps(tmp_path, [5])
    with Checkpoints(tmp_path) as checkpoints:
        assert_same(checkpoints.restore_params(abstract(state.params)), state.params)
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), state.params)
        found = checkpoints.restore_params(wanted)
        assert_same(found, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params))
        part, step = checkpoints.restore_part({"extras": abstract(state.extras)})
        assert step == 5
        assert_same(part["extras"], state.extras)
        with pytest.raises(ArchitectureError, match="params/embed: found"):
            checkpoints.restore_params(abstract(new_state(width=12).params))


def test_keep_policies_and_maybe_save(tmp_path):
    state = {"w": jnp.zeros(3)}
    config = CheckpointConfig(every=2, keep_last=2, keep_every=6)
    with Checkpoints(tmp_path, config) as checkpoints:
        saved = [step for step in range(1, 15) if checkpoints.maybe_save(step, state)]
        assert saved == [2, 4, 6, 8, 10, 12, 14]
        assert checkpoints.save(14, state) is False, "already there"
        with pytest.raises(ValueError, match="step 13: this run already stands at checkpoint 14"):
            checkpoints.save(13, state)
        checkpoints.wait()
        assert checkpoints.steps() == [6, 12, 14]
    with pytest.raises(ValueError, match="checkpoint.keep_last is 0"):
        Checkpoints(tmp_path, CheckpointConfig(keep_last=0))


def test_rewinding_keeps_the_abandoned_branch_aside(tmp_path):
    state = save_steps(tmp_path, [1, 2, 3])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(abstract(state), step=1)
        with pytest.warns(RuntimeWarning, match="aside"):
            checkpoints.save(2, at_step(state, 2), wait=True)
        assert checkpoints.steps() == [1, 2]
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert names == {"1", "2", "2.aside", "3.aside"}


def test_failed_write_is_one_clear_error_and_earlier_checkpoints_load(tmp_path):
    """A real refusal of the operating system: files may not grow beyond 20 kB."""
    state = {"w": jax.random.normal(jax.random.key(0), (64, 256))}
    with Checkpoints(tmp_path, CheckpointConfig(every=1)) as checkpoints:
        checkpoints.save(1, state, wait=True)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            checkpoints.save(2, state)
            with pytest.raises(CheckpointError, match=r"(?s)step 2 .*checkpoints/2.*Earlier.*\[1\]") as error:
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "GB" in str(error.value) and "\n" not in str(error.value)
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]
        assert checkpoints.maybe_save(3, state), "the run may go on"
        found, step = checkpoints.restore(abstract(state))
        assert step == 3
        assert_same(found, state)


FULL_DISK = """
    import sys, jax
    from runtime.checkpoint import Checkpoints, CheckpointError
    state = {"w": jax.random.normal(jax.random.key(0), (256, 256))}
    checkpoints = Checkpoints(sys.argv[1])
    try:
        for step in range(1, 20):
            checkpoints.save(step, state, wait=True)
            print("saved", step)
    except CheckpointError as error:
        print(error)
    found, step = checkpoints.restore(jax.eval_shape(lambda: state))
    assert (found["w"] == state["w"]).all()
    print("restored", step)
"""


def test_full_disk(tmp_path):
    """A file system of 1 MB, in a mount namespace of its own."""
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "sh", "-c", mount]).returncode:
        pytest.skip("needs unprivileged mount namespaces")
    (tmp_path / "disk").mkdir()
    run = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}/disk && exec {sys.executable} - {tmp_path}/disk"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", run],
        input=textwrap.dedent(FULL_DISK),
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "the disk is full" in done.stdout
    saved = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("saved")]
    assert f"restored {saved[-1]}" in done.stdout


def test_config_of_every_start_is_kept(tmp_path):
    texts = ['{"lr": 1}', '{"lr": 2}', '{"lr": 2}', '{"lr": 3}']
    assert load_config(tmp_path) is None
    for text in texts:
        save_config(tmp_path, text)
    assert load_config(tmp_path) == texts[-1]
    assert (tmp_path / "config.1.json").read_text() == texts[0]
    assert (tmp_path / "config.2.json").read_text() == texts[1]
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(ValueError):
        save_config(tmp_path, "not json")


def test_config_change_is_explained():
    old = '{"optim": {"lr": 0.001, "wd": 0.1}, "model": {"pattern": ["m", "a"], "parts": [{"d": 1}]}, "n": 1}'
    new = '{"optim": {"lr": 0.0003}, "model": {"pattern": ["m"], "parts": [{"d": 2}]}, "n": 1, "seed": 0}'
    assert explain_config_change(old, new) == [
        "model.parts.0.d: 1 -> 2",
        'model.pattern: ["m", "a"] -> ["m"]',
        "optim.lr: 0.001 -> 0.0003",
        "optim.wd: removed, was 0.1",
        "seed: added, 0",
    ]
    assert explain_config_change(old, old) == []
