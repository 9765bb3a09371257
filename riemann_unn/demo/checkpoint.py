"""Checkpoints of the demo: files from which the same run, and no other, continues."""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["CheckpointError", "Parts", "Settings", "load", "save", "settings_of"]

Settings = Mapping[str, "int | float | str | bool"]

_CHANGE_NOTHING = ("out", "quiet", "checkpoint")


class CheckpointError(RuntimeError):
    """A checkpoint file cannot continue this run."""


def settings_of(options: Namespace) -> Settings:
    """The options that a run's numbers depend on.

    Args:
        options: As parsed.
    """
    return {key: value for key, value in vars(options).items() if key not in _CHANGE_NOTHING}


def save(path: Path, settings: Settings, state: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically, so that an interruption leaves the last complete one.

    Args:
        path: The file.
        settings: The options that the run depends on.
        state: Tensors and plain values.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"settings": dict(settings), **state}, file)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load(path: Path, settings: Settings, key: str) -> dict[str, Any]:
    """Read a checkpoint of the same run.

    Args:
        path: The file.
        settings: The options that the run depends on.
        key: A key that the state must have.

    Raises:
        CheckpointError: If the file is none, or of a run with other settings; names them.
    """
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        saved = state["settings"]
    except Exception as error:  # torch.load raises many types, depending on what the file is
        raise CheckpointError(
            f"{path} is not a checkpoint of this demo ({error}): name another file, or remove it"
        ) from error
    if saved != dict(settings):
        changed = [k for k in sorted(saved.keys() | settings) if saved.get(k) != settings.get(k)]
        if saved.keys() != settings.keys() and "task" in changed:
            changed = ["task"]  # different tasks have different options
        shown = ", ".join(f"{k}: {saved.get(k)} there, {settings.get(k)} now" for k in changed)
        raise CheckpointError(
            f"{path} was made with other settings ({shown}): "
            "give the same ones, name another file, or remove it"
        )
    if key not in state:
        raise CheckpointError(
            f"{path} is a checkpoint of something else: name another file, or remove it"
        )
    return state


class Parts:
    """Finished parts of a run that consists of many, each independent of the others.

    Args:
        path: File to save them to; ``None`` saves nothing.
        settings: The options that the run depends on.

    Raises:
        CheckpointError: As :func:`load`.
    """

    def __init__(self, path: Path | None, settings: Settings) -> None:
        self._path, self._settings = path, settings
        self._parts: dict[str, Any] = {}
        if path is not None and path.exists():
            self._parts = load(path, settings, "parts")["parts"]

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __getitem__(self, name: str) -> Any:
        """A finished part."""
        return self._parts[name]

    def put(self, name: str, value: Any) -> None:
        """Save a finished part.

        Args:
            name: Its name.
            value: Tensors and plain values.
        """
        self._parts[name] = value
        if self._path is not None:
            save(self._path, self._settings, {"parts": self._parts})
