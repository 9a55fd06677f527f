"""Images side by side in one picture."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..arrays import AnyArray


def picture(images: AnyArray, columns: int | None = None, smallest: int = 64) -> Image.Image:
    """Lay images of shape (n, channels, height, width) in [-1, 1] out in a grid; those lower than `smallest` enlarged."""
    n, channels, height, width = images.shape
    columns = min(n, columns or int(np.ceil(np.sqrt(n))))
    rows = -(-n // columns)
    pixels = np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)
    pixels = np.concatenate([pixels, np.zeros((rows * columns - n, channels, height, width), np.uint8)])
    pixels = pixels.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    pixels = pixels.reshape(rows * height, columns * width, channels)
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    zoom = max(1, smallest // height)
    return image.resize((zoom * image.width, zoom * image.height), Image.Resampling.NEAREST)
