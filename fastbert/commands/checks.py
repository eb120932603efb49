"""What only the file system can tell of a request, asked before anything slow is imported."""

import os
from contextlib import suppress

from fastbert.errors import UserError, did_you_mean
from fastbert.settings import show


def check_path(name: str, value: str, words: tuple[str, ...]) -> None:
    """Refuses a path that does not exist, unless it is one of `words`.

    Raises:
        UserError: it does not exist.
    """
    if value not in words and not os.path.exists(value):
        meant = did_you_mean(value, filter(None, words))
        raise UserError(f"{name} = {show(value)}: no such file or folder{meant}")


def check_folder(name: str, path: str) -> None:
    """Refuses a file where a folder is to be made.

    Raises:
        UserError: it is a file.
    """
    if os.path.exists(path) and not os.path.isdir(path):
        raise UserError(f"{name} = {path!r} is a file: give a folder")


def check_output(name: str, path: str) -> None:
    """Refuses a file that cannot be written, before it costs the minutes of a measurement.

    Raises:
        UserError: its folder is missing, it is no file, or it may not be written.
    """
    if not path:
        return
    shown = f"{name} = {path!r}"
    folder, file = os.path.split(path)
    if not os.path.isdir(folder or "."):
        raise UserError(f"{shown}: no such folder")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{shown} is no file: give the path of one")
    probe = os.path.join(folder, f".{file}.tmp")  # as it will be written before it is renamed
    try:
        for place in (probe, path) if os.path.exists(path) else (probe,):
            with open(place, "ab"):
                pass
    except OSError as error:
        raise UserError(f"{shown}: cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            os.remove(probe)
