"""Times the loss from log-probabilities: `python -m benchmarks.logprobs`."""

from benchmarks.harness.command import main
from benchmarks.logprobs.benchmark import FromLogprobs

if __name__ == "__main__":
    raise SystemExit(main(FromLogprobs))
