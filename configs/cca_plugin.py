"""A run with full attention goes on with core-context-aware attention, at the length it was trained at.

Command: ``python train.py --config=configs/cca_plugin.py:runs/attention --workdir=runs/attention_cca``
    (RUN or RUN@STEP, and optionally GROUP,WINDOW: ``runs/attention@3600,8,64``)
Hardware: that of the run. Metric: validation bits per byte of lm_stdlib:attention, seed 0, after it: 1.652
    (``RUN,8,128``: 1.621; ``RUN,16,512``, which is full attention: 1.603).

Every parameter is loaded and none is new; a tenth of the run's updates at a tenth of its rate. All of them
train; the paper also trains the projections of queries, keys and values alone,
``--config.train.unfreeze='("*/q/kernel","*/k/kernel","*/v/kernel")'``. With ``--config.train.steps=1
--config.optim.lr=1e-12 --config.optim.muon_lr=1e-12`` its evaluation is of the swap alone.
"""

from configs.base import Experiment
from configs.saved import from_json
from layers.cca import CCAConfig
from runtime import run_record
from runtime.schedule import ScheduleConfig
from runtime.warm_start import source_of

GROUP_SIZE = 16
WINDOWS = 8  # the run's sequence length is this many windows
RATE, STEPS = 0.1, 0.1  # of the run's peak learning rates, and of its updates


def get_config(arg: str = "") -> Experiment:
    """Raises ValueError for an argument that is not RUN[@STEP][,GROUP,WINDOW], or a run without attention."""
    where = f"configs/cca_plugin.py:{arg}"
    source, *sizes = arg.split(",")
    text = run_record.load_config(source_of(source)[0]) if source else None
    if text is None or len(sizes) not in (0, 2) or not all(size.isdecimal() for size in sizes):
        missing = source and text is None
        found = "there is no config.json in it" if missing else "expected RUN[@STEP][,GROUP,WINDOW]"
        raise ValueError(f"{where}: {found}; RUN is the workdir of a run")
    config = from_json(text, f"{source}/config.json")
    model = config.model
    if not isinstance(config, Experiment) or "*" not in model.layers or model.attention.window is not None:
        raise ValueError(f"{where}: {source} is no language model with full attention (pattern letter '*')")
    window = max(config.task.seq_len // WINDOWS, GROUP_SIZE)
    group_size, window = (int(size) for size in sizes) if sizes else (GROUP_SIZE, window)
    model.cca = CCAConfig.like(model.attention, group_size=group_size, window=window)
    model.pattern = model.pattern.replace("*", "c")
    config.name, config.init_from = f"{config.name}, CCA", source
    config.optim.lr, config.optim.muon_lr = RATE * config.optim.lr, RATE * config.optim.muon_lr
    for group in config.optim.groups.values():
        group.lr = None if group.lr is None else RATE * group.lr
    config.optim.schedule = ScheduleConfig(kind="constant", warmup_fraction=0.02)
    config.train.steps = max(round(STEPS * config.train.steps), 10)
    config.train.eval_every = max(config.train.steps // 4, 1)
    config.checkpoint.every = config.train.eval_every
    config.train.freeze, config.train.unfreeze = (), ()
    return config
