"""Trunks spread over two processes, against the same without sharding."""

import copy
import re

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, RUNNERS, DefaultScope
from mmengine.runner import load_checkpoint
from safetensors.torch import load_file
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from e3va_mm.checkpoint import read_adapter
from e3va_mm.engine import launch
from e3va_mm.engine.strategies import E3VAFSDPStrategy
from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.utils.sharding import size_of
from tests.ranks import WORLD, run_ranks
from tests.test_engine.test_hooks.tiny import (
    make_segmentation,
    segmentation_config,
    side_path_config,
)
from tests.trunk_cases import CASES, awake, build_ours, flat, image_for, need

STEPS = 4
HEAD = (
    'decode_head=dict(in_channels=256, in_index=0, dropout_ratio=0.0, '
    "norm_cfg=dict(type='SyncBN')), auxiliary_head=None"
)
MORE = """
# Every parameter that trains has a gradient.
model['backbone']['out_indices'] = (3,)
default_hooks = dict(checkpoint=dict(interval=2))
runner_type = 'FlexibleRunner'
env_cfg = dict()
strategy = dict(type='e3va_mm.E3VAFSDPStrategy')
custom_hooks = [
    dict(type='e3va_mm.TrainableTableHook'),
    dict(type='e3va_mm.AdapterCheckpointHook', by_epoch=False, interval=2,
         save_best='mIoU')]
optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-2),
    clip_grad=dict(max_norm=0.01), accumulative_counts=2)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.5, by_epoch=False, end=3)]
randomness = dict(seed=0)
"""
DDP = dict(
    type='DDPStrategy',
    model_wrapper=dict(
        type='GlooDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,
    ),
)
# Each reads its blocks in another way.
FAMILIES = (
    'vit',
    'sam',
    'swin of mmdet',
    'swin v2',
    'convnext',
    'mit',
)


def runner_of(folder, name, **options):
    config = Config.fromfile(folder / 'experiment.py')
    config.work_dir = str(folder / name)
    config.experiment_name = str(folder / name).replace('/', '_')
    config.launcher = 'pytorch'
    config.train_cfg = dict(
        type='IterBasedTrainLoop', max_iters=STEPS, val_interval=2
    )
    strategy = options.pop('strategy', None)
    if strategy is not None:
        config.strategy = strategy
    config.merge_from_dict(options)
    return RUNNERS.build(config)


def train(folder, name, **options):
    """Train; what is to be known of it afterwards."""
    runner = runner_of(folder, name, **options)
    runner.train()
    inner = runner.model.module
    values = list(inner.backbone.parameters())
    frozen = [p for p in values if not p.requires_grad]
    return dict(
        losses=list(runner.message_hub.get_scalar('train/loss').data[0]),
        norms=list(runner.message_hub.get_scalar('train/grad_norm').data[0]),
        trained={
            key: value.detach().clone()
            for key, value in inner.named_parameters()
            if value.requires_grad
        },
        here=sum(p.nbytes for p in frozen),
        whole=sum(size_of(p) * p.element_size() for p in frozen),
        total=sum(map(size_of, values)),
        state=runner.strategy.model_state_dict(),
        origin=(inner.backbone.trunk_source, inner.backbone.trunk_address),
    )


def run_all(rank, folder):
    lean = {'model.backbone.side_path': dict(preset='lean')}
    found = dict(
        ddp=train(folder, 'ddp', strategy=DDP),
        fsdp=train(folder, 'fsdp'),
        resumed=train(
            folder,
            'resumed',
            load_from=str(folder / 'ddp' / 'iter_2.pth'),
            resume=True,
        ),
        lean=train(folder, 'lean', **lean),
        loaded=train(
            folder,
            'loaded',
            load_from=str(folder / 'lean' / 'adapter_iter_4.safetensors'),
            **{**lean, 'model.backbone.init_cfg': None},
        ),
    )
    refused = runner_of(
        folder,
        'refused',
        load_from=str(folder / 'other.safetensors'),
    )
    found['errors'] = []
    try:
        refused.train()
    except CheckpointError as error:
        found['errors'].append(str(error))
    model = refused.strategy.model
    for attempt in (
        lambda: model.module.load_state_dict(found['fsdp']['state']),
        lambda: copy.deepcopy(model.module),
    ):
        try:
            attempt()
        except (CheckpointError, ConfigError) as error:
            found['errors'].append(str(error))
    torch.save(found, folder / f'{rank}.pt')


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """What each process found, and the folder of the runs."""
    folder = tmp_path_factory.mktemp('runs')
    make_segmentation(folder)
    side_path_config(folder, segmentation_config(folder), HEAD, MORE)
    run_ranks(run_all, folder, folder)
    return [
        torch.load(folder / f'{rank}.pt', weights_only=False)
        for rank in range(WORLD)
    ], folder


