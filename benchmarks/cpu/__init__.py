"""edgevl beside the other runtimes of this processor."""
