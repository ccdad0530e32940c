# %% [markdown]
# # Read a finished run
#
# This tutorial reads the folder of a finished run, and answers three questions. Has the model begun to copy? Which images
# are the likeliest copies? Which checkpoint is the one to keep? It takes one to two minutes on one CPU core.
#
# ## A run
#
# This command trains a small network on 32 handwritten digits. Any folder that a watch or a trainer has written will do.

# %%
import subprocess
import sys


def run(command):
    """Run a command of Python packages and return what it prints."""
    done = subprocess.run([sys.executable, "-m", *command.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


printed = run(
    "trainers.train --preset digits --num-images 32 --total-kimg 24 --first-measurement-kimg 1 --measurements 12 "
    "--learning-rate 2e-3 --block-channels 16,32 --batch-size 32 --num-samples 64 --sample-steps 8 --output-dir "
    "outputs/finished"
)

# %% [markdown]
# ## The verdict
#
# `mlflow-icr verdict outputs/finished` prints the verdict. In Python it is an object.

# %%
from mlflow_icr import verdict

run_verdict = verdict("outputs/finished")
print(run_verdict.text)

# %% [markdown]
# The network has seen each image 750 times, and has turned.

# %%
assert run_verdict.state in ("turning", "memorizing")
assert run_verdict.turned_at < 24_000

# %% [markdown]
# ## The likeliest copies
#
# This run judges samples at every measurement. It keeps a picture each time: samples, and below each its nearest training
# image. The likeliest copies come first.

# %%
from pathlib import Path

import matplotlib.pyplot as plt

newest = sorted(Path("outputs/finished/images/nearest").glob("*.png"))[-1]
figure, axes = plt.subplots(figsize=(8, 2.5), layout="constrained")
axes.imshow(plt.imread(newest))
axes.set_axis_off()

# %% [markdown]
# How many samples are copies? `mem/ratio_l2` is the share whose distance ratio is below 1/3.

# %%
from mlflow_icr.tracking import read_history

rows = read_history("outputs/finished")
for row in rows[::3]:
    print(f"{row['images_seen']:>6,.0f} images seen: {row['mem/ratio_l2']:5.1%} copies")
assert rows[-1]["mem/ratio_l2"] > rows[0]["mem/ratio_l2"]

# %% [markdown]
# Which training images hold the residual energy? On average an image has a relative share of 1.

# %%
from mlflow_icr.monitoring.ranking import rank_folder

images, classes = rank_folder("outputs/finished")
for entry in images[:3]:
    print(f"image {entry['image']}: relative share {entry['relative_share']:.2f}")
assert images[0]["relative_share"] > 1

# %% [markdown]
# ## The checkpoint to keep
#
# The verdict names the last measurement before the turn. `best_checkpoint` returns its folder, a pipeline of diffusers.
# On a command line: `mlflow-icr best-checkpoint outputs/finished --output best`.

# %%
from mlflow_icr import best_checkpoint

kept = best_checkpoint("outputs/finished")
print(kept, sorted(path.name for path in kept.iterdir()))
assert int(kept.name) == run_verdict.checkpoint_images_seen

# %% [markdown]
# ## The report
#
# The training has written a report: one HTML page with curves, samples and the audit. This command writes it again, or compares
# several runs. The page needs no server.

# %%
run("mlflow_icr.cli report outputs/finished --output report.html")
page = Path("report.html")
print(f"{page}: {page.stat().st_size / 1e6:.1f} MB")
assert "How this was computed" in page.read_text()
