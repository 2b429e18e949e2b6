"""The loss from log-probabilities: a step with every metric read."""
