"""A run becomes a published checkpoint: safetensors, config.json and the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from configs.base import BaseExperiment
from eval.opened import RunError, load_config
from models import published
from models.config import LMConfig
from models.published.state_space import plain_tensors
from objectives import model_of
from runtime import tensor_files, tree_diff
from runtime.checkpoint import Checkpoints
from runtime.tensor_files import SHARD_BYTES, Entry
from runtime.warm_start import source_of, stored
from tools.convert.importing import PUBLISHED, appearing
from tools.convert.published_files import CONFIG, TOKENIZER_FILES, ConvertError

PLAIN, STATE_SPACE = "plain", "state_space"
Read = Callable[[Any, tuple[slice, ...]], np.ndarray]


def export_run(
    source: str,
    to: epath.PathLike,
    *,
    format: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write the published checkpoint ``to`` from a run; returns a line about it.

    The moving average of the parameters is written where the run keeps one.

    Args:
        source: RUN or RUN@STEP.
        format: of `models.published.FORMATS`; "plain" for any model, every parameter under its own path;
            "state_space" likewise, but S4, S4D and DSS layers under their authors' names and in their
            layouts; None for that which the run was imported from, or the first that can hold it.
        dtype: of the tensors; None for that of the checkpoint.

    Raises:
        ConvertError: no format, or not this one, can hold the model; ``to`` is taken.
        RunError, ConfigError, CheckpointError: the run cannot be read.
    """
    workdir, step = source_of(source)
    config = load_config(workdir)
    if config.lora.rank:
        raise ConvertError(
            f"{workdir} has LoRA adapters, which no published format holds; merge them first: "
            f"python -m tools.merge --workdir={workdir} --out=MERGED"
        )
    format, raw = _format(config, workdir, format)
    params = _params(config, workdir, step, dtype)
    tensors, value = _plain(params) if format == PLAIN else _published(config, format, params)
    with appearing(to) as out:
        tensor_files.write(Path(out), tensors, value, shard_bytes)
        kinds = sorted({entry.dtype.name for _, entry in tensors})
        if "model_type" in raw and len(kinds) == 1:  # Hugging Face's
            raw = raw | {"torch_dtype" if "torch_dtype" in raw else "dtype": kinds[0]}
        (out / CONFIG).write_text(json.dumps(raw, indent=2) + "\n")
        for name in TOKENIZER_FILES:
            if (workdir / name).exists():
                (workdir / name).copy(out / name)
    total = sum(array.size for array in params.values())
    return f"{to}: {total:,} parameters in {len(tensors)} tensors ({', '.join(kinds)}), format {format}"


def _format(config: BaseExperiment, workdir: epath.Path, asked: str | None) -> tuple[str, dict[str, Any]]:
    """The format to write and its config.json: the one that was imported, while it still holds."""
    known = [*published.FORMATS, PLAIN, STATE_SPACE]
    if asked not in (None, *known):
        raise ConvertError(f"--format={asked} is unknown; use one of {', '.join(known)}")
    if asked in (PLAIN, STATE_SPACE):
        return asked, json.loads(config.to_json())
    if not isinstance(config.model, LMConfig):
        raise ConvertError(
            f"{workdir} is of kind {config.kind!r}, and published formats hold language models; use "
            f"--format={PLAIN}"
        )
    kept = workdir / PUBLISHED
    before: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    first = [before["format"]] if before else []
    reasons = []
    for format in [asked] if asked else dict.fromkeys([*first, *published.FORMATS]):
        try:
            return format, _config(config.model, format, before)
        except ValueError as error:
            reasons.append(f"{format}: {error}")
    raise ConvertError(
        f"{workdir}: no published format can hold this model (--format={PLAIN} can):\n  "
        + "\n  ".join(reasons)
    )


def _config(model: LMConfig, format: str, before: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model; that which it was imported with (``before``), if that still says the same.

    Raises:
        ValueError: the format cannot hold the model.
    """
    shapes = {tensor.name: tensor.shape for tensor in published.exported(model, format)}
    raw = published.raw_from(model, format)
    if before.get("format") != format:
        return raw
    imported = published.config_from(before["config"], shapes)
    return before["config"] if published.raw_from(imported, format) == raw else raw


def _params(
    config: BaseExperiment, workdir: epath.Path, step: int | None, dtype: str | None
) -> dict[tuple[Any, ...], jax.Array]:
    """Parameters by path, in the dtypes of the checkpoint or in ``dtype``."""
    model = model_of(config)
    with Checkpoints(workdir) as checkpoints:
        found = checkpoints.latest if step is None else step
        if found is None or found not in checkpoints.steps():
            raise RunError(
                f"{workdir}: no checkpoint to export (step {found}); there are steps {checkpoints.steps()}"
            )
        field, leaves = stored(checkpoints.path(found))
        wanted = [
            jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype or leaves.get(path, leaf).dtype))
            for path, leaf in tree_diff.leaves(model.shapes).items()
        ]
        structure: Any = jax.tree.structure(model.shapes)
        tree = structure.unflatten(wanted)
        for name in reversed(field.split("/")):
            tree = {name: tree}
        tree = checkpoints.restore_part(tree, found)[0]
    for name in field.split("/"):
        tree = tree[name]
    return nnx.traversals.flatten_mapping(tree)


def _published(
    config: BaseExperiment, format: str, params: Mapping[tuple[Any, ...], jax.Array]
) -> tuple[list[tuple[str, Entry]], Callable[[str], np.ndarray]]:
    if format == STATE_SPACE:
        made = plain_tensors(config.model, {path: array.shape for path, array in params.items()})
    else:
        made = published.exported(config.model, format)
    tensors = {tensor.name: tensor for tensor in made}

    def value(name: str) -> np.ndarray:
        return tensors[name].values(lambda path, box: np.asarray(params[path])[box])

    entries = [
        (name, Entry(tensor.shape, np.dtype(params[tensor.blocks[0].path].dtype)))
        for name, tensor in tensors.items()
    ]
    return entries, value


def _plain(
    params: Mapping[tuple[Any, ...], jax.Array],
) -> tuple[list[tuple[str, Entry]], Callable[[str], np.ndarray]]:
    """Every parameter under its path, in our layout."""
    named = {"/".join(map(str, path)): array for path, array in params.items()}
    entries = [(name, Entry(array.shape, np.dtype(array.dtype))) for name, array in named.items()]
    return entries, lambda name: np.ascontiguousarray(named[name])
