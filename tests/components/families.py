"""Every family of transformers' text, image and audio classifiers, built small.

``python -m tests.components.families`` sweeps all of them and writes what it saw, with the
version of transformers, to families.json beside this file.
"""

import copy
import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from skperf import ComponentAttributor, from_module

RECORD = Path(__file__).with_name("families.json")
N_ROWS, N_MASKS = 4, 6
TASKS = {
    "text": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "audio": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
}
# fmt: off
# ruff: noqa: E501
_32 = ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "embedding_size",
       "moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size",
       "image_size")
_2 = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers",
      "decoder_layers", "num_key_value_heads", "num_experts_per_tok")
_4 = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
      "decoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts")
_64 = ("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "hidden_dim",
       "ffn_dim", "max_position_embeddings", "n_positions", "ffn_hidden_size")
_8 = ("d_kv", "head_dim", "patch_size")
_16 = ("projection_dim", "num_mel_bins", "max_source_positions", "classifier_proj_size")
SMALL = {
    **dict.fromkeys(_32, 32), **dict.fromkeys(_2, 2), **dict.fromkeys(_4, 4),
    **dict.fromkeys(_64, 64), **dict.fromkeys(_8, 8), **dict.fromkeys(_16, 16),
    "vocab_size": 100, "num_labels": 3, "pad_token_id": 0, "dropout": 0.0,
}
MLA = {'num_key_value_heads': 4, 'qk_nope_head_dim': 8, 'qk_rope_head_dim': 8, 'v_head_dim': 8, 'q_lora_rank': 16, 'kv_lora_rank': 16, 'head_dim': 8, 'n_group': 1, 'topk_group': 1}
SWIN = {'embed_dim': 16, 'hidden_size': None, 'depths': [1, 1], 'num_heads': [2, 4], 'image_size': 32, 'patch_size': 2, 'window_size': 4, 'num_layers': None, 'num_hidden_layers': None}
CONVNEXT = {'hidden_sizes': [8, 16, 24, 32], 'depths': [1, 1, 1, 1], 'num_hidden_layers': None, 'patch_size': None}
AUDIO = {'conv_dim': [16, 16], 'conv_kernel': [4, 4], 'conv_stride': [4, 4], 'num_feat_extract_layers': 2}
# what a family needs beside SMALL; None leaves an option of SMALL at its default
OWN = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "minicpm3"), MLA),
    **dict.fromkeys(("swin", "swinv2", "donut-swin"), SWIN),
    **dict.fromkeys(("hubert", "data2vec-audio", "unispeech", "unispeech-sat", "wav2vec2"), AUDIO),
    **dict.fromkeys(("wav2vec2-conformer", "wavlm", "sew", "sew-d"), AUDIO),
    'bit': {'hidden_sizes': [8, 16], 'depths': [1, 1], 'embedding_size': 8, 'num_groups': 4},
    **dict.fromkeys(('convnext', 'convnextv2'), CONVNEXT),
    **{key: {'eos_token_id': 2} for key in ('stablelm', 'ultrabert')},
    'efficientnet': {'hidden_dim': 320, 'width_coefficient': 0.25, 'num_hidden_layers': None},
    'PerceiverForImageClassificationFourier': {'num_self_attention_heads': 1, 'num_cross_attention_heads': 3},
    'ctrl': {'dff': 64},
    'esmc': {'num_key_value_heads': 4},
    'focalnet': {'embed_dim': 16, 'depths': [1, 1], 'hidden_sizes': [16, 32], 'focal_levels': [2, 2], 'focal_windows': [3, 3]},
    'funnel': {'block_sizes': [1, 1], 'd_model': 32, 'n_head': 4, 'd_head': 8, 'd_inner': 64, 'num_hidden_layers': None, 'num_decoder_layers': 1},
    'gpt_neo': {'attention_types': [[['global', 'local'], 1]]},
    'gptj': {'rotary_dim': 4},
    'hgnet_v2': {'stem_channels': [3, 8, 16], 'stage_in_channels': [16, 16], 'stage_mid_channels': [8, 8], 'stage_out_channels': [16, 32], 'stage_num_blocks': [1, 1], 'stage_downsample': [False, True], 'stage_light_block': [False, False], 'stage_kernel_size': [3, 3], 'stage_numb_of_layers': [2, 2], 'hidden_sizes': [16, 32], 'depths': [1, 1], 'embedding_size': 16},
    'hiera': {'embed_dim': 16, 'depths': [1, 1], 'num_heads': [1, 2], 'image_size': [32, 32], 'patch_kernel': [7, 7], 'patch_stride': [4, 4], 'masked_unit_size': [4, 4], 'num_query_pool': 1, 'embed_dim_multiplier': 2.0},
    'imagegpt': {'vocab_size': 100, 'image_size': 8},
    'jamba': {'attn_layer_period': 2, 'attn_layer_offset': 1, 'expert_layer_period': 2, 'expert_layer_offset': 1},
    'layoutlmv3': {'coordinate_size': 6, 'shape_size': 4, 'visual_embed': False},
    'levit': {'hidden_sizes': [16, 24, 32], 'num_attention_heads': [2, 3, 4], 'key_dim': [8, 8, 8], 'depths': [1, 1, 1], 'image_size': 64, 'patch_size': None},
    'lilt': {'hidden_size': 48},
    'longformer': {'attention_window': 4},
    'luke': {'entity_vocab_size': 10, 'entity_emb_size': 8},
    'mobilebert': {'true_hidden_size': 16, 'intra_bottleneck_size': 16},
    'mobilenet_v1': {'depth_multiplier': 0.25, 'min_depth': 8},
    'mobilenet_v2': {'depth_multiplier': 0.25, 'min_depth': 8},
    'mobilevit': {'image_size': 64, 'patch_size': 2, 'hidden_sizes': [16, 24, 32], 'neck_hidden_sizes': [8, 8, 8, 8, 8, 8, 16]},
    'mobilevitv2': {'image_size': 64, 'patch_size': 2, 'base_attn_unit_dims': [16, 16, 16], 'n_attn_blocks': [1, 1, 1]},
    'mt5': {'decoder_start_token_id': 0},
    'perceiver': {'d_latents': 16, 'num_latents': 4, 'd_model': 32, 'num_blocks': 1, 'num_self_attends_per_block': 1, 'num_self_attention_heads': 2, 'num_cross_attention_heads': 2, 'image_size': 16, 'max_position_embeddings': 12},
    'poolformer': {'hidden_sizes': [8, 16], 'depths': [1, 1], 'patch_sizes': [7, 3], 'strides': [4, 2], 'padding': [2, 1], 'num_encoder_blocks': 2},
    'pvt_v2': {'hidden_sizes': [8, 16], 'depths': [1, 1], 'num_attention_heads': [1, 2], 'sr_ratios': [4, 2], 'num_encoder_blocks': 2, 'patch_sizes': [7, 3], 'strides': [4, 2], 'mlp_ratios': [2, 2], 'image_size': 32},
    'qwen3_5_text': {'layer_types': ['linear_attention', 'full_attention']},
    'qwen3_next': {'layer_types': ['linear_attention', 'full_attention']},
    'reformer': {'axial_pos_embds': False, 'attn_layers': ['local', 'lsh'], 'attention_head_size': 8, 'lsh_attn_chunk_length': 4, 'local_attn_chunk_length': 4, 'num_buckets': 2, 'hash_seed': 0},
    'regnet': {'hidden_sizes': [8, 16], 'depths': [1, 1], 'embedding_size': 8, 'groups_width': 4},
    'resnet': {'hidden_sizes': [8, 16], 'depths': [1, 1], 'embedding_size': 8},
    'roc_bert': {'pronunciation_vocab_size': 20, 'shape_vocab_size': 20, 'pronunciation_embed_dim': 8, 'shape_embed_dim': 8},
    'segformer': {'hidden_sizes': [8, 16], 'depths': [1, 1], 'num_attention_heads': [1, 2], 'sr_ratios': [4, 2], 'num_encoder_blocks': 2, 'patch_sizes': [7, 3], 'strides': [4, 2], 'mlp_ratios': [2, 2]},
    'swiftformer': {'embed_dims': [8, 16, 24, 32], 'depths': [1, 1, 1, 1], 'image_size': 64},
    't5': {'decoder_start_token_id': 0},
    'textnet': {'hidden_sizes': [8, 8, 8, 8, 8], 'stem_out_channels': 8, 'conv_layer_kernel_sizes': [[[3, 3]], [[3, 3]], [[3, 3]], [[3, 3]]], 'conv_layer_strides': [[2], [2], [2], [2]], 'image_size': [32, 32]},
    'umt5': {'decoder_start_token_id': 0},
    'xlnet': {'d_inner': 64},
    'xmod': {'default_language': 'en_XX'},
}
# fmt: on
# where an output projection stands, from the module that attends: the test's own knowledge
PROJECTIONS = (
    "o_proj",
    "out_proj",
    "c_proj",
    "dense",
    "o",
    "wo",
    "out_lin",
    "proj",
    "to_out",
    "fc_out",
    "linear_out",
    "o_linear",
    "attn_out",
    "Wo",
    "resid_proj",
    "output.dense",
    "../output.dense",
    "../out_proj",
    "../self_output.dense",
    "../dense",
    "../o_proj",
    "../output.attn",
    "../wo",
    "../proj",
    "../self.output.dense",
    "../projection.2",
    "../projection",
)  # fmt: skip


