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
# # A tour: train a hybrid, then look inside
#
# Attention compares a token with every token before it; its cache grows with the text. A state-space
# layer keeps one matrix $S_t$ a head instead, whatever the length (Mamba-2, arXiv:2405.21060):
#
# $$S_t = e^{\Delta_t A} S_{t-1} + \Delta_t\, x_t B_t^\top, \qquad y_t = S_t C_t .$$
#
# A hybrid has both. This notebook trains one (two Mamba-2 layers, an attention layer and an MLP) on the
# source of Python's standard library, byte by byte, sets it beside simple compressors, lets it write, and
# asks how far it looks back.

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
from configs.quickstart import get_config
from eval.curves import read_records
from eval.generate import Generator
from eval.opened import open_run
from eval.probes import choose
from eval.report.words import REFERENCES
from eval.run import examine
from eval.sampling import Sampling

RUN = Path("runs/notebooks/tour", SIZE)

# %% [markdown]
# ## One experiment, one object
#
# A config is a tree of dataclasses. `pattern` names the sub-layers: `M` Mamba-2, `*` attention, `-` MLP.
# Any field can be set here, or on the command line with `--config.FIELD=VALUE`.

# %%
config = get_config()
if SIZE != "full":
    config.train.steps = {"smoke": 3, "default": 400}[SIZE]
    config.train.eval_every = config.checkpoint.every = max(config.train.steps // 4, 1)
    config.train.sample_length, config.task.eval_batches = 0, 8
if SIZE == "smoke":
    config.model.pattern = "M*"
    config.model.d_model, config.model.mlp.hidden, config.model.mamba2.d_state = 32, 32, 8
    config.model.mamba2.headdim, config.model.attention.num_heads, config.model.attention.num_kv_heads = (
        16,
        1,
        1,
    )
    config.task.seq_len, config.task.batch_size, config.task.eval_batch_size = 64, 4, 4
    config.task.eval_batches, config.train.baselines = 1, False
print(
    config.model.pattern,
    config.model.d_model,
    config.model.mamba2.d_state,
    config.task.source,
    config.optim.name,
)

# %% [markdown]
# ## Train
#
# The command line does the same: `python train.py --config=configs/quickstart.py --workdir=RUN`. Run it
# again and it goes on from the last checkpoint.

# %%
results = train.run(config, RUN)

# %%
records = read_records(RUN / "metrics.jsonl")
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for side in ("train", "validation"):
    points = [(r["step"], r[f"{side}/bits_per_byte"]) for r in records if f"{side}/bits_per_byte" in r]
    axes.plot(*zip(*points), label=side, marker="o" if side == "validation" else None, lw=1)
for name, value in results.items():
    if name.startswith("reference/"):
        axes.axhline(value, ls=":", lw=1, color="0.4")
        said = REFERENCES[name.removeprefix("reference/")]
        axes.text(0.01, value, said, fontsize=7, va="bottom", transform=axes.get_yaxis_transform())
axes.set(xlabel="step", ylabel="bits per byte", title=config.name, ylim=(1, 5))
_ = axes.legend(frameon=False)

# %% [markdown]
# Bits per byte are what a compressor that asked this model would need. The dotted lines are compressors
# on the very same split; the curve passes the n-gram models first, and `xz` only with more steps.
#
# ## Let it write
#
# The state after the prompt is all that a Mamba-2 layer keeps of it; the attention layer keeps a cache.

# %%
generator = Generator.open(RUN)
new = {"smoke": 8, "default": 300, "full": 600}[SIZE]
(written,) = generator.generate(["def read(self, "], Sampling(temperature=0.7), max_new_tokens=new)
print("def read(self, " + written.text)

# %% [markdown]
# ## Look inside
#
# Probes read a checkpoint: `loss_by_position` asks what more context is worth, `receptive_field` how far
# back each layer looks (the mean distance of its attention, hidden or not, arXiv:2406.14528). The command
# line: `python -m eval.run --workdir=RUN --probes=all`.

# %%
settings = ["loss_by_position.documents=16", "loss_by_position.control_documents=8"]
if SIZE == "smoke":
    settings = [f"loss_by_position.{n}" for n in ("factor=1", "documents=4", "min_documents=2")]
    settings += ["receptive_field.factors=[0.5,1]", "receptive_field.rows=1"]
found = examine(open_run(RUN), choose("loss_by_position,receptive_field", settings))
by_position, looks_back = (record["curves"] for record in found)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for name, curve in by_position.items():
    left.plot(curve["x"], curve["y"], marker="o", ms=3, label=name)
for name, curve in looks_back.items():
    right.plot(curve["x"], curve["y"], marker="o", ms=3, label=name)
for axes, curves in ((left, by_position), (right, looks_back)):
    first = next(iter(curves.values()))
    axes.axvline(config.task.seq_len, ls="--", lw=1, color="0.5")
    axes.set(xlabel=first["xlabel"], ylabel=first["ylabel"], xscale="log")
    axes.legend(frameon=False, fontsize=8)

# %% [markdown]
# Left: the loss of a token, by how many stand before it in its document; beyond the dashed line rows are
# longer than any in training. Right: how far back each layer looks, in rows of growing length. The
# attention layer looks further the longer the row; a Mamba-2 layer forgets at its own pace.
#
# `python -m eval.report RUN` makes one self-contained page of all this.
