"""What is in a checkpoint, told from its headers, and whether a model can take it up; every kind of them."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from avar_lightning.checkpoints.optimizer import is_by_name, trained_names
from avar_lightning.checkpoints.replacing import recover

Kind = Literal["file", "FSDP2 folder", "FSDP folder"]

EXTRA = "meta.pt"  # where Lightning keeps what is neither weights nor optimizer, beside torch's files
WEIGHTS: dict[Kind, str] = {"FSDP2 folder": "state_dict.", "FSDP folder": "model."}
SHOWN = 3


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds.

    Attributes:
        path: Of the checkpoint.
        kind: `file` is one of a single process or DDP; the others are folders in which each process wrote its share.
        shapes: Of every weight, by name.
        trained: Names of the parameters that an optimizer has, where they are known.
        extra: Everything but weights and optimizers.
    """

    path: Path
    kind: Kind
    shapes: dict[str, torch.Size]
    trained: set[str] | None
    extra: dict[str, Any]


def is_checkpoint(path: str | Path) -> bool:
    """Whether this is a Lightning checkpoint, by its looks: a zip file of torch's, or a folder with both metadata."""
    path = Path(path)
    if path.is_file():
        return zipfile.is_zipfile(path)
    return (path / ".metadata").is_file() and (path / EXTRA).is_file()


def look_into(path: str | Path, *, trusted: bool = False) -> Contents:
    """Read what a checkpoint holds, without its tensors.

    Args:
        path: Of the checkpoint.
        trusted: Whether it may hold objects of any type, which can run any code as they are read.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is no checkpoint, or not a whole one.
    """
    path = Path(path)
    recover(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint at {str(path)!r}; check the path.")
    if (path / "zero_to_fp32.py").exists() or (path / "latest").exists():
        raise ValueError(
            f"{str(path)!r} is a folder of DeepSpeed, which only DeepSpeed reads; make a file of it with "
            "convert_zero_checkpoint_to_fp32_state_dict of lightning.pytorch.utilities.deepspeed."
        )
    if not is_checkpoint(path):
        raise ValueError(
            f"{str(path)!r} is no Lightning checkpoint, expected a .ckpt file or a folder with .metadata and {EXTRA}; "
            "check the path."
        )
    return _of_file(path, trusted) if path.is_file() else _of_folder(path, trusted)


def load_weights(contents: Contents) -> dict[str, Tensor]:
    """Every weight of a checkpoint by its name, on the CPU; those of a file stay on the disk until they are used."""
    if contents.kind == "file":
        weights: dict[str, Tensor] = _load(contents.path)["state_dict"]
        return weights
    prefix, metadata = WEIGHTS[contents.kind], _metadata(contents.path)
    state = {
        prefix + name: torch.empty(shape, dtype=metadata[prefix + name].properties.dtype)
        for name, shape in contents.shapes.items()
    }
    dcp.load(state, checkpoint_id=contents.path, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def refuse_other(contents: Contents, shapes: Mapping[str, Sequence[int]], trained: Iterable[str] | None = None) -> None:
    """Refuse a checkpoint of another model, before any of it is loaded.

    Args:
        contents: Of the checkpoint.
        shapes: Of the model's weights, by the same names.
        trained: Names of the parameters that train; where given, the checkpoint's must be the same.

    Raises:
        ValueError: A key is missing, unexpected, or of another shape.
    """
    shapes = {name: tuple(shape) for name, shape in shapes.items()}
    theirs = {name: tuple(shape) for name, shape in contents.shapes.items()}
    differing = {
        "missing": sorted(shapes.keys() - theirs.keys()),
        "unexpected": sorted(theirs.keys() - shapes.keys()),
        "of another shape": sorted(name for name in shapes.keys() & theirs.keys() if shapes[name] != theirs[name]),
    }
    if any(differing.values()):
        said = "; ".join(f"{len(names)} {what} ({_some(names)})" for what, names in differing.items() if names)
        raise ValueError(
            f"{str(contents.path)!r} is a checkpoint of another model: of {len(shapes)} keys {said}; give the model "
            "that it was saved from (vlm.pretrained, vlm.lora), or another checkpoint."
        )
    if trained is not None and contents.trained is not None and set(trained) != contents.trained:
        changed = sorted(set(trained) ^ contents.trained)
        raise ValueError(
            f"{str(contents.path)!r} was saved while other weights trained: {len(changed)} differ ({_some(changed)}); "
            "restore vlm.freeze and vlm.lora, or start anew from the exported model (avar export)."
        )


def _of_file(path: Path, trusted: bool) -> Contents:
    saved = _load(path, trusted)
    if not isinstance(saved, dict) or "state_dict" not in saved or "pytorch-lightning_version" not in saved:
        raise ValueError(f"{str(path)!r} is no checkpoint of Lightning, expected one with a 'state_dict'; check it.")
    weights = saved.pop("state_dict")
    optimizers = saved.pop("optimizer_states", None) or []
    known = [set(trained_names(state)) for state in optimizers if is_by_name(state)]
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    return Contents(path, "file", shapes, set().union(*known) if known else None, saved)


def _of_folder(path: Path, trusted: bool) -> Contents:
    metadata = _metadata(path)
    kind: Kind = "FSDP2 folder" if any(name.startswith("state_dict.") for name in metadata) else "FSDP folder"
    prefix = WEIGHTS[kind]
    tensors = {name: entry.size for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}
    shapes = {name.removeprefix(prefix): size for name, size in tensors.items() if name.startswith(prefix)}
    states = [name.removeprefix("optimizer_0.state.") for name in metadata if name.startswith("optimizer_0.state.")]
    trained = {name.rpartition(".")[0] for name in states}
    return Contents(path, kind, shapes, trained or None, _load(path / EXTRA, trusted))


def _metadata(path: Path) -> dict[str, Any]:
    try:
        return dict(dcp.FileSystemReader(path).read_metadata().state_dict_metadata)
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{str(path / '.metadata')!r} is damaged ({error}); give another checkpoint.") from error


def _load(path: Path, trusted: bool = False) -> Any:
    """What torch saved; its tensors are read from the file when they are used."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=not trusted)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, LookupError, TypeError) as error:
        types = _refused_types(path)
        if types:
            raise ValueError(
                f"{str(path)!r} holds {_some(types)}, and only plain values and tensors are read from files that need "
                "not be trusted; if you trust this one, resume with --weights_only false, or write it anew to export "
                "it (torch.save(torch.load(PATH, weights_only=False) | {'callbacks': {}}, PATH)), and have the "
                "callback that keeps such values keep plain ones."
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{str(path)!r} cannot be read ({reason}); it is damaged, give another one.") from error


def _refused_types(path: Path) -> list[str]:
    """Types in a file that are not read unless it is trusted; none of one that is damaged."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # whatever a damaged pickle comes to
        return []


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
