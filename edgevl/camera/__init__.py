"""Captioning live sources for months: capture, change gate, journal lines, health. Called by `edgevl caption`."""
