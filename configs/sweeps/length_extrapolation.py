"""Beyond the training length: who breaks, what mends it without training, and what training on does.

Command:
    ``python -m tools.launch --sweep=configs/sweeps/length_extrapolation.py:cpu --workdir=studies/length``
Presets: smoke (128 bytes, few steps, minutes), cpu (configs/lm_stdlib.py, 512 bytes, hours on 2 cores), full
    (the same at 2048, three seeds, a GPU).
Learning rates: those of the recipes; that of configs/continue_long.py is a tenth.
Every run is read at the same row lengths, with mitigations switched on one at a time; then it goes on
training at eight times its length (state carried where it is bounded, YaRN where attention reaches all) and
is read again.
"""

from configs.study import Arm, Examination, Study

FACTOR = 8  # of the continued training
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
PROBE = "length_extrapolation"
NO_SLIDING = f"{PROBE}.sliding_factor=0.0"  # of runs as they were trained only


def get_study(preset: str = "smoke") -> Study:
    """Raises ValueError for a preset that does not exist."""
    quiet = {"train.baselines": False, "train.sample_length": 0}
    if preset == "smoke":
        short = {"train.steps": 300, "train.eval_every": 0, "task.eval_batches": 20, "checkpoint.every": 0}
        size = {"task.seq_len": 128, "task.batch_size": 16}
        arms = _arms(("mamba2", "attention"), 128, (0,), quiet | short | size, rows=16)
    elif preset == "cpu":
        arms = _arms(("mamba2", "attention", "hybrid"), 512, (0,), quiet, rows=64)
    elif preset == "full":
        size = {"task.seq_len": 2048, "task.batch_size": 32, "train.steps": 20_000}
        arms = _arms(("mamba2", "attention", "hybrid"), 2048, (0, 1, 2), quiet | size, rows=256)
    else:
        raise ValueError(f"configs/sweeps/length_extrapolation.py:{preset}: use smoke, cpu or full")
    return Study(
        name=f"length_extrapolation:{preset}",
        question=(
            "What becomes of the loss of a byte in texts longer than those of training, and what mends it: "
            "switches on the trained model, or training on longer text?"
        ),
        analysis="length",
        arms=tuple(arms),
    )


def _arms(variants, length, seeds, overrides, rows) -> list[Arm]:
    settings = (f"{PROBE}.rows={rows}", f"{PROBE}.factors={list(FACTORS)}")
    arms = []
    for variant in variants:
        plain = Examination((PROBE, "loss_by_position"), settings)
        mended = [
            Examination((PROBE,), (*settings, NO_SLIDING), changes, name, calibrated=name == "longmamba")
            for name, changes in _mitigations(variant, length).items()
        ]
        common = {"metric": "validation/bits_per_byte", "seeds": seeds}
        config = f"configs/lm_stdlib.py:{variant}"
        factors = {"architecture": variant}
        examinations = (plain, *mended)
        arms.append(Arm(variant, config, overrides, factors, examinations=examinations, **common))
        same = [factor / FACTOR for factor in FACTORS]  # the same row lengths
        again = Examination((PROBE,), (settings[0], f"{PROBE}.factors={same}", NO_SLIDING))
        arms.append(
            Arm(
                name=f"{variant}_longer",
                config=f"configs/continue_long.py:{{source}},{FACTOR * length}",
                factors=factors | {"longer": True},
                source=variant,
                examinations=(again,),
                **common,
            )
        )
    return arms


def _mitigations(variant: str, length: int) -> dict[str, tuple[str, ...]]:
    """Overrides by name; of a hybrid both its kinds of layers have theirs."""
    states = {
        "forget_more_remember_less": (
            "model.mamba2.mitigation.decay_factor=0.9999",
            "model.mamba2.mitigation.insert_factor=0.75",
        ),
        "state_window": (f"model.mamba2.mitigation.window={length}",),
        "longmamba": ("model.mamba2.dt_filter.scale=1.0",),
    }
    rope = "model.attention.rope"
    stretched = (f"{rope}.scaling=yarn", f"{rope}.factor=8.0", f"{rope}.original_max_position={length}")
    caches = {"yarn_8x": stretched, "attention_window": (f"model.attention.window={length}",)}
    return {"mamba2": states, "attention": caches, "hybrid": states | caches}[variant]
