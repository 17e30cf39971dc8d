"""From records on disk to this process's rows of global batch k."""
