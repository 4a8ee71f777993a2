"""`infer serve` in a process of its own, for tests."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

from tests.support.commands import start


class Served:
    """A server that has said where it listens."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.log = process, list[str]()
        assert process.stderr is not None
        for line in process.stderr:
            self.log.append(line)
            if found := re.search(r"(http://\S+) ", line):
                self.base = found[1]
                break
        else:
            raise AssertionError("".join(self.log))
        self._reader = threading.Thread(target=lambda: self.log.extend(process.stderr or ()), daemon=True)
        self._reader.start()

    def stop(self, number: int = signal.SIGINT) -> str:
        """Standard output of a server that was stopped; asserts that it ended well."""
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> str:
        """Standard output of a server that ends; asserts that it ended well."""
        code = self.process.wait(60)
        self._reader.join(10)
        assert code == 0, (code, "".join(self.log))
        assert "Traceback" not in "".join(self.log)
        assert self.process.stdout is not None
        return self.process.stdout.read()


@contextlib.contextmanager
def llava_server(*flags: object, **environment: Any) -> Iterator[Served]:
    process = start("infer", "serve", "--port", 0, *flags, **environment)
    try:
        yield Served(process)
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            with contextlib.suppress(ValueError):
                stream.close()
