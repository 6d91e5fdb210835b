"""What simple compressors reach on the very same split: the numbers beside which a model's loss is read.

A byte model that is not below the order-3 n-gram has learned nothing useful; one below xz uses long context.
All numbers are bits per validation byte. As for models, the n-grams also pay for the ends of documents.
"""

from __future__ import annotations

import dataclasses
import lzma
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from tasks.corpus import Corpus
from tasks.manifest import Manifest, read_cache, write_cache
from tasks.tokenizer import ByteTokenizer

_SYMBOLS, _END = ByteTokenizer.vocab_size, ByteTokenizer.separator_id
_LONGEST_ORDER = 6  # keys of order + 1 symbols fit int64: 257^7 < 2^63
_VERSION = 1  # of the cached numbers


@dataclasses.dataclass(frozen=True)
class _Counts:
    """Counts of one order, with sorted keys: pairs (context, symbol), and contexts with N(c) and T(c)."""

    pairs: Int[np.ndarray, " p"]
    pair_counts: Int[np.ndarray, " p"]
    contexts: Int[np.ndarray, " c"]
    totals: Int[np.ndarray, " c"]
    distinct: Int[np.ndarray, " c"]


def reference_bits_per_byte(
    train: Corpus,
    validation: Corpus,
    manifest: Manifest,
    *,
    cache_dir: str = "",
    orders: Sequence[int] = (2, 3),
) -> dict[str, float]:
    """``{"ngram_order_k", ..., "xz", "xz_primed"}``, computed once per manifest and kept in the cache.

    About ten seconds for the standard library, nearly all of it xz.
    """
    data = f"{manifest.digest[:16]}-{train.targets}-{validation.targets}"
    name = f"compressors-v{_VERSION}-{data}-orders-{'-'.join(map(str, orders))}.json"
    known = read_cache(cache_dir, name)
    if known is None:
        bits = ngram_bits_per_byte(train, validation, orders)
        known = {f"ngram_order_{k}": value for k, value in bits.items()} | xz_bits_per_byte(train, validation)
        write_cache(cache_dir, name, known)
    return known


def ngram_bits_per_byte(
    train: Corpus, validation: Corpus, orders: Sequence[int] = (2, 3), *, max_pairs: int = 50_000_000
) -> dict[int, float]:
    """Interpolated Witten-Bell byte n-grams (Witten & Bell 1991), order k = k bytes of context.

        P_k(s | c) = (N(c, s) + T(c) P_{k-1}(s | c')) / (N(c) + T(c)),    P_{-1} = 1 / 257,

    N counts, T(c) the number of distinct symbols seen after c, c' the context without its oldest byte.
    Contexts do not reach across the start of a document. Fitted on the first ``max_pairs`` training pairs
    (about 50 bytes of memory a pair).
    """
    if not orders or min(orders) < 0 or max(orders) > _LONGEST_ORDER:
        raise ValueError(f"n-gram orders must lie in 0..{_LONGEST_ORDER}, got {tuple(orders)}")
    tokens, targets, positions = train.split(max_pairs)[0].pairs()
    held_out, symbols, places = validation.pairs()
    byte_count = max(int(np.sum(symbols != _END)), 1)
    probability = np.full(symbols.shape, 1 / _SYMBOLS)
    bits = {}
    for order in range(max(orders) + 1):
        counts = _count(_contexts(tokens, positions, order) * _SYMBOLS + targets)
        probability = _interpolate(counts, _contexts(held_out, places, order), symbols, probability)
        bits[order] = float(-np.log2(probability).sum() / byte_count)
    return {order: bits[order] for order in orders}


def xz_bits_per_byte(
    train: Corpus, validation: Corpus, *, preset: int = 9, prime_bytes: int = 32 << 20
) -> dict[str, float]:
    """``xz``: the validation bytes compressed alone; ``xz_primed``: what they add behind training bytes.

    Primed is ``len(xz(tail + validation)) - len(xz(tail))`` with the last ``prime_bytes`` of the training
    bytes; together with the validation bytes they should fit the dictionary (64 MiB at preset 9).
    """
    held_out = _text(validation)
    tail = _text(train)[-prime_bytes:]
    sizes = [len(lzma.compress(text, preset=preset)) for text in (held_out, tail + held_out, tail)]
    scale = 8 / max(len(held_out), 1)
    return {"xz": sizes[0] * scale, "xz_primed": (sizes[1] - sizes[2]) * scale}


def _text(corpus: Corpus) -> bytes:
    """All documents' bytes, joined."""
    targets = corpus.pairs()[1]
    return targets[targets != _END].astype(np.uint8).tobytes()


def _contexts(
    tokens: Int[np.ndarray, " P"], positions: Int[np.ndarray, " P"], order: int
) -> Int[np.ndarray, " P"]:
    """The ``order`` symbols before each target as one number; separators stand before a document."""
    key = np.zeros(tokens.shape, np.int64)
    for back in reversed(range(order)):
        symbol = np.full(tokens.shape, _END, np.int64)
        symbol[back:] = np.where(positions[back:] >= back, tokens[: len(tokens) - back], _END)
        key = key * _SYMBOLS + symbol
    return key


def _runs(ordered: Int[np.ndarray, " n"]) -> Int[np.ndarray, " r"]:
    """Where each run of equal values of a sorted array starts."""
    return np.flatnonzero(np.concatenate([[len(ordered) > 0], ordered[1:] != ordered[:-1]]))


def _count(keys: Int[np.ndarray, " P"]) -> _Counts:
    """Counts of (context, symbol) keys."""
    keys = np.sort(keys)
    starts = _runs(keys)
    pairs, pair_counts = keys[starts], np.diff(starts, append=len(keys))
    contexts = pairs // _SYMBOLS
    heads = _runs(contexts)
    return _Counts(
        pairs=pairs,
        pair_counts=pair_counts,
        contexts=contexts[heads],
        totals=np.add.reduceat(pair_counts, heads),
        distinct=np.diff(heads, append=len(pairs)),
    )


def _interpolate(
    counts: _Counts,
    contexts: Int[np.ndarray, " V"],
    symbols: Int[np.ndarray, " V"],
    lower: Float[np.ndarray, " V"],
) -> Float[np.ndarray, " V"]:
    """P_k from P_{k-1} = ``lower``; unchanged where the context was never seen."""
    slot, seen = _look_up(counts.contexts, contexts)
    total, distinct = counts.totals[slot], counts.distinct[slot]
    pair, known = _look_up(counts.pairs, contexts * _SYMBOLS + symbols)
    count = np.where(known, counts.pair_counts[pair], 0)
    return np.where(seen, (count + distinct * lower) / (total + distinct), lower)


def _look_up(table: Int[np.ndarray, " n"], keys: Int[np.ndarray, " V"]) -> tuple[np.ndarray, np.ndarray]:
    """Index of each key in a sorted table, and whether it is there."""
    slot = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return slot, table[slot] == keys
