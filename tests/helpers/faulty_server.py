"""A server that misbehaves on purpose. It injects faults into the client and measures nothing."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import threading
import time
from collections.abc import Iterator
from urllib.parse import quote

MALFORMED = {
    "choices-text": {"choices": "abc"},
    "choice-null": {"choices": [None]},
    "delta-text": {"choices": [{"index": 0, "delta": "hi"}]},
    "usage-text": {"usage": "none"},
    "tokens-text": {"usage": {"prompt_tokens": "40", "completion_tokens": 2}},
    "no-tokens": {"usage": {"prompt_tokens": 0, "completion_tokens": 2}},
    "more-found": {
        "usage": {"prompt_tokens": 40, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 50}}
    },
    "less-than-none": {
        "usage": {"prompt_tokens": 40, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": -1}}
    },
    "details-list": {"usage": {"prompt_tokens": 40, "completion_tokens": 2, "prompt_tokens_details": [1]}},
}
LISTS = {"named": {"data": [{"name": "x"}]}, "object": {"data": {"id": "x"}}, "texts": ["m"], "none": {"data": []}}


class Faulty(http.server.BaseHTTPRequestHandler):
    """Answers /MODE/v1/... the way MODE says, and remembers what it was sent."""

    protocol_version = "HTTP/1.1"
    received: list[tuple[str, dict, dict]] = []  # noqa: RUF012, one list for all requests of a server

    def remember(self, body: dict) -> None:
        self.received.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))

    def do_GET(self) -> None:
        self.remember({})
        mode = self.path.split("/")[1]
        if mode in ("silent", "cookie"):
            self.answer(200, json.dumps({"object": "list", "data": [{"id": "listed", "object": "model"}]}))
        elif mode == "html":
            self.answer(200, "<html>a proxy</html>", "text/html")
        elif mode in LISTS:
            self.answer(200, json.dumps(LISTS[mode]))
        elif mode == "echo":  # names its model after the headers of the request
            self.answer(200, json.dumps({"data": [{"id": f"m {self.headers['Authorization']}"}]}))
        elif mode == "escapes":
            self.answer(200, json.dumps({"data": [{"id": "m\x1b[31m"}]}))
        else:
            self.refuse(404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.remember(body)
        mode = self.path.split("/")[1]
        if mode.isdigit():
            self.refuse(int(mode))
        elif mode == "hang":
            time.sleep(3)
            self.close_connection = True
        elif mode == "html":
            self.answer(200, "<html>a proxy</html>", "text/html")
        else:
            self.stream(mode)

    def refuse(self, status: int) -> None:
        """Refuse, and repeat the key wherever one can."""
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        spelled = f"{key} {quote(key)} {key[:12]} {key[::-1]} {base64.b64encode(key.encode()).decode()}"
        message = {"error": {"message": f"this key is no good: {spelled}", "type": key, "code": key}}
        self.send_response(status, f"no good {key}")
        self.finish_headers(json.dumps(message), "application/json", key)

    def answer(self, status: int, text: str, kind: str = "application/json") -> None:
        self.send_response(status)
        self.finish_headers(text, kind, "")

    def finish_headers(self, text: str, kind: str, key: str) -> None:
        self.send_header("Content-Type", kind)
        self.send_header("X-Request-Id", key)
        self.send_header("Set-Cookie", "server=2; Path=/")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def stream(self, mode: str) -> None:
        """Stream an answer of two tokens that goes wrong as `mode` says; without a length, its end is the close."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Set-Cookie", "server=2; Path=/")
        if mode == "broken":
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        role, token = (
            {"role": "assistant", "content": ""},
            {"content": "" if mode in ("blank", "textless") else "Hello"},
        )
        made = 0 if mode == "blank" else 2
        usage = {"prompt_tokens": 40, "completion_tokens": made, "total_tokens": 40 + made}
        deltas = {"empty": [role], "cut": [role, token], "broken": [role, token], "error": [role]}
        chunks = [
            {"id": "1", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta}]}
            for delta in deltas.get(mode, [role, token, token])
        ]
        if mode not in ("empty", "cut", "broken", "error"):
            chunks[-1]["choices"][0]["finish_reason"] = "length"
        if mode not in ("empty", "cut", "broken", "error", *MALFORMED):
            chunks.append({"id": "1", "object": "chat.completion.chunk", "choices": [], "usage": usage})
        if mode == "error":
            chunks.append({"error": {"message": f"sorry {self.headers.get('Authorization')}", "code": 500}})
        if mode in MALFORMED:
            chunks[1] = {"id": "1", "object": "chat.completion.chunk", "choices": [], **MALFORMED[mode]}
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        if mode == "number":
            lines[1] = "data: 5\n\n"
        if mode == "garbage":
            lines[1] = "data: {not json\n\n"
        if mode in ("silent", "cookie", "empty"):
            lines.append("data: [DONE]\n\n")
        for line in lines:
            self.wfile.write((f"{len(line):x}\r\n{line}\r\n" if mode == "broken" else line).encode())

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def faulty_server() -> Iterator[str]:
    """Run the server inside, and yield its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Faulty) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
