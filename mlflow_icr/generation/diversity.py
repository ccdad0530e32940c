"""Inception score and Vendi score: how varied and how recognisable samples are, without real images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mlflow_icr.generation.embeddings import check_embeddings


def inception_score(probs: Tensor) -> float:
    """exp of the mean Kullback-Leibler divergence of each image's class probabilities (N, C) from their mean, 1 to C.

    It is taken over all images at once; splits, which some programs make, only lower it. It is called Inception Score only
    when the classes are the Inception network's. Raises ValueError for rows that are not probabilities.
    Source: Salimans et al. 2016.
    """
    p = check_embeddings("probs", probs, at_least=1).double()
    if not (bool((p >= 0).all()) and bool((p.sum(1) - 1).abs().max() < 1e-3)):
        raise ValueError("probs holds rows that are not probabilities; expected numbers >= 0 that sum to 1")
    marginal = p.mean(0)
    # 0 log 0 = 0, and where the marginal is 0 every row is.
    divergence = torch.where(p > 0, p * (p.clamp(min=1e-300).log() - marginal.clamp(min=1e-300).log()), 0.0).sum(1)
    return float(divergence.mean().exp())


def vendi_score(x: Tensor) -> float:
    """The effective number of different embeddings among (N, D): exp of the entropy of the eigenvalues of K / N, 1 to N.

    K holds the cosines of all pairs; its non-zero eigenvalues are those of a D x D matrix where D < N. Raises ValueError
    for an embedding that is all 0. Source: Friedman & Dieng 2023, "The Vendi score", order 1.
    """
    x = check_embeddings("x", x, at_least=1).double()
    if not bool((x.abs().amax(1) > 0).all()):
        raise ValueError("x holds an embedding that is all 0; a cosine needs a direction")
    z = normalize(x, dim=1) / len(x) ** 0.5
    values = torch.linalg.eigvalsh(z @ z.T if len(z) <= z.shape[1] else z.T @ z).clamp(min=0)
    return float(torch.special.entr(values / values.sum()).sum().exp())
