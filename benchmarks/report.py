"""The results of ``benchmarks.lm``: as a dict for JSON, and against the targets."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from benchmarks.peers import DECODE_STEPS, OURS, PEERS
from benchmarks.workload import Shape, build
from models.functional import parameter_count

if TYPE_CHECKING:
    from benchmarks.lm import Run

METHOD = (
    "Float32 on all cores of the CPU; medians of samples taken in turns, compilation apart. Every peer runs "
    "with the malloc settings of runtime/host.py. A training step is the mean cross entropy of every next "
    "token, its gradient and one AdamW update; ours also clips the gradient, reports norms and checks for "
    f"NaN. Decoding is greedy; JAX peers decode {DECODE_STEPS} tokens a call in a compiled scan, and again one "
    "token a call, as torch does."
)


def results(run: Run, machine: dict[str, Any], floors: dict[str, float]) -> dict[str, Any]:
    """Everything found by ``run``, as plain data."""
    records = [{**dataclasses.asdict(r), "median": r.median} for r in run.records]
    found = {
        "benchmark": "lm",
        "method": METHOD,
        "machine": machine,
        "plan": dataclasses.asdict(run.plan),
        "floors": floors | work(run.plan.shape),
        "carried_bytes": run.carried_bytes,
        "peers": {name: PEERS[name].about for name in dict.fromkeys((OURS, *run.plan.peers))},
        "failures": run.failures,
        "logit_difference": run.logit_difference,
        "peak_bytes": run.peak_bytes,
        "records": records,
    }
    return found | {"targets": targets(found)}


def work(shape: Shape) -> dict[str, float]:
    """Bytes of the weights, and operations (2 per multiply-add) of a prefilled and of a trained token."""
    model = build(shape)[0]
    lm = model.bind(model.shapes)
    whole_chunks = 2**20
    return {
        "weights_bytes": 4.0 * parameter_count(model.shapes),
        "prefill_flops_per_token": lm.backbone.flops_per_token(whole_chunks),
        "train_flops_per_token": 3 * lm.flops_per_token(whole_chunks),  # a backward is two forwards
    }


class Medians(dict[tuple[str, str, str, int], float]):
    """Seconds by (part, peer, what, length), of the records in ``found``."""

    def __init__(self, found: dict[str, Any]):
        super().__init__(
            ((r["part"], r["peer"], r["what"], r["length"]), r["median"]) for r in found["records"]
        )

    def lengths(self, part: str, peer: str, what: str) -> list[int]:
        """In rising order."""
        return sorted(length for *key, length in self if key == [part, peer, what])


def matmul_share(found: dict[str, Any], what: str, length: int, seconds: float) -> float:
    """What fraction of the machine's matmul rate the operations of ``what`` were done at."""
    tokens = found["plan"]["shape"]["batch"] * length
    rate = found["floors"][f"{what}_flops_per_token"] * tokens / seconds
    return rate / found["floors"]["matmul_flops"]


def weights_time(found: dict[str, Any], source: str = "memory") -> float:
    """Seconds to read all weights once, from "memory", or, as "weights", from the cache they fit in."""
    return found["floors"]["weights_bytes"] / found["floors"][f"{source}_bytes_per_second"]


def targets(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target the records can answer: "claim", "found", "wanted", "at_least" (or at most), "met"."""
    median, rows = Medians(found), []

    def add(claim: str, value: float, wanted: float, at_least: bool = False) -> None:
        met = value >= wanted if at_least else value <= wanted
        rows.append({"claim": claim, "found": value, "wanted": wanted, "at_least": at_least, "met": met})

    for peer, factor in (("transformers", 10.0), ("mamba2-jax", 3.0)):
        for n in median.lengths("peers", peer, "train"):
            ratio = median["peers", peer, "train", n] / median["peers", OURS, "train", n]
            add(f"training, {n} tokens: times faster than {peer}", ratio, factor, at_least=True)
    for what in ("train", "prefill"):
        lengths = median.lengths("scaling", OURS, what)
        if len(lengths) > 1:
            short, long = lengths[0], lengths[-1]
            growth = median["scaling", OURS, what, long] / median["scaling", OURS, what, short]
            # Linear growth and a quarter: 8 times the tokens may cost 10 times as much.
            add(f"{what}: cost of {long} tokens over {short}", growth, 1.25 * long / short)
    for part in ("peers", "scaling"):
        for n in median.lengths(part, OURS, "prefill"):
            share = matmul_share(found, "prefill", n, median[part, OURS, "prefill", n])
            add(f"prefill, {n} tokens: share of the matmul rate", share, 0.4, at_least=True)
    contexts = median.lengths("contexts", OURS, "decode")
    if contexts:
        times = [median["contexts", OURS, "decode", n] for n in contexts]
        add("decoded token: times reading all weights from memory", max(times) / weights_time(found), 2.5)
        add(f"decoded token after {contexts[-1]} tokens over after {contexts[0]}", times[-1] / times[0], 1.1)
    return rows
