"""Another run goes on at a longer context: eight times its own, or what is given.

Command: ``python train.py --config=configs/continue_long.py:runs/hybrid,4096 --workdir=runs/hybrid_4096``
    (RUN, RUN@STEP, RUN,LENGTH or RUN@STEP,LENGTH). Compare with the run as it is, at the same length.
Hardware: that of the run; a batch keeps its number of tokens. Metric: validation bits per byte
    1.532 in rows of 4096 (lm_stdlib:attention, seed 0, 4096; 2.834 without).

Attention with RoPE to all of the past: YaRN (arXiv:2309.00071) stretches the rotations from the length they
were trained at; ``--config.model.attention.rope.scaling=linear`` (or ntk) takes another (``model.cca`` has
its own). Attention in a window no longer than that, ALiBi, and recurrent mixers need nothing. Learned
positions: the table grows, its new rows start fresh. Without attention to all of the past the state is
carried from batch to batch (truncated back-propagation), so that what a row remembers is not bounded by its
length.
"""

import math

from configs.base import Experiment
from configs.hmt import HMTExperiment
from configs.saved import from_json
from runtime import run_record
from runtime.schedule import ScheduleConfig
from runtime.warm_start import source_of

FACTOR = 8
RATE = 0.1  # of the run's peak learning rates
STEPS = 0.1  # of the run's updates


def get_config(arg: str = "") -> Experiment:
    """Raises ValueError for an argument that is not RUN[@STEP][,LENGTH], or a length that is no longer."""
    source, _, length = arg.partition(",")
    text = run_record.load_config(source_of(source)[0]) if source else None
    if text is None or (length and not length.isdecimal()):
        found = "there is no config.json in it" if source and text is None else "expected RUN[@STEP][,LENGTH]"
        raise ValueError(f"configs/continue_long.py:{arg}: {found}; RUN is the workdir of a run")
    config = from_json(text, f"{source}/config.json")
    before = config.task.seq_len
    after = int(length) if length else FACTOR * before
    if after <= before:
        raise ValueError(f"configs/continue_long.py:{arg}: {source} has task.seq_len={before}; give more")
    config.name, config.init_from = f"{config.name} at {after}", source
    _lengthen_task(config, before, after)
    if not isinstance(config, HMTExperiment):  # whose positions are those of a segment
        _lengthen_positions(config, before, after)
    config.optim.lr, config.optim.muon_lr = RATE * config.optim.lr, RATE * config.optim.muon_lr
    for group in config.optim.groups.values():
        group.lr = None if group.lr is None else RATE * group.lr
    config.optim.schedule = ScheduleConfig(kind="cosine", warmup_fraction=0.1, end_factor=0.1)
    config.train.steps = max(round(STEPS * config.train.steps), 10)
    config.train.eval_every = max(config.train.steps // 4, 1)
    config.checkpoint.every = config.train.eval_every
    config.train.freeze, config.train.unfreeze = (), ()
    return config


def _lengthen_task(config: Experiment, before: int, after: int) -> None:
    """Longer and fewer rows; the state is carried on where it is bounded."""
    task = config.task
    rows = task.eval_batch_size or task.batch_size
    task.eval_batch_size = max(rows * (task.eval_seq_len or before) // after, 1)
    task.batch_size = max(task.batch_size * before // after, 1)
    task.seq_len = task.eval_seq_len = after
    config.optim.accumulation = math.gcd(config.optim.accumulation, task.batch_size)
    task.carry_state = not config.model.state_grows
    if isinstance(config, HMTExperiment):  # whose rows must end with a segment
        task.carry_state = task.packing == "stream" and after % config.model.memory.segment == 0


def _lengthen_positions(config: Experiment, before: int, after: int) -> None:
    """Learned positions for every token; rotations stretched where attention reaches further than it did."""
    model = config.model
    if model.max_positions is not None:
        model.max_positions = max(model.max_positions, after)
    for symbol, layer in (("*", model.attention), ("c", model.cca)):
        rope = layer.rope
        trained = rope.original_max_position or round(before / rope.factor)
        reach = after if layer.window is None or symbol == "c" else min(layer.window, after)
        if symbol in model.layers and layer.position == "rope" and reach > trained:
            rope.scaling, rope.factor, rope.original_max_position = "yarn", reach / trained, trained
