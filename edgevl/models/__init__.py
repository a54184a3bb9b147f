"""The model family, written once against `edgevl.ops`."""
