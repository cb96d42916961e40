"""Opening pictures: the stated behaviour of every kind of source and pixel format, and of everything broken."""

import io

import numpy as np
import pytest
from PIL import Image

from vision.decode import open_image

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def random_pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(source) -> np.ndarray:
    image = open_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_every_kind_of_source_gives_the_same_pixels(tmp_path):
    array = random_pixels(5, 7, 3)
    path = tmp_path / "picture.png"
    Image.fromarray(array).save(path)
    content = path.read_bytes()
    with path.open("rb") as file:
        sources = [str(path), path, content, bytearray(content), memoryview(content), io.BytesIO(content), file]
        sources += [Image.open(path), Image.fromarray(array), array, array[:, ::-1][:, ::-1]]
        for source in sources:
            np.testing.assert_array_equal(pixels(source), array)
        assert not file.closed


def test_the_extension_does_not_matter(tmp_path):
    path = tmp_path / "picture.jpg"
    array = random_pixels(4, 4, 3)
    path.write_bytes(encoded(Image.fromarray(array), "PNG"))
    np.testing.assert_array_equal(pixels(path), array)


@pytest.mark.parametrize("channels", [None, 1, 2, 3, 4])
def test_array_channels(channels):
    array = random_pixels(3, 4) if channels is None else random_pixels(3, 4, channels)
    colours = array if channels in (3, 4) else np.repeat(array.reshape(3, 4, -1)[:, :, :1], 3, axis=2)
    np.testing.assert_array_equal(pixels(array), colours[:, :, :3])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_applied(orientation, format):
    # corner colours survive JPEG well enough to tell the corners apart
    array = np.zeros((32, 48, 3), dtype=np.uint8)
    array[:16, :24], array[:16, 24:], array[16:, :24] = RED, GREEN, BLUE
    turned = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: np.rot90(a),
    }[orientation](array)
    exif = Image.Exif()
    exif[0x0112] = orientation
    result = pixels(encoded(Image.fromarray(array), format, exif=exif))
    assert result.shape == turned.shape
    corners = ([4, 4, -5, -5], [4, -5, 4, -5])
    error = np.abs(result[corners].astype(int) - turned[corners].astype(int)).max()
    assert error <= (5 if format == "JPEG" else 0)  # measured with JPEG at quality 75: 1


def test_a_damaged_exif_block_is_ignored():
    content = encoded(Image.fromarray(random_pixels(8, 8, 3)), "JPEG", exif=b"Exif\x00\x00damaged")
    assert pixels(content).shape == (8, 8, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped_not_blended(mode):
    array = random_pixels(6, 5, len(mode))
    array[:3, :, -1] = 0
    colours = array[:, :, :3] if mode == "RGBA" else np.repeat(array[:, :, :1], 3, axis=2)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(array, mode))), colours)
    np.testing.assert_array_equal(pixels(Image.fromarray(array, mode)), colours)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("format", "transparency"),
    [("PNG", None), ("PNG", 1), ("PNG", bytes([0, 128, 255])), ("GIF", None), ("GIF", 1)],
)
def test_palette_is_looked_up_and_transparent_entries_keep_their_colour(format, transparency):
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putdata([0, 1, 2])
    options = {} if transparency is None else {"transparency": transparency}
    np.testing.assert_array_equal(pixels(encoded(image, format, **options)), [[RED, GREEN, BLUE]])
    image.info.update(options)
    np.testing.assert_array_equal(pixels(image), [[RED, GREEN, BLUE]])


def test_greyscale_and_one_bit():
    grey = random_pixels(4, 5)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(grey))), np.repeat(grey[:, :, None], 3, axis=2))
    bits = grey > 127
    expected = np.repeat(bits[:, :, None] * np.uint8(255), 3, axis=2)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(bits))), expected)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(format):
    values = np.array([[0, 255, 256, 257, 4096], [32767, 32768, 40000, 65280, 65535]], dtype=np.uint16)
    result = pixels(encoded(Image.fromarray(values), format))
    np.testing.assert_array_equal(result, np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, axis=2))
    clipped = np.minimum(values, 255)
    assert (result[:, :, 0] != clipped).any()


