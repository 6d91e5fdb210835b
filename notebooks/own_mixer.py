# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Write your own mixer, and see the laws test it
#
# Retention (arXiv:2307.08621, here without its rotation) is linear attention that fades at a fixed rate
# $\gamma_h$ in each head:
#
# $$S_t = \gamma_h S_{t-1} + v_t k_t^\top, \qquad y_t = S_t q_t .$$
#
# It fits into 60 lines, because the op underneath (`ssd_core`) already knows about chunks, documents,
# padding, devices and gradients. What a mixer has to be, whatever it computes, is written down as laws:
# causal; the same in one pass, in pieces and token by token; packed documents as if alone; padding
# unseen; sharded as unsharded.

# %%
# On Colab: fetch the code and install it for this runtime. Elsewhere: nothing to do.
import os
import shutil
import subprocess
import sys

REPOSITORY = "<this repository>"  # its address
if "COLAB_RELEASE_TAG" in os.environ and not os.path.exists("longspan"):
    runtime = (
        "tpu" if "COLAB_TPU_1VM" in os.environ else "cuda" if shutil.which("nvidia-smi") else "notebooks"
    )
    subprocess.run(["git", "clone", REPOSITORY, "longspan"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", f"longspan[{runtime}]"], check=True)
    sys.path.insert(0, os.path.abspath("longspan"))

# %%
# "default": minutes on a CPU. "full": the configs as they are, for an accelerator. "smoke": for the tests.
SIZE = os.environ.get("NOTEBOOK_SIZE", "default")
# The laws about devices need eight of them; a CPU can pretend, if told before jax starts.
_ = os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

# %%
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from flax import nnx
from jaxtyping import Array, Float

import train
from configs.lm_stdlib import get_config
from eval.curves import read_records
from layers.mlp import MLPConfig
from layers.param import Initializer, Linear, uniform_fan_in
from layers.types import Context, State
from models.registry import KINDS, TINY_D_MODEL, Kind
from pallas_kernels.ssd import ssd_core

RUNS = Path("runs/notebooks/own_mixer", SIZE)
sys.path.insert(0, str(Path(importlib.util.find_spec("train").origin).parent))  # where tests/ is
from tests.laws.check import LAWS, check

# %% [markdown]
# ## The mixer


# %%
class Retention(nnx.Module):
    """A sequence mixer; its state is float32 [B, H, P, N], whatever the length."""

    causal = True

    def __init__(
        self,
        d_model: int,
        config: MLPConfig,  # not read; a mixer that stays gets a config of its own
        *,
        rngs: nnx.Rngs,
        init: Initializer = uniform_fan_in,
        out_init: Initializer | None = None,
        heads: int = 4,
    ):
        self.d_model, self.heads = d_model, heads

        def inner() -> Linear:
            return Linear(d_model, d_model, ("embed", "inner"), rngs=rngs, init=init)

        self.q, self.k, self.v, self.gate = inner(), inner(), inner(), inner()
        self.out = Linear(d_model, d_model, ("inner", "embed"), rngs=rngs, init=out_init or init)

    def init_state(self, batch: int, max_len: int) -> State:
        size = self.d_model // self.heads
        return jnp.zeros((batch, self.heads, size, size))

    def __call__(
        self, x: Float[Array, "B L D"], state: State | None, ctx: Context
    ) -> tuple[Float[Array, "B L D"], State | None]:
        q, k, v = (p(x).reshape(*x.shape[:2], self.heads, -1) for p in (self.q, self.k, self.v))
        log_decay = jnp.log1p(-(2.0 ** (-3 - jnp.arange(self.heads))))
        y, after = ssd_core(
            v * q.shape[-1] ** -0.5,
            jnp.broadcast_to(log_decay, q.shape[:3]),
            k,
            q,
            initial_state=ctx.carried(state),
            segment_ids=ctx.segment_ids,
        )
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-5)
        y = y.reshape(x.shape) * jax.nn.silu(self.gate(x))
        return self.out(y), None if state is None else after

    def flops_per_token(self, length: int) -> float:
        """Five projections; writing and reading the state."""
        return float(10 * self.d_model**2 + 4 * self.d_model**2 / self.heads)


# %% [markdown]
# ## The laws

# %%
laws = (
    ["contract", "causality_to_the_bit", "padding_only_leaves_the_state_alone"] if SIZE == "smoke" else LAWS
)
verdicts = check(lambda rngs: Retention(TINY_D_MODEL, MLPConfig(), rngs=rngs), laws)
for law, problem in verdicts.items():
    print(f"{problem or 'kept':<8} {law}")

# %% [markdown]
# Once registered they are tests: with a line in each of the two dicts of `models/registry.py`, `pytest
# tests/laws` runs all of this for the new name, with no new test code.
#
# ## What a mistake looks like
#
# The same layer, ignoring where documents begin and end: right for one text, and wrong as soon as two lie
# in a row.


# %%
class Forgetful(Retention):
    def __call__(self, x, state, ctx):
        return super().__call__(x, state, Context.create(*x.shape[:2]))  # forgets which document it is in


tried = (
    ["causality_to_the_bit"] if SIZE == "smoke" else [law for law in LAWS if "pack" in law or "caus" in law]
)
broken = check(lambda rngs: Forgetful(TINY_D_MODEL, MLPConfig(), rngs=rngs), tried)
for law, problem in broken.items():
    print(f"{law}: {problem or 'kept'}")

# %% [markdown]
# It is still causal, and would train without complaint; the laws about packed documents say what is
# wrong.
#
# ## Train it
#
# A letter for the pattern, and the loop does the rest.

# %%
KINDS["r"] = Kind(Retention, "mlp")


def experiment(pattern):
    config = get_config("mamba2")
    config.name, config.model.pattern = pattern, pattern
    config.train.baselines, config.train.sample_length = False, 0
    if SIZE != "full":
        config.model.pattern, config.model.d_model, config.model.mlp.hidden = pattern[:4], 64, 176
        config.task.seq_len, config.task.eval_batches = 256, 4
        config.train.steps = {"smoke": 2, "default": 200}[SIZE]
        config.train.eval_every = config.checkpoint.every = 0
    if SIZE == "smoke":
        config.model.pattern, config.model.d_model, config.task.seq_len, config.task.batch_size = (
            pattern[:1],
            16,
            32,
            2,
        )
        config.model.mamba2.headdim, config.task.eval_batch_size, config.task.eval_batches = 16, 2, 1
    return config


PATTERNS = {"Mamba-2": "M-M-M-", "retention": "r-r-r-"}
results = {}
for name in list(PATTERNS)[SIZE == "smoke" :]:
    results[name] = train.run(experiment(PATTERNS[name]), RUNS / name, jax.devices()[:1])

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for name, found in results.items():
    records = [r for r in read_records(RUNS / name / "metrics.jsonl") if "train/bits_per_byte" in r]
    label = f"{name}: validation {found['validation/bits_per_byte']:.3f}"
    axes.plot([r["step"] for r in records], [r["train/bits_per_byte"] for r in records], lw=1, label=label)
axes.set(xlabel="step", ylabel="bits per byte in training")
_ = axes.legend(frameon=False)

# %% [markdown]
# One seed, one learning rate and few steps: enough to see that the new layer learns, not to rank it. That
# takes a study with rates and seeds, such as `configs/sweeps/architectures_recall.py`.
