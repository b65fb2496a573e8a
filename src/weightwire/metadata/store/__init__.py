"""Where slots are kept."""
