"""What ``dpbudget train`` writes: weights as safetensors, whole or not at all, with the facts of their guarantee."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dpbudget.errors import InvalidParameter, Unreadable

if TYPE_CHECKING:
    import torch


def card_of(output: str) -> str:
    """Where the model card of these weights goes."""
    return f"{output}.md"


def check_output(output: str) -> None:
    """Refuse, before any step is charged, files that could not be written after the last one.

    Raises:
        InvalidParameter: weights or card exist (DP074).
        Unreadable: their folder cannot be written (DP070).
    """
    for name in (output, card_of(output)):
        if os.path.lexists(name):
            raise InvalidParameter(
                f"{name} exists",
                code="DP074",
                hint="choose another --output, with --init if these weights go on; no step was taken",
            )
    place = Path(output).parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise Unreadable(f"the folder {place} cannot be written", hint="make the folder first")


def save_weights(model: torch.nn.Module, output: str, facts: Mapping[str, str]) -> str:
    """Write the weights with ``facts`` as the file's metadata; returns the SHA-256 of the file.

    Raises:
        InvalidParameter: the file exists (DP074).
    """
    from safetensors.torch import save

    tensors = {name: value.detach().contiguous().clone() for name, value in model.state_dict().items()}
    data = save(tensors, metadata={"format": "pt", **facts})
    write_whole(output, data)
    return hashlib.sha256(data).hexdigest()


def write_whole(output: str, data: bytes) -> None:
    """Write a file so that it appears whole or not at all, and never over another.

    Raises:
        InvalidParameter: it exists (DP074).
    """
    place = Path(output)
    partial = place.with_name(f".{place.name}.{secrets.token_hex(8)}")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(partial, place)
    except FileExistsError:
        raise InvalidParameter(f"{output} exists", code="DP074", hint="another process wrote it meanwhile") from None
    finally:
        partial.unlink(missing_ok=True)
