"""Likelihoods against one pass over each text alone; the harness's own evaluator on a local task file."""

import json

import jax
import numpy as np
import pytest

from eval.decode import RoomError
from eval.likelihood import likelihoods
from eval.opened import open_run
from objectives import model_of
from runtime import run_record
from runtime.checkpoint import save_alone
from tests.experiments import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained run on bytes that can read 128 tokens."""
    root = tmp_path_factory.mktemp("run")
    experiment = tiny(root / "corpus")
    experiment.model.pattern, experiment.model.max_positions = "*", 128
    experiment.model.attention.window = None
    params = model_of(experiment).init(jax.random.key(0))
    save_alone(root / "run", 0, {"params": jax.tree.map(lambda p: 3 * p if p.ndim > 1 else p, params)})
    run_record.save_config(root / "run", experiment.to_json())
    return open_run(root / "run")


@pytest.fixture(scope="module")
def direct(run):
    """``direct(context, continuation)`` by the definition: log-softmax of the logits of one pass."""

    @jax.jit
    def logits(params, tokens, segment_ids):
        lm = run.model.bind(params)
        return jax.nn.log_softmax(lm.logits(lm(tokens, segment_ids=segment_ids)[0])[0])

    def alone(context, continuation):
        whole = np.concatenate([context, continuation]).astype(np.int32)
        size = len(whole) - 1
        tokens = np.pad(whole[:-1], (0, 128 - size))[None]
        rows = logits(run.params, tokens, (np.arange(128) < size)[None].astype(np.int32))[
            len(context) - 1 : size
        ]
        picked = np.take_along_axis(np.asarray(rows), np.asarray(continuation)[:, None], axis=1)
        return float(picked.sum()), bool((rows.argmax(axis=-1) == continuation).all()), int(rows[0].argmax())

    return alone


def test_likelihoods_are_those_of_each_pair_alone(run, direct):
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(0, 256, n), rng.integers(0, 256, m)) for n, m in ((3, 2), (40, 9), (1, 1), (90, 30))
    ]
    pairs.append((pairs[0][0], np.array([direct(*pairs[0])[2]])))
    found = likelihoods(run, pairs, rows=2, piece=32)
    for one, pair in zip(found, pairs):
        logprob, greedy, _ = direct(*pair)
        assert one.logprob == pytest.approx(logprob, abs=1e-4) and one.greedy == greedy
    assert found[-1].greedy
    with pytest.raises(RoomError, match="pair 0 has 131 tokens, but model.max_positions=128"):
        likelihoods(run, [(np.zeros(1), np.zeros(130))])
    with pytest.raises(ValueError, match="pair 0 has an empty context or continuation"):
        likelihoods(run, [(np.zeros(1), np.zeros(0))])


TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{c}}",
        "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{long}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{c[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
DOCUMENTS = [
    {"q": "one plus one is", "c": [" two", " three"], "a": 0, "long": "a text of bytes " * 14},
    {"q": "the sky is", "c": [" green", " blue"], "a": 1, "long": "short"},
]


def test_the_harness_on_a_local_task(run, direct, tmp_path):
    pytest.importorskip("lm_eval")
    from eval import harness

    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, task in TASKS.items():
        local = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        task = {"task": name, "test_split": "test", **local, **task}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    out = tmp_path / "out.json"
    arguments = [f"--workdir={run.workdir}", f"--tasks={','.join(TASKS)}", f"--include_path={tmp_path}"]
    harness.main([*arguments, "--rows=2", f"--out={out}"])
    results = json.loads(out.read_text())["results"]

    ids = run.tokenizer.encode
    right = 0
    for document in DOCUMENTS:
        scores = [direct(ids(document["q"], separator=True), ids(choice))[0] for choice in document["c"]]
        right += int(np.argmax(scores) == document["a"])
    assert results["choice"]["acc,none"] == right / 2
    bits = 0.0
    for document in DOCUMENTS:
        text = ids(document["long"], separator=True)
        # What learned positions do not reach is read in a second window, which ends with the text.
        cuts = [(0, 1, 129), (len(text) - 129, 129, len(text))] if len(text) > 129 else [(0, 1, len(text))]
        for start, first, end in cuts:
            bits -= direct(text[start:first], text[first:end])[0] / np.log(2)
    count = sum(len(document["long"]) for document in DOCUMENTS)
    assert results["rolling"]["bits_per_byte,none"] == pytest.approx(bits / count, abs=1e-4)
    assert results["answer"]["exact_match,none"] == 0
