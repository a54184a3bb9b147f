"""Int4 quantizers side by side: same model, same calibration tokens, same bits, one evaluator.

`peers` is the table of tools and how each is installed, `runners/` one script for each, run in the tool's own virtual
environment; `model` prepares what they are given, `__main__` runs and compares.
"""
