"""What to run after installing, and what a bug report quotes: ``info`` and ``verify``."""
