"""`train watch`: a page about a run or a sweep, which a small HTTP server of the standard library keeps live.

GET / is the page; GET /events a stream of server-sent events: at first all that there is, then what is new.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from llava_core.cli.console import say
from llava_core.network.listen import host_name, is_loopback, listening
from llava_core.report.page import report
from llava_core.types import JsonDict
from train.watch.config import WatchConfig
from train.watch.follow import Follower

POLL_SECONDS = 1.0
"""Time between two looks at the files."""
PAGE = Path(__file__).with_name("watch.html")


class Server(ThreadingHTTPServer):
    """Serves the page of one folder on a listening socket."""

    def __init__(self, config: WatchConfig, listener: socket.socket) -> None:
        super().__init__(listener.getsockname()[:2], Handler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.folder, self.local = listener, config.folder, is_loopback(config.host)
        parts = {
            "title": escape(config.folder.resolve().name),
            "subtitle": "",
            "totals": "",
            "connect": "'self'",
        }
        self.page = report(PAGE, parts, "train watch").encode()

    def handle_error(self, request: object, client_address: object) -> None:
        """A page that was closed while it was written to is no error."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 60

    def do_GET(self) -> None:
        if self.server.local and not is_loopback(host_name(self.headers.get("Host", ""))):
            # by DNS rebinding a page of another site could read this one
            self.send_error(403, "open it at 127.0.0.1 or localhost, or begin with --host 0.0.0.0")
        elif (path := self.path.partition("?")[0]) == "/":  # VS Code adds a query
            self._begin("text/html; charset=utf-8")
            self.wfile.write(self.server.page)
        elif path == "/events":
            self._begin("text/event-stream")
            self._follow(Follower(self.server.folder))
        else:
            self.send_error(404)

    def _begin(self, kind: str) -> None:
        self.send_response(200)
        for name, value in (("Content-Type", kind), ("Cache-Control", "no-store")):
            self.send_header(name, value)
        self.end_headers()

    def _follow(self, follower: Follower) -> None:
        first = True
        while True:
            if (changes := follower.changes()) or first:
                # JSON has no NaN, which the losses of a run that diverges may be
                finite = json.loads(json.dumps(changes), parse_constant=lambda _: None)
                self.wfile.write(f"data: {json.dumps(finite)}\n\n".encode())
            else:
                self.wfile.write(b":\n\n")  # which tells whether the page is still there
            first = False
            time.sleep(POLL_SECONDS)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not logged."""


def run(config: WatchConfig) -> JsonDict:
    """Serve until a signal to stop. Raises LlavaError if the port is in use."""
    with Server(config, listening(config.host, config.port)) as server:
        port = server.socket.getsockname()[1]
        base = f"http://{f'[{config.host}]' if ':' in config.host else config.host}:{port}/"
        say(f"{config.folder} at {base} in a browser; Ctrl-C ends the page, not the training")
        if server.local:
            login = "@".join((os.environ.get("USER") or "USER", socket.gethostname()))
            ssh = f"ssh -N -L {port}:127.0.0.1:{port} {login}"
            say(f"from another computer: {ssh} (address and port as for your login), then the same address")
        else:
            say("anybody who reaches this port can read it")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return {}
