"""The frozen trunk spread over the cards of a job, by FSDP.

Another `_base_` of any config beside its own: nothing else changes, and
checkpoints are those of the same config without. For trunks that one card has
no room for; where it has, DDP (without this file) is faster.
"""
runner_type = 'FlexibleRunner'
strategy = dict(type='e3va_mm.E3VAFSDPStrategy')
# Tests bring the trunk by the checkpoint, as without.
init_weights_for_test_or_val = False