def test_integer_pixels_beyond_sixteen_bits_and_floats_are_refused():
    with pytest.raises(ValueError, match="70000"):
        open_image(Image.fromarray(np.full((2, 2), 70000, dtype=np.int32)))
    with pytest.raises(ValueError, match="floating point"):
        open_image(Image.fromarray(np.zeros((2, 2), dtype=np.float32)))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animated_pictures_give_their_first_frame(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if format == "WEBP" else {}
    content = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    np.testing.assert_array_equal(pixels(content), np.full((8, 8, 3), RED))


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(format):
    array = np.zeros((16, 16, 4), dtype=np.uint8)
    array[:, :, 1:3] = 255  # full magenta and yellow print red
    result = pixels(encoded(Image.fromarray(array, "CMYK"), format))
    assert np.abs(result.astype(int) - RED).max() <= 3  # measured: 0; JPEG need not be exact


def test_an_rgb_image_is_not_copied_and_a_given_image_not_changed():
    image = Image.fromarray(random_pixels(4, 4, 3))
    assert open_image(image) is image
    palette = image.convert("P")
    open_image(palette)
    assert palette.mode == "P"


def test_missing_files_folders_and_empty_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="absent.png.*does not exist"):
        open_image(tmp_path / "absent.png")
    with pytest.raises(ValueError, match="folder"):
        open_image(tmp_path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match="empty.png.*empty file"):
        open_image(str(tmp_path / "empty.png"))
    with pytest.raises(ValueError, match="got none"):
        open_image(b"")


def test_addresses_and_impossible_names_are_refused():
    for address in ("https://example.org/a.png", "data:image/png;base64," + "A" * 5000):
        with pytest.raises(ValueError, match="nothing is fetched") as error:
            open_image(address)
        assert len(str(error.value)) < 400
    with pytest.raises(ValueError, match="cannot be read"):
        open_image("a" * 5000)
    with pytest.raises(ValueError):
        open_image("a\0b.png")
    with open("/dev/null", "wb") as file, pytest.raises(ValueError, match="cannot be read"):
        open_image(file)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("kept", [0.2, 0.6])
def test_truncated_files_are_refused_by_name(tmp_path, format, kept):
    content = encoded(Image.fromarray(random_pixels(64, 64, 3)), format)
    path = tmp_path / "half.img"
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=r"half\.img"):
        open_image(path)


def test_bytes_that_are_no_picture_are_refused():
    for content in (b"%PDF-1.4", b"\x89PNG\r\n\x1a\n" + b"\x00" * 40, b"\xff\xd8\xff" + b"\x01" * 50, b"GIF89a"):
        with pytest.raises(ValueError, match=f"the given {len(content)} bytes"):
            open_image(content)


@pytest.mark.filterwarnings("ignore")  # Pillow warns about damaged metadata before it fails or goes on
def test_damaged_bytes_raise_value_error_or_decode():
    generator = np.random.default_rng(0)
    for format in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        content = encoded(Image.fromarray(random_pixels(16, 16, 3)), format)
        for _ in range(30):
            damaged = bytearray(content)
            for place in generator.integers(0, len(content), 8):
                damaged[place] = generator.integers(0, 256)
            try:
                assert open_image(bytes(damaged)).mode == "RGB"
            except ValueError as error:
                assert f"the given {len(content)} bytes" in str(error)


def test_postscript_is_not_handed_to_an_interpreter():
    with pytest.raises(ValueError, match="known format"):
        open_image(encoded(Image.fromarray(random_pixels(8, 8, 3)), "EPS"))


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch):
    content = encoded(Image.new("1", (3000, 3000)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(ValueError, match="MAX_IMAGE_PIXELS"):
        open_image(content)


def test_sizes_and_types_without_pixels_are_refused():
    for empty in (np.zeros((0, 4, 3), np.uint8), np.zeros((4, 0), np.uint8), Image.new("RGB", (0, 3))):
        with pytest.raises(ValueError, match="at least one pixel"):
            open_image(empty)
    with pytest.raises(ValueError, match="channels last"):
        open_image(random_pixels(3, 8, 8))
    with pytest.raises(ValueError, match="channels last"):
        open_image(random_pixels(2, 8, 8, 3))
    with pytest.raises(ValueError, match="float64.*0..255"):
        open_image(np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match="binary mode"):
        open_image(io.StringIO("picture"))
    with pytest.raises(ValueError, match=r"builtins\.int"):
        open_image(3)
