#!/usr/bin/env bash
# verl's masked_sum, by its docstring, keeps a NaN outside of the mask out of the sum, and the loss by "token-mean"
# does so. The three aggregations by sequence multiply by the mask first and call masked_sum on what comes of it: one
# NaN in the padding is the whole loss. The gradient is that of the tokens alone, so training can go on under a loss
# that is logged as NaN.
# Seen: verl 0.9.1 with torch 2.13.0. Guessed: all aggregations leave the padding out, or all do not. Output seen:
#   token-mean loss 2.0 gradient [0.5, 0.5, 0.0]
#   seq-mean-token-sum loss nan gradient [1.0, 1.0, 0.0]
#   seq-mean-token-mean loss nan gradient [0.5, 0.5, 0.0]
#   seq-mean-token-sum-norm loss nan gradient [0.33, 0.33, 0.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy "tensordict<=0.10.0" ray==2.60.0 omegaconf \
    transformers==5.10.4 codetiming orjson
"$folder/venv/bin/pip" install --quiet --no-deps verl==0.9.1

cat > "$folder/padding.py" <<'PYTHON'
import torch
from verl.trainer.ppo.core_algos import agg_loss

mask = torch.tensor([[1.0, 1.0, 0.0]])
for mode in "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm":
    losses = torch.tensor([[1.0, 3.0, float("nan")]], requires_grad=True)
    loss = agg_loss(losses, mask, mode)
    loss.backward()
    print(mode, "loss", loss.item(), "gradient", [round(slope, 2) for slope in losses.grad[0].tolist()])
PYTHON

found=$("$folder/venv/bin/python" "$folder/padding.py" 2> /dev/null)
echo "$found"
means="*token-sum loss nan gradient [[]1.0, *token-mean loss nan gradient [[]0.5, *norm loss nan gradient [[]0.33, *"
[[ $found == "token-mean loss 2.0 gradient [0.5, 0.5, 0.0]"$means ]]
