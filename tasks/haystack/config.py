"""Settings of training on needles in text."""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses

NOISES = ("own", "text", "sentences")
LOSSES = ("all", "answer")


@dataclasses.dataclass
class HaystackConfig:
    """Rows of training batches that are made of prompts with their answers, in the place of text.

    Attributes:
        share: of the rows; 0 for none.
        tasks: names in `tasks.haystack.GENERATORS`, in equal shares.
        noise: what the facts are hidden in: "own", as the task was published; "text" of the run's source (of
            its validation side in evaluation); "sentences" made by rule.
        loss: on "all" tokens of these rows, or on the "answer" and the end after it alone.
        shortest: tokens of the shortest prompts with their answers; 0 for what the tasks need. Lengths are
            log-uniform from there on, and a row holds as many as fit.
        growth_steps: the longest grow from the shortest to task.seq_len in so many steps; 0: as long as rows
            from the start.
        eval_lengths: prompts with their answers of these lengths are evaluated, a held-out set
            "haystack_LENGTH" each; () for task.eval_seq_len, its half, its quarter, ... as far as tasks fit.
        eval_samples: of each length.
        seed: of what is drawn.
    """

    share: float = 0.0
    tasks: tuple[str, ...] = ("stuffed_mamba",)
    noise: str = "sentences"
    loss: str = "all"
    shortest: int = 0
    growth_steps: int = 0
    eval_lengths: tuple[int, ...] = ()
    eval_samples: int = 32
    seed: int = 0
