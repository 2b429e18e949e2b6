"""The loss inside other people's trainers; each module needs its host only where it says so."""
