"""Data sets that the package builds itself."""
