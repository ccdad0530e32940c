"""The same training for several sizes, seeds and other settings."""
