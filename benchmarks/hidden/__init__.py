"""The loss from hidden states and a head: loss, gradients, and the memory beyond them."""
