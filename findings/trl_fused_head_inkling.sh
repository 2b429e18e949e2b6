#!/usr/bin/env bash
# TRL's fused head, from which its trainers take their log-probabilities, knows Granite's logits_scaling, Cohere's
# logit_scale and more, but not the muP width by which transformers' Inkling divides its hidden states before the head
# (24 by default), nor that Inkling drops padded entries of its vocabulary. Its logits are 24 times the model's, as if
# the temperature were 1/24, and nothing warns.
# Seen: TRL 1.16.0 with transformers 5.24.0 and torch 2.13.0, CPU. Guessed: what the fused head cannot do, it refuses,
# or it gives what the model's own logits give. Output seen, the largest difference between the two, in nats:
#   GraniteForCausalLM, logits_scaling 4: 0.0
#   InklingForCausalLM, as it comes: 5.7
#   InklingForCausalLM, logits_mup_width_multiplier 1: 0.0
#   InklingForCausalLM, logits_mup_width_multiplier 1, unpadded_vocab_size 32: 1.4
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.24.0 trl==1.16.0

cat > "$folder/head.py" <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM, GraniteConfig, InklingTextConfig
from trl.trainer.utils import add_fused_lm_head

TINY = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
TINY |= dict(num_attention_heads=2, num_key_value_heads=2)
INKLING = TINY | dict(head_dim=8, swa_num_attention_heads=2, swa_num_key_value_heads=2, swa_head_dim=8)
INKLING |= dict(d_rel=4, rel_extent=16, mlp_layer_types=["dense"], initializer_range=0.5)
ids = torch.arange(1, 9)[None]


@torch.no_grad()
def difference(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    logits = model(input_ids=ids).logits[:, :-1].float()
    own = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    add_fused_lm_head(model)
    fused = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    return f"{(own - fused).abs().max().item():.1f}"


print("GraniteForCausalLM, logits_scaling 4:", difference(GraniteConfig(**TINY, logits_scaling=4.0)))
print("InklingForCausalLM, as it comes:", difference(InklingTextConfig(**INKLING)))
for options in {}, {"unpadded_vocab_size": 32}:
    options = {"logits_mup_width_multiplier": 1.0, **options}
    words = ", ".join(f"{name} {value:g}" for name, value in options.items())
    print(f"InklingForCausalLM, {words}:", difference(InklingTextConfig(**INKLING, **options)))
PYTHON

found=$("$folder/venv/bin/python" "$folder/head.py" 2> /dev/null)
echo "$found"
[[ $found == *"scaling 4: 0.0"*"as it comes: "[1-9]*"multiplier 1: 0.0"*"vocab_size 32: "[1-9]* ]]
