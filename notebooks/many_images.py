# %% [markdown]
# # Many images on TPU or GPU
#
# **How are thousands of images attacked, and what is lost if the machine dies?** The command
# `adv2 attack` works on one batch after the other, on all devices, and keeps what is finished. Here a
# run is repeated from what was on disk after its first batch, and the results are compared.

# %%
import json
import os
import shutil
import threading
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from adv2_jax.cli.entry import main

SMOKE = "ADV2_SMOKE" in os.environ
N, BATCH = (4, 2) if SMOKE else (32, 8)

# %% [markdown]
# ## A run
# In a terminal: `adv2 attack --images photos/ --model … --weights … --out run`. `--images` may be a
# folder, an `.npz` or `tfds:name/split`. `--batch-size auto` asks how many fit into the device's memory,
# `--precision bfloat16` makes the steps faster on TPU and GPU, `--keep adversarial` leaves out what only
# the report needs, `--distributed` shares a run among hosts.

# %%
command = ["attack", "--images", f"shapes:{2 * N}", "--limit", str(N), "--batch-size", str(BATCH)]
command += ["--interpreter", "cam", "--preset", "quick", "--epsilon", "16/255"]
command += ["--keep", "adversarial"]


def copy_the_first_batch():
    """Copy what a machine would leave that dies after the first batch."""
    while not (finished := list(Path("run/batches").glob("*/*.npz"))):
        time.sleep(0.01)
    for file in (Path("run/batches/settings.json"), finished[0]):
        copy = Path("died", *file.parts[1:])
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)


threading.Thread(target=copy_the_first_batch, daemon=True).start()
finished = main([*command, "--out", "run"])

# %% [markdown]
# ## Go on where it died
# The same command with `--resume`. It goes on after ■ or Ctrl-C too.

# %%
kept = list(Path("died/batches").glob("*/*.npz"))
print("on disk:", *kept)
resumed = main([*command, "--out", "died", "--resume", "--quiet"])
same = Path("run/results.npz").read_bytes() == Path("died/results.npz").read_bytes()
print("the same bytes in results.npz:", same)

# %% [markdown]
# ## What the files say
# `results.npz` has the numbers of each image, `log.jsonl` a line for each batch of each attack, and
# `summary.json` means with their 95 % intervals.

# %%
with np.load("run/results.npz") as arrays:
    distances = {"PGD": arrays["cam/pgd/map_l1"], "ADV²": arrays["cam/adv2/map_l1"]}
_, axis = plt.subplots(figsize=(5, 3), layout="constrained")
for (name, values), colour in zip(distances.items(), ("#D55E00", "#0072B2"), strict=True):
    axis.ecdf(values, color=colour, label=name)
axis.set(title=f"Maps of {N} images under attack", ylabel="share of the images")
axis.set_xlabel("map L1: distance from the benign map, in [0, 1]")
axis.legend()
plt.show()

# %% [markdown]
# ## The answer

# %%
summary = json.loads(Path("run/summary.json").read_text())
log = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
for row in summary["rows"]:
    # of the last batch: nothing is compiled in it
    last = [line for line in log if line["attack"] == row["attack"]][-1]
    low, high = row["ci"]["map_l1"]
    print(
        f"{row['attack']:5} fooled {row['asr']:4.0%} of {row['n']}, map L1 {row['map_l1']:.3f} "
        f"[{low:.3f}, {high:.3f}], {last['n'] / last['seconds']:.2g} images a second"
    )
print(
    f"\nBy one command, batch by batch. What is finished is kept, here {len(kept)} of {len(log)} parts, and "
    f"the resumed run has {'the same bytes as' if same else 'other bytes than'} one that never died."
)
