"""Every message in the code, as the catalogue of translations has it; `python -m tests.support.messages` adds
what the catalogue lacks, without a translation, and removes what the code no longer has."""

from __future__ import annotations

import ast
import collections
import functools
import importlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator

from llava_core.cli.flags import help_texts, paragraphs
from llava_core.cli.options import GROUPS
from llava_core.cli.translation import CATALOGUE, FIELD, read_catalogue
from llava_core.report.page import TEXTS
from tests.support.paths import ROOT

PACKAGES = ("llava_core", "extract", "train", "infer", "llava_align")
PRINTED = {
    "say": (0,),
    "say_once": (0,),
    "translated": (0,),
    "translated_label": (0,),
    "in_both": (0,),
    "as_llava_error": (0,),
    "LlavaError": (0, "expected", "got", "do"),
    "progress": ("desc", 3),
    "table": (1, "header"),
    "main": (1,),
    "require_same": (1, "do"),
    "require_one_encoder": (1,),
}
"""Functions whose arguments, by position or keyword, are messages."""
TABLES = ("FOUND", "NEXT", "MESSAGES")
"""Constants that are dicts of messages."""
BILINGUAL = ("infer/serve/page.html", "train/watch/watch.html")
"""Pages with both languages, of which the browser picks one."""
SPEAKERS = ("progress_line", "advice", "without_flush", "without_locks", "proxy_hint")
"""Functions that return a line to print."""
RETURNED = ("location", "ending")
"""Properties that are messages."""
OPAQUE = (
    "visible",
    "table",
    "human_bytes",
    "human_operations",
    "human_seconds",
    "counted",
    "first_line",
    "reason",
    "translated",
)
"""Functions of a text or number that is not theirs."""
MOST = 24
"""More ways to fill in a message are left open."""


