"""Activation Beacon on a small backbone: a plug-in to a run trained here, or both from scratch.

Command: ``python train.py --config=configs/lm_stdlib.py:attention --workdir=runs/attention``, then
    ``python train.py --config=configs/beacon_stdlib.py:runs/attention --workdir=runs/beacon``
    (RUN, RUN@STEP or ``scratch``; ",WINDOW" after it sets the window, a quarter of a row if not given).
Hardware: 2 CPU cores. Metric: validation bits per byte 1.890 (seed 0: worse than truncation, RESULTS.md).
Compare with the backbone, ``eval_ratios=(0,)``, and with texts of one window: ``--probes=condensing``.

Beacons alone are trained on a run (a quarter of its steps, new ratios for every window); from scratch all is.
"""

from configs.base import Experiment
from configs.beacon import BeaconExperiment, with_beacons
from configs.lm_stdlib import get_config as lm_stdlib
from configs.saved import from_json
from layers.beacon_ratios import BeaconConfig
from runtime import run_record
from runtime.optimizer import OptimConfig
from runtime.schedule import ScheduleConfig
from runtime.warm_start import source_of

SCRATCH = "scratch"
STEPS = 0.25  # of the run's updates


def get_config(arg: str = SCRATCH) -> BeaconExperiment:
    """Raises ValueError for an argument that is not RUN[@STEP][,WINDOW] or scratch[,WINDOW]."""
    source, _, window = arg.partition(",")
    if window and not window.isdecimal():
        raise ValueError(f"configs/beacon_stdlib.py:{arg}: {window!r} is no window; expected RUN,WINDOW")
    plain = lm_stdlib("attention") if source == SCRATCH else _config_of(source, arg)
    length = plain.task.seq_len
    beacon = BeaconConfig(
        window=int(window) if window else length // 4,
        ratios=(2, 4, 8),
        eval_ratios=(4,),
        positions=length,
    )
    config = with_beacons(plain, beacon)
    config.name = f"beacon_stdlib:{arg}"
    if source == SCRATCH:
        config.train.unfreeze = ()
        return config
    config.init_from = source
    config.optim = OptimConfig(lr=1e-3, b2=0.98, schedule=ScheduleConfig("linear", warmup_fraction=0.02))
    config.train.steps = max(round(STEPS * plain.train.steps), 10)
    config.train.eval_every = max(config.train.steps // 4, 1)
    config.checkpoint.every = config.train.eval_every
    return config


def _config_of(source: str, arg: str) -> Experiment:
    """The config of the run; a plain language model's."""
    text = run_record.load_config(source_of(source)[0])
    if text is None:
        raise ValueError(
            f"configs/beacon_stdlib.py:{arg}: there is no config.json in {source}; expected the workdir of a "
            f"run, or {SCRATCH}"
        )
    config = from_json(text, f"{source}/config.json")
    if config.kind != Experiment.kind:
        raise ValueError(
            f"configs/beacon_stdlib.py:{arg}: the run is of kind {config.kind!r}, expected a plain "
            f"{Experiment.kind!r}"
        )
    return config
