"""Random calls of the public functions: made, run, judged in float64, and minimised on failure."""
