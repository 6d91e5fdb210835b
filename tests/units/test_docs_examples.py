"""The worked examples of docs/ are run as they stand there."""

import importlib
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from configs.quickstart import get_config as quickstart
from eval.opened import OpenRun
from eval.probes.types import Probe
from models.functional import Functional
from models.lm import LM
from models.registry import TINY_MIXERS
from runtime.mesh import MeshConfig, make_mesh
from tasks.recall import RecallTask, RecallTaskConfig, draws
from tasks.recall import config as recall_config
from tests.laws import test_mixers as laws

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def page(tmp_path, monkeypatch):
    """``page(name, "layers/mingru.py", ...)``: the page's files in order, put beside ours, imported."""

    def load(name, *paths):
        blocks = BLOCK.findall((DOCS / f"{name}.md").read_text())
        assert len(blocks) == len(paths)
        for path, text in zip(paths, blocks):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        names = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in paths]
        for package in {name.rpartition(".")[0] for name in names} & sys.modules.keys():
            there = sys.modules[package]
            folder = str(tmp_path / package.replace(".", "/"))
            monkeypatch.setattr(there, "__path__", [*there.__path__, folder])
        loaded = [importlib.import_module(name) for name in names]
        for name in names:
            monkeypatch.delitem(sys.modules, name)
        return loaded

    return load


def test_the_mixer_satisfies_the_laws(page, monkeypatch):
    (mingru,) = page("add_a_mixer", "layers/mingru.py")
    build = lambda rngs: mingru.MinGRU(32, mingru.MinGRUConfig(), rngs=rngs)  # noqa: E731
    monkeypatch.setitem(TINY_MIXERS, "mingru", build)
    laws.test_contract("mingru")
    laws.test_causality_to_the_bit("mingru")
    laws.test_any_split_with_carried_state_is_one_pass("mingru", (8, 8, 5))
    laws.test_packed_documents_are_separate_runs("mingru", (10, 11))
    laws.test_padding_only_leaves_the_state_alone("mingru")
    laws.test_state_keeps_its_declared_shape("mingru")
    with pytest.raises(ValueError, match="expand"):
        mingru.MinGRU(32, mingru.MinGRUConfig(expand=0), rngs=nnx.Rngs(0))


def test_the_generator_and_its_config(page, monkeypatch):
    first, config = page("add_a_task", "tasks/recall/first.py", "configs/first.py")
    law, size = first.FirstSpec(), (24, 1)
    batch = law.make(draws.uniforms((0,), np.arange(40), law.width(*size)), *size, held_out=False)
    asked = batch["distance"] > 0
    np.testing.assert_array_equal(law.oracle(batch["tokens"], 1)[asked], batch["targets"][asked])
    np.testing.assert_array_equal(batch["tokens"][:, 0], batch["targets"][asked])
    monkeypatch.setattr(recall_config, "NAMES", (*recall_config.NAMES, "first"))
    monkeypatch.setattr(RecallTaskConfig, "first", law, raising=False)
    experiment = config.get_config("mamba2")
    experiment.validate()
    assert RecallTask(experiment.task).train()[0]["tokens"].shape == (32, 64)


def test_the_probe_on_a_model_that_knows_nothing(page, tmp_path):
    (certainty,) = page("add_a_probe", "eval/probes/certainty.py")
    (tmp_path / "text.txt").write_text("some text, and more of it\n" * 400)
    config = quickstart()
    config.task.source, config.task.seq_len, config.model.pattern = str(tmp_path), 16, "-"
    model = Functional.create(lambda rngs: LM(config.model, rngs=rngs))
    params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), model.shapes)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    opened = OpenRun(epath.Path(tmp_path), config, 0, model, params, None, None, mesh)
    probe = certainty.Certainty(rows=2)
    assert isinstance(probe, Probe)
    result = probe.run(opened, print)
    assert result.numbers["entropy"] == pytest.approx(np.log(config.model.vocab_size), abs=1e-4)
    assert result.numbers["overconfidence"] == pytest.approx(0, abs=1e-4)
    assert len(result.curves["loss"].y) == 16 and probe.plot(result) is not None


def test_the_kernel_equals_its_reference(page):
    names = ("reference", "xla", "tpu", "__init__")
    running_sum = page("add_a_kernel", *(f"pallas_kernels/running_sum/{name}.py" for name in names))[-1]
    rng = np.random.default_rng(0)
    x, state = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, 256, 128), (2, 128)))

    def loss(x, state, implementation):
        y, final = running_sum.running_sum(x, initial_state=state, implementation=implementation)
        return jnp.mean(jnp.sin(y)) + jnp.sum(jnp.cos(final)), (y, final)

    run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    want = run(x, state, "reference")
    for implementation in ("xla", "interpret"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), run(x, state, implementation), want
        )
    lowered = jax.jit(running_sum.running_sum).trace(x).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in lowered
    with pytest.raises(ValueError, match="multiple of 128"):
        running_sum.running_sum(x[:, :100], implementation="pallas_tpu")