def families():
    """Names of all families: (task, model type, class)."""
    for task, mapping in TASKS.items():
        for kind, classes in mapping.items():
            for name in classes if isinstance(classes, tuple) else (classes,):
                yield task, kind, name


def build(kind, name):
    """A small model with random weights, all of them different from zero."""
    config_class = CONFIG_MAPPING[kind]
    default = config_class()
    options = _shrunk(default, set(getattr(config_class, "attribute_map", {})))
    for part in getattr(config_class, "sub_configs", None) or {}:
        sub = getattr(default, part, None)
        if sub is not None:
            options[part] = {**_shrunk(sub, set()), "model_type": getattr(sub, "model_type", "")}
    options.update({"num_labels": 3, **OWN.get(kind, {}), **OWN.get(name, {})})
    options = {key: value for key, value in options.items() if value is not None}
    torch.manual_seed(0)
    model = getattr(transformers, name)(config_class(**options)).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        # initial weights of .02 would leave next to nothing to be ablated
        parameter.data.add_(0.1 * noise / max(parameter.shape[-1:] or [1]) ** 0.25)
    return model


def _shrunk(config, others):
    known = set(config.to_dict()) | others
    return {
        key: value
        for key, value in SMALL.items()
        if key in known and not isinstance(getattr(config, key, None), list | tuple | dict)
    }


