"""Phonebook look-up in bytes: short books, then longer ones than in training.

Command: ``python train.py --config=configs/phonebook.py:standard,hybrid --workdir=runs/phonebook`` (standard,
    reversed, many; smoke for a CPU). Models as in configs/mqar.py.
Hardware: 2 CPU cores for smoke; a GPU for the rest.
Metric: validation/accuracy, of digits, and validation/exact_match, of all numbers asked for. Published
    (arXiv:2406.07887): pure Mamba(-2) fails in books above 500 tokens, hybrids up to the training length do
    not; with the name announced before the book, state-space models do better.
"""

from configs.recall import RecallExperiment, experiment, parse, small_model
from tasks.recall import RecallTaskConfig
from tasks.recall.phonebook import PhonebookSpec

LAWS = {
    "standard": PhonebookSpec(),
    "reversed": PhonebookSpec(order="reversed", shots=0),
    "many": PhonebookSpec(shots=0, asked=8),
    "smoke": PhonebookSpec(shots=0),
}


def get_config(argument: str = "smoke,hybrid") -> RecallExperiment:
    """Raises ValueError for an argument that is not ORDER[,MODEL]."""
    order, model = parse("phonebook", argument, list(LAWS))
    law = LAWS[order]
    smoke = order == "smoke"
    entries = (2, 4) if smoke else (10, 20, 40)
    more = (2, 4, 8) if smoke else (10, 20, 40, 80, 160)
    task = RecallTaskConfig(
        name="phonebook",
        phonebook=PhonebookSpec(**vars(law)),
        train_sizes=_sizes(law, entries),
        eval_sizes=_sizes(law, more),
        eval_rows=128 if smoke else 256,
        batch_size=16 if smoke else 32,
        loss="all",
    )
    network = small_model(model, task.law.vocab_size, 64 if smoke else 128)
    steps = 2000 if smoke else 20_000
    return experiment(f"phonebook {order}, {model}", network, task, steps=steps, lr=2e-3 if smoke else 5e-4)


def _sizes(law: PhonebookSpec, entries: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Rows just long enough, in multiples of 64 bytes."""
    return tuple((-(-law.fitted(0, n)[0] // 64) * 64, n) for n in entries)
