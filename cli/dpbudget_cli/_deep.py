"""What ``dpbudget doctor --deep`` asks of PyTorch itself: the devices it has, and whether native code is built."""

from __future__ import annotations

from collections.abc import Iterator

from dpbudget_cli._checkup import Finding

_INSTALL = "pip install 'dpbudget[train]'"
_TRITON = "pip install 'dpbudget[gpu]', or train with noise=SecureNoise(generate_on_cpu=True)"


def devices_and_kernels() -> Iterator[Finding]:
    """Load torch, which takes seconds, ask it for CUDA, and compile what dptrainer compiles."""
    try:
        import torch
    except Exception as error:  # noqa: BLE001 - a broken installation raises whatever its loader raises
        yield Finding("GPU", "warn", f"torch cannot be loaded: {type(error).__name__}", _INSTALL)
        return
    yield from _cards() if torch.cuda.is_available() else [_no_card()]
    from dptrainer.clipping import native as clipping
    from dptrainer.noise import native as noise

    for name, library in (("noise", noise.LIBRARY), ("clipping", clipping.LIBRARY)):
        if library.get() is None:
            yield Finding(f"native {name}", "warn", f"{library.status}; the same results are slower", "see C compiler")
        else:
            yield Finding(f"native {name}", "ok", library.status)


def _cards() -> Iterator[Finding]:
    """Every CUDA device, and whether noise can be made on it: the first question compiles and tests the kernels."""
    import torch

    from dptrainer.noise.gpu import why_not

    for number in range(torch.cuda.device_count()):
        name = f"{torch.cuda.get_device_name(number)} (CUDA {torch.version.cuda})"
        reason = why_not(torch.device("cuda", number))
        if reason is None:
            yield Finding(f"GPU {number}", "ok", f"{name}; noise is made on it")
        else:
            yield Finding(f"GPU {number}", "warn", f"{name}; noise cannot be made on it: {reason}", _TRITON)


def _no_card() -> Finding:
    import torch

    built = "built without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
    return Finding("GPU", "ok", f"none that torch sees ({built}); training runs on the processor")
