"""The shape of a model, as a config: the mixers it may be made of, and a decoder language model of them."""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses

from layers.attention import AttentionConfig
from layers.cca import CCAConfig
from layers.decimation import DecimateConfig
from layers.dss import DSSConfig
from layers.mamba import MambaConfig
from layers.mamba2 import Mamba2Config
from layers.mlp import MLPConfig
from layers.norm import NORMS
from layers.s4 import S4Config
from layers.s4d import S4DConfig
from layers.s5 import S5Config
from models import pattern as patterns
from models.registry import KINDS

REMAT = ("none", "dots", "full")


@dataclasses.dataclass
class MixerConfigs:
    """A config for each kind of sub-layer that a pattern can name (`models.registry.KINDS`)."""

    mamba2: Mamba2Config = dataclasses.field(default_factory=Mamba2Config)
    mamba: MambaConfig = dataclasses.field(default_factory=MambaConfig)
    s5: S5Config = dataclasses.field(default_factory=S5Config)
    s4: S4Config = dataclasses.field(default_factory=S4Config)
    s4d: S4DConfig = dataclasses.field(default_factory=S4DConfig)
    dss: DSSConfig = dataclasses.field(default_factory=DSSConfig)
    attention: AttentionConfig = dataclasses.field(default_factory=AttentionConfig)
    cca: CCAConfig = dataclasses.field(default_factory=CCAConfig)
    mlp: MLPConfig = dataclasses.field(default_factory=MLPConfig)


@dataclasses.dataclass
class LMConfig(MixerConfigs):
    """Shape of a decoder language model.

    Attributes:
        vocab_size: number of ids, special ids included.
        vocab_multiple: the tables have this multiple of rows, so that a head divides over devices.
        pattern: sub-layers, e.g. "M-M-*-"; "(M-)24" repeats. See ``models/pattern.py``.
        norm: "rms" or "layer".
        tie_embeddings: the head is the transposed embedding table.
        max_positions: number of learned position embeddings, None for none.
        embedding_scale, residual_scale, logits_divisor: factors of the token embeddings, of what every
            sub-layer adds, and 1 over that of the logits (as in Granite; 1 for none).
        dtype: of matmul operands and activations between ops; parameters and dynamics stay float32.
        residual_dtype: of the residual stream.
        init_std: standard deviation of projection weights, None for U(+-1/sqrt(fan_in)).
        rescale_residual: divide residual-writing projections by sqrt(number of sub-layers) at init.
        remat: what the backward pass recomputes: "none", "dots" or "full".
        loss_chunks: pieces of the sequence the cross entropy is computed in, 0 for automatic.
        z_loss: weight of the squared log-normaliser added to the loss.
        decimate: layers that drop tokens of a prompt; none by default.
    """

    vocab_size: int = 257
    vocab_multiple: int = 8
    d_model: int = 256
    pattern: str = "M-M-"
    norm: str = "rms"
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    max_positions: int | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    dtype: str = "float32"
    residual_dtype: str = "float32"
    init_std: float | None = None
    rescale_residual: bool = True
    remat: str = "none"
    loss_chunks: int = 0
    z_loss: float = 0.0
    decimate: DecimateConfig = dataclasses.field(default_factory=DecimateConfig)

    @property
    def padded_vocab_size(self) -> int:
        """V, the rows of the embedding and the columns of the head."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def layers(self) -> str:
        """The pattern with repeats written out."""
        return patterns.parse(self.pattern, "".join(KINDS))

    @property
    def longest(self) -> int | None:
        """Tokens that a document can have, None for any number: it has as many learned positions."""
        return self.max_positions

    @property
    def state_grows(self) -> bool:
        """Whether the state needs room for every token: full attention caches them all, CCA their cores."""
        return "c" in self.layers or ("*" in self.layers and self.attention.window is None)

    @property
    def reads_whole(self) -> bool:
        """Whether a prompt should be read in one piece."""
        return bool(self.decimate.layers)

    def validate(self) -> None:
        """Raises ValueError naming the first field whose value cannot work, and what would."""
        self.decimate.validate(self.layers)
        if self.decimate.layers and type(self) is not LMConfig:
            raise ValueError(
                f"model.decimate.layers={self.decimate.layers}: a model with a memory around it reads in "
                "segments of its own; use layers=()"
            )
        for field, known in (
            ("norm", NORMS),
            ("remat", REMAT),
            ("dtype", ("float32", "bfloat16", "float16", "float64")),
            ("residual_dtype", ("float32", "bfloat16", "float64")),
        ):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"model.{field}={getattr(self, field)!r} is unknown; use one of {sorted(known)}"
                )
        for field in ("vocab_size", "d_model", "vocab_multiple"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field}={getattr(self, field)} must be at least 1")


POOLINGS = ("mean", "last", "max", "cls")
HEADS = ("classes", "tokens")


@dataclasses.dataclass
class ClassifierConfig(MixerConfigs):
    """Shape of an encoder with a head: one label for a sequence, for a pair of them, or for every token.

    Attributes:
        classes: number of labels; of values a token can take when ``head`` is "tokens".
        vocab_size: number of ids; None for continuous inputs of ``channels`` numbers a token.
        pattern: sub-layers, as in `LMConfig`.
        read_both_ways: kinds of causal sub-layers (letters of the pattern) of which a second copy reads from
            the end, e.g. "M". S4, S4D, DSS, S5 and attention have a field of their own for it.
        norm: "batch", "layer" or "rms"; ``batch_momentum`` is the share of its running statistics kept.
        prenorm: x + mixer(norm(x)) and a last norm; else norm(x + mixer(x)).
        dropout: on what each sub-layer adds; ``tie_dropout`` zeroes a feature in all tokens of a row.
        pooling: "mean", "last" or "max" over the real tokens, or "cls": a learned first token.
        pair: two sequences, encoded by the same weights; the head sees [a, b, a - b, a * b].
        head: "classes", or "tokens" for a prediction at every token (self-pretraining).
        max_positions: number of learned position embeddings, None for none.
        init_std, rescale_residual, dtype: as in `LMConfig`.
    """

    classes: int = 10
    vocab_size: int | None = None
    channels: int = 1
    d_model: int = 128
    pattern: str = "(*-)4"
    read_both_ways: str = ""
    norm: str = "layer"
    norm_eps: float = 1e-5
    batch_momentum: float = 0.9
    prenorm: bool = True
    dropout: float = 0.0
    tie_dropout: bool = False
    pooling: str = "mean"
    pair: bool = False
    head: str = "classes"
    max_positions: int | None = None
    init_std: float | None = None
    rescale_residual: bool = False
    dtype: str = "float32"

    @property
    def layers(self) -> str:
        """The pattern with repeats written out."""
        return patterns.parse(self.pattern, "".join(KINDS))

    def validate(self) -> None:
        """Raises ValueError naming the first field whose value cannot work, and what would."""
        _ = self.layers
        for field, known in (
            ("norm", ("batch", *NORMS)),
            ("pooling", POOLINGS),
            ("head", HEADS),
            ("dtype", ("float32", "bfloat16", "float64")),
        ):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"model.{field}={getattr(self, field)!r} is unknown; use one of {sorted(known)}"
                )
        for field in ("classes", "channels", "d_model"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field}={getattr(self, field)} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout} must be at least 0 and below 1")
        if self.pair and self.head == "tokens":
            raise ValueError("model.pair=True has no model.head='tokens'; pretrain with pair=False")
