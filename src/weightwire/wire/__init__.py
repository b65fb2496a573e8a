"""Messages, their encoding, and everything that touches gRPC."""
