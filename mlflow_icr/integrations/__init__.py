"""Watches for training loops: your own, Accelerate's, Lightning's, transformers', and diffusers' example scripts.

All of them use `mlflow_icr.integrations.watch`; each other module is named after the library that it is for.
"""
