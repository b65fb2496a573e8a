"""Live loading put together: find, pull or fall back to the disk, publish."""
