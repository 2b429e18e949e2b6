#!/usr/bin/env bash
# Inductor's cache of compiled graphs on disk knows a custom operator by its name: after an operator's fake has changed
# (an upgrade of the package that defines it), a new process gets the graph that was compiled before, and fails.
# Seen: torch 2.13.0, CPU. Guessed: another fake is another key. Output seen, of the three processes below:
#   shape (2, 24)
#   AssertionError: expected size 24==2, stride 2==24 at dim=0; expected size 2==24, stride 1==1 at dim=1
#   shape (24, 2)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy

cat > "$folder/step.py" <<'PYTHON'
import sys

import torch

AXIS = int(sys.argv[1])  # which of two versions of the operator this process has


@torch.library.custom_op("finding::pairs", mutates_args=())
def pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x], AXIS)


@pairs.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((2, len(x)) if AXIS == 0 else (len(x), 2))


@torch.compile(fullgraph=True)
def step(x: torch.Tensor) -> torch.Tensor:
    return pairs(x * 2) + 1


try:
    print("shape", tuple(step(torch.arange(24.0)).shape))
except AssertionError as error:
    print("AssertionError:", str(error).splitlines()[0])
PYTHON

run() { TORCHINDUCTOR_CACHE_DIR="$folder/$1" "$folder/venv/bin/python" "$folder/step.py" "$2"; }
found=$(run shared 0; run shared 1; run fresh 1)
echo "$found"
[[ $found == "shape (2, 24)"$'\n'"AssertionError: expected size 24==2"*$'\n'"shape (24, 2)" ]]
