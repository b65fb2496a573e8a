"""Child process: publishes an Encoder and serves it until a line arrives on standard input."""

from __future__ import annotations

import sys

import torch
from vision import Encoder, identity

import weightwire


def main() -> None:
    torch.set_num_threads(1)
    url, seed, revision = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    module = Encoder(8, seed)
    with weightwire.publish(module, identity(revision or None), url=url) as published:
        print("ready", published.report.content_id, published.report.weights_id, flush=True)
        sys.stdin.readline()


main()
