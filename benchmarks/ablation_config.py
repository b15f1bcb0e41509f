"""The comparison's detector, with the candidates of an ablation.

Run: python benchmarks/ablation.py
"""

_base_ = '../configs/comparison/cascade_swin_nano_digits.py'
custom_imports = dict(imports=['benchmarks.candidates'])
