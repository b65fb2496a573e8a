"""The ``weightwire`` command: one file per subcommand. Imports neither torch nor engines; those run as subprocesses."""
