"""What the memory-lean configs of single cards have in common.

Names for children, as `_base_.lean`: what they belong to is in the config
that a child has as its other `_base_`.
"""

# Cards of this size are often too old for bfloat16.
lean = dict(
    preset='lean', compute='fp16', trunk_compute='fp16', trunk_weights='fp16'
)
amp = dict(type='AmpOptimWrapper', dtype='float16', loss_scale='dynamic')
