"""A source process, driven by lines on stdin: ``deregister SECONDS``, ``fill BYTE``, ``close``; a JSON line answers."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time

from transport.peers import LEASE, Gate, pattern, space


def main(factory: str, nbytes: int, pieces: int) -> None:
    module, function = factory.split(":")
    gate = Gate()
    transport = getattr(importlib.import_module(module), function)(gate)
    memory, parts = space(pattern(nbytes), pieces)
    registration = gate.registration = transport.register(memory)
    say(endpoint=transport.describe(registration, LEASE).hex())
    for line in sys.stdin:
        command, *arguments = line.split()
        began = time.monotonic()
        if command == "deregister":
            transport.deregister(registration, time.monotonic() + float(arguments[0]))
        elif command == "fill":
            for part in parts:
                part[:] = int(arguments[0])
        elif command == "close":
            transport.close()
        say(seconds=time.monotonic() - began)
    os._exit(0)  # a process that made a NIXL agent must leave this way


def say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
