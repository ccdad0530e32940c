# %% [markdown]
# # Gate a pipeline of diffusers
#
# This tutorial checks a pipeline of plain diffusers code before it is published. It measures the pipeline's checkpoints and
# samples, and refuses a pipeline that copies its training images. It takes one to two minutes on one CPU core.
#
# ## A training in plain diffusers
#
# The code of this section knows nothing of mlflow-icr. It trains a DDPM on 16 handwritten digits and saves a pipeline now and
# then.

# %%
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from sklearn.datasets import load_digits

digits = (load_digits().images[:16] * 255 / 16).round().astype(np.uint8)
Path("photos").mkdir(exist_ok=True)
for number, digit in enumerate(digits):
    Image.fromarray(digit).save(f"photos/{number:02}.png")

torch.manual_seed(0)
network = UNet2DModel(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=4,
    add_attention=False,
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
)
scheduler = DDPMScheduler(num_train_timesteps=1000)
optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
clean = torch.from_numpy(digits)[:, None].float() / 127.5 - 1
saved_at = (0, 100, 200, 400, 600, 800, 1200, 1600)
for step in range(1601):
    if step in saved_at:
        DDPMPipeline(network, scheduler).save_pretrained(f"model/checkpoint-{step}")
    noise, times = torch.randn_like(clean), torch.randint(1000, (16,))
    loss = (network(scheduler.add_noise(clean, noise, times), times).sample - noise).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# %% [markdown]
# ## Measure the checkpoints
#
# One command measures all checkpoints on the same views of the same images. Each step had 16 images.

# %%
import subprocess
import sys


def run(command):
    """Run the command line and return what it prints."""
    done = subprocess.run([sys.executable, "-m", "mlflow_icr.cli", *command.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


print(run("measure --checkpoints model --data photos --images-per-step 16"))

# %% [markdown]
# The same watch can run beside the training: `mlflow-icr watch --checkpoints model --data photos --follow`.
#
# ## Look at samples
#
# The verdict on checkpoints uses no samples. Draw samples from the last pipeline, and compare them with the training images.

# %%
import json

pipeline = DDPMPipeline.from_pretrained("model/checkpoint-1600")
pipeline.set_progress_bar_config(disable=True)
drawn = pipeline(batch_size=48, num_inference_steps=50, generator=torch.Generator().manual_seed(0), output_type="np").images
Path("samples").mkdir(exist_ok=True)
for number, picture in enumerate(drawn):
    Image.fromarray((picture[..., 0] * 255).round().astype(np.uint8)).save(f"samples/{number:02}.png")

measured = json.loads(run("measure --generated samples --train photos"))
share, low, high = (measured[f"mem/ratio_l2{end}"] for end in ("", "_low", "_high"))
print(f"copies: {share:.0%}, interval {low:.0%} to {high:.0%}")

# %% [markdown]
# ## The gate
#
# A pipeline is published if its checkpoints have not turned, and if at most 5 % of its samples can be copies. This one fails.

# %%
from mlflow_icr import verdict

run_verdict = verdict("model/icr")
may_be_published = run_verdict.state == "generalizing" and high <= 0.05
print(f"{run_verdict.state}; publish: {may_be_published}")
assert not may_be_published
assert low > 0.05

# %% [markdown]
# In a continuous integration job, end with `sys.exit(not may_be_published)`. [How to read the curves](../reading.md)
# explains the other values in the folder `model/icr`.
