"""What a finished language-model run shows: numbers beside simple compressors, a sample, a report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from configs.base import TrainConfig
from eval import curves, report
from eval.decode import decode
from eval.report.words import REFERENCES
from eval.sampling import Sampling
from models.functional import Functional
from runtime.host import peak_memory
from tasks.compressors import reference_bits_per_byte
from tasks.lm import LMTask


def finish(
    model: Functional,
    task: LMTask,
    config: TrainConfig,
    params: Any,
    results: Mapping[str, Any],
    workdir: epath.Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """``results`` with peak memory and what the config asks for beside them.

    Written to result.json, loss.png, sample.txt and report.html.
    """
    # Before the compressors, which may need more memory than the training did.
    results = dict(results) | {f"memory/{name}_peak_bytes": size for name, size in peak_memory().items()}
    references: dict[str, float] = {}
    if config.baselines and task.manifest is not None:
        references = reference_bits_per_byte(
            task.training, task.validation, task.manifest, cache_dir=task.config.cache_dir
        )
        results |= {f"reference/{name}": value for name, value in references.items()}
        for line in comparison(results["validation/bits_per_byte"], references):
            say(line)
    text = None
    # Sampling fetches tokens as it goes, which needs every parameter within reach of this process.
    if config.sample_length and task.tokenizer is not None and jax.process_count() == 1:
        text = sample(model, task, params, config.sample_prompt, config.sample_length, config.seed)
        say(f"sample, after {config.sample_prompt!r}:\n{text}")
    if jax.process_index() == 0:
        records = curves.read_records(workdir / "metrics.jsonl")
        reference = {
            REFERENCES[name]: references[name] for name in list(REFERENCES)[:3] if name in references
        }
        curves.plot_loss(records, workdir / "loss.png", reference=reference)
        if text is not None:
            (workdir / "sample.txt").write_text(text)
        (workdir / "result.json").write_text(json.dumps(results, indent=2) + "\n")
        say(f"report {report.write([workdir])}, curve {workdir / 'loss.png'}, {workdir / 'result.json'}")
    return results


def comparison(bits_per_byte: float, references: Mapping[str, float]) -> list[str]:
    """Lines of a small table, the best last but for the model itself."""
    rows = [(REFERENCES.get(name, name), value) for name, value in references.items()]
    rows = [*sorted(rows, key=lambda row: -row[1]), ("this model", bits_per_byte)]
    width = max(len(name) for name, _ in rows)
    return ["validation, bits per byte:", *(f"  {name:<{width}}  {value:.3f}" for name, value in rows)]


def sample(model: Functional, task: LMTask, params: Any, prompt: str, length: int, seed: int) -> str:
    """``prompt``, as the start of a document, and ``length`` further bytes sampled at temperature 0.8."""
    assert task.tokenizer is not None
    ids = task.tokenizer.encode(prompt, separator=True)
    blocks = decode(model, params, [ids], length, Sampling(temperature=0.8, seed=seed))
    new = np.concatenate([block[0] for block in blocks])
    stop = np.flatnonzero(new == task.tokenizer.separator_id)
    return prompt + task.tokenizer.decode(new[: stop[0]] if stop.size else new)
