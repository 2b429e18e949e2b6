"""Process groups as users give them: themselves, or a device mesh of one dimension."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

Group: TypeAlias = dist.ProcessGroup | DeviceMesh


def process_group(name: str, group: Any) -> dist.ProcessGroup:
    """That of a mesh, or ``group`` itself; ``name`` is the argument's."""
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"{name}: expected a mesh of one dimension, got one of {group.ndim}; pass that of "
                'one, such as mesh["cp"]'
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{name}: expected a process group or a device mesh, got {type(group).__name__}"
        )
    return group
