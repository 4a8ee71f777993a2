"""Projectors, visual tokens and vision encoders by name.

A name is built in, registered in this process, an entry point of an installed package, or `module:Class`.

Nothing is imported before a name is asked for. Checkpoints record a built-in's name, or `module:Class`, which
any later process can import.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llava_core.errors import LlavaError, first_line, nearest
from llava_core.types import JsonDict

Class = TypeVar("Class", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Entry:
    """A registered class or function, with arguments that its callers add to their own."""

    target: Any
    reference: str
    """A built-in's name, or `module:Class`."""
    arguments: JsonDict = dataclasses.field(default_factory=dict)


class Registry:
    """Names of one kind of part.

    `group` is the entry-point group by which installed packages add theirs; `builtins` are references. Only
    classes with these `attributes` are accepted: a checkpoint may name any object of any module. Built-ins in
    `factors` also take a number, as in pool4, which their constructor gets as `factor`; without one it is
    the number given there.
    """

    def __init__(
        self,
        noun: str,
        group: str,
        attributes: Sequence[str],
        builtins: Mapping[str, str],
        factors: Mapping[str, int] | None = None,
    ) -> None:
        self.noun, self.group, self.attributes, self.builtins = noun, group, attributes, dict(builtins)
        self.factors = dict(factors or {})
        self.registered: dict[str, Entry] = {}

    def register(self, name: str, **arguments: Any) -> Callable[[Class], Class]:
        """Class decorator: makes it known as `name` in this process.

        `arguments`, JSON values, are passed to its constructor and recorded beside it, so that one class can
        be registered under several names. Raises LlavaError if the name is taken, or no other process could
        import the class.
        """

        def decorate(target: Class) -> Class:
            self._require_class(name, target)
            entry = Entry(target, _reference(target, self.noun), arguments)
            known = self.registered.get(name)
            if self._builtin(name) or ":" in name or (known and known.reference != entry.reference):
                raise LlavaError(f"the {self.noun} {name!r} exists", do="register it under another name")
            self.registered[name] = entry
            return target

        return decorate

    def names(self) -> list[str]:
        """Every name that needs no module, built-ins first."""
        from importlib import metadata  # which --help does without

        installed = (point.name for point in metadata.entry_points(group=self.group))
        return list(dict.fromkeys([*self.builtins, *self.registered, *installed]))

    def require(self, name: str) -> None:
        """Raise LlavaError (wrong usage) for a name that `get` would not find. Imports no built-in."""
        if self._builtin(name) is None:
            self.get(name)

    def get(self, name: str) -> Entry:
        """What a name or a `module:Class` stands for. Raises LlavaError (wrong usage) if nothing."""
        if builtin := self._builtin(name):
            stem, arguments = builtin
            return Entry(_imported(self.builtins[stem], self.noun), name if arguments else stem, arguments)
        if name not in self.registered and ":" in name:
            target = _imported(name, self.noun)
            self._require_class(name, target)
            entries = (entry for entry in self.registered.values() if entry.target is target)
            return next((entry for entry in entries if not entry.arguments), Entry(target, name))
        from importlib import metadata

        for point in metadata.entry_points(group=self.group, name=name):
            if name not in self.registered:
                self.register(name)(_imported(point.value.split()[0], self.noun))
        if name not in self.registered:
            do = f"{nearest(name, self.names())}; or give package.module:Class"
            raise LlavaError(f"unknown {self.noun} {name!r}", do=do, exit_code=2)
        return self.registered[name]

    def _builtin(self, name: str) -> tuple[str, JsonDict] | None:
        """The built-in that `name` stands for, and its arguments; None if it stands for none."""
        stem = name.rstrip("0123456789")
        if name in self.builtins:
            return name, {}
        if stem not in self.factors or not re.fullmatch("[1-9][0-9]?", number := name[len(stem) :]):
            return None
        return stem, {} if int(number) == self.factors[stem] else {"factor": int(number)}

    def _require_class(self, name: str, target: Any) -> None:
        if not isinstance(target, type) or not all(hasattr(target, each) for each in self.attributes):
            raise LlavaError(
                f"{name} cannot be used as {self.noun}",
                expected=f"a class with {' and '.join(self.attributes)}",
                got=target.__name__ if isinstance(target, type) else type(target).__name__,
                exit_code=2,
            )


def _reference(target: Any, noun: str) -> str:
    """`module:Class`. Raises LlavaError if that does not lead back to `target` in another process."""
    module, name = target.__module__, target.__qualname__
    if module == "__main__" or "<locals>" in name:
        raise LlavaError(
            f"the {noun} {name} cannot be loaded by another process",
            expected="a class at the top of a module",
            got="one of a notebook or script" if module == "__main__" else "one inside a function",
            do="move it into a .py file, and import it from there",
        )
    return f"{module}:{name}"


def _imported(reference: str, noun: str) -> Any:
    """What `module:Class` names; modules of the current folder count, as they do for `python -m`."""
    module, _, name = reference.partition(":")
    try:
        with _current_folder():
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
    except ModuleNotFoundError as error:
        raise LlavaError(
            f"the {noun} {reference} cannot be loaded",
            got=f"no module named {error.name!r}",
            do=f"install the package that has it, or run where {module.split('.')[0]}.py lies",
            exit_code=2,
        ) from None
    except Exception as error:  # a stranger's module raises anything
        raise LlavaError(
            f"the {noun} {reference} cannot be loaded", got=first_line(error), exit_code=2
        ) from None
    return found


@contextlib.contextmanager
def _current_folder() -> Iterator[None]:
    here = str(Path.cwd())
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


PROJECTORS = Registry(
    "projector",
    "llava_align.projectors",
    ("forward", "state_dict"),
    {name: f"llava_core.projector.projector:{name.title()}" for name in ("linear", "mlp")},
)
"""Modules (in_width, out_width, **arguments): [..., T, in_width] -> [..., T, out_width]."""
VISUAL_TOKENS = Registry(
    "visual tokens",
    "llava_align.visual_tokens",
    ("widening", "tokens_out"),
    {
        name: f"llava_core.projector.visual_tokens:{name.title()}"
        for name in ("all", "patches", "pool", "shuffle")
    },
    factors={"pool": 2, "shuffle": 2},
)
"""Classes like `visual_tokens.VisualTokens`."""
VISION_ENCODERS = Registry("vision encoder", "llava_align.vision_encoders", ("recognises", "open"), {})
"""Classes like `vision.open.EncoderLayout`, asked before the folder layouts that are built in."""

register_projector = PROJECTORS.register
register_visual_tokens = VISUAL_TOKENS.register
register_vision_encoder = VISION_ENCODERS.register
