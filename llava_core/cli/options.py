"""Base class of the commands' flags, and the record of a subcommand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from llava_core.errors import LlavaError

Appended = "appended"
"""Mark of a tuple's flag that is typed once for each value."""
Repeated = Annotated[tuple[str, ...], Appended]
"""Type of a flag that may be repeated, each time with one value."""
GROUPS = ("Required", "Often changed", "Network", "Tuning", "Advanced")
"""Groups of flags in a page of help, in their order; a flag that none names is advanced."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Flags that every command has."""

    groups: ClassVar[Mapping[str, str]] = {}
    """Names of fields, by their group in a page of help; a subclass adds its own."""

    json: bool = False
    """Make the last line of standard output one JSON object with the figures of the summary."""

    def require_inputs(self) -> None:
        """Raise LlavaError for files and folders that can be seen to be wrong without reading them.

        Called before the command's module is imported: torch takes seconds.
        """

    @property
    def own_device(self) -> str:
        """--device, where this process computes; auto if it does not: on Ray, or with no model given."""
        flags = vars(self)
        no_model = "llm" not in flags and flags.get("vision", ...) is None
        return "auto" if no_model or flags.get("ray") is not None else flags.get("device", "auto")

    def require_at_least(self, least: int, *names: str) -> None:
        """Raise LlavaError (wrong usage) unless these flags are `least` or more."""
        for name in names:
            if not (value := getattr(self, name)) >= least:
                flag = f"--{name.replace('_', '-')}"
                raise LlavaError(flag, expected=f"{least} or more", got=value, exit_code=2)

    def require_above_zero(self, *names: str) -> None:
        """Raise LlavaError (wrong usage) unless these flags are finite numbers above 0, or None."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise LlavaError(
                    f"--{name.replace('_', '-')}", expected="a number above 0", got=value, exit_code=2
                )


@dataclasses.dataclass(frozen=True)
class Command:
    """One subcommand: its flags, and the function that it runs as "module:function"."""

    config: type[Options]
    target: str
    recipes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Flags and their values by the name of the `--recipe`."""
    continues: bool = False
    """Whether the same command goes on where an interrupted one stopped."""
    example: str = ""
    """Flags of a call that can be copied, as a page of help shows it."""
    subject: str = ""
    """Flag whose value may be typed without it, such as the folder to inspect."""
