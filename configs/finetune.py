"""Another run goes on with other text, at its own length: a run made from a published checkpoint, most often.

Command: ``python train.py --config=configs/finetune.py:runs/llama --workdir=runs/llama_code
    --config.task.source=corpus`` (RUN or RUN@STEP; ``,lora`` after it trains adapters alone)
Hardware: that of the run. Metric: not yet recorded.

The corpus is to have the run's tokenizer: ``python -m tools.prepare --source=TEXT
--tokenizer=runs/llama/tokenizer.json --out=corpus``. All parameters train at 1e-5, or adapters of rank 16 at
2e-4.
"""

import dataclasses

from configs.base import Experiment
from configs.saved import from_json
from models.lora import LoRAConfig
from runtime import run_record
from runtime.optimizer import OptimConfig
from runtime.schedule import ScheduleConfig
from runtime.warm_start import InitConfig, source_of

RATE, ADAPTER_RATE = 1e-5, 2e-4
LORA = LoRAConfig(rank=16, alpha=32.0)


def get_config(arg: str = "") -> Experiment:
    """Raises ValueError for an argument that is not RUN[@STEP][,lora]."""
    source, _, how = arg.partition(",")
    text = run_record.load_config(source_of(source)[0]) if source else None
    if text is None or how not in ("", "lora"):
        missing = source and text is None
        found = "there is no config.json in it" if missing else "expected RUN[@STEP] or RUN[@STEP],lora"
        raise ValueError(f"configs/finetune.py:{arg}: {found}; RUN is the workdir of a run")
    config = from_json(text, f"{source}/config.json")
    config.name, config.init_from, config.init = f"{config.name}, tuned", source, InitConfig()
    config.lora = dataclasses.replace(LORA) if how else config.lora
    config.task.vocab_size = None  # a prepared corpus has its own
    config.optim = OptimConfig(
        lr=ADAPTER_RATE if how else RATE,
        b2=0.95,
        schedule=ScheduleConfig(kind="cosine", warmup_fraction=0.03, end_factor=0.1),
    )
    config.train.steps = 1000
    config.train.eval_every = config.checkpoint.every = 250
    config.train.freeze, config.train.unfreeze = (), ()
    return config
