"""Images of others: a folder or a zip of PNG, JPEG and WebP files, or an .npz; read one at a time, checked, refused.

Grey images have one channel, all others three (RGB). Transparency must be absent or opaque: there is no background to
put behind it that would not be an invention. Nothing is resized, rotated or unpacked to disk.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import torch
from torch import Tensor

from sid_ray.errors import UserError
from sid_ray.evaluation.feature_network import ImageShape
from sid_ray.storage import fetch

FIELD = "IMAGES"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
ARRAYS = ("images", "arr_0")
"""Names under which an .npz holds uint8 images (N, H, W, C): ours, and NumPy's when none was given."""
MOST_BYTES = 64 * 2**20
"""Largest file of one image."""
MOST_PIXELS = 4096**2
ALLOWED = f"allowed: a folder or a .zip of images ({', '.join(SUFFIXES)}), or an .npz of uint8 images (N, H, W, C)"
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile)
"""What Pillow and zipfile raise for damaged files."""


@dataclass(frozen=True)
class ImageSet:
    """Images of one shape, in a fixed order."""

    names: list[str]
    """What each is called, for error messages."""
    read: Callable[[], Iterator[Tensor]]
    """uint8 images (C, H, W), one after the other."""

    @property
    def num(self) -> int:
        """Number of images."""
        return len(self.names)

    @property
    def shape(self) -> ImageShape:
        """(C, H, W) of the first image, and so of all."""
        channels, height, width = next(self.read()).shape
        return channels, height, width

    def batches(self, size: int) -> Iterator[Tensor]:
        """All images as uint8 (n, C, H, W), at most `size` at a time.

        UserError naming the first image that cannot be read, or whose shape is another than the first one's.
        """
        images, shape = self.read(), self.shape
        names = iter(self.names)
        while batch := list(islice(images, size)):
            for image, name in zip(batch, islice(names, len(batch)), strict=True):
                if image.shape != shape:
                    raise UserError(
                        f"{FIELD}: {name} is {_size(image.shape)} (channels, height, width), {self.names[0]} is "
                        f"{_size(shape)}; allowed: images of one size, all grey or all RGB"
                    )
            yield torch.stack(batch)


def open_images(path: str) -> ImageSet:
    """The images at a path or an address. UserError, naming the file, if there are none or they cannot be listed."""
    place = fetch(path, FIELD)
    if place.is_dir():
        images = _folder(place)
    elif place.suffix == ".npz" and zipfile.is_zipfile(place):
        images = _array(place)
    elif place.is_file() and zipfile.is_zipfile(place):
        images = _archive(place)
    else:
        raise UserError(f"{FIELD}: {path!r} is not a folder, a zip or an .npz; {ALLOWED}")
    if not images.num:
        raise UserError(f"{FIELD}: there are no images in {path!r}; {ALLOWED}")
    return images


def decode(data: bytes, name: str) -> Tensor:
    """An image file's contents as uint8 (1 or 3, H, W). UserError calling it `name` if that is not possible."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MOST_PIXELS}")
            if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
                raise ValueError(f"its pixels are {image.mode}; allowed: 8-bit grey or RGB")
            if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
                raise ValueError("it is transparent; put it on a background first")
            pixels = np.array(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise UserError(f"{FIELD}: {name} cannot be used: {error}") from error
    return torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1)


def _is_image(name: str) -> bool:
    """Whether a relative path is an image's, and neither hidden nor macOS's shadow of one."""
    path = PurePosixPath(name)
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden


def _folder(folder: Path) -> ImageSet:
    found = [Path(where, name).relative_to(folder) for where, _, names in os.walk(folder) for name in names]
    names = sorted(file.as_posix() for file in found if _is_image(file.as_posix()))

    def read() -> Iterator[Tensor]:
        for name in names:
            file = folder / name
            try:
                _check_size(file.stat().st_size)
                data = file.read_bytes()
            except (OSError, ValueError) as error:
                raise UserError(f"{FIELD}: {file} cannot be used: {error}") from error
            yield decode(data, str(file))

    return ImageSet([str(folder / name) for name in names], read)


def _archive(file: Path) -> ImageSet:
    with _open_zip(file) as archive:
        entries = sorted((e for e in archive.infolist() if _is_image(e.filename)), key=lambda e: e.filename)

    def read() -> Iterator[Tensor]:
        with _open_zip(file) as archive:
            for entry in entries:
                name = f"{entry.filename} in {file}"
                try:
                    # zipfile reads no more than the size that the entry declares.
                    _check_size(entry.file_size)
                    data = archive.read(entry)
                except (*UNREADABLE, zlib.error) as error:
                    raise UserError(f"{FIELD}: {name} cannot be used: {error}") from error
                yield decode(data, name)

    return ImageSet([f"{entry.filename} in {file}" for entry in entries], read)


def _array(file: Path) -> ImageSet:
    """Images of an .npz, read from the archive as they are needed."""
    with _open_zip(file) as archive:
        present = [name for name in ARRAYS if f"{name}.npy" in archive.namelist()]
        if not present:
            raise UserError(f"{FIELD}: {file} holds no array {' or '.join(ARRAYS)}; {ALLOWED}")
        entry = f"{present[0]}.npy"
        try:
            with archive.open(entry) as data:
                shape = _read_header(data)
        except (*UNREADABLE, zlib.error) as error:
            raise UserError(f"{FIELD}: {entry} in {file} cannot be used: {error}; {ALLOWED}") from error

    def read() -> Iterator[Tensor]:
        num, height, width, channels = shape
        with _open_zip(file) as archive, archive.open(entry) as data:
            _read_header(data)
            for number in range(num):
                try:
                    pixels = data.read(height * width * channels)
                    image = np.frombuffer(pixels, np.uint8).reshape(height, width, channels)
                except (*UNREADABLE, zlib.error) as error:
                    raise UserError(f"{FIELD}: image {number} of {file} cannot be read: {error}") from error
                yield torch.from_numpy(image.copy()).permute(2, 0, 1)

    return ImageSet([f"image {number} of {file}" for number in range(shape[0])], read)


def _read_header(data: IO[bytes]) -> tuple[int, int, int, int]:
    """(N, H, W, C) of the array whose bytes follow. ValueError if it is no array of uint8 images."""
    version = np.lib.format.read_magic(data)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if header is None:
        raise ValueError(f"its format {version} is not known")
    shape, fortran_order, dtype = header(data)
    if len(shape) != 4 or dtype != np.uint8 or fortran_order or shape[3] not in (1, 3) or min(shape) < 1:
        raise ValueError(f"it is {dtype} of shape {shape}")
    if shape[1] * shape[2] > MOST_PIXELS:
        raise ValueError(f"{shape[2]} x {shape[1]} pixels are more than {MOST_PIXELS}")
    return shape


def _open_zip(file: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise UserError(f"{FIELD}: {file} is not a readable zip: {error}") from error


def _check_size(size: int) -> None:
    if size > MOST_BYTES:
        raise ValueError(f"{size} bytes are more than {MOST_BYTES}")


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