def rows(task, model):
    """Random inputs of a model: (N_ROWS, ...)."""
    rng, config = np.random.default_rng(0), model.config
    if task == "text" or config.model_type == "imagegpt":
        X = rng.integers(3, 90, (N_ROWS, 12))
        end = getattr(config, "eos_token_id", None)
        if isinstance(end, int) and end < 90:
            X[:, -1] = end
        return X
    if task == "image":
        size = getattr(config, "image_size", 32)
        size = size if isinstance(size, int) else size[0]
        shape = (getattr(config, "num_channels", 3), size, size)
    elif type(model).__name__.startswith("AST"):
        shape = (config.max_length, config.num_mel_bins)
    elif type(model).__name__.startswith("Whisper"):
        shape = (config.num_mel_bins, 32)
    elif model.main_input_name == "input_features":
        shape = (20, getattr(config, "feature_projection_input_dim", 160))
    else:
        shape = (1600,)
    return rng.normal(size=(N_ROWS, *shape)).astype(np.float32)


def projection_of(model, module):
    """The layer that takes the heads of an attending module, by the names people give it."""
    for path in PROJECTIONS:
        start = module
        while path.startswith("../"):
            start, path = start.rpartition(".")[0], path[3:]
        try:
            part = model.get_submodule(f"{start}.{path}" if start else path)
        except AttributeError:
            continue
        if getattr(part, "weight", None) is not None and part.weight.ndim == 2:
            return part
    return None


