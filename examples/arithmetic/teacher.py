"""A teacher of arithmetic behind an OpenAI-compatible endpoint, for trying `slm-export reason` without any service.

    python teacher.py problems 2000 > problems.jsonl      writes problems with their answers
    python teacher.py serve --port 8199                   answers them step by step, on this machine alone

It is a program, not a model: what it writes is right, except that every tenth answer of a first sample is wrong on
purpose, so that there is something to reject.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "column-arithmetic"


def problems(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Return different problems: sums and differences of numbers of two and three digits."""
    generator = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        first, second = (generator.randrange(10, 10 ** generator.choice((2, 3, 3))) for _ in range(2))
        sign = generator.choice("+-")
        first, second = (max(first, second), min(first, second)) if sign == "-" else (first, second)
        found[f"{first} {sign} {second} ="] = str(first + second if sign == "+" else first - second)
    return [{"problem": problem, "answer": answer} for problem, answer in found.items()]


def solve(problem: str) -> str:
    """Return the solution by columns, the lowest digit first, with the carry of every step."""
    match = re.search(r"(\d+) ([+-]) (\d+)", problem)
    if not match:
        return "I only know sums and differences.\nAnswer: unknown"
    first, sign, second = int(match[1]), match[2], int(match[3])
    digits = max(len(match[1]), len(match[3]))
    carry, lines = 0, []
    for place in range(digits):
        a, b = (number // 10**place % 10 for number in (first, second))
        value = a + b + carry if sign == "+" else a - b - carry
        digit, carried = value % 10, int(value > 9 or value < 0)
        lines.append(f"{a} {sign} {b} {sign} {carry} : {digit} carry {carried}")
        carry = carried
    answer = first + second if sign == "+" else first - second
    return "\n".join([*lines, f"Answer: {answer}"])


def answer(problem: str, seed: int | None, wrong: bool) -> str:
    """Return a solution; where ``wrong``, every tenth one ends in another number, always the same ones."""
    text = solve(problem)
    chosen = hashlib.sha256(f"{problem}:{seed}".encode()).digest()[0] % 10 == 0
    return (
        re.sub(r"Answer: (\d+)", lambda found: f"Answer: {int(found[1]) + 1}", text)
        if wrong and chosen
        else text
    )


class Handler(BaseHTTPRequestHandler):
    """POST /v1/chat/completions and GET /v1/models, as far as a client that asks one question needs them."""

    protocol_version = "HTTP/1.1"
    wrong = True

    def do_GET(self) -> None:
        """List the one model."""
        self._reply(
            {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "you", "created": 0}]}
        )

    def do_POST(self) -> None:
        """Answer the last message of a chat."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = answer(asked["messages"][-1]["content"], asked.get("seed"), self.wrong)
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        made = {"id": "chat", "object": "chat.completion", "created": 0, "model": MODEL, "choices": [choice]}
        self._reply(made)

    def _reply(self, document: dict[str, object]) -> None:
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing of every request."""


def server(port: int = 0, wrong: bool = True) -> ThreadingHTTPServer:
    """Return a server on the loopback interface; port 0 takes a free one."""
    handler = type("Handler", (Handler,), {"wrong": wrong})
    return ThreadingHTTPServer(("127.0.0.1", port), handler)


def main() -> None:
    """Write problems, or serve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("problems")
    writing.add_argument("count", type=int)
    writing.add_argument("--seed", type=int, default=0)
    serving = commands.add_parser("serve")
    serving.add_argument("--port", type=int, default=8199)
    given = parser.parse_args()
    if given.command == "problems":
        for problem in problems(given.count, given.seed):
            print(json.dumps(problem))
        return
    with server(given.port) as running:
        print(f"http://127.0.0.1:{running.server_address[1]}/v1", flush=True)
        running.serve_forever()


if __name__ == "__main__":
    main()
