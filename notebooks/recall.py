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
# # Mamba-2 against a hybrid: recall, and a phone book
#
# A row of multi-query associative recall (arXiv:2312.04927) tells pairs of a key and a value, then keys
# again; after each the model must say its value:
#
# `k1 v1 k2 v2 k3 v3 ... k2 -> v2 ... k1 -> v1`
#
# Attention can look each key up. A state-space layer holds all pairs in one matrix of $P \times N$
# numbers a head, $S_t = e^{\Delta_t A} S_{t-1} + \Delta_t\, x_t B_t^\top$, and reads with $C_t$: beyond
# about $N$ pairs their keys cannot all be told apart. A hybrid needs one attention layer for it.

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
from pathlib import Path

import matplotlib.pyplot as plt

import train
from configs import mqar, phonebook
from eval.curves import read_records
from eval.opened import open_run
from eval.probes import choose
from eval.run import examine

RUNS = Path("runs/notebooks/recall", SIZE)
MODELS = ("mamba2", "hybrid")[SIZE == "smoke" :]


# %% [markdown]
# ## Associative recall
#
# Both models have two mixers, each with an MLP, and states of 16 numbers a channel. Few pairs come first,
# more later. `full` is the published set of Based.


# %%
def recall(model):
    if SIZE == "full":
        return mqar.get_config(f"based,{model}")
    config = mqar.get_config(f"smoke,{model}")
    config.model.mamba2.d_state = 16
    steps = {"smoke": 2, "default": 1600}[SIZE]
    config.task.starts = tuple(start * steps // config.train.steps for start in config.task.starts)
    config.train.steps, config.train.eval_every, config.checkpoint.every = steps, max(steps // 8, 1), steps
    if SIZE == "smoke":
        tiny(config)
        config.task.train_sizes, config.task.starts, config.task.eval_sizes = ((32, 2),), (), ()
    return config


def tiny(config):
    config.model.pattern = "*"
    config.model.d_model, config.model.mlp.hidden, config.model.attention.head_dim = 16, 16, 16
    config.model.mamba2.d_state, config.model.mamba2.headdim = 8, 16
    config.task.batch_size, config.task.eval_rows, config.train.eval_every = 2, 2, 0


found = {model: train.run(recall(model), RUNS / f"mqar_{model}") for model in MODELS}


# %%
def curves(runs, metric, title):
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, results in runs.items():
        records = [r for r in read_records(RUNS / name / "metrics.jsonl") if metric in r]
        axes.plot([r["step"] for r in records], [r[metric] for r in records], marker="o", ms=3, label=name)
        axes.axhline(results["reference/chance"], ls=":", color="0.5", lw=1)
    axes.set(xlabel="step", ylabel="accuracy of answers", title=title, ylim=(0, 1.02))
    axes.legend(frameon=False)


curves(
    {f"mqar_{model}": r for model, r in found.items()},
    "validation/accuracy",
    "Recall, held-out rows of all sizes",
)

# %% [markdown]
# The dotted line is chance. A curve flat above it guesses among the values of the row; it rises once the
# model has learned to match keys, which takes some models more steps than these. Mamba-2 with this state
# learns these sizes too, in 4000 steps (RESULTS.md).
#
# ## More pairs than in training
#
# The probe reads held-out rows with half, once and twice as many pairs as the largest of training, and
# the same pairs in longer rows.

# %%
settings = ["recall.factors=[0.5,1.0,2.0]", "recall.rows=64"]
if SIZE == "smoke":
    settings = ["recall.factors=[1.0]", "recall.rows=2", "recall.batch=2", "recall.piece=32"]
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for model in MODELS:
    (record,) = examine(open_run(RUNS / f"mqar_{model}"), choose("recall", settings))
    accuracy = record["numbers"]["accuracy"]
    axes.plot(list(accuracy), list(accuracy.values()), marker="o", ls="none", label=model)
axes.set(ylabel="accuracy of answers", ylim=(0, 1.02), title="pairs in a row of so many tokens")
_ = axes.legend(frameon=False)

# %% [markdown]
# ## A phone book
#
# Names and numbers in bytes, then one name again; the ten digits of its number are to be told
# (arXiv:2406.07887). The name comes after the book: what is not in the state by then cannot be read
# again.


# %%
def book(model):
    if SIZE == "full":
        return phonebook.get_config(f"standard,{model}")
    config = phonebook.get_config(f"smoke,{model}")
    steps = {"smoke": 2, "default": 400}[SIZE]
    config.train.steps, config.train.eval_every, config.checkpoint.every = steps, max(steps // 6, 1), steps
    config.task.eval_rows = 64
    if SIZE == "smoke":
        tiny(config)
        config.task.train_sizes, config.task.eval_sizes = ((128, 2),), ()
    return config


looked_up = {model: train.run(book(model), RUNS / f"phonebook_{model}") for model in MODELS}

# %%
names = {f"phonebook_{model}": r for model, r in looked_up.items()}
curves(names, "validation/accuracy", "Phone book, digits right, books of all sizes")

# %% [markdown]
# Copying a number byte by byte takes longer to learn than recalling one symbol: in so few steps expect
# digits above chance (the dotted line) at most. The published result, that Mamba-2 fails in long books
# and a hybrid does not, needs `full`.
