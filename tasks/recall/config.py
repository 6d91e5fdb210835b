"""Which recall task, of which sizes, in which order."""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses

from tasks.recall.copying import CopyingSpec
from tasks.recall.in_context import InContextSpec
from tasks.recall.induction import InductionSpec
from tasks.recall.mqar import MQARSpec
from tasks.recall.phonebook import PhonebookSpec
from tasks.recall.repeat import RepeatSpec
from tasks.recall.types import Generator

Size = tuple[int, int]
NAMES = ("mqar", "copying", "repeat", "induction", "phonebook", "in_context")
LOSSES = ("answers", "all")
SLICES = ("size", "distance")


@dataclasses.dataclass
class RecallTaskConfig:
    """Generated rows in batches; a size is (tokens of a row, items to remember), as each law has them.

    Attributes:
        name: which of the laws below it: "mqar", "copying", ...
        train_sizes: of training rows; a batch has one of them.
        train_rows: rows of each size an epoch; one number for all sizes, or one for each.
        fresh: every epoch has new rows; else the same ones in another order.
        starts: the step from which each size is trained on, ascending from 0; () for all from the start.
        keep_started: sizes that have started stay in the mix; else each replaces the one before.
        eval_sizes: of held-out rows, () for those of training; ``eval_rows`` of each.
        batch_size: B, rows of the longest size; ``eval_batch_size`` of held-out rows, None for the same.
        equal_tokens: batches of shorter rows have as many more of them, where that divides.
        one_length: shorter rows are padded to the longest: one program to compile, more to compute.
        loss: "answers", or "all": the next tokens too (MAD). Accuracy is of the answers alone.
        slices: accuracy of held-out rows apart by "size", "distance" (in powers of two), or both.
        seed: of the training rows.
    """

    name: str = "mqar"
    mqar: MQARSpec = dataclasses.field(default_factory=MQARSpec)
    copying: CopyingSpec = dataclasses.field(default_factory=CopyingSpec)
    repeat: RepeatSpec = dataclasses.field(default_factory=RepeatSpec)
    induction: InductionSpec = dataclasses.field(default_factory=InductionSpec)
    phonebook: PhonebookSpec = dataclasses.field(default_factory=PhonebookSpec)
    in_context: InContextSpec = dataclasses.field(default_factory=InContextSpec)
    train_sizes: tuple[Size, ...] = ((64, 4),)
    train_rows: tuple[int, ...] = (100_000,)
    fresh: bool = True
    starts: tuple[int, ...] = ()
    keep_started: bool = False
    eval_sizes: tuple[Size, ...] = ()
    eval_rows: int = 512
    batch_size: int = 64
    eval_batch_size: int | None = None
    equal_tokens: bool = True
    one_length: bool = False
    loss: str = "answers"
    slices: tuple[str, ...] = ("size",)
    seed: int = 0

    @property
    def law(self) -> Generator:
        """Raises ValueError for a name that does not exist."""
        if self.name not in NAMES:
            raise ValueError(f"task.name={self.name!r} is unknown; use one of {', '.join(NAMES)}")
        return getattr(self, self.name)

    @property
    def evaluated(self) -> tuple[Size, ...]:
        """Sizes of held-out rows."""
        return tuple(self.eval_sizes or self.train_sizes)

    def validate(self) -> None:
        """Raises ValueError naming the first field whose value cannot work, and what would."""
        law, count = self.law, len(self.train_sizes)
        for field, sizes in (("train_sizes", self.train_sizes), ("eval_sizes", self.evaluated)):
            if not sizes:
                raise ValueError(f"task.{field} is empty; give sizes such as ((64, 4),)")
            for length, items in sizes:
                try:
                    law.check(length, items)
                except ValueError as error:
                    raise ValueError(
                        f"task.{field} has ({length}, {items}); task.{self.name}: {error}"
                    ) from error
        if len(self.train_rows) not in (1, count) or min(self.train_rows) < self.batch_size:
            raise ValueError(
                f"task.train_rows={self.train_rows} should be one number, or {count} for as many sizes, each "
                f"at least task.batch_size={self.batch_size}"
            )
        rising = all(a < b for a, b in zip(self.starts, self.starts[1:]))
        if self.starts and (len(self.starts) != count or self.starts[0] != 0 or not rising):
            raise ValueError(f"task.starts={self.starts} should be {count} steps, one a size, rising from 0")
        for field, least in (("batch_size", 1), ("eval_rows", 1), ("eval_batch_size", 1)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise ValueError(f"task.{field}={value} must be at least {least}")
        if self.loss not in LOSSES or not set(self.slices) <= set(SLICES):
            raise ValueError(
                f"task.loss={self.loss!r} should be one of {LOSSES}, and task.slices={self.slices} some of "
                f"{SLICES}"
            )
