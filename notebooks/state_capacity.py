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
# # How much does a recurrent state hold?
#
# A state-space layer writes into a matrix and reads from it, $S = \sum_i v_i k_i^\top$, $y = S q$. With
# $q = k_j$:
#
# $$S k_j = v_j |k_j|^2 + \sum_{i \ne j} v_i\, (k_i \cdot k_j),$$
#
# the value that was asked for, and noise from all others. In $N$ dimensions random keys have products of
# about $1 / \sqrt N$, so that the noise reaches the signal after a number of pairs that grows with $N$.
# Stuffed Mamba (arXiv:2410.07145) finds two more laws in trained models: the length that teaches one to
# forget grows linearly with the size of the state, the longest text in which it finds a passkey
# exponentially.

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

# %%
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import train
from configs.lm_stdlib import get_config
from configs.saved import overridden
from configs.sweeps.state_capacity import get_study
from eval import fits
from eval.opened import open_run
from eval.probes import choose
from eval.run import examine
from pallas_kernels.ssd import ssd

RUNS = Path("runs/notebooks/state_capacity", SIZE)

# %% [markdown]
# ## The op alone
#
# `ssd` is what every Mamba-2 layer runs. Here it writes random pairs into an empty state, with nothing
# forgotten ($A = 0$); each value is one of 64 codes, and the nearest code to what is read back is the
# answer.


# %%
@functools.partial(jax.jit, static_argnums=(0, 1))
def recalled(n_state, pairs, codes=64, rows=16):
    """Share of ``pairs`` that a state of ``n_state`` numbers a channel gives back."""
    book, keys, drawn = (jax.random.key(seed) for seed in range(3))
    book = jax.random.normal(book, (codes, 64))
    keys = jax.random.normal(keys, (rows, pairs, 1, n_state)) / np.sqrt(n_state)
    chosen = jax.random.randint(drawn, (rows, pairs), 0, codes)
    _, state = ssd(book[chosen][:, :, None], jnp.ones((rows, pairs, 1)), jnp.zeros(1), keys, keys)
    read = jnp.einsum("bhpn,blhn->blp", state, keys)
    return (jnp.argmax(read @ book.T, axis=-1) == chosen).mean()


sizes = {"smoke": (4, 8, 16), "default": (8, 16, 32, 64, 128), "full": (8, 16, 32, 64, 128, 256)}[SIZE]
many = [2**k for k in range(1, {"smoke": 5, "default": 11, "full": 12}[SIZE])]
found = {n: [float(recalled(n, pairs)) for pairs in many] for n in sizes}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
held = {}
for n, accuracy in found.items():
    left.semilogx(many, accuracy, base=2, marker="o", ms=3, label=f"N = {n}")
    held[n] = float(np.interp(-0.9, [-a for a in accuracy], many))
line = fits.linear(list(held), list(held.values()))
right.plot(list(held), list(held.values()), "o")
x = np.linspace(0, max(held), 50)
right.plot(
    x, line(x), ls=":", label=f"{line.parameters['a']:.2f} N {line.parameters['b']:+.1f}, R2 = {line.r2:.3f}"
)
left.set(xlabel="pairs written", ylabel="share given back", title="one head, values of 64 codes")
right.set(xlabel="N", ylabel="pairs, of which 90 % come back")
left.legend(frameon=False)
_ = right.legend(frameon=False)

# %% [markdown]
# Each curve falls off at its own place, and that place moves in proportion to $N$. Nothing was trained:
# this is the room that a model has to work with, and a trained model can at best choose better keys.
#
# ## Trained models: do they learn to forget?
#
# The arms of `configs/sweeps/state_capacity.py`, fewer and shorter here: Mamba-2 with small and large
# states, trained on short and longer rows, then read far beyond them. A state that is too large for its
# training length never needs to forget, and what it never learned breaks later: the loss grows.

# %%
study = get_study({"smoke": "smoke", "default": "smoke", "full": "cpu"}[SIZE])
arms = [arm for arm in study.arms if arm.factors["measures"] == "forget"]
if SIZE != "full":
    arms = [arm for arm in arms if arm.factors["length"] in (64, 256)][: 1 if SIZE == "smoke" else 4]
smaller = {"model.pattern": '"M-M-"', "model.d_model": 64, "model.mlp.hidden": 176, "train.steps": 120}
if SIZE == "smoke":
    smaller = {"model.pattern": '"M"', "model.d_model": 16, "model.mamba2.headdim": 16, "train.steps": 2}
    smaller |= {"task.batch_size": 2, "task.eval_batch_size": 2, "task.eval_batches": 1}
read = {}
for arm in arms:
    settings = [f"{field}={json.dumps(value)}" for field, value in arm.overrides.items()]
    settings += [f"{field}={value}" for field, value in smaller.items()] if SIZE != "full" else []
    config = overridden(get_config("mamba2"), settings)
    train.run(config, RUNS / arm.name)
    probe = choose(
        "state_collapse", [f"state_collapse.factor={2 if SIZE == 'smoke' else 16}", "state_collapse.rows=2"]
    )
    (read[arm.name],) = examine(open_run(RUNS / arm.name), probe, say=lambda _: None)

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for arm in arms:
    numbers, curve = read[arm.name]["numbers"], read[arm.name]["curves"]["loss, text"]
    N, T = arm.factors["d_state"], arm.factors["length"]
    label = f"N = {N}, trained at {T}: {numbers['loss_growth']['text']:.2f}"
    axes.plot(np.array(curve["x"]) / T, curve["y"], lw=1, label=label)
axes.axvline(1, ls="--", lw=1, color="0.5")
axes.set(xlabel="tokens read / training length", ylabel="nats per byte", xscale="log")
_ = axes.legend(frameon=False, title="largest loss beyond 1x / within it", fontsize=8)

# %% [markdown]
# The legend has the paper's test: a model has learned to forget if that ratio stays below 2. The two
# fitted laws need many sizes and lengths, hence hours: `python -m tools.launch
# --sweep=configs/sweeps/state_capacity.py:cpu --workdir=studies/capacity`.
