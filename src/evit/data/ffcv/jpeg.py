"""jpeg_crop.c as a function that numba can call, compiled where that has not been done yet."""

import ctypes
import functools
import os
import platform
import subprocess
import tempfile
import zlib
from pathlib import Path

import llvmlite.binding
from numba import types

SOURCE = Path(__file__).with_name("jpeg_crop.c")


def _load() -> ctypes.CDLL:
    key = f"{platform.machine()}-{zlib.crc32(SOURCE.read_bytes()):08x}"
    library = Path(f"~/.cache/evit-lab/jpeg_crop-{key}.so").expanduser()
    try:
        return ctypes.CDLL(str(library))
    except OSError:  # not there yet, or made on a machine with another libjpeg
        library.parent.mkdir(parents=True, exist_ok=True)
    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
    try:
        flags = run(["pkg-config", "--cflags", "--libs", "libjpeg"]).stdout.split()
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = f"{folder}/{library.name}"
            compiler = os.environ.get("CC", "cc").split()
            run([*compiler, "-O2", "-shared", "-fPIC", str(SOURCE), "-o", made, *flags])
            os.replace(made, library)  # at once: other processes may be about to do the same
    except (OSError, subprocess.CalledProcessError) as error:
        raise ImportError(
            f"jpeg_crop.c could not be compiled ({getattr(error, 'stderr', None) or error}): run "
            f"`make setup`, or install g++, pkg-config and libjpeg-dev (libjpeg-turbo's)"
        ) from error
    return ctypes.CDLL(str(library))


# By name and not by ctypes, because numba does not keep functions that hold an address on disk.
_address = ctypes.cast(_load().evit_jpeg_crop, ctypes.c_void_p).value
llvmlite.binding.add_symbol("evit_jpeg_crop", _address)

_pointer, _unsigned = types.uintp, types.uint32
jpeg_crop = types.ExternalFunction(
    "evit_jpeg_crop",
    types.int32(_pointer, types.ulong, *(_unsigned,) * 7, _pointer, types.ulong, _pointer),
)
