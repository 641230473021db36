"""One run: its folder, its arguments, its processes, and what comes of it."""
