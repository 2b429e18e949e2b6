"""What the loss and the log-probabilities compute, on every backend."""
