"""What a process tells about itself: log lines, metrics, progress. Nothing here may fail a load."""
