"""Verifiable rewards for math and code."""
