#!/usr/bin/env bash
# Of Liger's fused GRPO losses, "luspo" trains what the attention mask leaves out: a row's loss is summed over all of
# it, times the count of the mask. So it is with the default importance_sampling_level, "token", and with a KL to the
# reference (beta) at the level "sequence", where without a KL a row has one ratio, and the sum is right.
# Seen: liger-kernel 0.8.5 with torch 2.13.0, CPU. Guessed: a masked token has no gradient, as in "dapo" and the
# others. Output seen, norms of the gradients of the hidden states: three tokens kept and one masked, then five masked
# ("padded on"):
#   dapo token beta 0: kept 1.10, masked 0.00; padded on: kept 1.10, masked 0.00
#   luspo token beta 0: kept 2.48, masked 1.54; padded on: kept 1.24, masked 1.67
#   luspo sequence beta 0: kept 3.31, masked 0.00; padded on: kept 3.31, masked 0.00
#   luspo sequence beta 1: kept 5.49, masked 0.18; padded on: kept 4.31, masked 1.36
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy liger-kernel==0.8.5

cat > "$folder/luspo.py" <<'PYTHON'
import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

torch.manual_seed(0)
hidden, weight, ids = torch.randn(2, 8, 6) / 4, torch.randn(5, 6), torch.randint(5, (2, 8))
reference = -1 - torch.rand(2, 8)  # its log-probabilities
mask = (torch.arange(8) < 3).float().expand(2, 8)


def norms(length, loss_type, level, beta):
    module = LigerFusedLinearGRPOLoss(
        beta=beta, loss_type=loss_type, importance_sampling_level=level, use_ref_model=beta > 0, compiled=False
    )
    x = hidden[:, :length].clone().requires_grad_()
    rest = dict(ref_per_token_logps=reference[:, :length]) if beta else {}
    module(x, weight, ids[:, :length], mask[:, :length], torch.tensor([1.0, -2.0]), **rest)[0].backward()
    return f"kept {x.grad[:, :3].norm():.2f}, masked {x.grad[:, 3:].norm():.2f}"


for options in ("dapo", "token", 0), ("luspo", "token", 0), ("luspo", "sequence", 0), ("luspo", "sequence", 1):
    print(*options[:2], f"beta {options[2]}: {norms(4, *options)}; padded on: {norms(8, *options)}")
PYTHON

found=$("$folder/venv/bin/python" "$folder/luspo.py" 2> /dev/null)
echo "$found"
trains="*masked [0-9].[1-9]*masked [0-9].[1-9]*"
none="*masked 0.00; *masked 0.00"
mapfile -t rows <<< "$found"
[[ ${rows[0]} == $none && ${rows[1]} == $trains && ${rows[2]} == $none && ${rows[3]} == $trains ]]
