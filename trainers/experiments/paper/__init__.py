"""The paper, reproduced: trainings, result files from their checkpoints, figures 2 to 14 and a statement on each claim.

Li, Jia, et al., "Evaluating the Representation Space of Diffusion Models via Self-Supervised Principles", ICML 2026, arXiv
2606.09718. One direction: `plan` -> `preparations`, `trainings` -> `measurements` -> `claims`, `beyond`, `figures` -> `page`.
"""
