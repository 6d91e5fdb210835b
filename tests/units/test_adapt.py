"""Starting from another run, freezing, LoRA, merging: what moves, what is read, what bad input is told."""

import contextlib
import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tokenizers
from absl import flags
from ml_collections import config_flags

import train
from configs import cca_plugin, continue_long
from configs.base import ConfigError, Experiment
from eval.curves import read_records
from eval.opened import RunError, open_run
from eval.source_run import start_from
from models.functional import Functional
from models.lm import LM
from models.lora import LoRA, LoRAConfig, with_lora
from runtime import tree_diff
from runtime.checkpoint import Checkpoints
from runtime.freeze import freeze
from runtime.mesh import MeshConfig
from runtime.optimizer import OptimConfig, make_optimizer, trained_parameters
from runtime.restore import ArchitectureError
from runtime.schedule import ScheduleConfig
from runtime.state import init_state
from runtime.step import make_train_step, parameter_paths
from tests.experiments import tiny, write_corpus
from tools import merge

DEVICE = jax.devices()[:1]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus")


def small(corpus, steps=3):
    """Five MLPs, scanned, and an attention layer: quick to compile."""
    experiment = tiny(corpus, steps=steps)
    experiment.model.pattern = "(-)5*"
    return experiment


@pytest.fixture(scope="module")
def source(corpus, tmp_path_factory):
    """A finished run that keeps a moving average."""
    workdir = tmp_path_factory.mktemp("source")
    experiment = small(corpus)
    experiment.optim.ema_decay = 0.9
    train.run(experiment, workdir, DEVICE)
    return workdir


@pytest.fixture(scope="module")
def adapted(corpus, source, tmp_path_factory):
    """A LoRA run on it, in two microbatches, resumed once; its workdir, and what it told."""
    workdir, told = tmp_path_factory.mktemp("adapted"), io.StringIO()
    experiment = lora(corpus, source)
    with contextlib.redirect_stdout(told):
        train.run(experiment, workdir, DEVICE)
        experiment.train.steps = 4
        train.run(experiment, workdir, DEVICE)
    return workdir, " ".join(told.getvalue().split())


def lora(corpus, source, rank=2):
    experiment = small(corpus)
    experiment.init_from, experiment.lora.rank = str(source), rank
    experiment.optim.accumulation, experiment.optim.clip_norm = 2, 0.5
    return experiment


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def logits(model, params, tokens):
    return jax.jit(lambda params: (m := model.bind(params)).logits(m(tokens)[0]))(params)


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 257, (2, 24)), jnp.int32)


def test_only_adapters_move_and_only_they_have_moments(adapted, source):
    run = open_run(adapted[0])
    equal(run.params["base"], open_run(source).params)
    assert all(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(run.params["lora"])), "every A and B has moved"
    with Checkpoints(adapted[0]) as checkpoints:
        stored = tree_diff.leaves(ocp.PyTreeCheckpointHandler().metadata(checkpoints.path(4)).tree)
    moments = [leaf.shape for name, leaf in stored.items() if name.startswith("opt_state") and leaf.shape]
    assert sorted(moments) == sorted(2 * [leaf.shape for leaf in jax.tree.leaves(run.params["lora"])])


def test_a_lora_run_starts_at_its_source_and_resumes(adapted, corpus, source):
    workdir, told = adapted
    records = [r for r in read_records(workdir / "metrics.jsonl") if "train/loss" in r]
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert records[3]["train/loss"] < records[0]["train/loss"]
    assert "parameters loaded (moving average); none fresh; adapters fresh" in told
    assert told.count("start from") == 1 and "from step 3, not from init_from" in told
    plain = open_run(source)
    model = with_lora(plain.model, LoRAConfig(2))
    params = {"base": plain.params, "lora": jax.jit(lambda key: model.init(key)["lora"])(jax.random.key(1))}
    got, want = logits(model, params, TOKENS), logits(plain.model, plain.params, TOKENS)
    np.testing.assert_allclose(got, want, atol=5e-7)  # compiled, sums may be rounded elsewhere
    bound = model.bind(params), plain.model.bind(plain.params)
    adapted_q, q = (m.backbone.runs[1].layers[0].mixer.q for m in bound)
    x = jax.random.normal(jax.random.key(2), (2, 3, 32))
    np.testing.assert_array_equal(adapted_q(x), q(x))


