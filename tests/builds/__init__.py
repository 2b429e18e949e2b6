"""The source tree, the binary and the release: layers, ABI, version."""
