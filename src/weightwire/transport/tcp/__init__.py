"""Plain sockets, straight between the wire and tensor memory."""

from weightwire.transport.tcp.settings import TcpSettings
from weightwire.transport.tcp.transport import STREAMS, TcpTransport

__all__ = ["STREAMS", "TcpSettings", "TcpTransport"]
