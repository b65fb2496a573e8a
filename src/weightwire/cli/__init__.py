"""The ``weightwire`` command: one file per subcommand. Imports neither torch nor engines; those run as subprocesses."""

import os

# gRPC's C core writes lines of its own to standard error, before the one line that we say about the same error.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
