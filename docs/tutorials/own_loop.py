# %% [markdown]
# # Watch your own loop
#
# This tutorial adds a watch to a training loop of your own, and reads the verdict and the curves. It takes one to two
# minutes on one CPU core.
#
# ## A loop without a watch
#
# The images are 48 handwritten digits, 8x8 pixels. With so few images a network learns them by heart.

# %%
import numpy as np
import torch
from diffusers import UNet2DModel
from sklearn.datasets import load_digits

from mlflow_icr import EDMDenoiser

torch.manual_seed(0)
digits = load_digits().images[:48]
images = torch.from_numpy((digits * 255 / 16).round().astype(np.uint8))[:, None]  # (N, C, H, W), uint8
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
denoiser = EDMDenoiser(network, sigma_data=0.75)  # D(x, sigma): the clean image in x


# %% [markdown]
# The loop is yours: here it denoises all 48 images at random noise levels. It yields the number of images seen so far.


# %%
def train(total):
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    clean = images.float() / 127.5 - 1
    for images_seen in range(len(images), total + 1, len(images)):
        sigma = (1.2 * torch.randn(len(images)) - 1.2).exp()
        noisy = clean + sigma[:, None, None, None] * torch.randn_like(clean)
        weight = (sigma**2 + 0.75**2) / (sigma * 0.75) ** 2
        loss = (weight[:, None, None, None] * (denoiser(noisy, sigma) - clean).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield images_seen


# %% [markdown]
# ## The watch
#
# `ICRWatch` needs a denoiser, the training images and a folder. Call it after each step with the number of images seen. It
# measures at 0, at 2000, and then three times in each doubling. With `generation` it draws samples when it has a suspicion, and
# at the end.

# %%
from mlflow_icr import GenerationMonitor
from mlflow_icr.integrations.watch import ICRWatch

samples = GenerationMonitor(denoiser, images, num_samples=32, num_steps=8)
with ICRWatch(denoiser, images, "outputs/own-loop", generation=samples, pictures=False) as watch:
    watch(0)
    for images_seen in train(12_000):
        watch(images_seen)

print(watch.verdict.text)

# %% [markdown]
# The network has seen each image 250 times. The verdict is no longer *generalizing*.

# %%
assert watch.verdict.state in ("turning", "memorizing")

# %% [markdown]
# ## The curves
#
# Each measurement is a row of `history.jsonl`. `read_history` returns the rows as dictionaries.

# %%
import matplotlib.pyplot as plt

from mlflow_icr.tracking import read_history

rows = read_history("outputs/own-loop")
seen = [row["images_seen"] for row in rows]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
left.plot(seen, [row["repr/far_error_ratio"] for row in rows], marker="o")
left.set(xscale="symlog", xlabel="images seen", title="error ratio of far views")
right.plot(seen, [row["repr/icr"] for row in rows], marker="o")
right.set(xscale="symlog", xlabel="images seen", title="ICR")

# %% [markdown]
# A ratio of 1 means that the network denoises a shifted view as well as the training image itself. Here the ratio is near 1
# at first, and far above 1 at the end.

# %%
ratios = [row["repr/far_error_ratio"] for row in rows]
print(f"first {ratios[0]:.2f}, last {ratios[-1]:.2f}")
assert ratios[0] < 1.2
assert ratios[-1] > 2

# %% [markdown]
# ## What it leaves alone
#
# A measurement changes neither weights nor random numbers. A training with the watch gives the same network as one without.

# %%
before = {name: value.clone() for name, value in network.state_dict().items()}
torch.manual_seed(1)
watch.monitor.measure(12_000)
drawn = torch.rand(1)
torch.manual_seed(1)
assert torch.equal(drawn, torch.rand(1))
assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())

# %% [markdown]
# The same values are in MLflow (`mlflow ui`) and in TensorBoard (`tensorboard --logdir outputs`).
# Next: [read a finished run](finished_run.md).
