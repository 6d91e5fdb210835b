"""How much attention does a hybrid need? Its share of the sequence mixers from 0 to 1, on text and recall.

Command: ``python -m tools.launch --sweep=configs/sweeps/layers_hybrid_ratio.py:cpu --workdir=studies/ratio``
Presets: smoke (a few steps, minutes), cpu (four mixers, hours on 2 cores), full (eight mixers, a GPU).
Learning rates: on text the recipe of configs/lm_stdlib.py; on recall a grid for each share.
Parameters: equal within 5 % in a task; the width of the MLPs evens them out.
"""

from configs.study import Arm, Study

FOUR = {0: "MMMM", 0.25: "MM*M", 0.5: "M*M*", 1: "****"}
EIGHT = {0: "M" * 8, 0.125: "MMMM*MMM", 0.25: "MM*MMM*M", 0.5: "M*" * 4, 0.75: "M***M***", 1: "*" * 8}
# Width of the MLPs without attention, and what a share of 1 adds to it.
TEXT = (416, 112)
RECALL = {64: (80, 96), 128: (188, 136)}


def get_study(preset: str = "smoke") -> Study:
    """Raises ValueError for a preset that does not exist."""
    if preset == "smoke":
        patterns = {share: FOUR[share] for share in (0, 0.25, 1)}
        text = {
            "train.steps": 200,
            "train.baselines": False,
            "train.sample_length": 0,
            "task.eval_batches": 20,
        }
        arms = _text(patterns, (0,), text | {"train.eval_every": 0})
        recall = {"train.steps": 1000, "train.eval_every": 250}
        arms += _recall(patterns, "configs/mqar.py:smoke", 64, (1.0,), (0,), recall)
    elif preset == "cpu":
        arms = _text(FOUR, (0, 1), {"train.baselines": False})
        arms += _recall(FOUR, "configs/mqar.py:smoke", 64, (0.3, 1.0), (0, 1), {})
    elif preset == "full":
        arms = _text(EIGHT, (0, 1, 2), {"train.steps": 20_000, "task.batch_size": 32})
        arms += _recall(EIGHT, "configs/mqar.py:based", 128, (0.3, 1.0, 3.0), (0, 1, 2), {})
    else:
        raise ValueError(f"configs/sweeps/layers_hybrid_ratio.py:{preset}: use smoke, cpu or full")
    return Study(
        name=f"layers_hybrid_ratio:{preset}",
        question=(
            "How many of the sequence mixers of a Mamba-2 hybrid should be attention, for text and for "
            "recall, at equal parameters?"
        ),
        analysis="hybrid_ratio",
        arms=tuple(arms),
    )


def _text(patterns, seeds, overrides) -> list[Arm]:
    return [
        Arm(
            name=f"lm_{share:g}",
            config="configs/lm_stdlib.py:hybrid",
            overrides=overrides
            | {"model.pattern": _with_mlps(pattern), "model.mlp.hidden": round(TEXT[0] + TEXT[1] * share)},
            factors={"task": "lm", "share": share},
            metric="validation/bits_per_byte",
            seeds=seeds,
        )
        for share, pattern in patterns.items()
    ]


def _recall(patterns, spec, d_model, rates, seeds, overrides) -> list[Arm]:
    width, more = RECALL[d_model]
    return [
        Arm(
            name=f"mqar_{share:g}",
            config=f"{spec},{_with_mlps(pattern)}",
            overrides=overrides | {"model.mlp.hidden": round(width + more * share)},
            factors={"task": "mqar", "share": share},
            rates=rates,
            metric="validation/accuracy",
            best="max",
            seeds=seeds,
        )
        for share, pattern in patterns.items()
    ]


def _with_mlps(pattern: str) -> str:
    return "".join(f"{mixer}-" for mixer in pattern)
