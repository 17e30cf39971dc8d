"""Reads datasets: from records on a disk to this process's rows of a global batch."""
