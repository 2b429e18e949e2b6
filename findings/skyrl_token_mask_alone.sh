#!/usr/bin/env bash
# SkyRL's off-policy correction has two limits for single tokens, token_mask_is_threshold_low and _high, each of them
# None or set. One that is set alone does nothing: no token is masked, and no metric tells of it. The two outlier
# limits beside them, of the same form, work alone. A mask on the upper side alone asks for a lower limit of 0.
# Seen: skyrl 0.4.0 with torch 2.13.0. Guessed: one limit masks on its side. Needs Python 3.12, as SkyRL does. Output
# seen, the mask after the correction of three tokens whose ratios are 148, 1 and 1:
#   token_mask low and high [0, 1, 1] with metrics
#   token_mask high [1, 1, 1] without metrics
#   token_mask high, low at 0 [0, 1, 1] with metrics
#   outlier_token high [0, 0, 0] with metrics
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.12 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy omegaconf jaxtyping loguru cloudpathlib pydantic pandas \
    requests func_timeout
"$folder/venv/bin/pip" install --quiet --no-deps skyrl==0.4.0 skyrl-gym==0.4.0

cat > "$folder/limits.py" <<'PYTHON'
import torch
from skyrl.backends.skyrl_train.utils.off_policy_correction_utils import apply_off_policy_correction
from skyrl.train.config.config import OffPolicyCorrectionConfig

trainer = torch.tensor([[-1.0, -1.0, -1.0]])
engine = torch.tensor([[-6.0, -1.0, -1.0]])


def correct(words, **limits):
    config = OffPolicyCorrectionConfig(**limits)
    loss = torch.ones(1, 3)
    _, mask, metrics = apply_off_policy_correction(loss, trainer, engine, torch.ones(1, 3), config)
    print(words, mask[0].int().tolist(), "with metrics" if metrics else "without metrics")


correct("token_mask low and high", token_mask_is_threshold_low=0.5, token_mask_is_threshold_high=2.0)
correct("token_mask high", token_mask_is_threshold_high=2.0)
correct("token_mask high, low at 0", token_mask_is_threshold_low=0.0, token_mask_is_threshold_high=2.0)
correct("outlier_token high", outlier_token_is_threshold_high=2.0)
PYTHON

found=$("$folder/venv/bin/python" "$folder/limits.py" 2> /dev/null)
echo "$found"
mapfile -t rows <<< "$found"
[[ ${rows[0]} == *"[0, 1, 1]"* && ${rows[1]} == *"[1, 1, 1] without"* ]]
[[ ${rows[2]} == *"[0, 1, 1]"* && ${rows[3]} == *"[0, 0, 0]"* ]]
