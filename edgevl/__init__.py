"""edgevl: a document-reading vision-language model on small machines.

Importing this package loads nothing heavy; each verb of the command line loads what it needs.
"""

__version__ = "0.1.0"
