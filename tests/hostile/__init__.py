"""Programs that try to pass without solving anything, or to harm the machine."""
