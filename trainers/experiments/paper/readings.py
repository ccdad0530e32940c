"""The paper's own readings of its figures, where its text or a figure gives numbers (Li et al. 2026, arXiv 2606.09718)."""

from __future__ import annotations

READINGS: dict[int, str] = {
    2: "EDM on CIFAR-10 and 100, SiT on ImageNet: U-shaped, the minimum where the probe is best.",
    3: "CIFAR-10, all images: ICR 0.40 falls to 0.26 with FID.",
    4: "CIFAR-10, N = 4096: ICR 0.36 at 2.5M images seen, 0.29 at 8.5M, 0.37 at 200M; copies leave 0 after 10M, 0.36 at 200M.",
    5: "ImageNet-64, N = 10K: ICR 0.546 (0.6M), 0.438 (7M), 0.504 (50M). SiT-B/2, N = 20K: 0.472, 0.441 (75K batches), 0.468.",
    6: "Neighbours are most semantic at the minimum, worse before and after.",
    7: "Many images: tr(Sigma_s) grows, tr(Sigma_xi) barely. Few: tr(Sigma_s) saturates, tr(Sigma_xi) keeps growing.",
    8: "tr(Sigma_xi) grows with sigma; tr(Sigma_s) peaks in the middle.",
    9: "N = 4096 after overfitting: ICR rises with sigma, accuracy falls.",
    10: "Many images: the Alignment loss rises while FID falls.",
    11: "N = 4096: Silhouette and class separation saturate early; ICR follows the memorization ratio.",
    12: "N = 512 reads 0.24 where all images read 0.45.",
    13: "Level 1 is unstable; levels 3 and up agree.",
    14: "The same trends across middle layers.",
}  # fmt: skip
