"""HMT from scratch on long documents: real text, rows of 2, 4 and 8 segments, shorter ones first.

Command: ``python train.py --config=configs/hmt_stdlib.py:hmt --workdir=runs/hmt`` (or rmt, local; ",PATTERN"
    after it sets the backbone, as in ``hmt,M-*-M-``). Facts to remember over segments, in bytes:
    ``--config.task.plant.distances="(300,600,1200)" --config.task.plant.length=4096``
Hardware: 2 CPU cores. Metric: not measured from scratch; on a trained backbone see configs/hmt_plugin.py.

``hmt`` recalls by attention over its memories. ``rmt`` hands one memory on from segment to segment and reads
no token again. ``local`` is the truncated context: of the segments before, nothing. All read segments of 256
bytes; the backbone is the attention model of configs/lm_stdlib.py, which reads 512 at once.
"""

from configs.hmt import HMTExperiment, with_memory
from configs.lm_stdlib import VARIANTS as BACKBONES
from configs.lm_stdlib import get_config as lm_stdlib
from models.hmt_config import MemoryConfig

SEGMENT = 256
# Where a segment's prompt comes from, and how many tokens of the one before it reads again.
MEMORIES = {"hmt": ("attention", 16), "rmt": ("last", 0), "local": ("none", 0)}


def get_config(arg: str = "hmt") -> HMTExperiment:
    """Raises ValueError for a memory that does not exist."""
    name, _, pattern = arg.partition(",")
    if name not in MEMORIES:
        raise ValueError(
            f"configs/hmt_stdlib.py:{arg}: unknown memory; use one of {', '.join(MEMORIES)}, and after a "
            f"comma a pattern such as {BACKBONES['hybrid'][0]}"
        )
    plain = lm_stdlib("attention")
    plain.name = f"hmt_stdlib:{arg}"
    plain.model.pattern = pattern or plain.model.pattern
    recall, sensory = MEMORIES[name]
    memory = MemoryConfig(segment=SEGMENT, sensory=sensory, recall=recall, queue=32, documents=4, remat=False)
    config = with_memory(plain, memory)
    task = config.task
    # As many bytes a batch as the backbone's own config has; every length a power of two.
    task.packing, task.curriculum, task.curriculum_cycles = "buckets", "grow_p2", 1
    task.shortest_seq_len, task.seq_len, task.batch_size = 2 * SEGMENT, 8 * SEGMENT, 2
    task.eval_seq_len, task.eval_batch_size = 8 * SEGMENT, 8
    return config
