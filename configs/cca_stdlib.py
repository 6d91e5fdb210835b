"""Core-context-aware attention beside full attention: same text, same budget, the same parameters.

Command: ``python train.py --config=configs/cca_stdlib.py:cca --workdir=runs/cca`` (or attention; with a
    length, ``cca,2048``, documents are seen in longer pieces and a batch keeps its number of tokens)
Hardware: 2 CPU cores, about ten minutes each at 512 tokens. Metric: not measured
    from scratch; continued from lm_stdlib:attention 1 to 3 % above full attention (RESULTS.md).

The recipe of ``configs/lm_stdlib.py:attention``. A query sees the last 64 tokens and one core for each 16
older ones: of 512 tokens at most 64 + 15 + 27 keys. Another compression is two settings away, in training
(``--config.model.cca.group_size=8 --config.model.cca.window=128``) or of a trained run
(``python -m eval.run --workdir=runs/cca --override=model.cca.group_size=8 --out=runs/cca/eval_8``).
"""

from configs.base import Experiment
from configs.lm_stdlib import get_config as recipe
from layers.cca import CCAConfig

VARIANTS = ("cca", "attention")


def get_config(arg: str = "cca") -> Experiment:
    """Raises ValueError for an argument that is not VARIANT[,LENGTH], or a length that is no multiple."""
    variant, _, length = arg.partition(",")
    if variant not in VARIANTS or (length and not length.isdecimal()):
        raise ValueError(
            f"configs/cca_stdlib.py:{arg}: expected one of {', '.join(VARIANTS)}, or VARIANT,LENGTH"
        )
    config = recipe("attention")
    config.name = f"cca_stdlib:{arg}"
    if variant == "cca":
        config.model.pattern = config.model.pattern.replace("*", "c")
        config.model.cca = CCAConfig.like(config.model.attention, group_size=16, window=64)
    if length:
        task, tokens = config.task, config.task.batch_size * config.task.seq_len
        task.seq_len = int(length)
        if tokens % task.seq_len:
            raise ValueError(
                f"configs/cca_stdlib.py:{arg}: a batch of {tokens} tokens is no multiple of {length}"
            )
        task.batch_size = task.eval_batch_size = tokens // task.seq_len
    return config
