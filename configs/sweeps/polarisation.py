"""Polarised channels of Mamba: does one that never forgets, or one that forgets at once, help recall?

Command: ``python -m tools.launch --sweep=configs/sweeps/polarisation.py:cpu --workdir=studies/polarisation``
Presets: smoke (two layers, default and both, minutes), mamba2 (those in Mamba-2 of 16 dimensions: faster; 2
    and 4 layers, two seeds, hours on a core), cpu (short rows, 2 and 4 layers, hours on 2 cores), full (the
    set, sizes and rate of arXiv:2501.00658, a GPU).
Learning rates: the paper's in full; else a grid of the default, of each depth, which the others take.
Parameters: a channel is 1 of 16 dimensions of the state; all arms of a depth are equal within 5 %.
"""

from configs.study import Arm, Study

CHANNELS = {
    "default": {},
    "zero": {"zeros": 1},
    "one": {"ones": 1},
    "both": {"ones": 1, "zeros": 1},
}
METRIC = "validation/accuracy"
MAMBA2 = {"model.mamba2.d_state": 16, "model.mamba2.headdim": 16, "model.mlp.hidden": 114}


def get_study(preset: str = "smoke") -> Study:
    """Raises ValueError for a preset that does not exist."""
    small = {16: "validation/accuracy_128_16", 24: "validation/accuracy_128_24"}
    small[32] = "validation/accuracy_256_32"
    if preset == "smoke":
        short = {"train.steps": 1000, "train.eval_every": 250, "checkpoint.every": 500}
        arms = _arms("configs/mqar.py:smoke", ("default", "both"), (2,), (1.0,), (0,), short)
    elif preset == "mamba2":
        spec = "configs/mqar.py:smoke"
        arms = _arms(spec, ("default", "both"), (2, 4), (1.0,), (0, 1), MAMBA2, layer="M-", of="mamba2")
    elif preset == "cpu":
        arms = _arms("configs/mqar.py:smoke", tuple(CHANNELS), (2, 4), (0.3, 1.0), (0, 1, 2), {})
    elif preset == "full":
        arms = _arms("configs/mqar.py:bottleneck", tuple(CHANNELS), (2, 4), (1.0,), (0, 1, 2), {})
    else:
        raise ValueError(f"configs/sweeps/polarisation.py:{preset}: use smoke, mamba2, cpu or full")
    pairs = {n: f"validation/accuracy_1024_{n}" for n in (64, 128, 256)} if preset == "full" else small
    return Study(
        name=f"polarisation:{preset}",
        question=(
            "State space models forget what is far away and smooth out what is near. Does a channel that "
            "never forgets (A = 1), and one that remembers nothing (A = 0), make Mamba recall better, and "
            "deeper Mamba useful?"
        ),
        analysis="polarisation",
        arms=tuple(arms),
        settings={"by_pairs": pairs},
    )


def _arms(spec, channels, depths, rates, seeds, overrides, layer="m", of="mamba") -> list[Arm]:
    return [
        Arm(
            name=f"{name}_{depth}",
            config=f"{spec},{layer * depth}",
            overrides=overrides | {f"model.{of}.{field}": n for field, n in CHANNELS[name].items()},
            factors={"channels": name, "depth": depth},
            rates=rates,
            rate_of="" if name == "default" else f"default_{depth}",
            metric=METRIC,
            best="max",
            seeds=seeds,
        )
        for depth in depths
        for name in channels
    ]
