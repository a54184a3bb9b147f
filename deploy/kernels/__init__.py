"""The GPU kernels, in Triton: one op a file. Compiled by `deploy.cubins`, run in tests by Triton's interpreter.

A kernel's pointers come first, then its run-time integers; everything in CAPITALS is a constant that is compiled in.
Activations are f16 or f32, as the pointer says; sums, norms and softmax are f32. Nothing here knows models or devices.
"""
