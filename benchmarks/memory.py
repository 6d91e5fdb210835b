"""Long documents, memory and time: ``python -m benchmarks.memory [--quick] [--sequence=8]``.

One tiny backbone with full attention, and with each method that keeps less of the past, at growing lengths:
the time of reading a prompt and of one more token, the bytes of the state, and what the compiled program
needs beside its inputs, forward and with gradients, as the compiler says. Beside them, what
``flops_per_token`` says should have grown how much. ``--sequence=N`` compiles for N (fake) devices that share
the tokens, and reports a device's memory only. Prints a table; writes JSON and a picture.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console

from benchmarks import machine, memory_report
from benchmarks.results_file import write
from benchmarks.timing import Stopwatch
from layers.attention import AttentionConfig
from layers.beacon_ratios import BeaconConfig
from layers.cca import CCAConfig
from models.beacon import BeaconLM
from models.beacon_config import BeaconLMConfig
from models.config import LMConfig
from models.functional import Functional
from models.hmt import HMT
from models.hmt_config import HMTConfig, MemoryConfig
from models.lm import LM
from models.loss import chunked_cross_entropy, token_nll
from runtime import mesh as meshes
from runtime.host import restart_with_tuned_malloc

STEPS = 16  # tokens a call of decoding, one compiled scan, as in eval/decode.py
SLACK = 1.25  # measured growth over that of the operations, at most
ATTENTION = AttentionConfig(num_heads=2, num_kv_heads=2)
BACKBONE = LMConfig(vocab_size=256, vocab_multiple=1, d_model=64, pattern="*-*-", attention=ATTENTION)


@dataclasses.dataclass(frozen=True)
class Method:
    """A language model, ``hidden, state, out = model(tokens, state)``, and how it is trained.

    Attributes:
        build: ``rngs -> model``.
        loss: ``(model, batch)`` to nats by token, what training differentiates.
    """

    build: Callable[[nnx.Rngs], Any]
    loss: Callable[[Any, Any], jax.Array] = lambda model, batch: token_nll(model, batch)[0]


def _cca(rngs: nnx.Rngs) -> LM:
    cca = CCAConfig.like(ATTENTION, group_size=16, window=1024)
    return LM(dataclasses.replace(BACKBONE, pattern="c-c-", cca=cca), rngs=rngs)


def _hmt(rngs: nnx.Rngs) -> HMT:
    fields = {field.name: getattr(BACKBONE, field.name) for field in dataclasses.fields(LMConfig)}
    return HMT(HMTConfig(**fields, memory=MemoryConfig(segment=512, sensory=32, queue=300)), rngs=rngs)


def _hmt_loss(model: HMT, batch: Any) -> jax.Array:
    """Back-propagation through 8 segments, the state carried on as ``task.carry_state`` does."""
    rows, length = batch["tokens"].shape
    pieces = length // math.gcd(length, 8 * model.recipe.segment)
    tokens, targets = (
        jnp.moveaxis(batch[name].reshape(rows, pieces, -1), 1, 0) for name in ("tokens", "targets")
    )

    @jax.checkpoint
    def piece(state: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        hidden, state, _ = model(batch[0], jax.lax.stop_gradient(state), training=True)
        return state, chunked_cross_entropy(model, hidden, batch[1])[0]

    _, nll = jax.lax.scan(piece, model.init_state(rows, length), (tokens, targets))
    return jnp.moveaxis(nll, 0, 1).reshape(rows, length)


def _beacon(rngs: nnx.Rngs) -> BeaconLM:
    fields = {field.name: getattr(BACKBONE, field.name) for field in dataclasses.fields(LMConfig)}
    beacon = BeaconConfig(window=1024, ratios=(8,), mix="sequence", eval_ratios=(8,))
    return BeaconLM(BeaconLMConfig(**fields, beacon=beacon), rngs=rngs)


def _beacon_loss(model: BeaconLM, batch: Any) -> jax.Array:
    """The single pass over all windows."""
    hidden, _, _ = model(batch["tokens"], segment_ids=batch["segment_ids"], deterministic=False)
    return chunked_cross_entropy(model, hidden, batch["targets"])[0]


MODELS: dict[str, Method] = {
    "attention": Method(lambda rngs: LM(BACKBONE, rngs=rngs)),
    "cca": Method(_cca),
    "hmt": Method(_hmt, _hmt_loss),
    "beacon": Method(_beacon, _beacon_loss),
}
METHOD = (
    "One row. Prompts in pieces as generation reads them, after which tokens are decoded greedily, "
    f"{STEPS} a call; medians of samples in turns. State: bytes with room for the prompt. Memory: temporary "
    "bytes of one pass over all tokens with the loss, as compiled, without rematerialisation; but HMT is "
    "trained in rows of 8 segments with the state carried on, and recomputes each."
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured: ``models`` are names of ``MODELS``.

    Attributes:
        piece: tokens of a prompt read at once.
        repeats: samples of a prompt's time; 0 for memory only.
        sequence: devices that share the tokens, for memory only.
    """

    models: Sequence[str] = tuple(MODELS)
    lengths: Sequence[int] = (4096, 8192, 16_384, 32_768, 65_536, 131_072)
    piece: int = 1024
    repeats: int = 3
    sequence: int = 1


