#!/usr/bin/env bash
# SkyRL copies the temperature of sampling to trainer.algorithm.temperature, by which the trainer divides logits, when
# its config object is made; the field's own text says "during config validation". A temperature that is set on the
# object afterwards reaches the engine alone: it samples at 0.7, the trainer computes log-probabilities at 1, and
# nothing says so. Overrides given before, on the command line or by from_cli_overrides, reach both.
# Seen: skyrl 0.4.0 with torch 2.13.0. Guessed: the trainer follows, or validation finds it. Needs Python 3.12, as SkyRL
# does. Output seen, the engine's temperature as SkyRL asks for it, and the trainer's:
#   as made: engine 1.0, trainer 1.0
#   set to 0.7 afterwards: engine 0.7, trainer 1.0
#   the same, validated: engine 0.7, trainer 1.0
#   set to 0.7 by an override: engine 0.7, trainer 0.7
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.12 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy omegaconf jaxtyping loguru cloudpathlib pydantic pandas \
    requests func_timeout aiohttp orjson pybase64 rich ray==2.60.0
"$folder/venv/bin/pip" install --quiet --no-deps skyrl==0.4.0 skyrl-gym==0.4.0

cat > "$folder/temperature.py" <<'PYTHON'
from skyrl.backends.skyrl_train.inference_servers.engine_utils import get_sampling_params_for_backend
from skyrl.train.config import SkyRLTrainConfig
from skyrl.train.utils.utils import validate_cfg


def show(words, config):
    engine = get_sampling_params_for_backend("vllm", config.generator.sampling_params)["temperature"]
    print(f"{words}: engine {engine}, trainer {config.trainer.algorithm.temperature}")


config = SkyRLTrainConfig()
show("as made", config)
config.trainer.logger = "console"  # validation asks for an account of the default one
config.generator.sampling_params.temperature = 0.7
show("set to 0.7 afterwards", config)
validate_cfg(config)
show("the same, validated", config)
overrides = ["generator.sampling_params.temperature=0.7"]
show("set to 0.7 by an override", SkyRLTrainConfig.from_cli_overrides(overrides))
PYTHON

found=$("$folder/venv/bin/python" "$folder/temperature.py" 2> /dev/null)
echo "$found"
mapfile -t rows <<< "$found"
[[ ${rows[1]} == *"engine 0.7, trainer 1.0" && ${rows[2]} == *"engine 0.7, trainer 1.0" ]]
[[ ${rows[3]} == *"engine 0.7, trainer 0.7" ]]
