"""Times the loss from logits: `python -m benchmarks.logits`."""

from benchmarks.harness.command import main
from benchmarks.logits.benchmark import FromLogits

if __name__ == "__main__":
    raise SystemExit(main(FromLogits))
