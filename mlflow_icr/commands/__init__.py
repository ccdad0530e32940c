"""The commands of `mlflow-icr`, a module each: `add` declares its options, and it calls into the library.

What a command needs is imported when it runs: `--help` waits for nothing.
"""
