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

from extract.deduplicate import Deduplicator
from extract.open_output import OpenOutput
from extract.pipeline_config import PipelineConfig
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
    towers: Sequence[VisionTower],
    config: PipelineConfig,
    openers: Sequence[Sequence[Callable[[], OpenOutput]]],
    bar: ProgressBar,
    done: Callable[[Shard, float], None],
    deduplicator: Deduplicator | None = None,
    keep: bool = True,
) -> JsonDict:
    """Open the shards one after the other and write all their rows; returns `Bottleneck.figures`.

    `openers`: of each source, those of its shards, one in the cache of each of the `towers`, less those that
    are finished. Towers with one network run it once for all. `bar` counts rows; `done` is called with each
    finished shard and the seconds it took; `deduplicator` may know shards of earlier runs. With `keep`, what
    is encoded is written even after a failure or cancellation.
    """
    cpu = ThreadPoolExecutor(config.decode_threads, "decode")
    gpu, disk = ThreadPoolExecutor(1, "encode"), ThreadPoolExecutor(1, "disk")
    deduplicator = deduplicator or Deduplicator()
    fetcher = Fetcher(config.fetch_limits())

    write = Write(disk, bar, done, deduplicator, outputs=max(map(len, openers), default=1))
    networks = {id(tower.network): tower.network for tower in towers}
    encoders = []
    for network in networks.values():
        layers = [tower for tower in towers if tower.network is network]
        name = "encode" if len(networks) == 1 else f"encode {layers[0].encoder['model_id']}"
        encoders.append(Encode(write.inbox, layers, gpu, config.batch_size, name))
    takes = [encoder.takes for encoder in encoders]
    decode = Decode(takes, write.inbox, cpu, config, fetcher.memory, deduplicator)
    download = Download(decode.inbox, fetcher, cpu, config)
    feed = Feed(openers, download.inbox, write, deduplicator, rows_ahead=config.concurrency)
    encode = [encoder.metrics for encoder in encoders]
    bottleneck = Bottleneck([decode.metrics, *encode, write.metrics], lambda: download.name)

    async def encode_all() -> None:
        await together(encoder.run() for encoder in encoders)
        await write.inbox.put(None)

    try:
        with cpu, gpu, disk:
            async with fetcher, in_background(monitor(download, write, bottleneck, bar)):
                await together((feed.run(), download.run(), decode.run(), encode_all(), write.run()))
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
