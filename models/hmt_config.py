"""The shape of a language model with a hierarchical memory (HMT, arXiv:2405.06067)."""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses

from models.config import LMConfig

RECALLS = ("attention", "last", "none")
QUERIES = ("current", "previous")


@dataclasses.dataclass
class MemoryConfig:
    """How a document is cut into segments, and what a segment is told of those before it.

    Attributes:
        segment: S, fresh tokens of a segment.
        sensory: k, how many of the last tokens of the segment before are read again; 0 for none.
        recall: where the prompt P_n of segment n comes from. "attention": the long-term memory (HMT, the
            paper's stage 2); "last": the memory of segment n - 1 (its stage 1, and with ``sensory`` 0 RMT,
            the recurrent memory transformer); "none": nowhere, it is P_0 throughout. No parameter depends on
            it, so that one checkpoint can be read with any.
        query: what the long-term memory is asked with, j tokens. "current": the first j of the segment itself
            (the paper), so that which memories it recalls depends on tokens to come; "previous": the last j
            of the segment before, so that nothing does.
        summary_fraction: f, j = round(S f).
        queue: Nq, how many memories are kept, the newest.
        recall_dim: h, width of the projections W_q and W_k; None for d_model.
        init_std: of the first T and P_0; None for that of the embedding table.
        bptt_depth: no gradient passes into the memories of segments before every such many; None for all.
        documents: in how many documents a row of a training batch may be divided and be read whole: there are
            ceil(L / S) + documents - 1 steps. What these do not reach is left out of the loss, never wrong.
        remat: recompute each segment in the backward pass, and keep its memory only.
    """

    segment: int = 256
    sensory: int = 32
    recall: str = "attention"
    query: str = "current"
    summary_fraction: float = 0.5
    queue: int = 100
    recall_dim: int | None = None
    init_std: float | None = None
    bptt_depth: int | None = None
    documents: int = 1
    remat: bool = True

    @property
    def summarised(self) -> int:
        """j, tokens that the query is made of."""
        return round(self.segment * self.summary_fraction)

    @property
    def slots(self) -> int:
        """S + k + 2, the longest input of the backbone."""
        return self.segment + self.sensory + 2

    def validate(self) -> None:
        """Raises ValueError naming the first field whose value cannot work, and what would."""
        least = {"segment": 1, "sensory": 0, "queue": 1, "recall_dim": 1, "bptt_depth": 1, "documents": 1}
        for field, smallest in least.items():
            value = getattr(self, field)
            if value is not None and value < smallest:
                raise ValueError(f"model.memory.{field}={value} must be at least {smallest}")
        for field, known in (("recall", RECALLS), ("query", QUERIES)):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"model.memory.{field}={getattr(self, field)!r} is unknown; use one of {known}"
                )
        if self.sensory >= self.segment:
            raise ValueError(
                f"model.memory.sensory={self.sensory} must be below model.memory.segment={self.segment}, the "
                "tokens it is taken from"
            )
        if not (0 < self.summary_fraction <= 1 and self.summarised):
            raise ValueError(
                f"model.memory.summary_fraction={self.summary_fraction} of model.memory.segment="
                f"{self.segment} tokens is {self.summarised}; it must be in (0, 1] and leave a token"
            )


@dataclasses.dataclass
class HMTConfig(LMConfig):
    """The backbone is the language model of the same config without ``memory``, at the same paths."""

    memory: MemoryConfig = dataclasses.field(default_factory=MemoryConfig)

    @property
    def longest(self) -> int | None:
        """Any number of tokens: positions start again with every segment."""
        return None

    @property
    def state_grows(self) -> bool:
        """Never."""
        return False

    def validate(self) -> None:
        """Raises ValueError naming the first field whose value cannot work, and what would."""
        super().validate()
        self.memory.validate()
        if self.max_positions is not None and self.max_positions < self.memory.slots:
            m = self.memory
            raise ValueError(
                f"model.max_positions={self.max_positions} is below the {m.slots} slots of a segment: "
                f"model.memory.segment={m.segment} + sensory={m.sensory} + 2; raise it, or use segments of "
                f"at most {max(self.max_positions - m.sensory - 2, 0)}"
            )
        if "*" in self.layers and not self.attention.causal:
            raise ValueError(
                "model.attention.causal=False: a memory is carried forward in time; set it to True"
            )
