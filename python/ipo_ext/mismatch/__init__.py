"""`python -m ipo_ext mismatch FILE...`: how far trainer and engine are apart in rollouts, and why.

The flow: ``readers`` (a file a format) -> ``rollouts`` -> ``recomputation`` of what a file lacks ->
``statistics`` -> ``causes`` -> ``report`` (text), ``picture`` and ``page`` (HTML). Needs torch;
what else a file or an option needs is in the extra ``mismatch`` and named where it is missing.
"""

from __future__ import annotations

from .command import main
from .dump import dump

__all__ = ["dump", "main"]
