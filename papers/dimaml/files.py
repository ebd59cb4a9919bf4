"""Files of learned distributions: safetensors, with a header of JSON in its metadata.

The metadata's one entry, `learned-init`, is an object of `format`, `version`, `sha256` (of all that follows and the
tensors), `families` (by key: which law, and what it needs beyond tensors) and `skipped`. Tensors are called by key and
field: `fc.weight.mean`.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from papers.dimaml.distributions import PLIF, Family, Normal

ENTRY = "learned-init"
_FORMAT = "dimaml.InitDistribution"
VERSION = 1


def write_distribution(path: Path, families: Mapping[str, Family], skipped: Mapping[str, str]) -> None:
    """Written beside and renamed: whole or absent; see `InitDistribution.save`."""
    tensors = {
        f"{key}.{field}": value.detach().to("cpu", copy=True).contiguous()
        for key, family in families.items()
        for field, value in family.parameters().items()
    }
    if broken := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise ValueError(
            f"InitDistribution.save: every parameter must be finite, got another in {broken[0]!r}. "
            f"{path.name} has not been written."
        )
    header: dict[str, Any] = {
        "format": _FORMAT,
        "version": VERSION,
        "families": {key: _description(family) for key, family in families.items()},
        "skipped": dict(skipped),
    }
    write_whole(path, header, tensors)


def write_whole(path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Tensors on the CPU under a header with a checksum, written beside and renamed: whole, or as it was before."""
    stamped = {**header, "sha256": fingerprint(header, tensors)}
    content = save(dict(tensors), {ENTRY: json.dumps(stamped)})
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def read_distribution(path: Path) -> tuple[dict[str, Family], dict[str, str]]:
    """Laws and what was skipped; see `InitDistribution.load`."""
    path.open("rb").close()  # one that is missing is an OSError, which names it
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise _refused(path, f"it is no whole safetensors file ({error})") from error
    try:
        header = json.loads(metadata[ENTRY])
        kind, version = header["format"], header["version"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _refused(path, "it has no header of a learned distribution") from error
    if kind != _FORMAT:
        raise _refused(path, f"its format is {kind!r}, not {_FORMAT!r}")
    if version != VERSION:
        raise _refused(path, f"its version is {version!r}, and this is a reader of version {VERSION}")
    try:
        stated = header.pop("sha256")
        if stated != fingerprint(header, tensors):
            raise ValueError("its content is not what was written: the checksum differs")
        families = {key: _family(key, said, tensors) for key, said in header["families"].items()}
        if tensors:
            raise ValueError(f"it has tensors of no law: {min(tensors)!r}")
        skipped = {str(key): str(reason) for key, reason in header["skipped"].items()}
    except KeyError as error:
        raise _refused(path, f"it lacks {error}") from error
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _refused(path, str(error)) from error
    return families, skipped


def _refused(path: Path, what: str) -> ValueError:
    return ValueError(
        f"InitDistribution.load: {path} must be a file that InitDistribution.save wrote, but {what}. "
        "Copy it again, or save the distribution anew with this version."
    )


def _description(family: Family) -> dict[str, str]:
    return {"family": "normal"} if isinstance(family, Normal) else {"family": "plif", "variant": family.variant}


def _family(key: str, said: Mapping[str, Any], tensors: dict[str, Tensor]) -> Family:
    """The law of one header entry, its tensors taken out of the dictionary."""
    kinds: dict[str, type[Family]] = {"normal": Normal, "plif": PLIF}
    if said["family"] not in kinds:
        raise ValueError(f"the law of {key!r} is unknown: {said['family']!r}")
    kind = kinds[said["family"]]
    parts = {field: tensors.pop(f"{key}.{field}") for field in kind.fields}
    for field, value in parts.items():
        if not value.is_floating_point() or not value.isfinite().all():
            raise ValueError(f"{key}.{field} is not made of finite numbers")
    return Normal(**parts) if kind is Normal else PLIF(**parts, variant=said["variant"])


def fingerprint(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the header's other entries, and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
