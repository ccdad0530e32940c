"""The commands of `mlflow-icr`, a module each: it declares its options in `add`, and calls the library.

A command imports what it needs when it runs, so that `--help` does not wait.
"""
