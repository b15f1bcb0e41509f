"""What is installed, what cannot work together, and what mends it.

`python -m e3va_mm.doctor` needs nothing but the standard library.
"""
