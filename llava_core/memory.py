"""How much memory may still be taken."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still have on `device`."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_ram()


def free_ram(root: Path = Path("/")) -> int:
    """Bytes of RAM that are free or can be freed, in the machine and within every control group's limit."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    (available,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min([available, *_group_rooms(root)])


def _group_rooms(root: Path) -> list[int]:
    """What the limits of this process's control groups, version 2 or 1, leave; none without a limit."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = top / path.lstrip("/")
        # Inside a container the path may be the host's; the container's own group is then the top.
        for folder in (group, *group.parents[: len(group.parts) - len(top.parts)]):
            try:
                limit, used = ((folder / name).read_text().strip() for name in names[:2])
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            if limit != "max":
                rooms.append(max(0, int(limit) - int(used) + int(stat.get(names[2], 0))))
    return rooms
