"""The built-in world as a data set: pictures, and parquet files in the style of SA1B-Dense-Caption."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llava_align.demo.world.captions import caption
from llava_align.demo.world.render import jpeg, render
from llava_align.demo.world.scene import Scene, random_scene


@dataclasses.dataclass(frozen=True)
class Split:
    """A split of the data set: parquet files, pictures, the scenes that they show, and their captions."""

    parquet: Path
    """Folder of the parquet files."""
    pictures: list[Path]
    scenes: list[Scene]
    captions: list[str]


def write_split(
    folder: Path, name: str, base_url: str, rows: int, files: int, seed: int, odd: tuple[str, ...] = ()
) -> Split:
    """Draw `rows` pictures, and list them in `files` parquet files with columns `url` and `cap_seg`.

    Pictures go to folder/pictures/<name>/, parquet files to folder/data/<name>/. The paths in `odd` replace
    the URLs of as many rows, spread over the first file.
    """
    rng = random.Random(f"{name}/{seed}")
    parquet = folder / "data" / name
    parquet.mkdir(parents=True)
    paths, scenes = draw(folder / "pictures" / name, rows, rng)
    urls = [f"{base_url}/{name}/{path.name}" for path in paths]
    for k, odd_path in enumerate(odd):
        urls[(2 * k + 1) * rows // (2 * len(odd) * files)] = f"{base_url}{odd_path}"
    captions = [caption(scene, rng) for scene in scenes]
    for file in range(files):
        part = slice(file * rows // files, (file + 1) * rows // files)
        table = pa.table({"url": urls[part], "cap_seg": _cap_seg(captions[part], as_struct=file % 2 == 0)})
        pq.write_table(table, parquet / f"{name}-{file:05d}.parquet")
    return Split(parquet, paths, scenes, captions)


def split_scenes(name: str, rows: int, seed: int) -> list[Scene]:
    """The scenes that `write_split` draws with the same arguments."""
    rng = random.Random(f"{name}/{seed}")
    return [random_scene(rng) for _ in range(rows)]


def draw(folder: Path, rows: int, rng: random.Random) -> tuple[list[Path], list[Scene]]:
    """Draw `rows` random scenes into the folder; returns the image files and the scenes."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = [random_scene(rng) for _ in range(rows)]
    paths = [folder / f"{row:05d}.jpg" for row in range(rows)]
    for path, scene in zip(paths, scenes, strict=True):
        path.write_bytes(jpeg(render(scene, rng)))
    return paths, scenes


def _cap_seg(captions: list[str], as_struct: bool) -> pa.Array:
    """The column in one of two forms found in published files: a struct, or a string that holds a dict."""
    values = [{"global_caption": text, "local_caption": []} for text in captions]
    if as_struct:
        return pa.array([{"global_caption": value["global_caption"]} for value in values])
    return pa.array([json.dumps(value, ensure_ascii=False) for value in values])
