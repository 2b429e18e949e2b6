#!/usr/bin/env bash
# ms-swift's module of helpers for GRPO and GKD imports one name of msgspec, which ms-swift does not name as a
# requirement and nothing that it names brings in: installed alone, its GRPOTrainer cannot be imported.
# Seen: ms-swift 4.6.0 with torch 2.13.0. Guessed: what its requirements bring is enough to import it. Output seen:
#   requirements named msgspec: 0
#   ModuleNotFoundError: No module named 'msgspec'
#   with msgspec: <class 'swift.rlhf_trainers.grpo_trainer.GRPOTrainer'>
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 ms-swift==4.6.0

cat > "$folder/requirements.py" <<'PYTHON'
from importlib.metadata import requires

print("requirements named msgspec:", sum("msgspec" in line for line in requires("ms-swift")))
PYTHON
cat > "$folder/trainer.py" <<'PYTHON'
try:
    from swift.rlhf_trainers.grpo_trainer import GRPOTrainer

    print("with msgspec:", GRPOTrainer)
except ModuleNotFoundError as error:
    print("ModuleNotFoundError:", error)
PYTHON

cd "$folder"
found=$(
  venv/bin/python requirements.py
  venv/bin/python trainer.py 2> /dev/null | tail -n 1
  venv/bin/pip install --quiet msgspec==0.23.0
  venv/bin/python trainer.py 2> /dev/null | tail -n 1
)
echo "$found"
[[ $found == *"msgspec: 0"*"ModuleNotFoundError: No module named 'msgspec'"*"with msgspec: <class "* ]]