class Source:
    """The functions of one file, by which names in its messages are looked up."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        self.assigned: dict[tuple[ast.AST | None, str], list[ast.expr]] = {}
        self.looped: dict[tuple[ast.AST | None, str], ast.expr] = {}
        """What a name runs over in a loop."""
        self.inside: dict[ast.AST, ast.AST | None] = {}
        self._walk(self.tree, None)

    def _walk(self, node: ast.AST, function: ast.AST | None) -> None:
        self.inside[node] = function
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._assign(function, target, node.value)
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign)) and node.value is not None:
            self._assign(function, node.target, node.value)
        elif isinstance(node, ast.NamedExpr):
            self._assign(function, node.target, node.value)
        elif isinstance(node, (ast.For, ast.comprehension)) and isinstance(node.target, ast.Name):
            self.looped[function, node.target.id] = node.iter
        within = node if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) else function
        for child in ast.iter_child_nodes(node):
            self._walk(child, within)

    def _assign(self, function: ast.AST | None, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self.assigned.setdefault((function, target.id), []).append(value)
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, each in zip(target.elts, value.elts, strict=False):
                self._assign(function, one, each)

    def templates(self, node: ast.expr, depth: int = 0) -> list[str]:
        """Texts that an expression may have; what is not written in the code is a field such as {path}."""
        open_field = ["{" + _name(node) + "}"]
        if depth > 6:
            return open_field
        below = functools.partial(self.templates, depth=depth + 1)
        if isinstance(node, ast.Constant):
            return [str(node.value)] if isinstance(node.value, str) else open_field
        if isinstance(node, ast.JoinedStr):
            parts = [
                below(part.value)
                if isinstance(part, ast.FormattedValue) and part.format_spec is None and part.conversion == -1
                else ["{" + _name(part.value) + "}"]
                if isinstance(part, ast.FormattedValue)
                else below(part)
                for part in node.values
            ]
            return _products(parts) or ["".join(p[0] if len(p) == 1 else "{value}" for p in parts)]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return _products([below(node.left), below(node.right)]) or open_field
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            return ["", *below(node.left)]
        if isinstance(node, ast.IfExp):
            return [*below(node.body), *below(node.orelse)]
        if isinstance(node, ast.BoolOp):
            return [text for value in node.values for text in below(value)]
        if isinstance(node, ast.Name):
            function = self.inside.get(node)
            while function is not None and (
                isinstance(function, ast.ClassDef) or (function, node.id) not in self.assigned
            ):
                function = self.inside.get(function)
            values = self.assigned.get((function, node.id), [])
            over = self.looped.get((self.inside.get(node), node.id))
            if not values and isinstance(over, ast.Call) and isinstance(over.func, (ast.Name, ast.Attribute)):
                called = over.func.id if isinstance(over.func, ast.Name) else over.func.attr
                if called in functions("list[str]", "Iterator[str]"):
                    source, each = functions("list[str]", "Iterator[str]")[called]
                    return [
                        text for value in source.listed(each) for text in source.templates(value, depth + 1)
                    ]
            if not values and node.id in constants():
                source, value = constants()[node.id]
                return source.templates(value, depth + 1)
            texts = [text for value in values for text in below(value) if not isinstance(value, ast.Name)]
            return texts if values and any(map(_is_message, texts)) else open_field
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            name = node.value.id
            tables = [
                *self.assigned.get((self.inside.get(node), name), ()),
                *self.assigned.get((None, name), ()),
            ]
            values = [value for table in tables if isinstance(table, ast.Dict) for value in table.values]
            return [text for value in values for text in below(value)] or open_field
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
            return [text if _is_message(text) else open_field[0] for text in below(node.func.value)]
        if isinstance(node, ast.Attribute) and node.attr in RETURNED:
            source, function = functions()[node.attr]
            return [
                text for value in source.returned(function) for text in source.templates(value, depth + 1)
            ]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions():
            source, function = functions()[node.func.id]
            return [
                text for value in source.returned(function) for text in source.templates(value, depth + 1)
            ]
        return open_field

    def returned(self, function: ast.AST) -> Iterator[ast.expr]:
        """What a function returns."""
        for node in ast.walk(function):
            if isinstance(node, ast.Return) and node.value is not None and self.inside[node] is function:
                yield node.value

    def _labels(self, rows: ast.expr) -> Iterator[str]:
        """Names in the first column of a table that is written in the code."""
        if isinstance(rows, ast.Name):
            for value in self.assigned.get((self.inside.get(rows), rows.id), []):
                yield from self._labels(value)
        elif isinstance(rows, (ast.List, ast.Tuple)):
            for row in rows.elts:
                if isinstance(row, ast.Tuple) and row.elts:
                    yield from self.templates(row.elts[0])
        elif isinstance(rows, ast.Dict):
            for key in rows.keys:
                yield from self.templates(key) if key is not None else ()

    def _each(self, node: ast.expr) -> list[ast.expr]:
        """What stands in a list that a name is given, such as the header of a table."""
        given = self.assigned.get((self.inside.get(node), node.id), []) if isinstance(node, ast.Name) else []
        lists = [value.elts for value in given if isinstance(value, (ast.Tuple, ast.List))]
        return [each for elements in lists for each in elements if not isinstance(each, ast.Starred)] or [
            node
        ]

    def listed(self, function: ast.AST) -> Iterator[ast.expr]:
        """What a function returns in a list, or yields."""
        for node in ast.walk(function):
            if isinstance(node, ast.Yield) and node.value is not None:
                yield node.value
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "append":
                yield node.args[0]
            elif isinstance(node, (ast.Return, ast.AugAssign)) and isinstance(node.value, ast.List):
                yield from (each for each in node.value.elts if not isinstance(each, ast.Starred))

    def messages(self) -> Iterator[str]:
        """Of every call that prints, and every error."""
        for name in TABLES:
            for table in self.assigned.get((None, name), []):
                values = table.values if isinstance(table, ast.Dict) else []
                yield from (text for value in values for text in self.templates(value) if _is_message(text))
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef) and node.name in SPEAKERS:
                texts = [text for value in self.returned(node) for text in self.templates(value)]
                yield from (_apart(text) for text in texts if _is_message(text))
            if isinstance(node, ast.Call):
                called = (
                    node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                )
                if called == "counted" and isinstance(node.args[1], ast.Constant):
                    noun = str(node.args[1].value)
                    yield from (f"{{n}} {noun}", f"{{n}} {noun}s")
                if called in ("table", "_print"):
                    yield from filter(
                        _is_message,
                        self._labels(
                            node.args[called == "_print"] if len(node.args) > (called == "_print") else node
                        ),
                    )
                for place in PRINTED.get(called, ()):
                    for argument in itertools.chain.from_iterable(map(self._each, _argument(node, place))):
                        texts = self.templates(argument)
                        yield from (_apart(text.strip()) for text in texts if _is_message(text))


def _argument(call: ast.Call, place: int | str) -> Iterable[ast.expr]:
    values = (
        [call.args[place]][: not isinstance(call.args[place], ast.Starred)]
        if isinstance(place, int) and place < len(call.args)
        else [keyword.value for keyword in call.keywords if keyword.arg == place]
    )
    return [
        each
        for value in values
        for each in (value.elts if isinstance(value, (ast.Tuple, ast.List)) else [value])
    ]


def _products(parts: list[list[str]]) -> list[str]:
    size = 1
    for part in parts:
        size *= len(part)
    return ["".join(each) for each in itertools.product(*parts)] if size <= MOST else []


def _name(node: ast.expr) -> str:
    """A name for what an expression fills in."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        named = re.sub(r"\W", "", str(node.slice.value))
        return named if named.isidentifier() else _name(node.value)
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "counted":
        noun = node.args[1]
        return (str(noun.value) if isinstance(noun, ast.Constant) else "item").replace(" ", "_") + "s"
    if isinstance(node, ast.Call) and node.args and not isinstance(node.args[0], ast.Starred):
        return _name(node.args[0])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return _name(node.func.value)
    return "value"


def _apart(text: str) -> str:
    """The text with another name for each further field of one name."""
    seen: collections.Counter[str] = collections.Counter()

    def named(field: re.Match[str]) -> str:
        seen[field[1]] += 1
        return "{" + field[1] + (str(seen[field[1]]) if seen[field[1]] > 1 else "") + "}"

    return FIELD.sub(named, text)