def test_it_trains_as_ddp_does(runs):
    for each in runs[0]:
        ddp, fsdp = each['ddp'], each['fsdp']
        assert len(ddp['losses']) == STEPS
        assert fsdp['losses'] == pytest.approx(ddp['losses'], abs=1e-5)
        # Clipping sees all gradients.
        assert fsdp['norms'] == pytest.approx(ddp['norms'], rel=1e-5)
        assert fsdp['trained'].keys() == ddp['trained'].keys()
        for name, value in ddp['trained'].items():
            assert (fsdp['trained'][name] - value).abs().max() < 1e-5, name


def test_each_process_holds_half_of_the_trunk(runs):
    for each in runs[0]:
        assert each['ddp']['here'] == each['ddp']['whole']
        assert each['fsdp']['whole'] == each['ddp']['whole']
        assert each['fsdp']['total'] == each['ddp']['total']
        share = each['fsdp']['here'] / each['fsdp']['whole']
        assert 0.5 <= share < 0.6, share


def test_the_trunk_is_what_it_was(runs):
    found, folder = runs
    source = load_file(folder / 'trunk.safetensors')
    for name in ('fsdp', 'resumed', 'lean', 'loaded'):
        state = found[0][name]['state']
        kept = {k: v for k, v in source.items() if k in state}
        # All but the norms of outputs that are not asked for.
        assert len(kept) == len(source) - 6
        norm = ('backbone.norm3.weight', 'backbone.norm3.bias')
        for key, value in kept.items():
            assert torch.equal(state[key], value) == (key not in norm), key


def test_processes_agree(runs):
    first, second = runs[0]
    for name in ('fsdp', 'resumed', 'lean', 'loaded'):
        for key, value in first[name]['trained'].items():
            assert torch.equal(value, second[name]['trained'][key]), key


def test_it_goes_on_from_a_checkpoint_of_ddp(runs):
    for each in runs[0]:
        # The steps before are in the checkpoint, as the first process had it.
        assert each['resumed']['losses'][2:] == pytest.approx(
            each['ddp']['losses'][2:], abs=1e-5
        )
        for name, value in each['ddp']['trained'].items():
            error = (each['resumed']['trained'][name] - value).abs().max()
            assert error < 1e-5, name


def unsharded(folder, **options):
    config = Config.fromfile(folder / 'experiment.py')
    config.merge_from_dict(options)
    with DefaultScope.overwrite_default_scope('mmseg'):
        return MODELS.build(config.model)


@pytest.mark.parametrize('name', ['fsdp', 'lean'])
@pytest.mark.parametrize('file', ['iter_4.pth', 'adapter_iter_4.safetensors'])
def test_what_is_written_loads_into_an_unsharded_model(runs, name, file):
    found, folder = runs
    model = unsharded(folder)
    load_checkpoint(model, str(folder / name / file))
    state = model.state_dict()
    assert state.keys() == found[0][name]['state'].keys()
    for key, value in found[0][name]['state'].items():
        assert torch.equal(state[key], value), key


def test_adapter_files_are_those_of_ddp(runs):
    _, folder = runs
    files = sorted(path.name for path in (folder / 'ddp').glob('adapter_*'))
    assert [name[:12] for name in files] == [
        'adapter_best',
        'adapter_iter',
        'adapter_iter',
    ]
    for name in files:
        ours, theirs = (
            read_adapter(folder / run / name) for run in ('fsdp', 'ddp')
        )
        assert ours.trunks == theirs.trunks
        assert ours.trainable == theirs.trainable
        for key, value in theirs.tensors.items():
            error = (ours.tensors[key].float() - value.float()).abs().max()
            assert error < 1e-5, key


def test_checkpoints_resume_without_sharding(runs):
    """The state of the optimizer too: in the same order."""
    _, folder = runs
    ours, theirs = (
        torch.load(folder / name / 'iter_4.pth', weights_only=False)
        for name in ('fsdp', 'ddp')
    )
    assert ours.keys() == theirs.keys()
    ours, theirs = ours['optimizer'], theirs['optimizer']
    assert ours['param_groups'] == theirs['param_groups']
    assert ours['state'].keys() == theirs['state'].keys()
    for index, values in theirs['state'].items():
        for key, value in values.items():
            found = ours['state'][index][key]
            assert torch.allclose(found, value, atol=1e-5), (index, key)


def test_an_adapter_file_brings_its_trunk(runs):
    found, folder = runs
    for each in found:
        assert each['loaded']['origin'][1] == str(folder / 'trunk.safetensors')
    # What it had learned is there too.
    first, *_, last = found[0]['lean']['losses']
    assert found[0]['loaded']['losses'][0] < (first + last) / 2


def test_the_table_counts_what_all_hold(runs):
    _, folder = runs
    tables = []
    for name in ('fsdp', 'ddp'):
        (log,) = (folder / name).rglob('*.log')
        text = log.read_text()
        (table,) = re.findall(
            r'Trainable parameters\n.+\nTrainable in the model.+?\n',
            text,
            re.DOTALL,
        )
        tables.append(table)
    assert tables[0] == tables[1]
    assert '(trunk)' in tables[0]


def test_what_cannot_work_is_refused_by_every_process(runs):
    for each in runs[0]:
        misfit, state, copied = each['errors']
        assert 'other.safetensors' in misfit
        assert 'set `load_from` or `resume` in the config.' in state
        assert 'cannot be copied, as the EMAHook does.' in copied


