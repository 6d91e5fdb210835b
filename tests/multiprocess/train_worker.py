"""``python train.py`` with two additions for tests: every batch is checked, and a signal comes at a step.

``SIGNAL_AT=PROCESS:STEP:NAME`` in the environment, such as ``2:5:SIGKILL``: process 2 sends it to itself
before step 5. Each piece of a batch on this process's devices must be, to the bit, what a process that loads
the whole batch has in its place.
"""

import functools
import os
import signal
import time

import jax
import numpy as np
from absl import app, flags

import train
from runtime.feed import Feed

PROCESS, STEP, NAME = os.environ.get("SIGNAL_AT", "-1:-1:SIGTERM").split(":")
NUMBER = signal.Signals[NAME]


class CheckedFeed(Feed):
    """Compares what it yields with ``whole[step]``."""

    def __init__(self, whole, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.whole, self.checked, self.pause = whole, 0, 0.0

    def __next__(self):
        time.sleep(self.pause)
        step, batch = super().__next__()
        if signal_is_due(step):
            os.kill(os.getpid(), NUMBER)
            # jax looks for the signal once a second, in which a small model is at its end.
            self.pause = 0.2 if jax.process_count() > 1 else 0.0
        for name, wanted in self.whole[step].items():
            for shard in batch[name].addressable_shards:
                np.testing.assert_array_equal(shard.data, wanted[shard.index], err_msg=f"{name}, step {step}")
                self.checked += 1
        return step, batch

    def close(self):
        super().close()
        print(f"{self.checked} pieces of batches as they should be", flush=True)


class CheckedLoop(train.Loop):
    def train(self, state, start):
        whole = self.task.train(slice(0, self.task.config.batch_size))
        train.Feed = functools.partial(CheckedFeed, whole)
        return super().train(state, start)


def signal_is_due(step: int) -> bool:
    return (jax.process_index(), step) == (int(PROCESS), int(STEP))


if __name__ == "__main__":
    train.Loop = CheckedLoop
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(train.main, flags_parser=train.parse_flags)
