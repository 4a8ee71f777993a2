"""The extraction pipeline: stages joined by bounded queues, each at its own pace.

    shards ─ rows by host ─▶ download ─ files ─▶ decode ─ pixels ─▶ encode ─ features ─▶ write
       └─ rows without a caption, failed rows and duplicates skip the stages between ───────▲

The queue before decoding is bounded by the bytes of its files. The slowest stage sets the pace. Rows of the
next shards start while the last rows of a shard are on their way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from extract.config import PipelineConfig
from extract.deduplicate import Deduplicator
from extract.open_shard import OpenShard
from extract.stages.decode import Decode
from extract.stages.download import Download
from extract.stages.encode import Encode
from extract.stages.feed import Feed
from extract.stages.metrics import Bottleneck, ProgressBar
from extract.stages.monitor import monitor
from extract.stages.write import Write
from llava_core.cli.console import say
from llava_core.network.async_tasks import in_background, together
from llava_core.network.fetch import Fetcher
from llava_core.shards.reader import Shard
from llava_core.types import JsonDict
from llava_core.vision.tower import VisionTower


async def run_pipeline(
    tower: VisionTower,
    config: PipelineConfig,
    openers: Sequence[Callable[[], OpenShard]],
    bar: ProgressBar,
    done: Callable[[Shard, float], None],
    deduplicator: Deduplicator | None = None,
    keep: bool = True,
) -> JsonDict:
    """Open the shards one after the other and write all their rows; returns `Bottleneck.figures`.

    `bar` counts rows; `done` is called with each finished shard and the seconds it took; `deduplicator` may
    know shards of earlier runs. With `keep`, what is encoded is written even after a failure or cancellation.
    """
    cpu = ThreadPoolExecutor(config.decode_threads, "decode")
    gpu, disk = ThreadPoolExecutor(1, "encode"), ThreadPoolExecutor(1, "disk")
    deduplicator = deduplicator or Deduplicator()
    fetcher = Fetcher(config.fetch_limits())

    write = Write(disk, bar, done, deduplicator)
    encode = Encode(write.inbox, tower, gpu, config.batch_size)
    decode = Decode(encode.inbox, write.inbox, tower.preprocess, cpu, config, fetcher.memory, deduplicator)
    download = Download(decode.inbox, fetcher, cpu, config)
    feed = Feed(openers, download.inbox, write, deduplicator, rows_ahead=config.concurrency)
    bottleneck = Bottleneck([decode.metrics, encode.metrics, write.metrics], lambda: download.name)

    try:
        with cpu, gpu, disk:
            async with fetcher, in_background(monitor(download, write, bottleneck, bar)):
                await together(stage.run() for stage in (feed, download, decode, encode, write))
    except BaseException as error:
        if keep:
            if isinstance(error, asyncio.CancelledError):
                say("stopping; what is encoded is kept")
            write.flush()
        raise
    finally:
        write.close()
    if feed.error is not None:
        raise feed.error
    return bottleneck.figures()
