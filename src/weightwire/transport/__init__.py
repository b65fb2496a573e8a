"""How bytes travel: one narrow seam (``base``), one module a backend."""