def test_the_gradient_of_frozen_matrices_is_not_computed(corpus, source):
    def flops(experiment):
        s = train.setup(experiment, DEVICE)
        shape = (experiment.task.batch_size, experiment.task.seq_len)
        names = ("tokens", "targets", "segment_ids", "positions")
        batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
        batch["weights"] = jax.ShapeDtypeStruct(shape, jnp.float32)
        return s.train_step.lower(s.abstract, batch).cost_analysis()["flops"]

    low, full = lora(corpus, source, rank=1), small(corpus)
    for experiment in (low, full):
        experiment.optim.accumulation = 1
        experiment.model.pattern, experiment.model.d_model = "-", 128
        experiment.model.mlp.hidden = 512
    assert flops(low) < 0.55 * flops(full), "neither of adapted matrices nor of tables"


def test_merged_is_the_adapted_model(adapted, setup, tmp_path, corpus, capsys):
    workdir, _ = adapted
    merge.main([f"--workdir={workdir}", f"--out={tmp_path / 'merged'}"])
    assert "merged step 4" in capsys.readouterr().out
    before, after = open_run(workdir), open_run(tmp_path / "merged")
    assert type(after.model) is Functional and after.config.lora.rank == 0 and not after.config.init_from
    want = logits(before.model, before.params, TOKENS)
    np.testing.assert_allclose(logits(after.model, after.params, TOKENS), want, atol=2e-5)

    @jax.jit
    def in_two_pieces(params):
        module = after.model.bind(params)
        first, state, _ = module(TOKENS[:, :11], module.init_state(2, 24))
        return module.logits(jnp.concatenate([first, module(TOKENS[:, 11:], state)[0]], axis=1))

    np.testing.assert_allclose(in_two_pieces(after.params), want, atol=2e-5)
    with pytest.raises(SystemExit, match="is not empty"):
        merge.main([f"--workdir={workdir}", f"--out={tmp_path / 'merged'}"])
    with pytest.raises(RunError, match="nothing to merge"):
        merge.merge(tmp_path / "merged", tmp_path / "again")
    with pytest.raises(ConfigError, match="merge them first"):
        start_from(plain_from(corpus, workdir), setup.model, setup.abstract, tmp_path, print)


@pytest.fixture(scope="module")
def setup(corpus):
    """Of the plain model, without arrays: what is loaded is made, what is fresh stays a shape."""
    return train.setup(small(corpus), DEVICE)


def plain_from(corpus, source, **model):
    experiment = small(corpus)
    experiment.init_from = str(source)
    experiment.model = dataclasses.replace(experiment.model, **model)
    return experiment


def test_grown_vocabulary_other_length_and_rotation_on_a_mesh(corpus, source, tmp_path):
    """The new rows keep their initialisation; all is read into the sharding of the mesh."""
    experiment = plain_from(corpus, source, vocab_size=300, vocab_multiple=4)
    experiment.mesh = MeshConfig(1, 2, 2, 2)
    experiment.task.seq_len = 64
    experiment.model.attention.rope.scaling, experiment.model.attention.rope.factor = "linear", 2.0
    experiment.optim.ema_decay = 0.5
    s, told = train.setup(experiment), []
    before = s.init(jax.random.key(0))
    state = start_from(experiment, s.model, before, tmp_path, told.append)
    for leaf, want in zip(jax.tree.leaves(state), jax.tree.leaves(s.abstract)):
        assert leaf.sharding == want.sharding and leaf.dtype == want.dtype
    old, new, fresh = open_run(source).params, state.params, before.params
    np.testing.assert_array_equal(new["embed"]["table"][:264], old["embed"]["table"])
    np.testing.assert_array_equal(new["embed"]["table"][264:], fresh["embed"]["table"][264:])
    np.testing.assert_array_equal(new["head"]["kernel"][:, :264], old["head"]["kernel"])
    equal(new["backbone"], old["backbone"])
    equal(state.extras["ema"], new)
    assert "embed/table float32[264,32] -> float32[300,32]" in told[0] and "none fresh" in told[0]


