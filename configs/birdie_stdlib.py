"""Birdie's mixture of objectives (arXiv:2411.01030), or masked input (MEAP, arXiv:2502.07490), on real text.

Command: ``python train.py --config=configs/birdie_stdlib.py:rewarded,mamba2 --workdir=runs/birdie``. What:
    ``mixture`` (equal odds), ``rewarded`` (odds that follow rewards), ``prefix`` (equal odds; half the heads
    of Mamba-2 read what comes before "begin" backward), ``meap``. Then a variant of configs/lm_stdlib.py,
    whose text, size and budget this is.
Hardware: 2 CPU cores. Metric: OBJECTIVE/loss and validation/bits_per_byte (of text as it is); not yet
    recorded.
"""

from configs.base import Experiment
from configs.lm_stdlib import VARIANTS
from configs.lm_stdlib import get_config as lm_stdlib
from tasks.birdie import COUNT, OBJECTIVES
from tasks.mixture import MixtureConfig
from tasks.reward import RewardConfig

MIXTURES = ("mixture", "rewarded", "prefix", "meap")


def get_config(argument: str = "rewarded,mamba2") -> Experiment:
    """Raises ValueError for an argument that is not WHAT[,VARIANT]."""
    what, _, variant = argument.partition(",")
    variant = variant or "mamba2"
    if what not in MIXTURES or variant not in VARIANTS or (what == "prefix" and variant == "attention"):
        raise ValueError(
            f"configs/birdie_stdlib.py:{argument}: expected WHAT[,VARIANT], with WHAT one of "
            f"{', '.join(MIXTURES)} and VARIANT one of {', '.join(VARIANTS)} (prefix: one with Mamba-2)"
        )
    config = lm_stdlib(variant)
    config.name = f"birdie_stdlib:{what},{variant}"
    config.model.vocab_size += COUNT
    config.train.eval_every = config.checkpoint.every = 300
    if what == "meap":
        config.task.mixture = MixtureConfig(mask_share=0.15)
        return config
    config.task.mixture = MixtureConfig(
        objectives=tuple(OBJECTIVES), eval_batches=2, reward=RewardConfig(on=what == "rewarded")
    )
    config.model.mamba2.mitigation.bidirectional_prefix = what == "prefix"
    return config
