"""Where policies act: verifiable text tasks and control tasks with a shift."""
