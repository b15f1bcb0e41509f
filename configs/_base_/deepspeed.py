"""What training adds to the weights, spread over the cards by DeepSpeed.

ZeRO of stage 2: gradients and the optimizer's state. A name for children, as
`_base_.deepspeed`: what `optim_wrapper` needs beside its optimizer. Clipping
is `strategy.gradient_clipping`.
"""
runner_type = 'FlexibleRunner'
strategy = dict(
    type='e3va_mm.E3VADeepSpeedStrategy', zero_optimization=dict(stage=2))
deepspeed = dict(type='DeepSpeedOptimWrapper')
