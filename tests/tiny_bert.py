"""A BERT of two layers with a vocabulary of its own, and detectors over it."""

import pytest

from tests.helpers import TINY
from tests.test_engine.test_hooks.tiny import CLASSES

WORDS = '[PAD] [UNK] [CLS] [SEP] [MASK] . ? a small large red'.split()
TINY_SWIN = {**TINY, 'out_indices': (1, 2, 3), 'drop_path_rate': 0.0}
# Of a Grounding DINO, what makes it small.
HIDDEN, LAYERS = 256, 1  # the width of text positions is fixed
ATTENTION = dict(embed_dims=HIDDEN, num_heads=4)
FFN = dict(embed_dims=HIDDEN, feedforward_channels=32)
LEVELS = dict(ATTENTION, num_levels=4)
SMALL = dict(
    num_queries=20,
    neck=dict(
        in_channels=[64, 128, 256],
        out_channels=HIDDEN,
        norm_cfg=dict(type='GN', num_groups=8),
    ),
    encoder=dict(
        num_layers=LAYERS,
        num_cp=0,
        layer_cfg=dict(self_attn_cfg=LEVELS, ffn_cfg=FFN),
        text_layer_cfg=dict(self_attn_cfg=ATTENTION, ffn_cfg=FFN),
        fusion_layer_cfg=dict(v_dim=HIDDEN, l_dim=HIDDEN, embed_dim=HIDDEN),
    ),
    decoder=dict(
        num_layers=LAYERS,
        layer_cfg=dict(
            self_attn_cfg=ATTENTION,
            cross_attn_text_cfg=ATTENTION,
            cross_attn_cfg=LEVELS,
            ffn_cfg=FFN,
        ),
    ),
    positional_encoding=dict(num_feats=HIDDEN // 2),
    test_cfg=dict(max_per_img=5),
)


def tiny_bert(folder):
    """Write one; its path. Skips where transformers is not installed."""
    transformers = pytest.importorskip('transformers')
    words = [*WORDS, *CLASSES]
    vocabulary = folder / 'vocab.txt'
    vocabulary.write_text('\n'.join(words))
    transformers.BertTokenizerFast(str(vocabulary)).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = transformers.BertModel(config, add_pooling_layer=False)
    model.save_pretrained(folder)
    return str(folder)
