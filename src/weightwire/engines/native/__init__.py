"""The native runtime as an engine: replicas that serve as demo, as test bed, and where no other engine is installed."""
