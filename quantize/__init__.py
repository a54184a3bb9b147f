"""AWQ on a workstation: a Hugging Face checkpoint and calibration samples in, AutoAWQ checkpoint and report out."""
