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
# # HMT, Activation Beacon and CCA: long text with a short memory
#
# Full attention keeps a key and a value of every token. Three ways to keep less, around the same kind of
# layers:
#
# * **CCA** (core context attention, arXiv:2412.12465): the last $w$ tokens one by one, the older ones in
#   groups of $g$, each pooled into one core. Keys seen: at most $w + g - 1 + L / g$.
# * **Activation Beacon** (arXiv:2401.03462): every window of $w$ tokens leaves $w / \alpha$ beacons,
#   whose keys and values are kept instead of the window's.
# * **HMT** (hierarchical memory transformer, arXiv:2405.06067): a segment $n$ is summarised as a query
#   $S_n$, which recalls from a queue of memories, $P_n = \mathrm{softmax}(Q_n K^\top / \sqrt{h})\, M$;
#   the segment is read behind $P_n$ and leaves a new memory. The queue has a fixed length.

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
from configs import beacon_stdlib, cca_stdlib, hmt_stdlib
from configs.saved import overridden
from eval.curves import read_records
from eval.opened import load_config, open_run
from eval.probes import choose
from eval.probes.speed import state_bytes
from eval.run import examine
from objectives import model_of

RUNS = Path("runs/notebooks/long_text", SIZE)

# %% [markdown]
# ## Four models, one recipe
#
# Default: two attention layers, 512 bytes a row, a window (or a segment) of 128, few steps. `full`: the
# configs as they are.


# %%
def experiments():
    made = {
        "attention": cca_stdlib.get_config("attention"),
        "CCA": cca_stdlib.get_config("cca"),
        "Beacon": beacon_stdlib.get_config("scratch"),
        "HMT": hmt_stdlib.get_config("hmt"),
    }
    for config in made.values():
        config.train.sample_length = 0
        if SIZE != "full":
            shrink(config)
    return made


def shrink(config):
    smoke = SIZE == "smoke"
    window, row = (16, 64) if smoke else (128, 512)
    config.model.pattern = config.model.pattern[: 1 if smoke else 4]
    config.model.d_model, config.model.mlp.hidden = (16, 16) if smoke else (64, 176)
    for kind in (config.model.attention, config.model.cca):
        kind.num_heads = kind.num_kv_heads = 1
    config.train.steps, config.train.baselines = 2 if smoke else 200, False
    config.train.eval_every = config.checkpoint.every = 0 if smoke else 100
    config.task.seq_len, config.task.batch_size = row, 2 if smoke else 8
    config.task.eval_seq_len, config.task.eval_batch_size = row, 2 if smoke else 8
    config.task.eval_batches = 1 if smoke else 12
    if hasattr(config.model, "memory"):
        config.model.memory.segment, config.model.memory.sensory = window, window // 8
        config.task.packing = "docs"
    if hasattr(config.model, "beacon"):
        config.model.beacon.window = window
    if smoke:
        config.model.cca.group_size, config.model.cca.window = 4, 8


configs = experiments()
trained = list(configs)[2 if SIZE == "smoke" else 0 :]
results = {name: train.run(configs[name], RUNS / name.lower()) for name in trained}

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for name, found in results.items():
    records = [r for r in read_records(RUNS / name.lower() / "metrics.jsonl") if "train/bits_per_byte" in r]
    label = f"{name}: validation {found['validation/bits_per_byte']:.3f}"
    axes.plot([r["step"] for r in records], [r["train/bits_per_byte"] for r in records], lw=1, label=label)
axes.set(xlabel="step", ylabel="bits per byte in training")
_ = axes.legend(frameon=False)

# %% [markdown]
# After a few hundred steps from scratch all four are learning spelling, which needs no memory, so that
# the curves say little about memory yet. What already holds, trained or not, is what they keep.
#
# ## What is carried

# %%
models = {name: model_of(config) for name, config in configs.items()}
lengths = [2**k for k in range(9, 18 if SIZE != "smoke" else 11)]
kept = {name: [state_bytes(model, 1, length) for length in lengths] for name, model in models.items()}
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for name, sizes in kept.items():
    axes.loglog(lengths, [size / 2**20 for size in sizes], marker="o", ms=3, base=2, label=name)
    print(f"{name}: {sizes[-1] / kept['attention'][-1]:.1%} of full attention at {lengths[-1]} tokens")
axes.set(xlabel="tokens read", ylabel="state of one text, MiB")
_ = axes.legend(frameon=False)

# %% [markdown]
# Full attention grows with the text, CCA and Beacon with it divided by the size of a group and the ratio,
# HMT not at all. Hidden widths are tiny here; the slopes are those of large models.
#
# ## What condensing costs, and what memory gives
#
# The probe `condensing` reads the same rows with the backbone alone (all of a row, or one window of it)
# and with windows condensed 2, 4 and 8 times. HMT is read once more with its recall switched off: no
# parameter depends on it.

# %%
settings = ["condensing.rows=4", "condensing.ratios=[2]"] if SIZE == "smoke" else ["condensing.rows=32"]
(record,) = examine(open_run(RUNS / "beacon"), choose("condensing", settings))
condensed = record["numbers"]["bits_per_byte"]
without = overridden(load_config(RUNS / "hmt"), ["model.memory.recall=none"])
hmt = {}
for name, config in {"HMT": None, "HMT, recall off": without}.items():
    (record,) = examine(
        open_run(RUNS / "hmt", config=config), choose("bits_per_byte"), RUNS / "recall", lambda _: None
    )
    hmt[name] = record["numbers"]["validation/bits_per_byte"]

# %%
figure, panels = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
for axes, values in zip(panels, (condensed, hmt)):
    axes.barh(list(values), list(values.values()), height=0.5)
    low, high = min(values.values()), max(values.values())
    axes.set(xlabel="bits per byte", xlim=(low - 0.05, high + 0.05))
panels[0].set_title("Beacon, after the first window of a row")
_ = panels[1].set_title("HMT, all of a row")

# %% [markdown]
# Left, `full` is the backbone that sees all of a row and `truncated` the one that sees its window alone;
# condensing should lie between them once it has been learned. Right, the distance between the two bars is
# what the memory is worth. Both are small while a model has not begun to use far context; in longer runs
# on this text HMT gains about 0.01 bits per byte and Beacon, trained with its backbone, keeps a third of
# what truncation loses (`RESULTS.md`).
