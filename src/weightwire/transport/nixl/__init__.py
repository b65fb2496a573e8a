"""NIXL: RDMA, NVLink, EFA and same-host memory through one-sided reads.

The package ``nixl`` is imported here alone, and only when a transport is made.
"""

from weightwire.transport.nixl.transport import NixlTransport

__all__ = ["NixlTransport"]
