"""The results of ``benchmarks.lm``: as a dict for JSON, and against the targets."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.peers import DECODE_STEPS, OURS, PEERS
from benchmarks.run import Run
from benchmarks.workload import Shape, build
from models.functional import parameter_count

METHOD = (
    "Float32 on all cores of the CPU; medians of samples taken in turns, compilation apart. Every peer runs "
    "as its users run it (our programs set malloc up for themselves, runtime/host.py), then with the other "
    "malloc setting. A training step is the mean cross entropy of every next token, its gradient and one "
    "AdamW update; ours also clips the gradient, reports norms and checks for NaN. Decoding is greedy; peers "
    f"in JAX decode {DECODE_STEPS} tokens a call in a compiled scan, and again one token a call, as in torch."
)


def results(run: Run, machine: dict[str, Any], floors: dict[str, float]) -> dict[str, Any]:
    """Everything found by ``run``, as plain data."""
    records = [{**dataclasses.asdict(r), "median": r.median, "steady": r.steady} for r in run.records]
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


Key = tuple[str, str, str, int]  # part, peer, what, length


class Medians(dict[Key, float]):
    """Seconds by (part, peer, what, length), of the records in ``found``."""

    def __init__(self, found: dict[str, Any]):
        super().__init__(
            ((r["part"], r["peer"], r["what"], r["length"]), r["median"]) for r in found["records"]
        )

    def keys_of(self, part: str, peer: str, what: str) -> list[Key]:
        """In rising order of length."""
        return sorted(key for key in self if key[:3] == (part, peer, what))


def matmul_share(found: dict[str, Any], what: str, length: int, seconds: float) -> float:
    """What fraction of the machine's matmul rate the operations of ``what`` were done at."""
    tokens = found["plan"]["shape"]["batch"] * length
    rate = found["floors"][f"{what}_flops_per_token"] * tokens / seconds
    return rate / found["floors"]["matmul_flops"]


def weights_time(found: dict[str, Any], source: str = "memory") -> float:
    """Seconds to read all weights once, from "memory", or, as "weights", from the cache they fit in."""
    return found["floors"]["weights_bytes"] / found["floors"][f"{source}_bytes_per_second"]


def targets(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target the records can answer.

    Keys: "claim", "found", "wanted", "at_least" (or at most), "met", and "steady": whether all the records it
    rests on are.
    """
    median, rows = Medians(found), []
    unsteady = {
        tuple(r[k] for k in ("part", "peer", "what", "length")) for r in found["records"] if not r["steady"]
    }

    def add(claim: str, value: float, wanted: float, used: list[Key], at_least: bool = False) -> None:
        met = value >= wanted if at_least else value <= wanted
        row = {"claim": claim, "found": value, "wanted": wanted, "at_least": at_least, "met": met}
        rows.append(row | {"steady": unsteady.isdisjoint(used)})

    for peer, factor in (("transformers", 10.0), ("mamba2-jax", 3.0)):
        for theirs in median.keys_of("peers", peer, "train"):
            ours = ("peers", OURS, *theirs[2:])
            claim = f"training, {theirs[-1]} tokens: times faster than {peer}"
            add(claim, median[theirs] / median[ours], factor, [ours, theirs], at_least=True)
    for what in ("train", "prefill"):
        keys = median.keys_of("scaling", OURS, what)
        if len(keys) > 1:
            short, long = keys[0], keys[-1]
            claim = f"{what}: cost of {long[-1]} tokens over {short[-1]}"
            # Linear growth and a quarter: 8 times the tokens may cost 10 times as much.
            add(claim, median[long] / median[short], 1.25 * long[-1] / short[-1], [short, long])
    for key in (*median.keys_of("peers", OURS, "prefill"), *median.keys_of("scaling", OURS, "prefill")):
        share = matmul_share(found, "prefill", key[-1], median[key])
        add(f"prefill, {key[-1]} tokens: share of the matmul rate", share, 0.4, [key], at_least=True)
    contexts = median.keys_of("contexts", OURS, "decode")
    if contexts:
        times = [median[key] for key in contexts]
        claim = "decoded token: times reading all weights from memory"
        add(claim, max(times) / weights_time(found), 2.5, contexts)
        claim = f"decoded token after {contexts[-1][-1]} tokens over after {contexts[0][-1]}"
        add(claim, times[-1] / times[0], 1.1, contexts)
    return rows
