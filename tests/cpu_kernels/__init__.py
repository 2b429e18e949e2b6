"""The bare CPU kernels under sanitizers."""
