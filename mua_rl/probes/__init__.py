"""Measurements on a model itself: feature updates, movement of the policy."""
