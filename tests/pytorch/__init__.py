"""The public functions under torch's machinery: compilers, autograd, checkpoints, shards."""
