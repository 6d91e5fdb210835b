"""Multi-query associative recall, of a published set or small enough for a CPU.

Command: ``python train.py --config=configs/mqar.py:based,mamba2 --workdir=runs/mqar_mamba2``. Sets: smoke,
    smoke_forgetting, and those of `tasks.recall.mqar.SETS`. Models: those of `configs.recall.PATTERNS`, or a
    pattern such as ``M-*-``.
Hardware: 2 CPU cores for smoke (minutes); a GPU for the rest.
Metric: validation/accuracy, over answers; by size and, with ``--config.task.slices="('size','distance')"``,
    by distance. The papers try several learning rates (``rates`` of a set; here a middle one) and widths.
"""

from configs.recall import RecallExperiment, experiment, parse, small_model
from tasks.recall import RecallTaskConfig
from tasks.recall.mqar import SETS, MQARSpec

SMOKE = ((32, 2), (32, 4), (64, 8), (128, 16))


def get_config(argument: str = "smoke,hybrid") -> RecallExperiment:
    """Raises ValueError for an argument that is not SET[,MODEL]."""
    name, model = parse("mqar", argument, ["smoke", "smoke_forgetting", *SETS])
    if name.startswith("smoke"):
        return _smoke(name, model)
    chosen = SETS[name]
    task = RecallTaskConfig(
        name="mqar",
        mqar=MQARSpec(random_non_queries=chosen.random_non_queries),
        train_sizes=chosen.train,
        train_rows=chosen.train_rows,
        fresh=False,
        eval_sizes=chosen.test,
        eval_rows=chosen.test_rows,
        batch_size=chosen.batch,
        equal_tokens=False,
    )
    steps = chosen.epochs * sum(rows // chosen.batch for rows in chosen.train_rows)
    task.starts = tuple(round(share * steps) for share in chosen.starts)
    rate = chosen.rates[len(chosen.rates) // 2]
    network = small_model(model, task.law.vocab_size)
    config = experiment(f"mqar {name}, {model}", network, task, steps=steps, lr=rate)
    config.stop_accuracy = 0.99 if not chosen.starts else None
    return config


def _smoke(name: str, model: str) -> RecallExperiment:
    """128 ids, up to 16 pairs; evaluated at more pairs and longer rows too.

    Few pairs come first, for a quarter of the steps: attention guesses among the values of its row until it
    has an induction head, and from all sizes at once, or after an eighth, some seeds never get one.
    """
    steps = 4000
    task = RecallTaskConfig(
        name="mqar",
        mqar=MQARSpec(vocab_size=128, random_non_queries=False, updates=2 if "forgetting" in name else 0),
        train_sizes=SMOKE,
        starts=tuple(eighths * steps // 8 for eighths in (0, 2, 3, 4)),
        eval_sizes=(*SMOKE[1:], (128, 24), (256, 32)),
        eval_rows=256,
        batch_size=32,
    )
    config = experiment(f"mqar {name}, {model}", small_model(model, 128, 64), task, steps=steps, lr=3e-3)
    config.stop_accuracy = 0.99
    return config
