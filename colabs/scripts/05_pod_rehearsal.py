# %% [markdown]
# # Will it fit? Rehearsing a pod
#
# The TPU compiler runs on any x86-64 Linux machine and compiles for TPUs that are not there. So the
# questions that a pod's first hour would answer can be asked before it is paid for: does the step
# fit, how long does it take, what do the chips send each other? Figures are the compiler's
# estimates, not readings from a chip (docs/rehearse.md says which is which).

# %%
import importlib.util
import subprocess
import sys

import jax
import matplotlib.pyplot as plt

from walt_jax.data.pipeline import DataConfig
from walt_jax.models import Denoiser, DenoiserConfig, Network, count
from walt_jax.models.named import DENOISERS
from walt_jax.parallel import MeshConfig
from walt_jax.rehearsal.chips import CHIPS, Topology
from walt_jax.rehearsal.report import lines
from walt_jax.rehearse import run
from walt_jax.tasks import DenoiserTask
from walt_jax.training.experiment import Experiment

if importlib.util.find_spec("libtpu") is None:  # the compiler; no TPU is needed
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "libtpu"], check=True)
jax.config.update("jax_platforms", "cpu")

# %% [markdown]
# ## The state of a 3B model
#
# Parameters, their moving average and AdamW's two moments are four float32 numbers a parameter.
# `fsdp` divides them over the chips. This much is arithmetic: the network is never allocated.

# %%
sizes = {}
for name in ("walt-l-ucf101", "walt-xl-ucf101", "walt-base-3b"):
    network = Network.of(lambda rngs, name=name: Denoiser(DENOISERS[name], rngs=rngs))
    sizes[name] = count(jax.eval_shape(network.init, jax.random.key(0)))
chips = [1, 4, 16, 64, 256]
figure, axes = plt.subplots(figsize=(6, 3.5))
for name, size in sizes.items():
    axes.loglog(chips, [16 * size / n / 2**30 for n in chips], "o-", label=f"{name}, {size:,}")
for kind, chip in CHIPS.items():
    axes.axhline(chip.hbm / 2**30, linestyle=":", color="gray")
    axes.text(chips[-1], chip.hbm / 2**30, kind, ha="right", va="bottom")
axes.set(xlabel="chips of the fsdp axis", ylabel="GiB of state a chip")
axes.legend()
plt.show()

# %% [markdown]
# ## What a mesh costs
#
# Activations, collectives and time are the compiler's to say. A full-size model takes it minutes; a
# small one shows the same things in less: the same step on four chips of a v5e, parameters divided
# (`fsdp`) and copied (`data`).

# %%
small = DenoiserConfig(width=256, num_heads=4, num_layers=4, num_classes=101)
topology = Topology.parse("v5e:2x2")
reports = {}
for name, mesh in {"fsdp": MeshConfig(data=1, fsdp=4), "data": MeshConfig(data=4)}.items():
    experiment = Experiment(
        DenoiserTask(tokenizer="", model=small),
        DataConfig(path="", sizes=((128, 128),), num_frames=17),
        num_steps=1000,
        batch_size=16,
        mesh=mesh,
    )
    (reports[name],) = run(experiment, topology, topology.devices(), "train")
    print("\n".join(lines(reports[name])[:8]), end="\n\n")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3))
names = list(reports)
axes[0].bar(names, [r.hbm_bytes / 2**20 for r in reports.values()])
axes[0].set(ylabel="MiB a chip")
axes[1].bar(names, [r.collective_bytes / 2**20 for r in reports.values()])
axes[1].set(ylabel="MiB sent a step and chip")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## The real thing
#
# The same for the model and the pod that you mean, from a shell:
#
#     python -m walt_jax.rehearse --config configs/walt_t2v.py:3b --topology v5p:4x4x4
#     python -m walt_jax.rehearse --config configs/walt_ucf101.py:l --topology v5e:4x4 --search
#
# `--search` tries meshes, batch sizes and what remat keeps.
