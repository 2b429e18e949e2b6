"""The Python half of the operators: arguments, checks, fakes, autograd, the loss's chunk loop."""
