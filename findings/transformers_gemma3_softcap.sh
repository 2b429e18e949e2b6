#!/usr/bin/env bash
# transformers' Gemma3ForCausalLM caps its logits by the final_logit_softcapping of its config.
# Gemma3ForConditionalGeneration, which AutoModelForCausalLM builds from the config that has images too, leaves its
# text config's cap out, without a word. The default is None, so the difference shows where a cap is set: a loss that
# reads it from the config, as a head of one's own must, is right for the first model and wrong for the second.
# Seen: transformers 5.24.0 with torch 2.13.0. Guessed: the text model's cap holds in both, as in Gemma 3n and
# PaliGemma. Output seen, the cap and the largest logit in magnitude:
#   Gemma3ForCausalLM cap 0.5 largest 0.50 within
#   Gemma3ForConditionalGeneration cap 0.5 largest 19.42 beyond
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.24.0

cat > "$folder/cap.py" <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3TextConfig

layers = dict(num_hidden_layers=1, num_attention_heads=2, hidden_size=16, intermediate_size=32)
text = dict(layers, vocab_size=64, num_key_value_heads=1, head_dim=8, initializer_range=1.0)
text["final_logit_softcapping"] = 0.5
vision = dict(layers, image_size=28, patch_size=14)

for config in Gemma3TextConfig(**text), Gemma3Config(text_config=text, vision_config=vision):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    cap = model.config.get_text_config().final_logit_softcapping
    largest = model(input_ids=torch.arange(1, 9)[None]).logits.abs().max().item()
    print(type(model).__name__, "cap", cap, f"largest {largest:.2f}", "within" if largest <= cap else "beyond")
PYTHON

found=$("$folder/venv/bin/python" "$folder/cap.py" 2> /dev/null)
echo "$found"
[[ $found == "Gemma3ForCausalLM "*" within"$'\n'"Gemma3ForConditionalGeneration "*" beyond" ]]
