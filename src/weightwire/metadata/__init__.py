"""Where sources are found: client, life cycle, selection, decisions, store and server."""