@dataclasses.dataclass(frozen=True)
class Record:
    """One model at one length.

    Attributes:
        prefill, decode: seconds of the whole prompt, and of one more token after it; none without samples.
        state, forward, gradient: bytes of the state, and of the two programs beside their inputs.
        flops, step_flops: of the prompt, and of the token after it, by ``flops_per_token``.
    """

    model: str
    length: int
    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    state: int
    forward: int
    gradient: int
    flops: float
    step_flops: float


class Reader:
    """A model that reads ``length`` tokens in pieces, and goes on after them."""

    def __init__(self, model: Functional, params: Any, length: int, piece: int):
        self.params, self.pieces = params, length // piece
        self.tokens = jax.random.randint(jax.random.key(1), (1, piece), 0, BACKBONE.vocab_size)
        self._empty = jax.jit(lambda params: model.bind(params).init_state(1, length + STEPS))

        def read(params: Any, tokens: Any, state: Any) -> Any:
            hidden, state, _ = model.bind(params)(tokens, state)
            return hidden[:, -1], state

        def step(params: Any, carry: Any) -> Any:
            def one(carry: Any, _: None) -> Any:
                token, state = carry
                lm = model.bind(params)
                hidden, state, _ = lm(token[:, None], state)
                return (jnp.argmax(lm.logits(hidden)[:, -1], axis=-1).astype(jnp.int32), state), None

            return jax.lax.scan(one, carry, length=STEPS)[0]

        self._read = jax.jit(read, donate_argnums=2)
        self._step = jax.jit(step)

    def prompt(self) -> Any:
        """State after the prompt."""
        state = self._empty(self.params)
        for _ in range(self.pieces):
            hidden, state = self._read(self.params, self.tokens, state)
        return state

    def steps(self, state: Any) -> Any:
        """``STEPS`` more tokens after ``state``, which stays as it is."""
        return self._step(self.params, (self.tokens[:, 0], state))[0]


def run(plan: Plan, note: Callable[[str], None]) -> list[Record]:
    """All of ``plan``."""
    records = []
    for length in plan.lengths:
        for name in plan.models:
            note(f"{name}, {length} tokens: compiling")
            model = Functional.create(MODELS[name].build)
            module = model.bind(model.shapes)
            empty = lambda params, m=model, n=length: m.bind(params).init_state(1, n)  # noqa: E731
            state = jax.eval_shape(empty, model.shapes)
            prefill, decode = _times(plan, model, length, note) if plan.repeats else ((), ())
            records.append(
                Record(
                    name,
                    length,
                    prefill,
                    decode,
                    sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
                    _temporary(plan, model, MODELS[name].loss, length, gradient=False),
                    _temporary(plan, model, MODELS[name].loss, length, gradient=True),
                    length * module.flops_per_token(length),
                    _last_token(module, length),
                )
            )
    return records


def _last_token(module: Any, length: int) -> float:
    """Operations of token number ``length``, of the means over ``length`` and over one less."""
    return length * module.flops_per_token(length) - (length - 1) * module.flops_per_token(length - 1)


