"""Images stored in a table, as a source of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from extract.sources.base import Images
from extract.sources.local_images import loaded
from llava_core.errors import first_line
from llava_core.network.fetch import Fetched
from llava_core.row_status import Status
from llava_core.tables.image_values import image_bytes


class StoredImages:
    """Images that a table holds; those that it does not hold are in `others`."""

    def __init__(self, value: Callable[[int], Any], others: Images) -> None:
        """`value` gives what the table has for a row."""
        self.value, self.others = value, others

    def load(self, row: int, max_bytes: int) -> Fetched | None:
        try:
            value = self.value(row)
            if isinstance(value, list) and len(value) > 1:
                return Fetched(Status.SEVERAL_IMAGES, attempts=0)
            body = image_bytes(value)
        except OSError as error:
            return Fetched(Status.UNREADABLE_FILE, attempts=0, detail=first_line(error))
        return self.others.load(row, max_bytes) if body is None else loaded(body, max_bytes)
