"""Serve sentence similarities of a MiniLM mixture of experts from an ONNX file: no torch and no moeify in this process.

python samples/serve_minilm.py              # export if need be, serve, ask a few questions, stop
python samples/serve_minilm.py --port 8080  # go on serving: POST /similarity {"a": "...", "b": "..."}
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy
import onnxruntime
from pretrained import OUT, minilm
from tokenizers import Tokenizer

DENSE, MOE, ONNX = OUT / "all-MiniLM-L6-v2", OUT / "minilm-moe.pt2", OUT / "minilm-moe.onnx"
PAIRS = [
    ("A man is playing a guitar on stage.", "Someone performs music with a guitar."),
    ("A man is playing a guitar on stage.", "The stock market fell sharply on Monday."),
    ("The cat sleeps on the warm windowsill.", "A kitten naps in the sun."),
]


class Encoder:
    """Sentences to unit vectors, as the model's card prescribes: the mean of the last hidden states of the tokens."""

    def __init__(self, model: Path, tokenizer: Path, kernels: str | None) -> None:
        options = onnxruntime.SessionOptions()
        if kernels:  # without them the standard operators in the file run
            options.register_custom_ops_library(kernels)
        self.session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self.tokenizer = Tokenizer.from_file(str(tokenizer))
        self.tokenizer.enable_padding()
        self.tokenizer.enable_truncation(256)

    def __call__(self, sentences: list[str]) -> numpy.ndarray:
        tokens = self.tokenizer.encode_batch(sentences)
        ids, mask = (numpy.array([getattr(t, name) for t in tokens]) for name in ("ids", "attention_mask"))
        hidden = self.session.run(["last_hidden_state"], {"input_ids": ids, "attention_mask": mask})[0]
        mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)
        return mean / numpy.linalg.norm(mean, axis=1, keepdims=True)


def handler(encoder: Encoder) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                a, b = encoder([question["a"], question["b"]])
                status, answer = 200, {"similarity": round(float(a @ b), 6)}
            except (KeyError, TypeError, ValueError) as error:
                status, answer = 400, {"error": f'send {{"a": "...", "b": "..."}}: {error}'}
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return None

    return Handler


MOEIFY = str(Path(sys.executable).with_name("moeify"))


def kernels() -> str | None:
    """The path of moeify's kernel library, None where it is not built: one file, which can be copied to a server."""
    found = subprocess.run([MOEIFY, "build-kernels", "--print-path"], capture_output=True, text=True)
    return found.stdout.strip() or None


def export() -> None:
    """``moeify convert`` and ``moeify export`` in processes of their own."""
    if not DENSE.exists():
        OUT.mkdir(exist_ok=True)
        DENSE.symlink_to(minilm())
    commands = [
        ["convert", str(DENSE), "--experts", "8", "--top-k", "2", "-o", str(MOE)],
        ["export", str(MOE), "--to", "onnxruntime", "--target", "cpu", "-o", str(ONNX)],
    ]
    for command, made in zip(commands, (MOE, ONNX)):
        if made.exists():
            continue
        print(f"$ moeify {' '.join(command)}\n", flush=True)
        subprocess.run([MOEIFY, *command], check=True)
        print(flush=True)


def ask(port: int, a: str, b: str) -> float:
    body = json.dumps({"a": a, "b": b}).encode()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/similarity", body) as answer:
        return json.load(answer)["similarity"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, help="go on serving on this port")
    port = parser.parse_args().port
    export()
    encoder = Encoder(ONNX, DENSE / "tokenizer.json", kernels())
    server = ThreadingHTTPServer(("127.0.0.1", port or 0), handler(encoder))
    here = server.server_address[1]
    print(f"serving {ONNX.name} at http://127.0.0.1:{here}/similarity", flush=True)
    if port:
        server.serve_forever()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for a, b in PAIRS:
        print(f"{ask(here, a, b):8.4f}  {a} | {b}")
    server.shutdown()
    loaded = [name for name in ("torch", "moeify", "transformers") if name in sys.modules]
    print(f"imported here: {', '.join(loaded) or 'no torch, no transformers, no moeify'}")
    if loaded:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
