"""Does the best learning rate depend on the width? Three rates at two widths of the quickstart hybrid.

Command: ``python -m tools.launch --sweep=configs/sweeps/lr_width.py --workdir=studies/lr_width --jobs=2``
Presets: smoke (100 steps, minutes on 2 cores), full (the quickstart's length, hours).
A search over the same fields: ``--search=20``.
"""

CONFIG = "configs/quickstart.py"
METRIC = "validation/bits_per_byte"

STEPS = {"smoke": 100, "full": 4000}
QUIET = {"train.baselines": False, "train.sample_length": 0}
SMOKE = {"train.eval_every": 0, "task.seq_len": 128, "task.eval_batches": 4, "checkpoint.every": 25} | QUIET


def get_sweep(preset: str = "smoke"):
    """Yields the overrides of each trial. Raises ValueError for a preset that does not exist."""
    if preset not in STEPS:
        raise ValueError(f"configs/sweeps/lr_width.py:{preset}: use {' or '.join(STEPS)}")
    shared = {"train.steps": STEPS[preset]} | (SMOKE if preset == "smoke" else QUIET)
    for width in (64, 128):
        for rate in (0.005, 0.015, 0.045):
            yield {"model.d_model": width, "optim.muon_lr": rate, **shared}


def space(trial):
    """The same fields, drawn by Optuna at the size of smoke."""
    width = trial.suggest_categorical("width", [64, 96, 128])
    rate = trial.suggest_float("muon_lr", 0.002, 0.1, log=True)
    return {"model.d_model": width, "optim.muon_lr": rate, "train.steps": STEPS["smoke"], **SMOKE}
