"""How Activation Beacon condenses: its settings, and the condensing ratio of every window.

Zhang et al. 2024, "Long Context Compression with Activation Beacon", arXiv:2401.03462. A window of w tokens
with ratio alpha leaves w / alpha beacons. Ratios are a cyclic table by window, so that how many beacons stand
before a window has a closed form: a piece of a document can be laid out without looking at what came before.
"""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

VARIANTS = ("interleaved", "step-expansion", "segmentation", "full-coverage")
DRAWN = ("step-random", "instance-random")
ADAPTIVE = "adapt-"


@dataclasses.dataclass
class BeaconConfig:
    """What is condensed into how many beacons.

    Attributes:
        window: w, raw tokens that are condensed together; they see each other and the beacons before them.
        stride: from window to window; None or ``window``, nothing else works.
        ratios: alpha in training, raw tokens a beacon; each divides ``window``.
        mix: which of ``ratios`` a window gets: "step-random" draws for every window, "instance-random" for
            every row, "sequence" takes one after another, "adapt-F" as in evaluation.
        eval_ratios: the same outside training; () for ``ratios``, (0,) for the backbone without beacons.
        eval_mix: "sequence", or "adapt-F": the smallest ratio that keeps a text and F tokens more within
            ``positions``, else the largest.
        variant: "interleaved": a beacon follows every alpha raw tokens and all is causal (the published
            method). The others are the first version, where raw tokens see no beacon of their own window and
            beacons not each other. Beacon i of a window sees its tokens 1..i alpha ("step-expansion"),
            (i-1) alpha + 1..i alpha ("segmentation") or all ("full-coverage").
        attend_previous: whether beacons see the beacons of earlier windows (False: first version only).
        own_out: beacons have their own output projection too, as in the first version.
        sinks: first tokens of a document whose keys and values are kept beside the beacons.
        positions: largest rotary positions that the backbone can do with, None for no limit.
        first_window_loss: whether the tokens of a document's first window count in the training loss, as in
            the published code; in the paper they do not.
        init_id: the beacon embedding starts as this id's, None for the last id (the byte separator).
    """

    window: int = 1024
    stride: int | None = None
    ratios: tuple[int, ...] = (2, 4, 8, 16, 32)
    mix: str = "step-random"
    eval_ratios: tuple[int, ...] = (8,)
    eval_mix: str = "sequence"
    variant: str = "interleaved"
    attend_previous: bool = True
    own_out: bool = False
    sinks: int = 0
    positions: int | None = None
    first_window_loss: bool = True
    init_id: int | None = None

    @property
    def interleaved(self) -> bool:
        """Whether beacons stand between the tokens, and not all at the end of a window."""
        return self.variant == "interleaved"

    @property
    def evaluated(self) -> tuple[int, ...]:
        """The ratios outside training."""
        return self.eval_ratios or self.ratios

    @property
    def plain(self) -> bool:
        """Whether nothing is condensed outside training."""
        return self.evaluated == (0,)

    @property
    def share(self) -> float:
        """Beacons a raw token, at the mean of the training ratios."""
        return sum(1 / ratio for ratio in self.ratios) / len(self.ratios)

    def validate(self) -> None:
        """Raises ValueError naming the first field whose value cannot work, and what would."""
        at = "model.beacon"
        if self.window < 1:
            raise ValueError(f"{at}.window={self.window} must be at least 1")
        if self.stride not in (None, self.window):
            raise ValueError(
                f"{at}.stride={self.stride}: windows follow one another without overlap; use None or "
                f"{at}.window={self.window}"
            )
        self._validate_ratios()
        for field, mixes in (("mix", (*DRAWN, "sequence")), ("eval_mix", ("sequence",))):
            mix = getattr(self, field)
            if mix not in mixes and _future(mix) is None:
                raise ValueError(f"{at}.{field}={mix!r} is unknown; use one of {mixes} or 'adapt-1024'")
            if _future(mix) is not None and self.positions is None:
                raise ValueError(f"{at}.{field}={mix!r} needs {at}.positions, those the backbone can do with")
        if self.variant not in VARIANTS:
            raise ValueError(f"{at}.variant={self.variant!r} is unknown; use one of {VARIANTS}")
        if self.interleaved and not self.attend_previous:
            raise ValueError(f"{at}.attend_previous=False needs a {at}.variant of the first version")
        smallest = min(r for r in (*self.ratios, *self.evaluated) if r)
        if not 0 <= self.sinks <= smallest:
            raise ValueError(
                f"{at}.sinks={self.sinks} must lie in 0..{smallest}, the tokens before the first beacon"
            )
        needed = self.sinks + self.window + self.window // smallest
        if self.positions is not None and needed > self.positions:
            raise ValueError(
                f"{at}.window={self.window} with its beacons needs {needed} positions, but {at}.positions="
                f"{self.positions}; use a shorter window or larger ratios"
            )

    def _validate_ratios(self) -> None:
        for field in ("ratios", "eval_ratios"):
            ratios = getattr(self, field)
            if field == "ratios" and not ratios:
                raise ValueError("model.beacon.ratios=() is empty; give at least one ratio")
            if field == "eval_ratios" and ratios == (0,):
                continue
            for ratio in ratios:
                if not 1 <= ratio <= self.window or self.window % ratio:
                    valid = [n for n in range(1, self.window + 1) if self.window % n == 0]
                    raise ValueError(
                        f"model.beacon.{field} has {ratio}, which does not divide model.beacon.window="
                        f"{self.window}; those that do are {', '.join(map(str, valid))}"
                        + ("; or (0,) alone, for no beacons" if field == "eval_ratios" else "")
                    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ratios:
    """The ratio of window g of row b is ``table[b, g % n]``.

    Attributes:
        table: int32 [B, n], or [1, n] where rows do not differ.
        window: w (static).
        smallest: a lower bound of the table (static): what arrays are made large enough for.
    """

    table: Int[Array, "R n"]
    window: int = dataclasses.field(metadata={"static": True})
    smallest: int = dataclasses.field(metadata={"static": True})

    def of(self, windows: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """alpha of each window."""
        return self._look_up(self.table, windows % self.table.shape[1])

    def before(self, windows: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """How many beacons the windows before each window leave."""
        counts = self.window // self.table
        sums = jnp.cumsum(counts, axis=1)
        turns, index = windows // counts.shape[1], windows % counts.shape[1]
        return turns * sums[:, -1:] + self._look_up(sums - counts, index)

    def _look_up(self, table: Int[Array, "R n"], index: Int[Array, "B T"]) -> Int[Array, "B T"]:
        return jnp.take_along_axis(jnp.broadcast_to(table, (index.shape[0], table.shape[1])), index, axis=1)


def evaluation_table(config: BeaconConfig, length: int) -> Int[np.ndarray, " n"]:
    """Ratios by window, cyclic, for texts of up to ``length`` tokens outside training."""
    return _chosen(config, config.evaluated, config.eval_mix, length)


def evaluation_ratios(config: BeaconConfig, length: int) -> Ratios:
    """:func:`evaluation_table` for a whole text of ``length`` tokens."""
    table = evaluation_table(config, length)
    return Ratios(jnp.asarray(table[None]), config.window, int(table.min()))


def training_ratios(config: BeaconConfig, batch: int, length: int, key: Array | None) -> Ratios:
    """Ratios of a training batch of rows of ``length`` tokens.

    Raises:
        ValueError: ``mix`` draws at random and there is no ``key``.
    """
    smallest = min(config.ratios)
    if config.mix not in DRAWN:
        table = _chosen(config, config.ratios, config.mix, length)
        return Ratios(jnp.asarray(table[None]), config.window, smallest)
    if key is None:
        raise ValueError(f"model.beacon.mix={config.mix!r} draws ratios: training needs a PRNG key")
    windows = -(-length // config.window)
    shape = (1, windows) if config.mix == "step-random" else (batch, 1)
    drawn = jax.random.choice(key, jnp.asarray(config.ratios, jnp.int32), shape)
    return Ratios(drawn, config.window, smallest)


def beacons_of(config: BeaconConfig, length: int) -> int:
    """Beacons that ``length`` tokens leave outside training, those of the unfinished window included."""
    table = evaluation_table(config, length)
    full, rest = divmod(length, config.window)
    ratios = table[np.arange(full + 1) % len(table)]
    unfinished = 0 if config.variant == "full-coverage" else rest // int(ratios[-1])
    return int((config.window // ratios[:-1]).sum()) + unfinished


def _chosen(config: BeaconConfig, ratios: tuple[int, ...], mix: str, length: int) -> Int[np.ndarray, " n"]:
    future = _future(mix)
    if future is None:
        return np.array(ratios, np.int32)
    # The memory of a text of n tokens and a last window: (n - w) / alpha + w positions at least.
    assert config.positions is not None
    room = config.positions - config.window
    fits = [r for r in sorted(ratios) if room * r + config.window >= length + future]
    return np.array([fits[0] if fits else max(ratios)], np.int32)


def _future(mix: str) -> int | None:
    """F of "adapt-F", else None."""
    digits = mix.removeprefix(ADAPTIVE)
    return int(digits) if mix.startswith(ADAPTIVE) and digits.isdecimal() else None
