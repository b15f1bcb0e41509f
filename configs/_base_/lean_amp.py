"""What the configs for single cards of 6 to 11 GB share.

Child configs use it as `_base_.lean` and `_base_.amp`.
"""

# Many cards of this size have no bfloat16.
lean = dict(
    preset='lean', compute='fp16', trunk_compute='fp16', trunk_weights='fp16'
)
amp = dict(type='AmpOptimWrapper', dtype='float16', loss_scale='dynamic')
