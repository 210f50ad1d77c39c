"""Images from folders, zips and arrays: what is read, how it is understood, and what is refused by name."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from sid_ray.errors import UserError
from sid_ray.evaluation import image_files
from sid_ray.evaluation.features import load_features
from sid_ray.evaluation.image_files import decode, open_images
from sid_ray.evaluation.reference_images import reference_statistics
from sid_ray.evaluation.statistics import load_reference
from sid_ray.teachers.digits import digits_images


def encoded(pixels, form="PNG", mode=None, **options):
    """An image file's bytes; pixels (H, W) or (H, W, C)."""
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, form, **options)
    return file.getvalue()


def rgb(seed=0, size=6):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def all_of(images, batch=2):
    return torch.cat(list(images.batches(batch)))


@pytest.fixture
def folder(tmp_path):
    """Five images as EDM lays them out, and what else lies about in such folders."""
    root = tmp_path / "images"
    for number in range(5):
        file = root / f"{number // 2:05d}" / f"img{number:08d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(rgb(number)))
    (root / "dataset.json").write_text('{"labels": null}')
    (root / "00000" / "._img00000000.png").write_bytes(b"shadow")
    (root / "__MACOSX").mkdir()
    (root / "__MACOSX" / "img.png").write_bytes(b"shadow")
    return root


@pytest.fixture
def archive(folder, tmp_path):
    """The same as a zip, its entries in another order."""
    file = tmp_path / "images.zip"
    with zipfile.ZipFile(file, "w") as z:
        for path in sorted(folder.rglob("*"), reverse=True):
            z.write(path, path.relative_to(folder))
    return file


@pytest.fixture
def array(tmp_path):
    """The same as an .npz, as `sid-ray generate` writes it."""
    np.savez_compressed(tmp_path / "images.npz", images=np.stack([rgb(i) for i in range(5)]))
    return tmp_path / "images.npz"


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
@pytest.mark.parametrize("kind", ["folder", "archive", "array"])
def test_the_same_images_in_the_same_order(kind, batch, request):
    images = open_images(str(request.getfixturevalue(kind)))
    assert (images.num, images.shape) == (5, (3, 6, 6))
    found = all_of(images, batch)
    assert found.dtype == torch.uint8
    assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), np.stack([rgb(i) for i in range(5)]))


def test_a_zip_may_lie_on_s3(archive, bucket):
    from sid_ray.storage import s3_client

    s3_client().upload_file(str(archive), bucket, "data/images.zip")
    assert torch.equal(all_of(open_images(f"s3://{bucket}/data/images.zip")), all_of(open_images(str(archive))))


def test_how_pixels_are_understood():
    grey, colour = rgb()[..., 0], rgb()
    opaque = np.dstack([colour, np.full((6, 6), 255, np.uint8)])
    assert np.array_equal(decode(encoded(grey), "x")[0], grey)
    assert decode(encoded(grey, mode="1"), "x").shape == decode(encoded(grey, mode="LA"), "x").shape == (1, 6, 6)
    for data in (encoded(colour), encoded(opaque), encoded(colour, "WEBP", lossless=True)):
        assert np.array_equal(decode(data, "x").permute(1, 2, 0), colour)
    assert decode(encoded(colour, mode="P"), "x").shape == (3, 6, 6)
    assert decode(encoded(colour, "JPEG"), "x").shape == (3, 6, 6)
    assert decode(encoded(grey, "JPEG"), "x").shape == (1, 6, 6)


