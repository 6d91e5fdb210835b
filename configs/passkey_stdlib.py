"""A small byte model learns to find a passkey in noise, and to model Python beside it.

Command: ``python train.py --config=configs/passkey_stdlib.py:mamba2 --workdir=runs/passkey`` (or attention,
    hybrid; small, two layers of Mamba-2 that learn the passkey and no text; ",D_STATE" after small, mamba2 or
    hybrid sets the states of a channel). From a run of the same variant of configs/lm_stdlib.py:
    ``--config.init_from=runs/mamba2``. By length and depth, in the noise of training:
    ``python -m eval.run --workdir=runs/passkey --probes=passkey --set=passkey.noise=sentences``.
Hardware: 2 CPU cores; small needs one. Metric: ``haystack_LENGTH/exact_match``, of keys that training never
    had; of small see RESULTS.md, of the others not recorded.

Three rows of four, all of small's, are Stuffed Mamba's prompts (arXiv:2410.07145) in sentences made by rule;
they grow longer over the first half of the run. Held-out prompts have once, twice and four times the length
of training rows.
"""

from configs.base import Experiment, TrainConfig
from configs.lm_stdlib import get_config as lm_stdlib
from runtime.checkpoint import CheckpointConfig
from tasks.haystack.config import HaystackConfig

STEPS = 2400
LONGER = 4  # held-out prompts, than rows of training


def get_config(arg: str = "mamba2") -> Experiment:
    """Raises ValueError for an argument that is not VARIANT[,D_STATE]."""
    variant, _, d_state = arg.partition(",")
    config = lm_stdlib("mamba2" if variant == "small" else variant)
    config.name = f"passkey_stdlib:{arg}"
    if d_state:
        if not d_state.isdecimal() or int(d_state) < 1 or "M" not in config.model.layers:
            raise ValueError(
                f"configs/passkey_stdlib.py:{arg}: {d_state!r} is no number of states of {variant}; use "
                "mamba2,16 or the like"
            )
        config.model.mamba2.d_state = int(d_state)
    config.task.haystack = HaystackConfig(share=0.75, growth_steps=STEPS // 2)
    if variant == "small":
        _small(config)
    config.task.eval_seq_len, config.task.eval_batch_size = LONGER * config.task.seq_len, 8
    config.task.eval_batches = 16
    config.checkpoint = CheckpointConfig(every=STEPS // 4)
    config.train = TrainConfig(steps=STEPS, eval_every=STEPS // 4)
    return config


def _small(config: Experiment) -> None:
    """Eight heads of 16 channels: many heads choose better what to keep than few (RESULTS.md)."""
    config.model.d_model, config.model.pattern = 64, "M-M-"
    config.model.mamba2.headdim, config.model.mlp.hidden = 16, 128
    config.task.batch_size = 16
    config.task.haystack.share, config.task.haystack.loss = 1.0, "answer"