def ablated(model, components, mask):
    """A copy with weights zeroed; None where the test does not know which."""
    own = copy.deepcopy(model)
    heads = {}
    for component in components:
        if component.kind == "attention_head":
            heads[component.module] = max(heads.get(component.module, 0), component.unit + 1)
    with torch.no_grad():
        for component, kept in zip(components, mask, strict=True):
            if kept:
                continue
            part = own.get_submodule(component.module)
            if component.kind == "attention_head":
                part = projection_of(own, component.module)
                if part is None:
                    return None
                columns = part.weight if isinstance(part, nn.Linear) else part.weight.T
                # the other half of ConvBERT's columns are convolutions
                half = 2 if model.config.model_type == "convbert" else 1
                width = columns.shape[1] // heads[component.module] // half
                columns[:, component.unit * width : (component.unit + 1) * width] = 0
            elif component.kind == "expert":
                for parameter in part.parameters(recurse=False):
                    if parameter.ndim == 3:
                        parameter[component.unit] = 0
            elif isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d):
                part.weight[component.unit] = 0
            else:
                part.weight[:, component.unit] = 0
    return own


def sweep(task, kind, name):
    """Hold counterfactuals against ablation by hand; say what "auto" took."""
    model = build(kind, name)
    X = rows(task, model)
    n_classes = model.config.num_labels
    classifier = from_module(model, np.arange(n_classes))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attributor = ComponentAttributor(
            classifier, output="logit", method="regression", budget=4, random_state=0
        ).fit(X, np.arange(N_ROWS) % n_classes)
    components = list(attributor.components_)
    rng = np.random.default_rng(2)
    masks = rng.random((N_MASKS, len(components))) > max(0.1, 2 / len(components))
    actual = attributor.counterfactual(masks)
    expected, known = np.full(actual.shape, np.nan), 0
    for i, mask in enumerate(masks):
        own = ablated(model, components, mask)
        if own is not None:
            known += 1
            with torch.no_grad():
                logits = own(torch.as_tensor(X))
            logits = logits[0]
            expected[:, i] = logits[range(N_ROWS), np.arange(N_ROWS) % n_classes].numpy()
    scale = max(1.0, float(np.abs(actual).max()))
    return {
        "kinds": attributor.coverage_["kinds"],
        "verified": float(attributor.verified_) / scale,
        "path": attributor.path_,
        "by_hand": known,
        "error": float(np.nanmax(np.abs(actual - expected))) / scale if known else None,
        "effect": float(np.ptp(actual, 1).max()) / scale,
        "warned": [str(w.message)[:200] for w in caught if "components='auto'" in str(w.message)],
    }


def main():
    wanted, record = sys.argv[1:], {}
    for task, kind, name in families():
        if wanted and kind not in wanted:
            continue
        start = time.perf_counter()
        try:
            record[name] = {"task": task, "family": kind, **sweep(task, kind, name)}
        except Exception as error:  # whatever refuses is listed with what it says
            said = f"{type(error).__name__}: {error}".replace("\n", " ")[:200]
            record[name] = {"task": task, "family": kind, "refused": said}
        print(name, record[name], f"{time.perf_counter() - start:.1f} s", flush=True)
    if not wanted:
        table = {"transformers": transformers.__version__, "torch": torch.__version__}
        RECORD.write_text(json.dumps({**table, "models": record}, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    main()
