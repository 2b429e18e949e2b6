#!/usr/bin/env bash
# SkyRL's sequence masks drop a response whose ratio is out of bounds, unless a position outside of the mask holds
# -inf or NaN: 0 times that is NaN, no comparison with a bound is true, and the response stays. With -inf each metric
# is finite, and the share of masked responses is 0. The token mask of the same module asks whether a ratio is within
# bounds: NaN is not.
# Seen: skyrl 0.4.0 with torch 2.13.0. Guessed: what the loss mask leaves out does not count, or else a NaN drops the
# response. Needs Python 3.12, as SkyRL does. Output seen, the mask of a response whose tokens have a ratio of e each,
# before padding:
#   geometric, padding holds 0.0: [0, 0, 0] masked share 1, finite metrics
#   geometric, padding holds -inf: [1, 1, 0] masked share 0, finite metrics
#   geometric, padding holds nan: [1, 1, 0] masked share 0, other metrics
#   product, padding holds 0.0: [0, 0, 0] masked share 1, finite metrics
#   product, padding holds -inf: [1, 1, 0] masked share 0, finite metrics
#   product, padding holds nan: [1, 1, 0] masked share 0, other metrics
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.12 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy omegaconf jaxtyping loguru cloudpathlib pydantic pandas \
    requests func_timeout
"$folder/venv/bin/pip" install --quiet --no-deps skyrl==0.4.0 skyrl-gym==0.4.0

cat > "$folder/padding.py" <<'PYTHON'
import math

import torch
from skyrl.backends.skyrl_train.utils.off_policy_correction_utils import apply_off_policy_correction
from skyrl.train.config.config import OffPolicyCorrectionConfig

for metric, short in ("geometric", "geo"), ("product", "product"):
    config = OffPolicyCorrectionConfig(sequence_mask_metric=metric)
    for held in 0.0, -math.inf, math.nan:
        trainer = torch.tensor([[-1.0, -1.0, 0.0]])
        engine = torch.tensor([[-2.0, -2.0, held]])
        mask = torch.tensor([[1.0, 1.0, 0.0]])
        _, mask, metrics = apply_off_policy_correction(torch.ones(1, 3), trainer, engine, mask, config)
        share = metrics[f"{short}_sequence_mask_masked_ratio"]
        kind = "finite" if all(map(math.isfinite, metrics.values())) else "other"
        print(f"{metric}, padding holds {held}: {mask[0].int().tolist()} masked share {share:.0f}, {kind} metrics")
PYTHON

found=$("$folder/venv/bin/python" "$folder/padding.py" 2> /dev/null)
echo "$found"
[[ $(grep -c "holds 0.0: \[0, 0, 0\] masked share 1" <<< "$found") == 2 ]]
[[ $(grep -c "holds -inf: \[1, 1, 0\] masked share 0, finite" <<< "$found") == 2 ]]
[[ $(grep -c "holds nan: \[1, 1, 0\] masked share 0" <<< "$found") == 2 ]]