def bomb():
    """A PNG of a few hundred bytes that declares 20,000 x 20,000 pixels."""
    data = bytearray(encoded(np.zeros((1, 1), np.uint8)))
    import zlib

    data[16:24] = (20_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


REFUSED = {
    "transparent": (encoded(np.dstack([rgb(), rgb()[..., 0]])), "transparent"),
    "transparent colour": (encoded(rgb()[..., 0], transparency=int(rgb()[0, 0, 0])), "transparent"),
    "16 bit": (encoded(np.zeros((4, 4), np.uint16)), "allowed: 8-bit grey or RGB"),
    "CMYK": (encoded(rgb(), "JPEG", mode="CMYK"), "CMYK"),
    "truncated": (encoded(rgb(size=64))[:300], "cannot be used"),
    "damaged": (encoded(rgb())[:40] + b"xxxxxxxx" + encoded(rgb())[48:], "cannot be used"),
    "empty": (b"", "cannot identify"),
    "gif": (encoded(rgb()[..., 0], "GIF"), "cannot identify"),
    "bomb": (bomb(), "pixels"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_used_is_named(what, folder, tmp_path):
    data, words = REFUSED[what]
    bad = folder / "00001" / "img00000002.png"
    bad.write_bytes(data)
    file = tmp_path / "bad.zip"
    with zipfile.ZipFile(file, "w") as z:
        z.write(folder / "00000" / "img00000000.png", "a.png")
        z.writestr("dir/bad.png", data)
    for path, name in ((folder, str(bad)), (file, "dir/bad.png in ")):
        with pytest.raises(UserError, match=r"^IMAGES: ") as error:
            all_of(open_images(str(path)))
        assert name in str(error.value) and words in str(error.value)


@pytest.mark.parametrize("data", [encoded(rgb(size=8)), encoded(rgb()[..., 0])], ids=["size", "grey among RGB"])
def test_images_of_two_shapes_are_refused(folder, data):
    (folder / "00001" / "img00000003.png").write_bytes(data)
    with pytest.raises(UserError, match=r"img00000003\.png is .*img00000000\.png is 3 x 6 x 6; allowed: images of"):
        all_of(open_images(str(folder)))


def test_entries_of_a_zip_are_bounded(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "big.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("big.png", encoded(rgb()) + bytes(10_000_000))
    assert (tmp_path / "big.zip").stat().st_size < 50_000
    monkeypatch.setattr(image_files, "MOST_BYTES", 9_000_000)
    with pytest.raises(UserError, match=r"big\.png in .*bytes are more than 9000000"):
        all_of(open_images(str(tmp_path / "big.zip")))


def test_a_zip_that_lies_about_a_size_reads_no_more_than_it_declares(tmp_path):
    with zipfile.ZipFile(tmp_path / "lie.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("lie.png", encoded(rgb()) + bytes(10_000_000))
    data = (tmp_path / "lie.zip").read_bytes()
    true = len(encoded(rgb())) + 10_000_000
    (tmp_path / "lie.zip").write_bytes(data.replace(true.to_bytes(4, "little"), (100).to_bytes(4, "little")))
    with pytest.raises(UserError, match=r"lie\.png in .*cannot be used"):
        all_of(open_images(str(tmp_path / "lie.zip")))


def test_damaged_and_locked_zips_are_refused(tmp_path, archive):
    data = bytearray(archive.read_bytes())
    start = data.index(b"\x89PNG")
    data[start + 60 : start + 70] = bytes(10)
    (tmp_path / "damaged.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"\.png in .*damaged\.zip cannot be used"):
        all_of(open_images(str(tmp_path / "damaged.zip")))
    locked = bytearray(archive.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := locked.find(signature, at + 1)) >= 0:
            locked[at + flags] |= 1
    (tmp_path / "locked.zip").write_bytes(locked)
    with pytest.raises(UserError, match="encrypted"):
        all_of(open_images(str(tmp_path / "locked.zip")))


@pytest.mark.parametrize(
    "arrays",
    [
        {"mu": np.zeros(3)},
        {"images": np.zeros((2, 4, 4, 3))},
        {"images": np.zeros((2, 3, 4, 4), np.uint8)},
        {"images": np.zeros((4, 4, 3), np.uint8)},
        {"images": np.array([None, {}], dtype=object)},
        {"images": np.asfortranarray(np.zeros((2, 4, 4, 3), np.uint8))},
    ],
    ids=["a reference", "floats", "channels first", "one image", "pickled", "fortran"],
)
def test_other_arrays_are_refused(tmp_path, arrays):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=r"allowed: a folder or a \.zip of images"):
        all_of(open_images(str(tmp_path / "a.npz")))


def test_an_array_cut_short_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as z, z.open("images.npy", "w") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (1000, 4, 4, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(4 * 4 * 3 * 2))
    with pytest.raises(UserError, match=r"image 2 of .* cannot be read"):
        all_of(open_images(str(tmp_path / "short.npz")))


def test_nothing_there(tmp_path):
    (tmp_path / "text.zip").write_text("no zip")
    for path, words in ((tmp_path / "none", "is not a folder"), (tmp_path / "text.zip", "is not a folder")):
        with pytest.raises(UserError, match=words):
            open_images(str(path))
    with pytest.raises(UserError, match="there are no images"):
        open_images(str(tmp_path))


def test_statistics_of_digits_are_the_packaged_ones_at_any_batch():
    images, _ = digits_images()
    packaged, network = load_reference("builtin:digits"), load_features("digits", (1, 8, 8))
    for batch in (100, 1797):
        made = reference_statistics(images.split(batch), 1797, network)
        assert (made.num, made.features) == (1797, "digits")
        np.testing.assert_allclose(made.mu, packaged.mu, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(made.sigma, packaged.sigma, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(made.sample, packaged.sample, rtol=1e-4, atol=1e-5)


def test_the_sample_is_a_seeded_choice_without_repetition():
    images, network = digits_images()[0][:300], load_features("digits", (1, 8, 8))
    first, again, other = (
        reference_statistics(images.split(batch), 300, network, sample=40, seed=seed)
        for seed, batch in ((0, 300), (0, 7), (1, 300))
    )
    np.testing.assert_allclose(first.sample, again.sample, rtol=1e-4, atol=1e-5)
    assert first.sample.shape == (40, 64) and not np.allclose(first.sample, other.sample)
    everything = network(images).numpy()
    positions = [int(np.abs(everything - row).sum(1).argmin()) for row in first.sample]
    assert positions == sorted(set(positions)) and positions[-1] > 200
    assert reference_statistics([images], 300, network, sample=0).sample is None


def test_statistics_need_two_images_and_finite_features():
    network = load_features("digits", (1, 8, 8))
    with pytest.raises(UserError, match="two images or more, found 1"):
        reference_statistics([torch.zeros(1, 1, 8, 8, dtype=torch.uint8)], 1, network)
    with torch.no_grad():
        network.conv2.bias += torch.inf
    with pytest.raises(UserError, match="not finite"):
        reference_statistics([torch.zeros(3, 1, 8, 8, dtype=torch.uint8)], 3, network)
