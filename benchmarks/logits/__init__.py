"""The loss from logits: loss and gradient, and the memory that they take."""
