"""Backends: each runs the recorded or eager model on one kind of hardware."""
