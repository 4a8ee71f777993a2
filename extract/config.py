"""Flags of `extract`; every default lives here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from extract.data_options import DataOptions
from extract.pipeline_config import PipelineConfig
from llava_core.cli.download_options import DownloadOptions
from llava_core.cli.options import Options
from llava_core.errors import LlavaError
from llava_core.filesystem import PAGE_BEGINS, require_file_place, require_folder
from llava_core.input_folders import folders_of, one_or_several, require_vision_encoder, shard_paths
from llava_core.types import Device


def require_data(data: str, images: Path | None) -> None:
    """Raise LlavaError if nothing is there, or --images is no folder."""
    from extract.sources.find import require_image_folder, require_matching  # with pyarrow: not for --help

    require_matching(data)
    require_image_folder(images)


def require_count(sample: int) -> None:
    """Raise LlavaError (wrong usage) for a negative --sample."""
    if sample < 0:
        raise LlavaError("--sample", expected="0 (every row) or more", got=sample, exit_code=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeConfig(PipelineConfig):
    """Flags of every command that encodes images into shards."""

    out: Path
    """Folder of the feature shards."""
    reuse: tuple[Path, ...] = ()
    """Folders of finished shards of the same encoder and preprocessing: rows whose address, or image, they
    have are copied instead of downloaded and encoded."""

    def require_inputs(self) -> None:
        for folder in self.reuse:
            shard_paths(folder)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(EncodeConfig, DataOptions):
    """Encode images into feature shards. The same command continues where it stopped.

    Several encoders, or --layers, make a cache each, in OUT/NAME or OUT/NAME@LAYER, from one download.
    """

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "limit dry_run thumbnails layers"}

    vision: tuple[Path, ...] | Path
    """Folder of the vision encoder: Chinese-CLIP from ModelScope, or a Hugging Face vision encoder. Of
    several, each makes a cache."""
    layers: tuple[Literal["last"] | int, ...] = ()
    """Layers to keep of each encoder, which runs once for all: last, or as for --layer."""

    data: str
    """Parquet, Arrow, JSON, CSV or tar files: their folder, one file, or a glob in quotes; or a folder of
    images with their words beside them. docs/use/data.md shows each."""
    limit: int | None = None
    """Take only the first N rows of all files together; what comes after them is not checked."""
    dtype: Literal["float16", "int8"] = "float16"
    """How features are stored; int8, with a scale per row and channel, takes half the disk, its error is
    about 1 %. Training reads both, also side by side."""
    thumbnails: bool = False
    """Keep a small JPEG of each picture in its shard, 4 KiB a row, to look at later."""
    keep_images: Path | None = None
    """Folder to keep the image files in, a WebDataset tar for each source, with every row's words and
    outcome: for a later encoder, which takes the folder as --data. Where the cache is finished, the images
    are downloaded for it."""
    ray: str | None = None
    """Spread the files over this Ray cluster, of which this machine is a node: auto, or HOST:6379."""
    ray_workers: int | None = None
    """Workers on it; without it, one for each GPU, or for every 4 CPU cores."""
    dry_run: bool = False
    """Print rows and bytes, and touch nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_above_zero("limit", "ray_workers")
        if self.ray_workers is not None and self.ray is None:
            raise LlavaError("--ray-workers", do="say with --ray which cluster", exit_code=2)
        object.__setattr__(
            self, "vision", one_or_several("vision", self.vision, "a folder of a vision encoder")
        )
        if self.layers and self.layer is not None:
            raise LlavaError("--layer and --layers", expected="one of them", exit_code=2)
        if self.ray is not None and (len(self.caches()) > 1 or self.keep_images is not None):
            expected, do = "one encoder, one layer, and no --keep-images", "make them one after the other"
            raise LlavaError("--ray", expected=expected, do=do, exit_code=2)

    def caches(self) -> list[RunConfig]:
        """The flags of the `extract run` that would make each of the caches alone.

        Raises LlavaError (wrong usage) if two would have one folder.
        """
        folders = folders_of(self.vision)
        if len(folders) == 1 and not self.layers:
            return [self]
        caches: dict[str, RunConfig] = {}
        for folder in folders:
            for layer in self.layers or ("last" if self.layer is None else self.layer,):
                name = folder.resolve().name + ("" if layer == "last" else f"@{layer}")
                if name in caches:
                    what = f"--vision and --layers would make {self.out / name} twice"
                    raise LlavaError(what, do="leave one out, or rename an encoder's folder", exit_code=2)
                own = None if layer == "last" else layer
                caches[name] = dataclasses.replace(
                    self, vision=folder, layer=own, layers=(), out=self.out / name
                )
        return list(caches.values())

    def require_inputs(self) -> None:
        require_data(self.data, self.images)
        require_folder(self.out)
        if self.keep_images is not None:
            require_folder(self.keep_images, "--keep-images")
            data, kept = Path(self.data), self.keep_images.resolve()
            read = {kept, *kept.parents} if data.is_dir() else {kept}
            if (data if data.is_dir() else data.parent).resolve() in read:
                expected = "a folder outside --data, which would take the tars for data when it is read again"
                raise LlavaError("--keep-images", expected=expected, got=self.keep_images, exit_code=2)
        for folder in folders_of(self.vision):
            require_vision_encoder(folder)
        super().require_inputs()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetryConfig(EncodeConfig, DataOptions):
    """Try the failed rows of finished shards again; all others stay as they are.

    --layer, --decode and --fit are those of the shards.
    """

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "status data"}

    vision: Path
    """Folder of the vision encoder that they were made with."""

    status: tuple[str, ...] = ()
    """Failures to try again, such as timeout http-5xx http-429; without it, every one but those that
    lie in the data: bad caption, several images.

    damaged: rows that no longer have their checksum; every row is read to find them."""
    data: str | None = None
    """What the shards were made from, if it has images of its own and does not lie there any more."""

    def require_inputs(self) -> None:
        from llava_core.row_status import failures  # with numpy, which --help does without

        super().require_inputs()
        require_vision_encoder(self.vision)
        shard_paths(self.out)
        failures(self.status)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyConfig(DownloadOptions, DataOptions):
    """Check every checksum, and, with --vision, that the encoder still gives the same features.

    Names the rows that are damaged or hold the features of another row, and the shards of another encoder.
    """

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "vision sample"}

    out: Path
    """Folder of the feature shards, or one shard."""
    vision: Path | None = None
    """Folder of the vision encoder to compare with."""
    sample: int = 16
    """Images to encode again for that; 0 takes every row."""
    data: str | None = None
    """What the shards were made from, if it has images of its own and does not lie there any more."""
    device: Device = "auto"
    """Where to encode."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(self.sample)

    def require_inputs(self) -> None:
        shard_paths(self.out)
        if self.vision is not None:
            require_vision_encoder(self.vision)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectConfig(Options):
    """What feature shards hold: outcomes, hosts, captions, norms."""

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "html sample"}

    out: Path
    """Folder of the feature shards, or one shard."""
    html: Path | None = None
    """Also write one page that shows all this and a sample of the rows; it needs nothing but a browser."""
    sample: int = 60
    """Rows on that page; 0 takes every row."""

    def __post_init__(self) -> None:
        require_count(self.sample)

    def require_inputs(self) -> None:
        shard_paths(self.out)
        if self.html is not None:
            require_file_place("--html", self.html, PAGE_BEGINS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExamplesConfig(DownloadOptions, DataOptions):
    """Save the first pictures of a data set with their captions: 0000.jpg (or .png, as it came), 0000.txt, ….

    Dialogues, and several captions of one picture, are saved as 0000.json.

    Rows without a caption or picture are skipped; too many in a row end it. You can pass the folder to
    --data afterwards.
    """

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "count"}

    data: str
    """As for `extract run`."""
    out: Path
    """Folder for them; it must be empty or new."""
    count: int = 16
    """Pictures to save."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_above_zero("count")
        require_folder(self.out)

    def require_inputs(self) -> None:
        require_data(self.data, self.images)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig(PipelineConfig, DataOptions):
    """How fast this machine extracts: each stage of `run` alone, then all together, on the first rows.

    With --features instead: how fast a finished cache is read, as training reads it. Nothing stays on disk.
    """

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "data vision features count"}

    data: str | None = None
    """What to extract, as for `run`."""
    vision: Path | None = None
    """Folder of the vision encoder, as for `run`."""
    features: Path | None = None
    """Folder of finished feature shards, or one shard, to read instead."""
    count: int = 512
    """Rows for the stages alone, and as many others for all together; with --features, rows to read."""
    out: Path = Path("features")
    """Folder whose disk is written to: where `run` would put its shards. It need not exist."""
    limit: int | None = None
    """Rows that `run` would take; the time is estimated for them."""
    dtype: Literal["float16", "int8"] = "float16"
    """How features are stored, as for `run`."""
    thumbnails: bool = False
    """Keep a small JPEG of each picture, as for `run`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_above_zero("count", "limit")
        if (self.data is None) == (self.features is None):
            both = "both" if self.data is not None else "neither"
            raise LlavaError("extract bench", expected="--data or --features", got=both, exit_code=2)
        if self.data is not None and self.vision is None:
            raise LlavaError("--data", do="say with --vision which encoder is to be measured", exit_code=2)

    def as_run(self) -> RunConfig:
        """The flags of the `extract run` that is measured."""
        names = [field.name for field in dataclasses.fields(RunConfig)]
        return RunConfig(**{name: getattr(self, name) for name in names if hasattr(self, name)})

    def require_inputs(self) -> None:
        if self.features is not None:
            shard_paths(self.features)
        if self.data is not None:
            require_data(self.data, self.images)
        if self.vision is not None:
            require_vision_encoder(self.vision)
