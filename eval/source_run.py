"""The run that another one starts from (``init_from``): found, checked, its parameters read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tokenizers
from etils import epath

from configs.base import BaseExperiment, ConfigError
from eval.opened import RunError, load_config
from models.functional import Functional
from models.lora import LoRA
from objectives import PLUG_INS
from runtime.checkpoint import ArchitectureError, Checkpoints
from runtime.state import TrainState
from runtime.warm_start import source_of, warm_start
from tasks import bpe


def start_from(
    config: BaseExperiment,
    model: Functional,
    state: TrainState,
    workdir: epath.PathLike,
    say: Callable[[str], None],
) -> TrainState:
    """The fresh ``state`` with parameters, and their moving average, of the run ``config.init_from`` names.

    The parameters of a run without LoRA become the base of a model with it. What a plug-in adds to those of a
    plain language model (`objectives.PLUG_INS`) is made from them.

    Args:
        workdir: of the new run; its tokenizer, if it has one, is compared with the source's, whose settings
            (special tokens, chat template) it inherits.
        say: is told in a line how many parameters were loaded.

    Raises:
        ConfigError: no such run, checkpoint or parameters, or another vocabulary or tokenizer.
        ArchitectureError, CheckpointError: names or shapes differ; the checkpoint cannot be read.
    """
    run, step = source_of(config.init_from)
    try:
        source = load_config(run)
        _check_vocabulary(config, source, epath.Path(workdir), run)
        checkpoint = _checkpoint(run, step)
    except (RunError, FileNotFoundError) as error:
        raise ConfigError(f"init_from={config.init_from}: {error}") from error
    if source.lora.rank and not config.lora.rank:
        raise ConfigError(
            f"init_from={config.init_from} has LoRA adapters and this model has none; merge them first: "
            f"python -m tools.merge --workdir={run} --out=MERGED"
        )
    plain = isinstance(model, LoRA) and not source.lora.rank  # the source is the base, and no more
    params, axes = (state.params["base"], model.axes["base"]) if plain else (state.params, model.axes)
    plug_in = PLUG_INS.get(config.kind) if source.kind == "lm" else None
    init = config.init
    if plug_in is not None:
        init = dataclasses.replace(init, exclude=(*init.exclude, *plug_in.added))
    try:
        params, told = warm_start(params, axes, checkpoint, init)
    except ArchitectureError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if plug_in is not None:
        start = jax.jit(
            functools.partial(plug_in.start, config.model),
            out_shardings=jax.tree.map(lambda p: p.sharding, params),
        )
        params, told = start(params), f"{told} (made from the others)"
    if plain:
        params, told = {**state.params, "base": params}, f"{told}; adapters fresh"
    if jax.process_index() == 0:
        bpe.inherit(run, epath.Path(workdir))
    say(f"start from {checkpoint}: {told}")
    extras = dict(state.extras)
    if "ema" in extras:
        extras["ema"] = _copy(params, extras["ema"])
    return dataclasses.replace(state, params=params, extras=extras)


def _checkpoint(run: epath.Path, step: int | None) -> epath.Path:
    """Raises RunError if the run has no checkpoint (of ``step``)."""
    with Checkpoints(run) as checkpoints:
        newest = checkpoints.latest
        if newest is None or (step is not None and step not in checkpoints.steps()):
            which = "" if step is None else f" of step {step}"
            raise RunError(
                f"no checkpoint{which} in {checkpoints.directory}; there are steps {checkpoints.steps()}. "
                "Train it first, or wait for its first save"
            )
        return checkpoints.path(newest if step is None else step)


def _check_vocabulary(config: Any, source: Any, workdir: epath.Path, run: epath.Path) -> None:
    """Raises ConfigError if an id of the source would mean something else here, or nothing."""
    old, new = source.model.vocab_size, config.model.vocab_size
    if old is None or new is None:
        return  # continuous inputs; that one of the two reads ids shows in the parameters
    if new < old:
        raise ConfigError(
            f"init_from={config.init_from} has model.vocab_size={old}, this run only {new}: a vocabulary can "
            f"grow but not shrink; use at least {old}"
        )
    theirs, ours = run / bpe.FILE, workdir / bpe.FILE
    if not theirs.exists() and not ours.exists():
        return
    missing = next((str(path) for path in (theirs, ours) if not path.exists()), None)
    if missing or not _extends(ours.read_text(), theirs.read_text()):
        raise ConfigError(
            f"init_from={config.init_from}: its tokenizer {theirs} and this run's {ours} differ"
            + (f" ({missing} does not exist)" if missing else "")
            + ", so its ids would mean other text; prepare the corpus with the source's tokenizer"
        )


def _extends(new: str, old: str) -> bool:
    """Whether every id of the tokenizer ``old`` (tokenizer.json) is the same token in ``new``."""
    before, after = (tokenizers.Tokenizer.from_str(text).get_vocab() for text in (old, new))
    return before.items() <= after.items()


def _copy(params: Any, like: Any) -> Any:
    """Copies of ``params`` with the dtypes and shardings of ``like``; the step donates both."""
    copy = jax.jit(
        lambda params: jax.tree.map(lambda p, e: jnp.array(p, e.dtype), params, like),
        out_shardings=jax.tree.map(lambda e: e.sharding, like),
    )
    return copy(params)
