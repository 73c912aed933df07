"""The tool around the stages: command line, configuration, runs that survive interruption, files.

    from pipeline import generate

    result = generate("a red mug", seed=1, out="runs/mug")
    result.mesh.save("mug.glb")

The names of `__all__` are all that a program needs. Each is imported when it is first asked for, so that
`pipeline --help` answers before torch is loaded.
"""

import importlib
from typing import Any

from pipeline.import_names import check_stages

__version__ = "0.1.0"

__all__ = [
    "Config",
    "Interrupted",
    "Result",
    "ResultMesh",
    "UserError",
    "__version__",
    "export",
    "generate",
    "load_config",
    "load_prior",
    "resume",
    "write_mesh",
]

_HOMES = {
    "Config": "pipeline.config.model",
    "Interrupted": "pipeline.errors",
    "Result": "pipeline.runs.result",
    "ResultMesh": "pipeline.output.result_mesh",
    "UserError": "stages.errors",
    "export": "pipeline.api",
    "generate": "pipeline.api",
    "load_config": "pipeline.config.model",
    "load_prior": "pipeline.api",
    "resume": "pipeline.api",
    "write_mesh": "pipeline.output.write",
}


check_stages()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