def test_full_attention_goes_on_as_core_context_attention(corpus, source, tmp_path):
    """Every parameter is read, and short documents see no core: the same model."""
    with pytest.raises(ValueError, match="no language model with full attention"):
        cca_plugin.get_config(str(source))  # its attention has a window
    (tmp_path / "run").mkdir()
    whole = plain_from(corpus, source)
    whole.model.attention.window, whole.init_from = None, ""
    (tmp_path / "run" / "config.json").write_text(whole.to_json())
    (tmp_path / "run" / "checkpoints").symlink_to(source / "checkpoints")
    experiment, told = cca_plugin.get_config(f"{tmp_path / 'run'}@3,4,20"), []
    assert experiment.model.pattern == "(-)5c" and experiment.optim.lr == 0.1 * whole.optim.lr
    s = train.setup(experiment, DEVICE)
    params = start_from(experiment, s.model, s.abstract, tmp_path, told.append).params
    assert "none fresh" in told[0]
    old = Functional.create(lambda rngs: LM(whole.model, rngs=rngs))
    tokens = TOKENS[:, : 20 + 4 - 1]
    np.testing.assert_array_equal(logits(s.model, params, tokens), logits(old, params, tokens))
    with pytest.raises(ValueError, match=r"expected RUN\[@STEP\]\[,GROUP,WINDOW\]"):
        cca_plugin.get_config(f"{source},4")


def test_part_of_another_architecture(corpus, source, tmp_path):
    experiment, told = plain_from(corpus, f"{source}@3", pattern="(-)5*-", tie_embeddings=True), []
    s, old = train.setup(experiment, DEVICE), open_run(source).params

    def read():
        return start_from(experiment, s.model, s.abstract, tmp_path, told.append).params

    with pytest.raises(ArchitectureError) as error:
        read()
    assert "head/kernel: in the source only; the nearest here is" in str(error.value)
    assert "backbone/runs/1/layers/1/norm/scale: not in the source, whose nearest is" in str(error.value)
    assert "another model.pattern may stack" in str(error.value)
    experiment.init.allow_missing = True
    params = read()
    equal(params["backbone"]["runs"][0], old["backbone"]["runs"][0])
    assert "fresh: backbone/runs/1/layers/1/" in told[0] and "1 of the source not used" in told[0]
    experiment.init.exclude, experiment.init.allow_missing = ("head*", "*/layers/1/*", "embed*"), False
    params = read()
    assert params["embed"] == s.abstract.params["embed"], "left as it was"
    equal(params["backbone"]["runs"][1]["layers"][0], old["backbone"]["runs"][1]["layers"][0])