def through(rank, folder):
    found = {}
    for name in FAMILIES:
        if not has_package(name):
            continue
        torch.manual_seed(0)
        backbone = awake(build_ours(name)).train()
        image = image_for(name, 1)
        expected = outputs_and_gradients(backbone, backbone, image)
        backbone.zero_grad()
        strategy = E3VAFSDPStrategy(
            work_dir=str(folder),
            experiment_name=name,
            env_kwargs=dict(launcher='pytorch', randomness=dict(seed=0)),
        )
        strategy.prepare(
            backbone, dispatch_kwargs=dict(init_weights_for_test_or_val=False)
        )
        model = strategy.model.train()
        got = outputs_and_gradients(model, model.module, image)
        frozen = [p for p in model.parameters() if not p.requires_grad]
        here = sum(p.numel() for p in frozen) / sum(map(size_of, frozen))
        units = [u for u in FSDP.fsdp_modules(model) if u is not model]
        gathered = sum(
            unit._handle.flat_param._full_param_padded.untyped_storage().size()
            for unit in units
        )
        found[name] = dict(
            expected=expected,
            got=got,
            here=here,
            units=len(units),
            gathered=gathered,
        )
    torch.save(found, folder / f'families_{rank}.pt')


def has_package(name):
    try:
        need(CASES[name])
    except pytest.skip.Exception:
        return False
    return True


def outputs_and_gradients(model, backbone, image):
    outputs = flat(model(image))
    sum(
        output.square().mean() * (1 + i) for i, output in enumerate(outputs)
    ).backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in backbone.named_parameters()
        if parameter.requires_grad
    }
    return [output.detach() for output in outputs], gradients


def test_trunks_of_every_kind(tmp_path):
    run_ranks(through, tmp_path, tmp_path)
    for rank in range(WORLD):
        found = torch.load(tmp_path / f'families_{rank}.pt')
        assert 'swin of mmdet' in found
        for name, each in found.items():
            assert each['here'] < 0.75, name
            # Blocks are whole while they run, no longer.
            assert each['units'] and not each['gathered'], name
            (maps, gradients), (got_maps, got) = each['expected'], each['got']
            for value, other in zip(maps, got_maps, strict=True):
                assert torch.allclose(value, other, atol=1e-6), name
            for key, value in gradients.items():
                assert torch.allclose(value, got[key], atol=1e-6), (name, key)


def test_one_process_is_not_sharded(tmp_path, monkeypatch):
    """The tools run such a config on one device as well."""
    make_segmentation(tmp_path)
    ema = "custom_hooks += [dict(type='e3va_mm.TrainableEMAHook')]"
    base = segmentation_config(tmp_path)
    side_path_config(tmp_path, base, HEAD, MORE + ema)
    monkeypatch.setenv('LOCAL_RANK', '0')
    config = str(tmp_path / 'experiment.py')
    assert launch.train([config]) == 0
    work = tmp_path / 'work'
    more = ['--cfg-options', 'train_cfg.max_iters=4']
    assert launch.train([config, '--resume', *more]) == 0
    saved = torch.load(work / 'iter_4.pth', weights_only=False)
    assert saved['ema_state_dict']['steps'] == 4
    for name in ('iter_4.pth', 'adapter_iter_4.safetensors'):
        file = str(work / name)
        assert launch.test([config, file]) == 0


@pytest.mark.parametrize(
    'options, expected',
    [
        (dict(skip_init_weights=True), '`strategy.skip_init_weights` is no'),
        (dict(state_dict_cfg='local'), 'checkpoints are those of one process'),
        (dict(activation_checkpointing={}), 'e3va_mm.ActivationCheckpointHo'),
        (
            dict(model_wrapper=dict(mixed_precision={})),
            'may hold backward_prefetch, forward_prefetch, limit_all_gathers,'
            ' but got mixed_precision. For mixed precision use',
        ),
    ],
)
def test_options_that_cannot_work(options, expected):
    with pytest.raises(ConfigError) as error:
        E3VAFSDPStrategy(**options)
    assert expected in str(error.value)


def test_eight_bits_cannot_be_spread():
    backbone = build_ours('swin of mmdet')
    backbone.trunk.options = backbone.trunk.options._replace(weights='int8')
    with pytest.raises(ConfigError, match="`trunk_weights='bf16'`, or train"):
        backbone.make_shardable()


def test_a_trunk_that_tasks_share_cannot_be_spread(monkeypatch):
    strategy = E3VAFSDPStrategy()
    monkeypatch.setattr(E3VAFSDPStrategy, 'world_size', 2)
    monkeypatch.setattr(
        'e3va_mm.engine.strategies.e3va_fsdp_strategy.is_distributed',
        lambda: True,
    )
    tasks = torch.nn.ModuleList(build_ours('convnext') for _ in range(2))
    tasks[1].share_trunk(tasks[0])
    with pytest.raises(ConfigError, match='a trunk that several tasks share'):
        strategy._wrap_model(tasks)
