"""The operators under torch's machinery: compilers, autograd, checkpoints, shards."""
