"""Made by ``tools/gen_proto.py`` from ``proto/``; only ``weightwire.wire`` imports it."""
