"""AWQ on a workstation: a Hugging Face checkpoint and calibration samples in, AutoAWQ checkpoint and report out."""

import os

# Read by OpenMP when torch is loaded, which happens after this. Threads that spin while they wait make the search up to
# twenty times slower on a machine where something else runs too; sleeping ones cost nothing measurable.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