@pytest.mark.parametrize(
    ("given", "change", "message"),
    [
        ("nowhere", {}, "init_from=.*nowhere: .*does not exist; give the --workdir of a training run"),
        ("empty", {}, r"no checkpoint in .*empty/checkpoints; there are steps \[\]. Train it first"),
        ("source@7", {}, r"no checkpoint of step 7 in .*; there are steps \[3\]"),
        ("source", {"vocab_size": 256}, "has model.vocab_size=257, this run only 256: .* use at least 257"),
        (
            "source",
            {"exclude": ("hed*",)},
            r"init.exclude: 'hed\*' matches no parameter; the nearest are head",
        ),
        ("source", {"include": ("hed*",)}, r"init.include: 'hed\*' matches no parameter"),
    ],
)
def test_a_source_that_cannot_be_used_is_named(corpus, source, setup, tmp_path, given, change, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text((source / "config.json").read_text())
    run = given.replace("source", str(source)) if given.startswith("source") else tmp_path / given
    experiment = plain_from(corpus, run)
    for field, value in change.items():
        setattr(experiment.model if field == "vocab_size" else experiment.init, field, value)
    with pytest.raises(ConfigError, match=message):
        start_from(experiment, setup.model, setup.abstract, tmp_path, print)


def test_other_shapes_are_listed(corpus, source, tmp_path):
    experiment = plain_from(corpus, source, d_model=48)
    s = train.setup(experiment, DEVICE)
    with pytest.raises(
        ArchitectureError, match=r"up/kernel: found float32\[5,32,64\], expected float32\[5,48,64\]"
    ):
        start_from(experiment, s.model, s.abstract, tmp_path, print)
    experiment.init_from, experiment.init.exclude = "", ("head*",)
    with pytest.raises(ConfigError, match="init_from names no run"):
        train.setup(experiment, DEVICE)


def test_another_tokenizer_is_refused_and_an_extended_one_is_not(corpus, source, setup, tmp_path):
    def write(folder, *words):
        vocabulary = {word: i for i, word in enumerate(words)}
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "a"))
        folder.mkdir(exist_ok=True)
        inner.save(str(folder / "tokenizer.json"))

    run = tmp_path / "run"
    write(run, "a", "b")
    (run / "config.json").write_text((source / "config.json").read_text())
    (run / "checkpoints").symlink_to(source / "checkpoints")

    def start(workdir):
        start_from(plain_from(corpus, run), setup.model, setup.abstract, workdir, print)

    with pytest.raises(ConfigError, match=r"run/tokenizer.json .* does not exist"):
        start(tmp_path)
    write(tmp_path / "other", "a", "c")
    with pytest.raises(ConfigError, match=r"run/tokenizer.json and this run's .*other/tokenizer.json differ"):
        start(tmp_path / "other")
    write(tmp_path / "more", "a", "b", "c")
    start(tmp_path / "more")


def roles_of(corpus, frozen=(), trained=(), config=None):
    model = Functional.create(lambda rngs: LM(tiny(corpus).model, rngs=rngs))
    model = with_lora(model, config or LoRAConfig())
    roles = freeze(model.roles, frozen, trained)
    return dict(zip(parameter_paths(model.shapes), jax.tree.leaves(roles))), model, roles


def test_patterns_choose_what_trains(corpus):
    def training(**kw):
        return {path for path, role in roles_of(corpus, **kw)[0].items() if not role.startswith("frozen/")}

    everything = training()
    assert training(frozen=("embed*", "backbone/runs/0/*")) == {
        p for p in everything if not p.startswith(("embed", "backbone/runs/0/"))
    }
    assert training(trained=("norm/*", "head*")) == {"norm/scale", "head/kernel"}
    adapters = training(config=LoRAConfig(2))
    assert adapters and all(path.startswith("lora/") for path in adapters)
    assert training(config=LoRAConfig(2), trained=("base/norm/*",)) == adapters | {"base/norm/scale"}
    queries = training(config=LoRAConfig(2, targets=("qv",)))
    assert {path.split("/")[-3] for path in queries} == {"q", "v"}


def test_a_frozen_parameter_neither_moves_nor_counts():
    """Not in the update, the moments, nor the norm that is clipped by; -0.0 stays -0.0."""
    roles = freeze({"a": "matrix", "b": "matrix"}, ("b",))
    axes = {"a": (None, None), "b": (None, None)}
    params = {"a": jnp.ones((2, 2)), "b": jnp.full((2, 2), -0.0)}
    config = OptimConfig(accumulation=2, schedule=ScheduleConfig("constant"))
    tx = make_optimizer(config, roles, axes, params, 10)
    trained = trained_parameters(config, roles, axes, params)

    def loss(params, batch, carry, key):
        return (jnp.sum(batch @ (params["a"] + params["b"])), jnp.float32(batch.shape[0])), (carry, {})

    state = init_state(params, tx, config)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) < 12
    step = make_train_step(loss, tx, config, 10, trained=trained)
    state, metrics = step(state, jnp.ones((4, 2)))
    np.testing.assert_array_equal(np.signbit(state.params["b"]), True)
    assert not np.any(state.params["b"]) and np.all(state.params["a"] < 1)
    np.testing.assert_allclose(metrics["grad_norm"], 2.0)  # of a alone; with b it would be sqrt(8)


