"""Pictures, buckets and videos as Pillow, NeMo AutoModel and NumPy have them; new ones each time.

pictures.py OUT SEED writes files, cases.json and expected.safetensors to OUT.
"""

import json
import pathlib
import sys

import imageio_ffmpeg
import numpy
import torch
from nemo_automodel.components.datasets.diffusion.multi_tier_bucketing import MultiTierBucketCalculator
from PIL import Image, ImageOps
from safetensors.torch import save_file

out, seed = pathlib.Path(sys.argv[1]), int(sys.argv[2])
draws = numpy.random.default_rng(seed)
expected = {}


def pixels(height, width, channels, smooth):
    """Waves with noise, or noise alone."""
    if not smooth:
        return draws.integers(0, 256, (height, width, channels), dtype=numpy.uint8)
    rows, columns = numpy.mgrid[0:height, 0:width]
    waves = [
        127 + 120 * numpy.sin(columns / draws.uniform(3, 9) + rows / draws.uniform(3, 9) + channel)
        for channel in range(channels)
    ]
    noisy = numpy.stack(waves, -1) + draws.normal(0, 6, (height, width, channels))
    return numpy.clip(noisy, 0, 255).astype(numpy.uint8)


def resized_size(image, size):
    """NeMo's, but no side is shorter than the bucket's: its crop would add a black line there."""
    scale = max(size[0] / image.width, size[1] / image.height)
    return max(int(image.width * scale), size[0]), max(int(image.height * scale), size[1])


def fitted(image, size):
    """NeMo's resize and crop."""
    (width, height), resized = size, resized_size(image, size)
    scale = max(width / image.width, height / image.height)
    if (int(image.width * scale), int(image.height * scale)) == resized:
        calculator = MultiTierBucketCalculator(quantization=16)
        return calculator.resize_and_crop(image, width, height, crop_mode="center")
    left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
    return image.resize(resized, Image.LANCZOS).crop((left, top, left + width, top + height)), (left, top)


def tensor(image):
    return torch.from_numpy(numpy.array(image)).contiguous()


def grey_of_16_bits(image):
    """Pillow cuts these values at 255; the upper half is what it takes of every other 16 bits."""
    return Image.fromarray((numpy.array(image).astype(numpy.uint16) >> 8).astype(numpy.uint8))


cases = []


def case(name, image, **options):
    path = out / name
    image.save(path, **options)
    read = ImageOps.exif_transpose(Image.open(path))
    colours = (grey_of_16_bits(read) if read.mode.startswith("I") else read).convert("RGB")
    side = int(draws.integers(40, 400))
    quantization = int(draws.choice([8, 16, 32]))
    calculator = MultiTierBucketCalculator(quantization=quantization, max_pixels=side * side)
    bucket = calculator.get_bucket_for_image(colours.width, colours.height)["resolution"]
    cropped, offset = fitted(colours, bucket)
    expected[f"{name}.colours"] = tensor(colours)
    expected[f"{name}.fitted"] = tensor(cropped)
    mask = colours.convert("L").resize(resized_size(colours, bucket), Image.BILINEAR)
    (left, top), (width, height) = offset, bucket
    expected[f"{name}.mask"] = tensor(mask.crop((left, top, left + width, top + height)))
    row = {"name": name, "size": colours.size, "pixels": side * side, "multiple": quantization}
    cases.append(row | {"bucket": bucket, "offset": offset})


def sixteen_bits(path, array):
    """Writes a PNG of 16 bits a channel, which Pillow reads and does not write."""
    import struct
    import zlib

    height, width, channels = array.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + array[row].astype(">u2").tobytes() for row in range(height))

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


class Written:
    """A file that is there already, in the place of an image that is saved."""

    def __init__(self, array):
        self.array = array

    def save(self, path):
        sixteen_bits(path, self.array)


def image(channels, mode=None):
    height, width = draws.integers(9, 260, 2)
    drawn = pixels(height, width, channels, bool(draws.integers(2)))
    return Image.fromarray(drawn[..., 0] if channels == 1 else drawn, mode)


