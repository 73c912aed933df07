"""The child process around xatlas: `python uv_worker.py IN OUT SIZE PADDING CPU_SECONDS`, safetensors in and out.

Alone in its process because xatlas 0.0.11 can crash or run for an hour (facts: threestudio #511); imports nothing of
ours, so a crash costs nothing and the start is quick.
"""

import sys

import numpy as np
import xatlas
from safetensors.numpy import load_file, save_file


def limit_cpu(seconds: int) -> None:
    """Let the system end this process after so much computing; a busy machine must not change the result."""
    try:
        import resource
    except ImportError:  # Windows: the parent's limit on the clock is all there is
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


def main(source: str, target: str, size: int, padding: int) -> None:
    data = load_file(source)
    atlas = xatlas.Atlas()
    atlas.add_mesh(data["vertices"], data["faces"].astype(np.uint32))
    options = xatlas.PackOptions()
    options.resolution, options.padding, options.bilinear = size, padding, True
    atlas.generate(xatlas.ChartOptions(), options)
    if atlas.atlas_count != 1:
        sys.exit(f"xatlas made {atlas.atlas_count} textures instead of one")
    _, uv_faces, uv = atlas[0]
    texels = uv * np.array([atlas.width, atlas.height], dtype=np.float32)
    data = {"texels": texels, "uv_faces": uv_faces.astype(np.int32)}
    data["shape"] = np.array([atlas.width, atlas.height, atlas.chart_count], dtype=np.int64)
    save_file({name: np.ascontiguousarray(value) for name, value in data.items()}, target)


if __name__ == "__main__":
    limit_cpu(int(sys.argv[5]))
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
