"""Whether README and docs are true: what they run, name and link to."""
