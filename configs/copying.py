"""Copying: after a delay, selective, of strings (Repeat After Me), of n-grams, and MAD's in-context recall.

Command: ``python train.py --config=configs/copying.py:mamba,mamba --workdir=runs/selective``
What: smoke, delay, mamba, mad, repeat, prefix, suffix, mad_recall, mad_noisy. Models as in configs/mqar.py.
Hardware: 2 CPU cores for smoke (a minute); a GPU for the rest.
Metric: validation/accuracy and validation/exact_match (of whole strings): smoke 0.68 (attention), 0.98
    (hybrid), 0.83 (mamba2), 0.51 (s4d), seed 0. Published, selective copying of 16 tokens among 4096
    (arXiv:2312.00752): S6 97.0 %, Mamba 99.8 %, S4 18.3 %.
"""

from configs.recall import RecallExperiment, experiment, parse, small_model
from tasks.recall import RecallTaskConfig
from tasks.recall.copying import CopyingSpec
from tasks.recall.in_context import InContextSpec
from tasks.recall.repeat import RepeatSpec

# Training sizes, evaluation sizes, batch, steps, learning rate.
STRINGS = (((220, 50),), tuple((2 * n + 10, n) for n in (50, 100, 200, 300)), 8, 20_000, 1e-4)
RECIPES = {
    "smoke": (((24, 6), (32, 10), (48, 18)), ((24, 6), (32, 10), (48, 18), (64, 26)), 32, 2000, 3e-3),
    "delay": (((120, 10),), (), 64, 20_000, 1e-3),
    "mamba": (((4112, 16),), (), 64, 400_000, 1e-4),
    "mad": (((256, 16),), (), 128, 20_000, 5e-4),
    "repeat": STRINGS,
    "prefix": STRINGS,
    "suffix": STRINGS,
    "mad_recall": (((128, 8),), (), 128, 20_000, 5e-4),
    "mad_noisy": (((128, 8),), (), 128, 20_000, 5e-4),
}
LAWS = {
    "smoke": RecallTaskConfig(name="repeat", repeat=RepeatSpec(letters=8, shortest=3)),
    "delay": RecallTaskConfig(name="copying", copying=CopyingSpec("classic", 10)),
    "mamba": RecallTaskConfig(name="copying", copying=CopyingSpec("selective", 16)),
    "mad": RecallTaskConfig(name="copying", copying=CopyingSpec("mad_selective", 16)),
    "repeat": RecallTaskConfig(name="repeat"),
    "prefix": RecallTaskConfig(name="repeat", repeat=RepeatSpec("prefix")),
    "suffix": RecallTaskConfig(name="repeat", repeat=RepeatSpec("suffix")),
    "mad_recall": RecallTaskConfig(name="in_context", loss="all"),
    "mad_noisy": RecallTaskConfig(name="in_context", in_context=InContextSpec(32, 16, 0.2), loss="all"),
}


def get_config(argument: str = "smoke,hybrid") -> RecallExperiment:
    """Raises ValueError for an argument that is not WHAT[,MODEL]."""
    what, model = parse("copying", argument, list(RECIPES))
    train, held_out, batch, steps, lr = RECIPES[what]
    # A copy: the recipes are shared.
    task = RecallTaskConfig(**{**vars(LAWS[what]), "train_sizes": train, "eval_sizes": held_out})
    task.batch_size = batch
    width = 64 if what in ("smoke", "mamba") else 128
    network = small_model(model, task.law.vocab_size, width)
    return experiment(f"copying {what}, {model}", network, task, steps=steps, lr=lr)
