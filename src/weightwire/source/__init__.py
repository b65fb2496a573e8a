"""The source: describe what is in memory, serve it under leases, keep it unchanged until it is withdrawn."""
