"""The one exception a user is meant to see: what happened, why, and what to do about it."""

import errno

_SHORTAGES = (
    "not enough memory", "can't allocate memory", "cannot allocate memory", "out of memory", "alloc_failed",
    "os error 12", "can't start new thread", "failed to map segment",
)  # fmt: skip
_TELLING = ("RuntimeError", "SafetensorError", "ImportError", "LLVMException")  # whose text alone says so


class UserError(Exception):
    """A mistake or a limit that the user can act on; shown as three lines, exit code 2, no traceback.

    Args:
        what: the thing that failed, in the user's terms.
        why: the cause, with the offending value.
        fix: the next thing to type or change.
    """

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(f"{what}: {why} ({fix})")
        self.what, self.why, self.fix = what, why, fix


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out.

    Python's, the system's and torch's own; the RuntimeErrors of torch's allocators and of CUDA's libraries, pinned main
    memory included; and that of a weights file or a library for which there is no room to be mapped.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    telling = any(kind.__name__ in _TELLING for kind in type(error).__mro__)
    return telling and any(words in text for words in _SHORTAGES)


def address_limit() -> int | None:
    """Return how many bytes this process may address, as `ulimit -v` or a batch system sets it; None for no limit."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft


def check_shape(name: str, tensor, expected: tuple[int | None, ...]) -> None:
    """Raise ValueError naming argument, wanted and got unless `tensor.shape` matches; None matches any size."""
    shape = tuple(tensor.shape)
    if len(shape) != len(expected) or any(w is not None and w != s for w, s in zip(expected, shape, strict=True)):
        want = "[" + ", ".join("*" if w is None else str(w) for w in expected) + "]"
        raise ValueError(f"{name}: wanted shape {want}, got {list(shape)}")
