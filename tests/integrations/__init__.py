"""The adapters, and tests inside the real trainers."""
