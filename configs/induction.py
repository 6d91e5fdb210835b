"""Induction heads: trained on 256 tokens, asked at 2^6 to 2^14 (Mamba, arXiv:2312.00752, appendix E).

Command: ``python train.py --config=configs/induction.py:full,mamba --workdir=runs/induction`` (or smoke).
    Longer rows than 2^14: ``--config.task.eval_sizes="((1048576,1),)"``. Models as in configs/mqar.py.
Hardware: 2 CPU cores for smoke; a GPU for the rest.
Metric: validation/accuracy by length. Published: Mamba 100 % to 2^20; H3 80.9 % at 512; attention below 10 %
    from 4096 on.
"""

from configs.recall import RecallExperiment, experiment, parse, small_model
from tasks.recall import RecallTaskConfig


def get_config(argument: str = "smoke,mamba2") -> RecallExperiment:
    """Raises ValueError for an argument that is not full or smoke[,MODEL]."""
    size, model = parse("induction", argument, ["smoke", "full"])
    smoke = size == "smoke"
    task = RecallTaskConfig(
        name="induction",
        train_sizes=((64 if smoke else 256, 1),),
        eval_sizes=tuple((2**n, 1) for n in (range(4, 9) if smoke else range(6, 15))),
        eval_rows=256 if smoke else 64,
        batch_size=16 if smoke else 8,
        eval_batch_size=8,
    )
    lr = 1e-3 if "m" in model.lower() else 2e-4
    steps = 3000 if smoke else 25 * 8192
    network = small_model(model, task.law.vocab_size, 64)
    return experiment(f"induction {size}, {model}", network, task, steps=steps, lr=lr, decay=0.0)
