"""A run becomes the backbone of an HMT, in the paper's two stages.

Command: ``python train.py --config=configs/hmt_plugin.py:runs/attention,1 --workdir=runs/hmt_1``, then
    ``python train.py --config=configs/hmt_plugin.py:runs/hmt_1,2 --workdir=runs/hmt_2``
    (RUN,STAGE or RUN@STEP,STAGE; stage 2 may start from a plain run too)
Hardware: that of the run. Metric: see RESULTS.md (segments of 118: 1.713 with memory, 1.719 without, seed 0;
    at the segments of this file memory makes no difference). Compare with the run itself, and with
``--config.model.memory.recall=none``.

Stage 1 hands the memory of a segment to the next, over rows of 2 segments; stage 2 recalls from all of them,
over rows of 8. A segment and its memory slots are as long as the rows that the run was trained on. All of the
backbone trains with the memory, at a tenth of its rate. In stage 2 the memory alone trains with
``--config.train.unfreeze='("memory/*",)'``, and beside adapters of the backbone with ``--config.lora.rank=8
--config.lora.alpha=32 --config.train.unfreeze='("base/memory/*",)'``; in stage 1 it is ``memory/prompt``
and no more.
"""

import dataclasses

from configs.base import Experiment
from configs.hmt import HMTExperiment, with_memory
from configs.saved import from_json
from models.hmt_config import MemoryConfig
from runtime import run_record
from runtime.schedule import ScheduleConfig
from runtime.warm_start import InitConfig, source_of

SEGMENTS = {"1": 2, "2": 8}  # of a row, by stage
STEPS = {
    "1": 0.05,
    "2": 0.125,
}  # of the plain run's updates; the paper's are as 200 to 500
RATE = 0.1  # of the run's peak rates


def get_config(arg: str = "") -> HMTExperiment:
    """Raises ValueError for an argument that is not RUN[@STEP],STAGE, or a run that reads no text."""
    where = f"configs/hmt_plugin.py:{arg}"
    source, _, stage = arg.rpartition(",")
    if stage not in SEGMENTS:
        raise ValueError(f"{where}: expected RUN,1 or RUN,2; RUN is the workdir of a run")
    text = run_record.load_config(source_of(source)[0])
    if text is None:
        raise ValueError(f"{where}: there is no config.json in {source}; RUN is the workdir of a run")
    before = from_json(text, f"{source}/config.json")
    if before.kind not in (Experiment.kind, HMTExperiment.kind):
        raise ValueError(
            f"{where}: {source} is of kind {before.kind!r}; expected a language model, or an HMT"
        )
    config = _around(before, stage)
    config.name, config.init_from = f"{before.name}, HMT stage {stage}", source
    return config


def _around(before: Experiment, stage: str) -> HMTExperiment:
    plain = not isinstance(before, HMTExperiment)
    memory = before.model.memory if isinstance(before, HMTExperiment) else _memory_for(before.task.seq_len)
    memory = dataclasses.replace(memory, recall="attention" if stage == "2" else "last", documents=3)
    train = dataclasses.replace(before.train, freeze=(), unfreeze=())
    config = with_memory(dataclasses.replace(before, train=train), memory)
    task, rows = config.task, before.task.batch_size * before.task.seq_len
    task.packing, task.carry_state = "docs", False
    task.seq_len = task.eval_seq_len = SEGMENTS[stage] * memory.segment
    task.batch_size = task.eval_batch_size = max(rows // task.seq_len, 1)
    if plain:
        config.init = InitConfig(exclude=("memory/*",))
        config.optim.lr, config.optim.muon_lr = RATE * config.optim.lr, RATE * config.optim.muon_lr
    config.optim.accumulation = 1
    config.optim.schedule = ScheduleConfig(kind="linear", warmup_fraction=0.05, end_factor=0.5)
    updates = before.train.steps if plain else before.train.steps / STEPS["1"]
    config.train.steps = max(round(STEPS[stage] * updates), 10)
    config.train.eval_every = max(config.train.steps // 4, 1)
    config.checkpoint.every = config.train.eval_every
    return config


def _memory_for(window: int) -> MemoryConfig:
    """Whose slots, S + k + 2, are the window that the backbone was trained with."""
    sensory = min(32, window // 16)
    return MemoryConfig(segment=window - sensory - 2, sensory=sensory, queue=32)
