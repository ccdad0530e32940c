"""Other people's training loops: a plain one, Accelerate's, Lightning's, transformers', and diffusers' example scripts.

`mlflow_icr.integrations.watch` is what all of them use; the others are named after what they are for, and import it.
"""
