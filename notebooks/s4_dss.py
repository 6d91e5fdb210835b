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
# # S4 and DSS on handwritten digits, one pixel at a time
#
# Both are linear state spaces, $\dot h = A h + B u,\ y = C h$, discretised with a learned step $\Delta$.
# Because nothing depends on the input, the layer is a convolution and a recurrence at once:
#
# $$y = K * u, \quad K_l = C \bar A^l \bar B \qquad\Longleftrightarrow\qquad
# h_t = \bar A h_{t-1} + \bar B u_t,\ y_t = C h_t .$$
#
# S4 (arXiv:2111.00396) takes $A$ diagonal plus low rank, from HiPPO, which compresses the past into
# polynomials. DSS (arXiv:2203.14343) shows that diagonal suffices: $K_l = \mathrm{Re} \sum_n w_n\,
# \mathrm{softmax}_l(l \Delta\lambda_n)$. The task is that of the Long Range Arena's Image, 1024 pixels in
# a row; without a download on digits of 8 x 8, enlarged.

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

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import train
from configs.lra_image import get_config
from eval.curves import read_records
from layers.dss import DSS, DSSConfig
from layers.s4 import S4, S4Config
from layers.types import Context

RUNS = Path("runs/notebooks/s4_dss", SIZE)
MODELS = ("s4", "dss")[: 1 if SIZE == "smoke" else 2]

# %% [markdown]
# ## What the kernels look like before training

# %%
length = 256
layers = {
    "S4": S4(3, S4Config(d_state=64, l_max=length, dt_min=0.01), rngs=nnx.Rngs(0)),
    "DSS": DSS(3, DSSConfig(d_state=64, max_kernel_length=length, dt_min=0.01), rngs=nnx.Rngs(0)),
}
figure, panels = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
for axes, (name, layer) in zip(panels, layers.items()):
    axes.plot(np.asarray(layer.kernel(length)[0]).T, lw=1)
    axes.set(title=f"{name}: kernels of three features", xlabel="tokens ago")

# %% [markdown]
# Each line is what an impulse leaves behind: waves that fade at a rate set by the step size of the
# feature, so that some remember much longer than others.
#
# ## One layer, two programs
#
# Training convolves; one token at a time the very same layer runs as a recurrence, with a state of fixed
# size.

# %%
x = jax.random.normal(jax.random.key(1), (1, 64, 3))
for name, layer in layers.items():
    convolved, _ = layer(x, None, Context.create(*x.shape[:2]))
    step = jax.jit(lambda token, state, layer=layer: layer(token, state, Context.create(1, 1)))
    state, ys = layer.init_state(1, 64), []
    for t in range(x.shape[1]):
        y, state = step(x[:, t : t + 1], state)
        ys.append(y)
    apart = float(jnp.abs(convolved - jnp.concatenate(ys, 1)).max())
    print(
        f"{name}: convolution and recurrence differ by at most {apart:.1e}; a state of {state.size} numbers"
    )

# %% [markdown]
# ## Train both
#
# `full` takes the published recipes on grey CIFAR-10 (the official files in `cifar-10-batches-py`).


# %%
def experiment(model):
    if SIZE == "full":
        config = get_config(model)
        config.task.data.directory = "cifar-10-batches-py"
        return config
    config = get_config(f"{model},smoke")
    config.train.steps = {"smoke": 2, "default": 200}[SIZE]
    config.train.eval_every = config.checkpoint.every = max(config.train.steps // 6, 1)
    if SIZE == "smoke":
        config.model.pattern, config.model.d_model = config.model.pattern[:1], 16
        config.model.s4.d_state = config.model.dss.d_state = 8
        config.task.batch_size = config.task.data.validation_size = config.task.data.test_size = 8
        config.train.eval_every = 0
    return config


results = {model: train.run(experiment(model), RUNS / model) for model in MODELS}

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for model, found in results.items():
    records = [r for r in read_records(RUNS / model / "metrics.jsonl") if "validation/accuracy" in r]
    steps, accuracy = zip(*((r["step"], 100 * r["validation/accuracy"]) for r in records))
    axes.plot(
        steps, accuracy, marker="o", ms=3, label=f"{model}, test {100 * found['best/test/accuracy']:.1f} %"
    )
for name, value in results["s4"].items():
    if name.startswith("reference/"):
        axes.axhline(100 * value, ls=":", lw=1, color="0.4")
        said = name.removeprefix("reference/")
        axes.text(0.01, 100 * value, said, fontsize=7, va="bottom", transform=axes.get_yaxis_transform())
axes.set(xlabel="step", ylabel="validation accuracy, %", title="Digits, 1024 pixels in a row")
_ = axes.legend(frameon=False)

# %% [markdown]
# The legend has the test accuracy at the best validation step, as the Arena asks for; dotted lines are
# rules that need no training, on the same test digits. Both models see one pixel after another and no
# second dimension; that they leave chance at all needs memory over hundreds of steps. The table of all
# six tasks: `python -m eval.lra RUN [RUN...]`.
