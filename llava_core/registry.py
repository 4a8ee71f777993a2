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
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llava_core.errors import LlavaError, as_llava_error, first_line, nearest
from llava_core.types import JsonDict

Class = TypeVar("Class", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Entry:
    """A class, with the arguments that its constructor gets after its callers' own."""

    target: Any
    reference: str
    """A built-in's name, or `module:Class`."""
    arguments: JsonDict = dataclasses.field(default_factory=dict)
    named: JsonDict = dataclasses.field(default_factory=dict)
    """Those of a built-in that its name says, as pool4 does."""

    @property
    def recorded(self) -> JsonDict:
        """The arguments that a checkpoint has beside the reference."""
        return {key: value for key, value in self.arguments.items() if self.named.get(key) != value}

    def with_arguments(self, arguments: JsonDict) -> Entry:
        """The same class; these arguments replace those of the same name."""
        return dataclasses.replace(self, arguments={**self.arguments, **arguments})

    def build(self, *positional: Any) -> Any:
        """An instance. Raises LlavaError if the constructor fails."""
        with as_llava_error(f"{self.reference} cannot be constructed"):
            return self.target(*positional, **self.arguments)


class Registry:
    """Names of one kind of part.

    `group` is the entry-point group by which installed packages add theirs; `builtins` are references. Only
    classes with these `attributes` are accepted: a checkpoint may name any object of any module. Built-ins in
    `numbers` also take numbers, as in pool4 or perceiver64x3, which their constructor gets by the names given
    there, in this order; a number left out is the one given there, or, if None, the constructor's affair.
    Registered arguments have none of the names in `reserved`; where that is None, there are none.
    """

    def __init__(
        self,
        noun: str,
        group: str,
        attributes: Sequence[str],
        builtins: Mapping[str, str],
        numbers: Mapping[str, Mapping[str, int | None]] | None = None,
        reserved: Sequence[str] | None = (),
    ) -> None:
        self.noun, self.group, self.attributes, self.builtins = noun, group, attributes, dict(builtins)
        self.numbers, self.reserved = dict(numbers or {}), reserved
        self.registered: dict[str, Entry] = {}

    def register(self, name: str, /, **arguments: Any) -> Callable[[Class], Class]:
        """Class decorator: makes it known as `name` in this process.

        `arguments`, JSON values, are passed to its constructor and recorded beside it, so that one class can
        be registered under several names. Raises LlavaError if the name is taken, no other process could
        import the class, or a checkpoint could not record an argument.
        """
        self._require_arguments(name, arguments)

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
            stem, reference, arguments = builtin
            target = _imported(self.builtins[stem], f"{self.noun} {name}")
            return Entry(target, reference, arguments, arguments)
        if name not in self.registered and ":" in name:
            target = _imported(name, f"{self.noun} {name}")
            self._require_class(name, target)
            entries = (entry for entry in self.registered.values() if entry.target is target)
            return next((entry for entry in entries if not entry.arguments), Entry(target, name))
        if name not in self.registered:
            self._register_installed(name)
        if name not in self.registered:
            do = f"{nearest(name, self.names())}; or give package.module:Class"
            raise LlavaError(f"unknown {self.noun} {name!r}", do=do, exit_code=2)
        entry = self.registered[name]
        if _imported(entry.reference, f"{self.noun} {name}") is not entry.target:
            what = f"the {self.noun} {name!r} would load as another class of the name {entry.reference}"
            raise LlavaError(what, do="give each class of a module a name of its own")
        return entry

    def _register_installed(self, name: str) -> None:
        """Register the entry point of this name, if a package has one, as the decorators in its module do."""
        from importlib import metadata

        points = {point.value: point for point in metadata.entry_points(group=self.group, name=name)}
        if len(points) > 1:
            raise LlavaError(
                f"several installed packages have a {self.noun} {name!r}",
                got=", ".join(points),
                do="give the module:Class that is meant, or uninstall the other package",
                exit_code=2,
            )
        for value, point in points.items():
            package = point.dist.name if point.dist else value
            target = _imported(value.split()[0], f"{self.noun} {name!r} of the package {package}")
            if name not in self.registered:
                self.register(name)(target)

    def _require_arguments(self, name: str, arguments: JsonDict) -> None:
        for key, value in arguments.items():
            if self.reserved is None or key in self.reserved:
                what = f"the {self.noun} {name!r} cannot be registered with an argument {key}"
                raise LlavaError(what, do="give it another name" if self.reserved else "leave it out")
            with contextlib.suppress(TypeError, ValueError):
                if json.loads(json.dumps(value)) == value:
                    continue
            raise LlavaError(
                f"a checkpoint cannot record the argument {key} of the {self.noun} {name!r}",
                expected="a number, a string, a boolean, None, or lists and dicts (by string) of them",
                got=repr(value),
            )

    def stem(self, name: str) -> str | None:
        """The built-in that `name` is, less its numbers; None for a name that is none. Imports nothing."""
        builtin = self._builtin(name)
        return builtin[0] if builtin else None

    def _builtin(self, name: str) -> tuple[str, str, JsonDict] | None:
        """The built-in that `name` stands for, its shortest name, and what its numbers are; None if none."""
        if name in self.builtins:
            return name, name, {}
        parts = re.fullmatch(r"([a-z]+)([1-9]\d{0,4}(?:x[1-9]\d{0,4})*)", name)
        if parts is None or parts[1] not in self.numbers:
            return None
        stem, known = parts[1], self.numbers[parts[1]]
        given = [int(number) for number in parts[2].split("x")]
        if len(given) > len(known):
            return None
        arguments = {key: n for key, n in zip(known, given, strict=False) if n != known[key]}
        while given and given[-1] == [*known.values()][len(given) - 1]:
            given.pop()
        return stem, stem + "x".join(map(str, given)), arguments

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


def _imported(reference: str, what: str) -> Any:
    """What `module:Class` names; modules of the current folder count, as they do for `python -m`.

    Raises LlavaError (wrong usage) that `what` cannot be loaded.
    """
    module, _, name = reference.partition(":")
    try:
        with _current_folder():
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        raise LlavaError(
            f"the {what} cannot be loaded",
            got=f"no module named {error.name!r}",
            do=f"install the package that has it, or run where {missing}.py lies",
            exit_code=2,
        ) from None
    except Exception as error:  # a stranger's module raises anything
        raise LlavaError(f"the {what} cannot be loaded", got=first_line(error), exit_code=2) from None
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
    {
        name.lower(): f"llava_core.projector.kinds.{name.lower()}:{name}"
        for name in ("Linear", "Mlp", "LowRank", "Perceiver", "CAbstractor", "Ldp", "TokenPacker")
    },
    numbers={
        "mlp": {"depth": 2, "width": None},
        "lowrank": {"rank": 64},
        "perceiver": {"queries": 64, "depth": 3},
        "cabstractor": {"tokens": 144, "depth": 3},
        "ldp": {"factor": 2},
        "tokenpacker": {"factor": 2},
    },
    reserved=(
        *("kind", "in_width", "out_width", "visual_tokens", "visual_tokens_arguments"),
        *("feature_norm", "fusion"),
    ),
)
"""Modules (in_width, out_width, **arguments): [..., T, in_width] -> [..., T, out_width], or fewer tokens."""
VISUAL_TOKENS = Registry(
    "visual tokens",
    "llava_align.visual_tokens",
    ("widening", "tokens_out"),
    {
        name: f"llava_core.projector.visual_tokens:{name.title()}"
        for name in ("all", "patches", "pool", "shuffle")
    },
    numbers={"pool": {"factor": 2}, "shuffle": {"factor": 2}},
)
"""Classes like `visual_tokens.VisualTokens`."""
VISION_ENCODERS = Registry(
    "vision encoder", "llava_align.vision_encoders", ("recognises", "open"), {}, reserved=None
)
"""Classes like `vision.open.EncoderLayout`, asked before the folder layouts that are built in."""

register_projector = PROJECTORS.register
register_visual_tokens = VISUAL_TOKENS.register
register_vision_encoder = VISION_ENCODERS.register
