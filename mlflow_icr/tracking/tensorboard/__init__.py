"""Results in TensorBoard's event files."""