def _times(
    plan: Plan, model: Functional, length: int, note: Callable[[str], None]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Samples of reading the prompt and of a token after it."""
    reader = Reader(model, jax.jit(model.init)(jax.random.key(0)), length, min(plan.piece, length))
    state = reader.prompt()
    read, step = Stopwatch(reader.prompt, 0.0), Stopwatch(lambda: reader.steps(state), 0.0)
    step.warm_up()
    prefill, decode = [], []
    for turn in range(plan.repeats):
        note(f"{length} tokens: turn {turn + 1} of {plan.repeats}")
        prefill.append(read.sample())
        decode += [step.sample() / STEPS for _ in range(3)]
    return tuple(prefill), tuple(decode)


def _temporary(plan: Plan, model: Functional, nll: Callable, length: int, *, gradient: bool) -> int:
    """Bytes that a device needs beside parameters and batch for the loss of one row, or its gradient."""

    def loss(params: Any, batch: Any) -> jax.Array:
        return nll(model.bind(params), batch).mean()

    mesh: Any = contextlib.nullcontext()
    params, sharding = model.shapes, None
    if plan.sequence > 1:
        over = meshes.make_mesh(meshes.MeshConfig(data=1, sequence=plan.sequence))
        mesh, sharding = jax.set_mesh(over), meshes.batch_sharding(over)
        whole = jax.NamedSharding(over, jax.P())
        params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=whole), params)
    row = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=sharding)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), row)
    with mesh:
        compiled = jax.jit(jax.grad(loss) if gradient else loss).lower(params, batch).compile()
    analysis: Any = compiled.memory_analysis()
    return int(analysis.temp_size_in_bytes)


def results(plan: Plan, records: Sequence[Record], described: dict[str, Any]) -> dict[str, Any]:
    """Everything as plain values."""
    return {
        "benchmark": "memory",
        "method": METHOD,
        "machine": described,
        "device": jax.devices()[0].device_kind,
        "backbone": f"d_model {BACKBONE.d_model}, {BACKBONE.pattern}",
        "plan": dataclasses.asdict(plan),
        "records": [dataclasses.asdict(r) for r in records],
        "growth": growth(records),
    }


def growth(records: Sequence[Record]) -> list[dict[str, Any]]:
    """From the shortest to the longest length of each model: time, memory and operations, as factors."""
    found = []
    for name in dict.fromkeys(r.model for r in records):
        mine = sorted((r for r in records if r.model == name), key=lambda r: r.length)
        first, last = mine[0], mine[-1]
        factors: dict[str, Any] = {
            field: getattr(last, field) / getattr(first, field)
            for field in ("length", "flops", "step_flops", "state", "forward", "gradient")
        }
        for field, flops in (("prefill", "flops"), ("decode", "step_flops")):
            if getattr(last, field):
                medians = [statistics.median(getattr(r, field)) for r in (first, last)]
                factors[field] = medians[1] / medians[0]
                factors[f"{field}_as_counted"] = factors[field] <= SLACK * factors[flops]
        found.append({"model": name, **factors})
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.memory", allow_abbrev=False)
    add: Any = parser.add_argument
    add("--models", help=f"some of {','.join(MODELS)} (default all)")
    add("--lengths", help="tokens, comma-separated (default 4096 to 131072)")
    add("--quick", action="store_true", help="about a minute: 4096 and 8192 tokens, one sample")
    add("--repeats", type=int, help="samples (default 3; 1 if --quick), 0 for memory only")
    add("--sequence", type=int, default=1, help="devices that share the tokens: memory only")
    add("--out", help="JSON file (default benchmarks/results/memory_DATE_MACHINE.json), picture beside it")
    given = parser.parse_args(argv)
    models = given.models.split(",") if given.models else list(MODELS)
    if unknown := sorted(set(models) - set(MODELS)):
        parser.error(f"--models: {unknown[0]!r} is unknown; use some of {','.join(MODELS)}")
    plan = Plan(models, sequence=given.sequence)
    if given.quick:
        plan = dataclasses.replace(plan, lengths=(4096, 8192), repeats=1)
    if given.lengths:
        plan = dataclasses.replace(plan, lengths=tuple(int(n) for n in given.lengths.split(",")))
    unit = plan.piece if plan.sequence == 1 else 16 * plan.sequence
    if wrong := [n for n in plan.lengths if n % unit]:
        parser.error(f"--lengths: {wrong[0]} is no multiple of {unit}")
    if given.repeats is not None:
        plan = dataclasses.replace(plan, repeats=given.repeats)
    if plan.sequence > 1:
        plan = dataclasses.replace(plan, repeats=0)
        jax.config.update("jax_num_cpu_devices", plan.sequence)
    console = Console(width=None if sys.stdout.isatty() else 160)  # a file is as wide as the tables
    described = machine.describe()
    with console.status("starting") as status:
        records = run(plan, status.update)
    found = results(plan, records, described)
    memory_report.show(found, console)
    path = write(found, given.out)
    memory_report.plot(found, path.with_suffix(".png"))
    console.print(f"written to {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    restart_with_tuned_malloc()
    main()