@pytest.mark.parametrize(
    ("frozen", "trained", "message"),
    [
        (("embd*",), (), r"train.freeze: 'embd\*' matches no parameter; the nearest are embed/table"),
        ((), ("nrm/*",), r"train.unfreeze: 'nrm/\*' matches no parameter; the nearest are norm/scale"),
        (("embed*", "head*"), ("*kernel",), r"both match head/kernel; make one of the patterns narrower"),
        (("*",), (), "every parameter is frozen"),
    ],
)
def test_patterns_that_cannot_work(corpus, frozen, trained, message):
    with pytest.raises(ValueError, match=message):
        _, model, roles = roles_of(corpus, frozen, trained)
        trained_parameters(tiny(corpus).optim, roles, model.axes, model.shapes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoRAConfig(40), "'all' matches no matrix of rank 40 or more|larger than"),
        (
            LoRAConfig(40, targets=("*/q/kernel",)),
            r"lora.rank=40 is larger than the matrix .*q/kernel .*at most 32",
        ),
        (LoRAConfig(2, targets=("*/query",)), r"'\*/query' matches no matrix.*one of all, qv, .*\*/q/kernel"),
        (LoRAConfig(2, targets=("norm*",)), "norm/scale of shape .32,., role 'vector/norm', is no matrix"),
        (LoRAConfig(2, targets=("*/conv/x/weight",)), "role 'conv', is no matrix"),
        (LoRAConfig(-1), "lora.rank=-1"),
        (LoRAConfig(2, alpha=0.0), "lora.alpha=0.0"),
    ],
)
def test_adapters_that_cannot_work(corpus, config, message):
    with pytest.raises(ValueError, match=message):
        roles_of(corpus, config=dataclasses.replace(config))


def test_a_matrix_that_is_no_projection_can_be_adapted(corpus):
    """The embedding table is looked up, not multiplied: its sum with A B takes its place."""
    _, model, _ = roles_of(corpus, config=LoRAConfig(2, targets=("embed/table", "head/kernel")))
    assert isinstance(model, LoRA)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), model.shapes)
    table = model.bind(params).embed.table[...]
    np.testing.assert_allclose(table, model.merge(params)["embed"]["table"], atol=1e-6)
    assert bool(jnp.all(table != params["base"]["embed"]["table"]))


def test_continuing_at_a_longer_context(corpus, source):
    config = continue_long.get_config(f"{source}@3,128")
    assert config.init_from == f"{source}@3" and (config.task.seq_len, config.task.batch_size) == (128, 2)
    assert config.task.carry_state and config.model.attention.rope.scaling == "none", (
        "a window of 24 is enough"
    )
    assert np.isclose(config.optim.lr, 3e-4) and config.task.eval_seq_len == 128
    config.validate()
    text = (source / "config.json").read_text()
    (source.parent / "full").mkdir()
    (source.parent / "full" / "config.json").write_text(text.replace('"window": 24', '"window": null'))
    rope = continue_long.get_config(str(source.parent / "full")).model.attention.rope
    assert (rope.scaling, rope.factor, rope.original_max_position) == ("yarn", 8.0, 32)
    for arg, message in (("", "expected RUN"), ("no_run", "no config.json"), (f"{source},16", "give more")):
        with pytest.raises(ValueError, match=message):
            continue_long.get_config(arg)


def test_the_fields_are_set_from_the_command_line():
    values = flags.FlagValues()
    argv = ["program", "--c.train.freeze=('embed*', 'head*')", "--c.lora.targets=('qv',)", "--c.lora.rank=4"]
    argv += ["--c.init_from=runs/base@100", "--c.init.exclude=('head*',)", "--c.init.allow_missing=True"]
    config_flags.DEFINE_config_dataclass("c", Experiment(), flag_values=values, sys_argv=argv)
    values(argv)
    assert values.c.train.freeze == ("embed*", "head*") and values.c.lora == LoRAConfig(4, targets=("qv",))
    assert values.c.init.exclude == ("head*",) and values.c.init.allow_missing
