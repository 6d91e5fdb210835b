"""DeciMamba (arXiv:2406.14528): prompts that become shorter from layer to layer."""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses


@dataclasses.dataclass
class DecimateConfig:
    """Layers after which only the tokens that matter most to them go on.

    Attributes:
        layers: sub-layers of the pattern, counted from 0, that decimate; all Mamba or Mamba-2. () for none.
        base: tokens that the first of them keeps (beside the tail).
        beta: factor from each to the next.
        minimum: tokens that all keep at least.
        tail: last tokens of the prompt that are always kept: the question, and where the answer begins.
    """

    layers: tuple[int, ...] = ()
    base: int = 2000
    beta: float = 0.5
    minimum: int = 20
    tail: int = 16

    def keep(self, stage: int, length: int) -> int:
        """Of ``length`` tokens that may be dropped, how many the ``stage``-th of the layers keeps."""
        return min(length, int(max(min(length, self.base * self.beta**stage), self.minimum)))
