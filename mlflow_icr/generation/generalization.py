"""Distances that account for copying: FLD, MiFID and the three-sample test C_T."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mlflow_icr.generation.embeddings import check_embeddings
from mlflow_icr.generation.frechet import frechet_distance
from mlflow_icr.generation.neighbours import k_nearest

# From Jiralerspong et al. 2023 and the authors' program: Adam's rate and steps, the early stop, the shrunk distance of the
# extra component at the training mean, and bounds for log sigma^2 that identical embeddings would exceed.
RATE, STEPS, PATIENCE, STILL = 0.5, 50, 5, 5e-4
ORIGIN_SHARE = 0.1
# Pairs of training and generated embeddings whose distances are held at a time, 256 MiB in float64. The fit holds them all,
# with a few times as much for its gradient: it takes only a part of larger training sets.
PAIRS = 2**25
LOG_VARIANCE_BOUND = 40.0

MIFID_THRESHOLD = 0.1  # mean minimal cosine distance above which MiFID is the Frechet distance
CT_COMPONENTS, CT_CELLS = 64, 3
CT_SMALLEST_SHARE = 20  # the fewest generated images in a cell that counts


def _squared(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()


def _log_likelihood(squared: Tensor, log_variance: Tensor, dim: int) -> Tensor:
    """log N(x_i | mu_j, sigma_j^2 I) for squared distances (N, M) and log variances (M,)."""
    return -0.5 * (squared * (-log_variance).exp() + dim * (log_variance + math.log(2 * math.pi)))


def _fit(centres: Tensor, x: Tensor) -> Tensor:
    """Log variances (M,) of equally weighted Gaussians at `centres` (M, D) that make x (N, D) most likely.

    A further component at the mean of x limits the effect of outliers; it is used in fitting only. Where N > 2^25 / M, a random
    subset of that many rows is used, always the same.
    """
    dim = x.shape[1]
    most = max(2, PAIRS // len(centres))
    if len(x) > most:
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:most].to(x.device)]
    squared = _squared(x, centres)
    origin = (1 - ORIGIN_SHARE) ** 2 * _squared(x, x.mean(0, keepdim=True))
    log_variance = ((squared.min(0).values + 1e-3) / dim).log().requires_grad_()
    log_origin = torch.zeros(1, dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.Adam([log_variance, log_origin], lr=RATE)
    losses: list[float] = []
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = [_log_likelihood(squared, log_variance, dim) - math.log(len(centres)), _log_likelihood(origin, log_origin, dim)]
        loss = -torch.logsumexp(torch.cat(parts, 1), 1).mean() / dim
        torch.autograd.backward(loss)
        optimizer.step()
        with torch.no_grad():
            log_variance.clamp_(-LOG_VARIANCE_BOUND, LOG_VARIANCE_BOUND)
        losses.append(float(loss.detach()))
        if step > PATIENCE and max(abs(losses[-1] - losses[-j]) for j in range(1, PATIENCE + 1)) < STILL:
            break
    return log_variance.detach()


def _nll(x: Tensor, centres: Tensor, log_variance: Tensor) -> float:
    """Mean negative log-likelihood per dimension of x (N, D)."""
    total = 0.0
    for part in x.split(max(1, PAIRS // len(centres))):
        pairs = _log_likelihood(_squared(part, centres), log_variance, x.shape[1]) - math.log(len(centres))
        total -= float(torch.logsumexp(pairs, 1).sum())
    return total / len(x) / x.shape[1]


def _standardised(train: Tensor, test: Tensor, fake: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sets, checked, in float64, standardised by mean and deviation of the test set; constant dimensions are not scaled."""
    train = check_embeddings("train", train, at_least=4).double()
    test = check_embeddings("test", test, at_least=2, like=train).double()
    fake = check_embeddings("fake", fake, at_least=1, like=train).double()
    mean, deviation = test.mean(0), test.std(0)
    deviation = torch.where(deviation > 0, deviation, 1.0)
    return (train - mean) / deviation, (test - mean) / deviation, (fake - mean) / deviation