for number in range(3):
    case(f"rgb{number}.png", image(3))
    case(f"rgba{number}.png", image(4, "RGBA"))
    case(f"grey{number}.png", image(1))
    case(f"grey-alpha{number}.png", image(2, "LA"))
    case(f"palette{number}.png", image(3).quantize(int(draws.integers(2, 256))))
    case(f"palette-alpha{number}.png", image(3).quantize(64), transparency=3)
    case(f"bits{number}.png", image(1).convert("1"))
    for channels in range(1, 5):
        height, width = draws.integers(9, 200, 2)
        case(f"sixteen{channels}-{number}.png", Written(draws.integers(0, 65536, (height, width, channels))))
    for subsampling in range(3):
        case(f"s{subsampling}-{number}.jpg", image(3), subsampling=subsampling, quality=int(draws.integers(20, 100)))
    case(f"progressive{number}.jpg", image(3), progressive=True)
    case(f"grey{number}.jpg", image(1))
    case(f"inks{number}.jpg", image(3).convert("CMYK"))
    case(f"untransformed{number}.jpg", image(3), keep_rgb=True)
    case(f"lossless{number}.webp", image(3), lossless=True)
    case(f"alpha{number}.webp", image(4, "RGBA"), quality=70)
    case(f"lossy{number}.webp", image(3), quality=60)
for orientation in range(1, 9):
    exif = Image.Exif()
    exif[0x112] = orientation
    for ending in ["jpg", "png", "webp"]:
        case(f"turned{orientation}.{ending}", image(3), exif=exif)

buckets = []
for _ in range(60):
    side, quantization = int(draws.integers(64, 1600)), int(draws.choice([8, 16, 32, 64]))
    calculator = MultiTierBucketCalculator(quantization=quantization, max_pixels=side * side)
    sizes = [[int(side) for side in draws.integers(1, 4000, 2)] for _ in range(20)]
    chosen = [calculator.get_bucket_for_image(*size)["resolution"] for size in sizes]
    listed = [bucket["resolution"] for bucket in calculator.get_all_buckets()]
    buckets.append({"pixels": side * side, "multiple": quantization, "listed": listed, "sizes": sizes, "chosen": chosen})

frames = []
for _ in range(200):
    available = int(draws.integers(2, 500))
    count = int(draws.integers(1, available))
    frames.append([available, count, numpy.linspace(0, available - 1, count).astype(int).tolist()])

videos = []
for number, (codec, ending) in enumerate([("libx264rgb", "mp4"), ("ffv1", "mkv"), ("libx264rgb", "mov")]):
    count, (height, width) = int(draws.integers(6, 30)), 2 * draws.integers(16, 60, 2)
    name, clip = f"clip{number}.{ending}", pixels(height, width, 3 * count, True)
    clip = numpy.ascontiguousarray(clip.reshape(height, width, count, 3).transpose(2, 0, 1, 3))
    form = "rgb24" if codec == "libx264rgb" else "bgr0"
    quality = ["-crf", "0"] if codec == "libx264rgb" else []
    size = (int(width), int(height))
    writer = imageio_ffmpeg.write_frames(
        str(out / name), size, fps=8, codec=codec, pix_fmt_out=form, macro_block_size=1, output_params=quality
    )
    writer.send(None)
    for frame in clip:
        writer.send(frame.tobytes())
    writer.close()
    bucket, taken = (64, 48), int(draws.integers(2, count))
    for index in numpy.linspace(0, count - 1, taken).astype(int).tolist():
        cropped, _ = fitted(Image.fromarray(clip[index]), bucket)
        expected.setdefault(f"{name}.fitted", []).append(tensor(cropped))
    expected[f"{name}.fitted"] = torch.stack(expected[f"{name}.fitted"])
    videos.append({"name": name, "size": size, "frames": count, "taken": taken, "bucket": bucket})

ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
document = {"pictures": cases, "buckets": buckets, "frames": frames, "videos": videos, "ffmpeg": ffmpeg}
(out / "cases.json").write_text(json.dumps(document, default=int))
save_file(expected, out / "expected.safetensors")
