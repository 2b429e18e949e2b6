#!/usr/bin/env bash
# transformers' nested_detach, which the Trainer runs over a model's outputs in evaluation, rebuilds every tuple from a
# generator: a NamedTuple, which takes its fields one by one, raises. nested_concat, beside it, does the same.
# Seen: transformers 5.24.0 with torch 2.13.0. Guessed: a NamedTuple passes, as through torch's own pytree. Output seen:
#   tuple (tensor([1.]), tensor([2.]))
#   TypeError: Output.__new__() missing 1 required positional argument: 'logits'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.24.0

cat > "$folder/detach.py" <<'PYTHON'
from typing import NamedTuple

import torch
from transformers.trainer_pt_utils import nested_detach


class Output(NamedTuple):
    loss: torch.Tensor
    logits: torch.Tensor


tensors = torch.ones(1), torch.full((1,), 2.0)
print("tuple", nested_detach(tensors))
try:
    print("NamedTuple", nested_detach(Output(*tensors)))
except TypeError as error:
    print("TypeError:", error)
PYTHON

found=$("$folder/venv/bin/python" "$folder/detach.py" 2> /dev/null)
echo "$found"
[[ $found == *"tuple (tensor([1.]), tensor([2.]))"*"TypeError: Output.__new__() missing 1 required positional argument: 'logits'" ]]
