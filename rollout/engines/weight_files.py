"""Named tensors in safetensors files, in shared memory where there is room: how weights reach engine processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from rollout.errors import UserError

if TYPE_CHECKING:
    import torch

# The last are other libraries', which lie beside the rest in folders from the hub.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ot")
CHUNK_BYTES = 2**30  # weights travel in files of about this size, so that a large model never lies in memory twice


def weight_files(stream: Iterable[tuple[str, torch.Tensor]]) -> Iterator[Path]:
    """Write named tensors to files, one at a time; each is removed after use."""
    with tempfile.TemporaryDirectory(prefix="turnstile-", dir=roomy_folder()) as folder:
        path = Path(folder) / "weights.safetensors"
        for chunk in _chunks(stream):
            _write(chunk, path)
            yield path


class KeptWeights:
    """One version of a model's weights, written once for any number of readers and restarts.

    The files have no name in any folder, so that nothing is left of a process that was killed: ``paths`` lead to its
    open files, for other processes of the same user on this machine.
    """

    def __init__(self, stream: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self.version = version
        self._files: list[BinaryIO] = []
        try:
            for chunk in _chunks(stream):
                self._files.append(_nameless(chunk))
        except BaseException:
            self.close()
            raise

    @property
    def paths(self) -> list[Path]:
        return [Path(f"/proc/{os.getpid()}/fd/{file.fileno()}") for file in self._files]

    def close(self) -> None:
        """Give the memory back, once the last reader has closed its files too."""
        for file in self._files:
            file.close()
        self._files = []

    @contextlib.contextmanager
    def folder(self, rest: Mapping[str, bytes]) -> Iterator[Path]:
        """A model folder with these weights and the ``rest`` of its files, to start an engine on."""
        with tempfile.TemporaryDirectory(prefix="turnstile-") as name:
            folder = Path(name)
            for file, content in rest.items():
                (folder / file).write_bytes(content)
            for number, path in enumerate(self.paths):
                (folder / f"model-{number:05}.safetensors").symlink_to(path)
            yield folder


def rest_of(model_dir: Path) -> dict[str, bytes]:
    """All files of a model folder but its weights."""
    return {file.name: file.read_bytes() for file in model_dir.iterdir() if file.is_file() and not is_weights(file)}


def is_weights(file: Path) -> bool:
    """Whether the file holds weights, or says which files do."""
    return file.suffix in WEIGHTS or file.name.endswith(".index.json")


def roomy_folder() -> Path | None:
    """Shared memory if a chunk fits well (containers often have little), else None: the folder for temporary files."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and shutil.disk_usage(shared).free > 2 * CHUNK_BYTES else None


def _chunks(stream: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    chunk: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in stream:
        chunk[name] = tensor.detach().to("cpu").contiguous()
        size += tensor.nbytes
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = {}, 0
    if chunk:
        yield chunk


def _nameless(chunk: dict[str, torch.Tensor]) -> BinaryIO:
    with tempfile.TemporaryDirectory(prefix="turnstile-", dir=roomy_folder()) as folder:
        path = Path(folder) / "weights.safetensors"
        _write(chunk, path)
        return path.open("rb")


def _write(chunk: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(chunk, path)
    except SafetensorError as error:  # what it makes of a full disk
        size = sum(tensor.nbytes for tensor in chunk.values()) / 2**20
        raise UserError(
            f"weights for the engine: {size:.0f} MiB do not go into {path.parent.parent} ({error}); free space there, "
            "or set TMPDIR to a folder that has it"
        ) from error
