"""An S3 server (moto) that fails on demand."""

from __future__ import annotations

import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

HOW = ("500", "503", "dropped", "cut")
"""Internal error, "slow down", the connection closed without an answer, and closed in the middle of the upload."""


class Quiet(WSGIRequestHandler):
    def log(self, *_):
        pass


@dataclass
class FlakyS3:
    """Serves S3 at `address`; requests that match `failing` (method and path) fail in the way `how` says."""

    failing: re.Pattern | None = None
    how: str = "500"
    failed: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.app = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=Quiet)
        self.address = f"http://127.0.0.1:{self.server.port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __call__(self, environ, start_response):
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        if self.failing is None or not self.failing.search(request):
            return self.app(environ, start_response)
        self.failed.append(request)
        if self.how in ("dropped", "cut"):
            if self.how == "cut":
                environ["wsgi.input"].read(1000)
            environ["werkzeug.socket"].shutdown(2)
            environ["werkzeug.socket"].close()
            raise ConnectionAbortedError
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response(f"{self.how} Failing", [("Content-Type", "application/xml")])
        code = {"500": "InternalError", "503": "SlowDown"}[self.how]
        return [f"<Error><Code>{code}</Code><Message>on demand</Message></Error>".encode()]

    @contextmanager
    def fails(self, pattern: str, how: str = "500"):
        """Within, requests whose method and path match the pattern fail."""
        self.failing, self.how = re.compile(pattern), how
        try:
            yield
        finally:
            self.failing = None

    def close(self):
        self.server.shutdown()