def fld(train: Tensor, test: Tensor, fake: Tensor, seed: int = 0) -> float:
    """Feature likelihood divergence: by how much less likely test embeddings are around fake than around real ones, x 100.

    Gaussians around `fake` (M, D), fitted to `train` (N, D), give `test` (L, D) a log-likelihood per dimension; that of
    Gaussians around half of `train`, fitted to the other half, is the baseline. Copies get narrow Gaussians, under which
    held-out images are unlikely: it rises with copying and with bad samples. Raises ValueError for N < 4, L < 2, other D.
    Source: Jiralerspong et al. 2023, "Feature likelihood divergence".
    """
    train, test, fake = _standardised(train, test, fake)
    nll = _nll(test, fake, _fit(fake, train))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).to(train.device)
    size = min(len(fake), len(train) // 2)
    centres, rest = train[order[:size]], train[order[size:]]
    return 100 * (nll - _nll(test, centres, _fit(centres, rest)))


def fld_gap(train: Tensor, test: Tensor, fake: Tensor) -> float:
    """100 x (NLL of train - NLL of test) under Gaussians around `fake`: far below 0, generated embeddings overfit to train.

    Raises ValueError as `fld`. Source: Jiralerspong et al. 2023, "generalization gap FLD".
    """
    train, test, fake = _standardised(train, test, fake)
    log_variance = _fit(fake, train)
    return 100 * (_nll(train, fake, log_variance) - _nll(test, fake, log_variance))


def mifid(train: Tensor, fake: Tensor) -> float:
    """Frechet distance, divided by the mean distance of generated (M, D) to training embeddings (N, D) where that is under 0.1.

    The divisor is the mean over generated embeddings of the smallest 1 - |cosine| to a training one: the nearer samples are
    to training images, the larger MiFID, up to inf. As in the paper the mean is over generated images; torchmetrics takes it
    over the set given as real, and gives 0 where the Frechet distance is 0 (exact copies of all images are inf here). It is
    called MiFID only with the FID Inception network's embeddings. Raises ValueError for fewer than 2 rows or an embedding
    that is all 0. Source: Bai et al. 2021, "On training sample memorization".
    """
    train = check_embeddings("train", train, at_least=2).double()
    fake = check_embeddings("fake", fake, at_least=2, like=train).double()
    for name, x in (("train", train), ("fake", fake)):
        if not bool((x.abs().amax(1) > 0).all()):
            raise ValueError(f"{name} holds an embedding that is all 0; a cosine needs a direction")
    directions = normalize(train, dim=1)
    # 1 - |cos| is half the squared distance to the nearer of a training embedding and its opposite.
    nearest = k_nearest(normalize(fake, dim=1), torch.cat([directions, -directions]), 1).distances[:, 0]
    distance = float((nearest.square() / 2).mean())
    divisor = distance if distance < MIFID_THRESHOLD else 1.0
    value = frechet_distance(fake, train)
    return value / divisor if divisor > 0 else math.inf


def ct_score(train: Tensor, test: Tensor, fake: Tensor, seed: int = 0) -> float:
    """C_T: are generated embeddings nearer to training ones than test embeddings are? Far below 0 they are copies.

    On the first 64 principal components of `train` (N, D), k-means makes 3 cells. In each, Mann and Whitney's U compares the
    distances of `fake` (M, D) and `test` (L, D) to the nearest training embedding of the cell, and is expressed as a normal
    deviate; these scores are averaged by the cells' shares of `test`. Cells with too few generated embeddings (under 20), or
    none of another set, are left out. Raises ValueError when no cell remains. Source: Meehan et al. 2020, "A non-parametric
    test to detect data-copying".
    """
    from scipy.stats import mannwhitneyu
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    train = check_embeddings("train", train, at_least=CT_CELLS).double()
    test = check_embeddings("test", test, at_least=1, like=train).double()
    fake = check_embeddings("fake", fake, at_least=1, like=train).double()
    sets = [x.cpu().numpy() for x in (train, test, fake)]
    if train.shape[1] > CT_COMPONENTS and len(train) > CT_COMPONENTS:
        reduction = PCA(CT_COMPONENTS, svd_solver="full").fit(sets[0])
        sets = [reduction.transform(x) for x in sets]
    cells = KMeans(CT_CELLS, random_state=seed, n_init=10).fit(sets[0])
    labels = [cells.predict(x) for x in sets]
    total, weight = 0.0, 0.0
    for cell in range(CT_CELLS):
        train_cell, test_cell, fake_cell = (
            torch.from_numpy(x[cell_of == cell]) for x, cell_of in zip(sets, labels, strict=True)
        )
        if not len(train_cell) or not len(test_cell) or len(fake_cell) < CT_SMALLEST_SHARE:
            continue
        test_distances, fake_distances = (k_nearest(x, train_cell, 1).distances[:, 0].numpy() for x in (test_cell, fake_cell))
        n, m = len(test_cell), len(fake_cell)
        # U counts pairs with the generated one farther away; the half is the correction for continuity.
        u = float(mannwhitneyu(fake_distances, test_distances, alternative="less").statistic)
        score = (u - (n * m / 2 - 0.5)) / math.sqrt(n * m * (n + m + 1) / 12)
        total, weight = total + score * n / len(test), weight + n / len(test)
    if not weight:
        raise ValueError(f"no cell holds test embeddings and {CT_SMALLEST_SHARE} generated ones; expected more of them")
    return total / weight