def _is_message(text: str) -> bool:
    """Whether it has a word, beside what is filled in."""
    return re.search(r"[A-Za-z]{2}", re.sub(r"--[\w-]+", "", FIELD.sub("", text))) is not None


@functools.cache
def sources() -> list[Source]:
    """Every file of the product."""
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return [Source(str(path.relative_to(ROOT))) for path in paths]


@functools.cache
def constants() -> dict[str, tuple[Source, ast.expr]]:
    """Texts that a module names, by a name that no other has."""
    found: dict[str, list[tuple[Source, ast.expr]]] = {}
    for source in sources():
        for (function, name), values in source.assigned.items():
            if function is None and name.isupper():
                found.setdefault(name, []).extend((source, value) for value in values)
    return {
        name: each[0]
        for name, each in found.items()
        if len(each) == 1 and isinstance(each[0][1], (ast.Constant, ast.JoinedStr))
    }


@functools.cache
def functions(*returned: str) -> dict[str, tuple[Source, ast.FunctionDef]]:
    """Functions that return a text, or one of these types, by a name that no other has."""
    found: dict[str, list[tuple[Source, ast.FunctionDef]]] = {}
    for source in sources():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef) and ast.unparse(node.returns or ast.Constant(0)) in (
                returned or ("str",)
            ):
                found.setdefault(node.name, []).append((source, node))
    return {name: each[0] for name, each in found.items() if len(each) == 1 and name not in OPAQUE}


def pages() -> Iterator[str]:
    """Texts of the pages of help."""
    yield from GROUPS
    for package in ("extract", "train", "infer", "llava_align"):
        for command in importlib.import_module(f"{package}.__main__").COMMANDS.values():
            yield from paragraphs(command.config.__doc__)
            yield from help_texts(command.config).values()


LABELS = """
healthy
broken data
diverging
overfitting
blind
parroting
underfitting
expected {error}
got {error}
a whole number or {choices}
train on one kind at a time, or on several of the same rows with --fuse
check the network
error: {error}
verdict: {name}
sources
rows
finished shards
unfinished shards
disk bytes
free bytes
shards
stale shards
checked
damaged rows
encoded again
changed rows
largest distance
loss
perplexity
loss shuffled
grounding gap
samples
pictures
answer tokens
text loss
captions cut
lines
failed
judged
accuracy
chance
unanswered
clip
clipscore
clipscore of another answer
clipscore of captions
questions
answered
accuracy shuffled
accuracy gain
steps
feature bytes per epoch
the run
frozen parameters
trained parameters
visual tokens
tokens per step
micro tokens
answer tokens per step
memory
process
language model
activations
logits
projector and optimizer
features read ahead
seconds
eval loss
eval perplexity
eval grounding gap
eval step
eval visual rms
.
outcome
reason
held-out loss
above the best
spread
tokens per image
operations
finished
time
points
pruned
running
interrupted
loss of the best
of training
rows with features
kept
dropped
share kept
hold features
of features
of images
of rows
a blank image
Encoder
Preprocessing
Source files
Figures
Shards
Varied
Common to all
Caption characters
Token norms
Similarity
Similarity of shuffled pairs
token norms
caption characters
share
shape
colour
place
size
all
machine
packages
commands
caches
environment
ready
advice
platform
CPU cores
disk
free RAM
C compiler, for --compile
the lessons in docs/learn
none: this torch is for CPUs
{free} free of {all}
"""
"""Names of figures and verdicts, and parts of an error, which the code puts together."""


def messages() -> dict[str, str]:
    """Every message, and the file that has it first."""
    found: dict[str, str] = {}
    for source in sources():
        for message in source.messages():
            found.setdefault(message, source.path)
    for text in pages():
        found.setdefault(text, "--help")
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.html")):
        name = str(path.relative_to(ROOT))
        for words in TEXTS.findall(path.read_text(encoding="utf-8")) if name not in BILINGUAL else ():
            if _is_message(re.sub(r"\$\w+", "", text := " ".join(words.split()))):
                found.setdefault(text, name)
    for text in LABELS.strip().splitlines():
        found.setdefault(text, "figures")
    return found


def catalogue_text(entries: dict[str, str], known: dict[str, str]) -> str:
    """A .po file of these messages with the translations known."""
    head = 'msgid ""\nmsgstr "Language: zh\\nContent-Type: text/plain; charset=UTF-8\\n"\n'
    lines = [head]
    for place, group in itertools.groupby(
        sorted(entries, key=lambda m: (entries[m], m)), entries.__getitem__
    ):
        lines.append(f"#: {place}")
        for message in group:
            quoted = (json.dumps(text, ensure_ascii=False) for text in (message, known.get(message, "")))
            lines.append("msgid {}\nmsgstr {}\n".format(*quoted))
    return "\n".join(lines)


if __name__ == "__main__":
    known = read_catalogue(CATALOGUE.read_text(encoding="utf-8"))
    entries = messages()
    CATALOGUE.write_text(catalogue_text(entries, known), encoding="utf-8")
    print(f"{len(entries)} messages, {sum(m not in known for m in entries)} to translate")
