"""Training of the demo's eyes: `python -m training`. Not part of the installed package; see training/README.md."""
