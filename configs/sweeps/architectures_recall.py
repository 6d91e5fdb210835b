"""Which architectures recall? MQAR, copying and a phone book at equal parameters; Mamba-2 by state size.

Command:
    ``python -m tools.launch --sweep=configs/sweeps/architectures_recall.py:cpu --workdir=studies/recall``
Presets: smoke (MQAR, four architectures and two more sizes of the state, minutes a run on 2 cores), mqar
    (the same with three seeds and a grid of rates), copying (three seeds, about a minute a run), cpu (every
    task and architecture on small sizes, many hours), full (published sizes, a GPU).
Learning rates: a grid for each architecture and task with the first seed, chosen by validation accuracy; the
    other state sizes of Mamba-2 take the rate of the one that is compared.
Parameters: equal within 5 % in a task; the width of the MLP evens them out.
"""

from configs.study import Arm, Study

ARCHITECTURES = ("attention", "mamba2", "hybrid", "s4d", "s5", "cca")
COUNTED = 64  # d_state of Mamba-2 in the next table
# Width of the MLPs that evens out the parameters, by d_model, then by kind of mixer.
HIDDEN = {
    64: {"attention": 176, "mamba2": 80, "hybrid": 128, "s4d": 152, "s5": 196, "cca": 176, "mamba": 88},
    128: {"attention": 324, "mamba2": 188, "hybrid": 256, "s4d": 344, "s5": 364, "cca": 324, "mamba": 192},
}
# Dimensions of the state of the Mamba-2 that is compared with the others, alone and in the hybrid.
D_STATE = {64: 32, 128: 64}
METRIC = "validation/accuracy"


def get_study(preset: str = "smoke") -> Study:
    """Raises ValueError for a preset that does not exist."""
    few = ("attention", "mamba2", "hybrid", "s4d")
    if preset == "smoke":
        arms = _task("mqar", "configs/mqar.py:smoke", 64, few, (1.0,), (0,), (16, 64), {})
    elif preset == "mqar":
        arms = _task("mqar", "configs/mqar.py:smoke", 64, few, (0.3, 1.0), (0, 1, 2), (16, 64), {})
    elif preset == "copying":
        arms = _task("copying", "configs/copying.py:smoke", 64, few, (1.0,), (0, 1, 2), (8, 16, 64), {})
    elif preset == "cpu":
        recipes = {task: f"configs/{task}.py:smoke" for task in ("mqar", "copying", "phonebook")}
        arms = [
            arm
            for task, spec in recipes.items()
            for arm in _task(task, spec, 64, ARCHITECTURES, (0.3, 1.0), (0, 1), (8, 16, 64), {})
        ]
    elif preset == "full":
        recipes = {
            "mqar": "configs/mqar.py:based",
            "copying": "configs/copying.py:repeat",
            "phonebook": "configs/phonebook.py:standard",
        }
        arms = [
            arm
            for task, spec in recipes.items()
            for arm in _task(task, spec, 128, ARCHITECTURES, (0.3, 1.0, 3.0, 10.0), (0, 1, 2), STATES, {})
        ]
    else:
        raise ValueError(
            f"configs/sweeps/architectures_recall.py:{preset}: use smoke, mqar, copying, cpu or full"
        )
    return Study(
        name=f"architectures_recall:{preset}",
        question=(
            "Which architectures find again what they have read, at equal parameters; and does a larger "
            "recurrent state find more?"
        ),
        analysis="recall",
        arms=tuple(arms),
    )


STATES = (8, 16, 32, 128, 256)


def _task(task, spec, d_model, kinds, rates, seeds, states, overrides) -> list[Arm]:
    """The architectures on one task, then Mamba-2 with other states."""
    common = {"metric": METRIC, "best": "max", "seeds": seeds}
    arms = [
        Arm(
            name=f"{task}_{kind}",
            config=f"{spec},{kind}",
            overrides=overrides | _equal(d_model, kind, D_STATE[d_model]),
            factors={"task": task, "architecture": kind, "compared": True}
            | ({"d_state": D_STATE[d_model]} if kind == "mamba2" else {}),
            rates=rates,
            **common,
        )
        for kind in kinds
    ]
    for d_state in states:
        arms.append(
            Arm(
                name=f"{task}_mamba2_N{d_state}",
                config=f"{spec},mamba2",
                overrides=overrides | _equal(d_model, "mamba2", d_state),
                factors={"task": task, "architecture": "mamba2", "d_state": d_state},
                rate_of=f"{task}_mamba2",
                **common,
            )
        )
    return arms


def _equal(d_model: int, kind: str, d_state: int) -> dict[str, int]:
    """The width of the MLPs at which an architecture has as many parameters as the others.

    B and C of a layer of Mamba-2 have 2 (d_model + 5) parameters for each dimension of the state, the
    convolution's taps and bias among them; an MLP has 3 d_model for each of its width.
    """
    hidden = HIDDEN[d_model][kind]
    share = {"mamba2": 1.0, "hybrid": 0.5}.get(kind)  # of the mixers that are Mamba-2
    if share is None:
        return {"model.mlp.hidden": hidden}
    more = (d_state - COUNTED) * share * 2 * (d_model + 5) / (3 * d_model)
    return {"model.mlp.hidden": hidden - round(more), "model.mamba2.d_state": d_state}
