"""What ``dpbudget doctor --deep`` asks of PyTorch itself: the devices it has, and whether native code is built."""

from __future__ import annotations

from collections.abc import Iterator

from dpbudget_cli._checkup import Finding

_INSTALL = "pip install 'dpbudget[train]'"


def devices_and_kernels() -> Iterator[Finding]:
    """Load torch, which takes seconds, ask it for CUDA, and compile what dptrainer compiles."""
    try:
        import torch
    except Exception as error:  # noqa: BLE001 - a broken installation raises whatever its loader raises
        yield Finding("GPU", "warn", f"torch cannot be loaded: {type(error).__name__}", _INSTALL)
        return
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
        yield Finding("GPU", "ok", f"{names} (CUDA {torch.version.cuda})")
    else:
        built = "built without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        yield Finding("GPU", "ok", f"none that torch sees ({built}); training runs on the processor")
    from dptrainer.clipping import native as clipping
    from dptrainer.noise import native as noise

    for name, library in (("noise", noise.LIBRARY), ("clipping", clipping.LIBRARY)):
        if library.get() is None:
            yield Finding(f"native {name}", "warn", f"{library.status}; the same results are slower", "see C compiler")
        else:
            yield Finding(f"native {name}", "ok", library.status)
