"""Checkpoints: their folder, and models of MLflow made of them."""
