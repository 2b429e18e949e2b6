"""Times the loss from hidden states: `python -m benchmarks.hidden`."""

from benchmarks.harness.command import main
from benchmarks.hidden.benchmark import FromHidden

if __name__ == "__main__":
    raise SystemExit(main(FromHidden))
