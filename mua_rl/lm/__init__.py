"""Language models: loading them, letting them write, and measuring held-out accuracy."""
