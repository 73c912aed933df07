"""What torch.cuda says of the pretended device (pretend_cuda.py)."""

from __future__ import annotations

from collections.abc import Callable

import torch

MEMORY = 139 << 30  # bytes


class Properties:
    """The facts about the device."""

    name, total_memory, major, minor, multi_processor_count = "pretended GPU", MEMORY, 9, 0, 132


class Stream:
    """The one stream; whatever is done with it is done at once."""

    cuda_stream = 0

    def __getattr__(self, name: str) -> Callable:
        return lambda *_: None


ANSWERED = {  # by the name in torch.cuda
    "_lazy_init": None,
    "is_available": True,
    "is_initialized": True,
    "device_count": 1,
    "current_device": 0,
    "current_stream": Stream(),
    "get_device_name": Properties.name,
    "get_device_properties": Properties,
    "get_device_capability": (9, 0),
    "mem_get_info": (MEMORY, MEMORY),
    "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    **dict.fromkeys(("set_rng_state", "manual_seed", "manual_seed_all", "empty_cache", "reset_peak_memory_stats")),
    **dict.fromkeys(("memory_reserved", "memory_allocated", "max_memory_allocated", "max_memory_reserved"), 0),
}
