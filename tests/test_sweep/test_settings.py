import pytest
from mmengine.config import Config

from e3va_mm.errors import ConfigError
from e3va_mm.sweep import check_together, setting_config, settings_of
from e3va_mm.sweep.records import SweepRecords

LR = 'optim_wrapper.optimizer.lr'
CONFIG = dict(
    model=dict(backbone=dict(tuner=dict(rank=16)), data_preprocessor=dict()),
    train_dataloader=dict(batch_size=2),
    train_cfg=dict(by_epoch=True, max_epochs=1),
    optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1.0)),
)


def changed(**options):
    config = Config(CONFIG)
    config.merge_from_dict(options)
    return config


def test_all_combinations_are_runs():
    options = {LR: [1e-3, 2e-3], 'model.backbone.tuner.rank': [8, [4, 8]]}
    found = settings_of(options, [0, 1])
    assert len({each.name for each in found}) == 8
    assert found[-1].name == 'lr=0.002_rank=-4-8-_seed=1'
    config = setting_config(Config(CONFIG), found[-1])
    assert config.optim_wrapper.optimizer == dict(type='AdamW', lr=2e-3)
    assert config.model.backbone.tuner.rank == [4, 8]
    assert config.randomness.seed == 1


def test_tuples_are_found_again(tmp_path):
    found = settings_of({'optim_wrapper.betas': [(0.9, 0.99)]}, [0])
    for _ in range(2):
        records = SweepRecords(tmp_path, dict(metric=None))
        assert records.plan(found) == found


def test_names_tell_options_apart():
    (found,) = settings_of({'model.a.rank': 1, 'model.b.rank': 2}, [0])
    assert found.name == 'a.rank=1_b.rank=2_seed=0'


@pytest.mark.parametrize(
    'options, text',
    [
        ({LR: [1.0, 1.0]}, 'two are lr=1.0_seed=0'),
        ({'optimiser.lr': [1.0]}, 'there is no optimiser; it has model'),
        ({'randomness.seed': [1]}, 'give seeds by --seeds'),
    ],
)
def test_wrong_options_are_refused(options, text):
    config = Config(dict(CONFIG, randomness=dict(seed=0)))
    with pytest.raises(ConfigError, match=text):
        for setting in settings_of(options, [0]):
            setting_config(config, setting)


@pytest.mark.parametrize(
    'options, text',
    [
        ({'train_dataloader.batch_size': 4}, 'the same `train_dataloader`'),
        ({'train_cfg.max_epochs': 4}, 'the same `train_cfg`'),
        ({'model.data_preprocessor.mean': 1}, '`model.data_preprocessor`'),
        ({'optim_wrapper.type': 'AmpOptimWrapper'}, '`optim_wrapper.type`'),
        ({'custom_hooks': [dict(type='e3va_mm.MeasureHook')]}, 'would meas'),
        ({'custom_hooks': [dict(type='e3va_mm.ExactResumeHook')]}, 'loader'),
        ({'custom_hooks': [dict(type='e3va_mm.TrunkCacheHook')]}, 'reads'),
        ({'runner_type': 'FlexibleRunner'}, '`runner_type` is set'),
        ({'launcher': 'pytorch'}, '`launcher` is pytorch'),
    ],
)
def test_what_cannot_be_one_of_several_is_refused(options, text):
    configs = dict(a=changed(), b=changed(**options))
    with pytest.raises(ConfigError, match=text):
        check_together(configs)


def test_runs_may_differ_in_what_is_their_own():
    own = {LR: 2.0, 'model.backbone.tuner.rank': 8, 'randomness': dict(seed=1)}
    check_together(dict(a=changed(), b=changed(**own)))
