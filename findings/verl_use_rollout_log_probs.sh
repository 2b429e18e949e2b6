#!/usr/bin/env bash
# verl's actors have an option use_rollout_log_probs, "Whether to use log probabilities from rollout engine", which the
# configs of its asynchronous trainer set ("Must use rollout log probs for training"). No line of verl's Python reads
# it. What decides is algorithm.rollout_correction.bypass_mode: with the first option alone, old log-probabilities are
# computed anew.
# Seen: verl 0.9.1 with torch 2.13.0. Guessed: the option decides, or is refused. Output seen, where the engine says -2
# and the trainer -1:
#   reads of use_rollout_log_probs: 0
#   use_rollout_log_probs False, bypass_mode False: old_log_probs [-1.0, -1.0, -1.0]
#   use_rollout_log_probs True, bypass_mode False: old_log_probs [-1.0, -1.0, -1.0]
#   use_rollout_log_probs False, bypass_mode True: old_log_probs [-2.0, -2.0, -2.0]
#   use_rollout_log_probs True, bypass_mode True: old_log_probs [-2.0, -2.0, -2.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy "tensordict<=0.10.0" ray==2.60.0 omegaconf \
    transformers==5.10.4 peft codetiming orjson torchdata hydra-core datasets pandas pillow cachetools uvicorn \
    fastapi
"$folder/venv/bin/pip" install --quiet --no-deps verl==0.9.1

cat > "$folder/option.py" <<'PYTHON'
import ast
from pathlib import Path
from types import SimpleNamespace

import torch
import verl
from omegaconf import OmegaConf
from verl import DataProto
from verl.experimental.separation.ray_trainer import SeparateRayPPOTrainer

NAME = "use_rollout_log_probs"
nodes = (node for path in Path(verl.__file__).parent.rglob("*.py") for node in ast.walk(ast.parse(path.read_text())))
# As an attribute, or as a text by which a config is asked.
reads = sum(NAME in (getattr(node, "attr", None), getattr(node, "value", None)) for node in nodes)
print(f"reads of {NAME}: {reads}")

ONES = torch.ones(1, 3)


def old_log_probs(use, bypass):
    correction = {"rollout_correction": {"bypass_mode": bypass}}
    actor = {NAME: use, "loss_agg_mode": "token-mean", "loss_scale_factor": None, "policy_loss": {}}
    config = OmegaConf.create({"algorithm": correction, "actor_rollout_ref": {"actor": actor}})
    anew = DataProto.from_dict({"old_log_probs": -ONES, "entropys": ONES})
    trainer = SimpleNamespace(
        config=config, metrics={}, timing_raw={}, _compute_old_log_prob=lambda batch: (anew, 0.0)
    )
    batch = {"rollout_log_probs": -2 * ONES, "responses": ONES.long()}
    masks = {"response_mask": ONES, "attention_mask": ONES}
    step = SeparateRayPPOTrainer._fit_compute_log_prob
    return step(trainer, DataProto.from_dict({**batch, **masks})).batch["old_log_probs"][0].tolist()


for bypass in False, True:
    for use in False, True:
        print(f"{NAME} {use}, bypass_mode {bypass}: old_log_probs {old_log_probs(use, bypass)}")
PYTHON

found=$("$folder/venv/bin/python" "$folder/option.py" 2> /dev/null)
echo "$found"
mapfile -t rows <<< "$found"
[[ ${rows[0]} == *": 0" && ${rows[1]} == *"[-1.0, "* && ${rows[2]} == *"[-1.0, "* ]]
[[ ${rows[3]} == *"[-2.0, "* && ${rows[4]} == *"[-2.0, "* ]]
