"""How many photographs one CPU core decodes in a second: `python -m benchmarks.decode`.

JPEGs of SA1B's size, 1500 × 2250, made here: noise of many scales, at the quality that comes nearest to
`--kilobytes` each, which is what decides the time of the Huffman decoder.
"""

from __future__ import annotations

import argparse
import io
import time

import numpy as np
from PIL import Image

from llava_core.vision.preprocess import CLIP_MEAN, CLIP_STD, Preprocess

HEIGHT, WIDTH = 1500, 2250


def photograph(seed: int) -> Image.Image:
    """RGB [1500, 2250] with the falling spectrum of a photograph: each octave of noise weaker."""
    rng = np.random.default_rng(seed)
    picture = np.full((HEIGHT, WIDTH, 3), 128.0)
    strength, cells = 55.0, 3
    while cells < 1500:
        noise = rng.integers(0, 256, (cells, cells * 3 // 2, 3), dtype=np.uint8)
        scaled = Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        picture += strength * (np.asarray(scaled, np.float32) / 127.5 - 1)
        strength, cells = strength / 1.45, cells * 2
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def jpeg(picture: Image.Image, kilobytes: int) -> tuple[bytes, int]:
    """The file nearest to that size, and its quality."""
    files = {}
    for quality in range(30, 96, 3):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        files[quality] = buffer.getvalue()
    best = min(files, key=lambda quality: abs(len(files[quality]) - 1000 * kilobytes))
    return files[best], best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--kilobytes", type=int, default=450)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    made = [jpeg(photograph(seed), args.kilobytes) for seed in range(args.images)]
    kilobytes = np.mean([len(data) for data, _ in made]) / 1000
    qualities = sorted({quality for _, quality in made})
    print(f"{args.images} JPEGs of {kilobytes:.0f} kB on average, quality {qualities}")
    for mode in ("draft", "exact"):
        preprocess = Preprocess(224, CLIP_MEAN, CLIP_STD, decode=mode)
        rounds = []
        for _ in range(args.rounds):
            began = time.process_time()  # of the core, not of the clock: others may use it as well
            for data, _ in made:
                preprocess.decode_image(data)
            rounds.append((time.process_time() - began) / args.images)
        print(f"{mode}: {1000 * min(rounds):.1f} ms an image, {1 / min(rounds):.0f} images/s a core")


if __name__ == "__main__":
    main()
