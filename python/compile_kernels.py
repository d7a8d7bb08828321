#!/usr/bin/env python3
"""Compiles the kernels to PTX text beside their sources, with NVIDIA's run-time compiler.

    pip install nvidia-cuda-nvrtc-cu12==12.0.140
    python compile_kernels.py            # writes gather.ptx and refresh.ptx
    python compile_kernels.py --check    # exit status 1 if one is not what its source compiles to

Needs no GPU and no toolkit. An old compiler on purpose: drivers refuse PTX that is newer than they are (error 222), and
read older text for good. This one writes PTX 8.0, for compute capability 7.5 and all later ones: drivers from 525 on.
"""

import argparse
import ctypes
import hashlib
import importlib.util
import sys
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path

VERSION = (12, 0)
OPTIONS = (b"--gpu-architecture=compute_75", b"--std=c++17")
HERE = Path(__file__).resolve().parent
# What a client gathers with, and what the server refreshes pins with.
SOURCES = (HERE / "pinion" / "kernels" / "gather.cu", HERE.parent / "gds" / "src" / "kernels" / "refresh.cu")


class NoCompiler(Exception):
    """No NVRTC here, or another version of it, whose text would differ."""


def compiler(path=None):
    """The library, by its path or from the wheel that is installed for this Python."""
    if path is None:
        found = importlib.util.find_spec("nvidia")
        folders = found.submodule_search_locations if found else []
        places = [Path(folder) / "cuda_nvrtc/lib/libnvrtc.so.12" for folder in folders]
        path = next((place for place in places if place.exists()), None)
        if path is None:
            raise NoCompiler("no NVRTC 12 is installed for this Python (pip install nvidia-cuda-nvrtc-cu12==12.0.140)")
    library = ctypes.CDLL(str(path))
    major, minor = c_int(), c_int()
    call(library, "nvrtcVersion", byref(major), byref(minor))
    if (major.value, minor.value) != VERSION:
        found = f"NVRTC {major.value}.{minor.value} at {path}"
        raise NoCompiler(f"{found}: the text is compiled by {VERSION[0]}.{VERSION[1]}")
    return library


def call(library, name, *arguments):
    code = getattr(library, name)(*arguments)
    if code != 0:
        library.nvrtcGetErrorString.restype = c_char_p
        raise RuntimeError(f"{name} failed with {code} ({library.nvrtcGetErrorString(code).decode()})")


def text_of(library, program, what):
    size = c_size_t()
    call(library, f"nvrtcGet{what}Size", program, byref(size))
    room = ctypes.create_string_buffer(size.value)
    call(library, f"nvrtcGet{what}", program, room)
    return room.value.decode()


def compiled(library, path):
    """What is written beside a source."""
    source = path.read_bytes()
    program = c_void_p()
    call(library, "nvrtcCreateProgram", byref(program), source, path.name.encode(), 0, None, None)
    try:
        call(library, "nvrtcCompileProgram", program, len(OPTIONS), (c_char_p * len(OPTIONS))(*OPTIONS))
    except RuntimeError as error:
        raise SystemExit(f"{error}\n{text_of(library, program, 'ProgramLog')}") from error
    lines = text_of(library, program, "PTX").splitlines(keepends=True)
    # Constants of NVRTC's own <nv/target>, which nothing refers to.
    return heading(path) + "".join(line for line in lines if "2nv6target" not in line)


def heading(path):
    """Says which source the text is of, so that a stale one is found without a compiler."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"// By compile_kernels.py from {path.name}, SHA-256 {digest}. Not to be edited.\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("--nvrtc", metavar="PATH", help="libnvrtc.so.12, if not from a wheel of this Python")
    given = parser.parse_args()
    try:
        library = compiler(given.nvrtc)
    except NoCompiler as error:
        raise SystemExit(str(error)) from error
    for source in SOURCES:
        text, ptx = compiled(library, source), source.with_suffix(".ptx")
        if not given.check:
            ptx.write_text(text)
        elif ptx.read_text() != text:
            raise SystemExit(f"{ptx} is not what {source.name} compiles to: run compile_kernels.py")


if __name__ == "__main__":
    sys.exit(main())
