"""Transformers: one tiny network per model type, built from a config alone, with its head and with example inputs.

Nothing is downloaded. ``networks()`` is read by ``examples/coverage.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from torch import Tensor, nn

Inputs = dict[str, Any]

WORDS = 40
SPECIAL: dict[str, Any] = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
STACK: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
}  # fmt: skip
TEXT: dict[str, Any] = SPECIAL | STACK | {"max_position_embeddings": 32}
GPT: dict[str, Any] = SPECIAL | {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "n_inner": 24}
GROUPED: dict[str, Any] = TEXT | {"num_key_value_heads": 2}
WIDE: dict[str, Any] = GROUPED | {"head_dim": 8}
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_top_k": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": 8,
    "first_k_dense_replace": 0,
}  # fmt: skip
IMAGE: dict[str, Any] = STACK | {"image_size": 16, "patch_size": 4}
PAIR: dict[str, Any] = SPECIAL | {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
    "decoder_start_token_id": 1,
}  # fmt: skip
WAVE: dict[str, Any] = SPECIAL | STACK | {
    "conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
BACKBONE: dict[str, Any] = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 12], "depths": [1, 1, 1, 1],
    "layer_type": "basic", "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip


def words(length: int = 7) -> Tensor:
    return torch.randint(3, WORDS, (2, length))


def text() -> Inputs:
    return {"input_ids": words()}


def masked() -> Inputs:
    return {"input_ids": words(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}


def causal() -> Inputs:
    return {"input_ids": words(), "use_cache": False}


def pair() -> Inputs:
    return {"input_ids": words(), "decoder_input_ids": words(5), "use_cache": False}


def image(size: int = 16) -> Inputs:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def wave() -> Inputs:
    return {"input_values": torch.randn(2, 60)}


def spoken() -> Inputs:
    return {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": words(5), "use_cache": False}


# model type: (auto class, configuration, inputs)
TYPES: dict[str, tuple[str, dict[str, Any], Callable[[], Inputs]]] = {
    # encoders of text
    "bert": ("ForMaskedLM", TEXT, masked),
    "roberta": ("ForSequenceClassification", TEXT, masked),
    "camembert": ("ForMaskedLM", TEXT, masked),
    "xlm-roberta": ("ForTokenClassification", TEXT, masked),
    "distilbert": ("ForMaskedLM", SPECIAL | {
        "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 32,
    }, masked),
    "albert": ("ForMaskedLM", TEXT | {"embedding_size": 8}, masked),
    "electra": ("ForMaskedLM", TEXT | {"embedding_size": 8}, masked),
    "mpnet": ("ForMaskedLM", TEXT, masked),
    "deberta": ("ForMaskedLM", TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, masked),
    "deberta-v2": ("ForMaskedLM", TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, masked),
    "modernbert": ("ForMaskedLM", TEXT | {"cls_token_id": 1, "sep_token_id": 2}, masked),
    "esm": ("ForMaskedLM", TEXT | {"position_embedding_type": "rotary", "mask_token_id": 3}, masked),
    "roformer": ("ForMaskedLM", TEXT | {"embedding_size": 16}, masked),
    "convbert": ("ForMaskedLM", TEXT | {"embedding_size": 16, "head_ratio": 2, "conv_kernel_size": 3}, masked),
    "squeezebert": ("ForMaskedLM", TEXT | {"embedding_size": 16}, masked),
    "mobilebert": ("ForMaskedLM", TEXT | {
        "embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2,
    }, masked),
    "fnet": ("ForMaskedLM", TEXT, text),
    "nystromformer": ("ForMaskedLM", TEXT | {"num_landmarks": 7, "segment_means_seq_len": 7}, masked),
    "big_bird": ("ForMaskedLM", TEXT | {"attention_type": "original_full"}, masked),
    "longformer": ("ForMaskedLM", TEXT | {"attention_window": 4}, lambda: {
        "input_ids": words(8), "attention_mask": torch.ones(2, 8, dtype=torch.long),
    }),
    "funnel": ("ForMaskedLM", SPECIAL | {
        "block_sizes": [1, 1], "d_model": 16, "n_head": 4, "d_head": 4, "d_inner": 24, "num_decoder_layers": 1,
    }, lambda: {"input_ids": words(8)}),
    "xlnet": ("ForSequenceClassification", SPECIAL | {
        "d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 24,
    }, lambda: {"input_ids": words(), "use_mems": False}),
    # decoders of text
    "gpt2": ("ForCausalLM", GPT, causal),
    "gpt_bigcode": ("ForCausalLM", GPT | {"multi_query": True}, causal),
    "gptj": ("ForCausalLM", GPT | {"rotary_dim": 2}, causal),
    "codegen": ("ForCausalLM", GPT | {"rotary_dim": 2}, causal),
    "gpt_neo": ("ForCausalLM", SPECIAL | {
        "hidden_size": 16, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
        "intermediate_size": 24, "max_position_embeddings": 32, "window_size": 4,
    }, causal),
    "gpt_neox": ("ForCausalLM", TEXT, causal),
    "opt": ("ForCausalLM", SPECIAL | {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 24,
        "max_position_embeddings": 32, "word_embed_proj_dim": 16,
    }, causal),
    "bloom": ("ForCausalLM", SPECIAL | {"hidden_size": 16, "n_layer": 2, "n_head": 4}, causal),
    "mpt": ("ForCausalLM", SPECIAL | {"d_model": 16, "n_heads": 4, "n_layers": 2, "max_seq_len": 32}, causal),
    "falcon": ("ForCausalLM", TEXT | {"ffn_hidden_size": 24, "alibi": True}, causal),
    "llama": ("ForCausalLM", GROUPED, causal),
    "mistral": ("ForCausalLM", GROUPED, causal),
    "qwen2": ("ForCausalLM", GROUPED | {"tie_word_embeddings": True}, causal),
    "qwen3": ("ForCausalLM", WIDE, causal),
    "gemma": ("ForCausalLM", WIDE, causal),
    "gemma2": ("ForCausalLM", WIDE | {"sliding_window": 4, "query_pre_attn_scalar": 8}, causal),
    "gemma3_text": ("ForCausalLM", WIDE | {"sliding_window": 4, "query_pre_attn_scalar": 8}, causal),
    "phi": ("ForCausalLM", TEXT, causal),
    "phi3": ("ForCausalLM", GROUPED, causal),
    "olmo2": ("ForCausalLM", GROUPED, causal),
    "cohere": ("ForCausalLM", GROUPED, causal),
    "stablelm": ("ForCausalLM", GROUPED, causal),
    "starcoder2": ("ForCausalLM", GROUPED, causal),
    "granite": ("ForCausalLM", GROUPED, causal),
    "deepseek_v3": ("ForCausalLM", GROUPED | {
        "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 4, "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 8, "n_shared_experts": 1,
    }, causal),
    "mixtral": ("ForCausalLM", GROUPED | {"num_local_experts": 4}, causal),
    "qwen2_moe": ("ForCausalLM", GROUPED | {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12,
    }, causal),
    "olmoe": ("ForCausalLM", GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}, causal),
    "qwen3_moe": ("ForCausalLM", WIDE | EXPERTS, causal),
    "glm4_moe": ("ForCausalLM", GROUPED | EXPERTS, causal),
    "granitemoe": ("ForCausalLM", GROUPED | EXPERTS, causal),
    "phimoe": ("ForCausalLM", GROUPED | EXPERTS, causal),
    "minimax": ("ForCausalLM", GROUPED | EXPERTS, causal),
    "jetmoe": ("ForCausalLM", GROUPED | EXPERTS, causal),
    "llama4_text": ("ForCausalLM", GROUPED | EXPERTS | {
        "intermediate_size_mlp": 24, "head_dim": 4, "interleave_moe_layer_step": 1, "num_experts_per_tok": 1,
    }, causal),
    "jamba": ("ForCausalLM", GROUPED | EXPERTS | {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0,
        "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4,
    }, causal),
    "gpt_oss": ("ForCausalLM", WIDE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}, causal),
    "mamba": ("ForCausalLM", SPECIAL | {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}, causal),
    "mamba2": ("ForCausalLM", SPECIAL | {
        "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 2,
        "chunk_size": 4,
    }, causal),
    # from text to text
    "t5": ("ForSeq2SeqLM", SPECIAL | {
        "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
    }, pair),
    "bart": ("ForSeq2SeqLM", PAIR, pair),
    "pegasus": ("ForSeq2SeqLM", PAIR, pair),
    "marian": ("ForSeq2SeqLM", PAIR, pair),
    # sound
    "whisper": ("ForSpeechSeq2Seq", PAIR | {
        "max_source_positions": 10, "max_target_positions": 16, "num_mel_bins": 8,
    }, spoken),
    "speech_to_text": ("ForSpeechSeq2Seq", PAIR | {
        "max_source_positions": 20, "max_target_positions": 16, "input_feat_per_channel": 8, "conv_channels": 8,
    }, lambda: spoken() | {"input_features": torch.randn(2, 20, 8)}),
    "wav2vec2": ("ForCTC", WAVE, wave),
    "hubert": ("ForCTC", WAVE, wave),
    "wavlm": ("ForCTC", WAVE, wave),
    "speecht5": ("ForSpeechSeq2Seq", WAVE | {
        "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_speech_positions": 32, "max_text_positions": 32,
    }, lambda: wave() | {"decoder_input_ids": words(5), "use_cache": False}),
    "audio-spectrogram-transformer": ("ForAudioClassification", STACK | {
        "patch_size": 4, "max_length": 16, "num_mel_bins": 8, "frequency_stride": 4, "time_stride": 4,
    }, lambda: {"input_values": torch.randn(2, 16, 8)}),
    # images and films
    "vit": ("ForImageClassification", IMAGE, image),
    "deit": ("ForImageClassification", IMAGE, image),
    "beit": ("ForImageClassification", IMAGE | {"use_relative_position_bias": True}, image),
    "dinov2": ("ForImageClassification", IMAGE, image),
    "siglip": ("ForZeroShotImageClassification", {
        "text_config": TEXT, "vision_config": IMAGE,
    }, lambda: text() | image()),
    "clip": ("ForZeroShotImageClassification", {
        "text_config": TEXT, "vision_config": IMAGE, "projection_dim": 8,
    }, lambda: text() | image()),
    "blip": ("ForZeroShotImageClassification", {
        "text_config": TEXT | {"encoder_hidden_size": 16}, "vision_config": IMAGE, "projection_dim": 8,
        "image_text_hidden_size": 8,
    }, lambda: masked() | image()),
    "swin": ("ForImageClassification", {
        "image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4,
    }, image),
    "swinv2": ("ForImageClassification", {
        "image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4,
    }, image),
    "pvt": ("ForImageClassification", {
        "image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1], "sequence_reduction_ratios": [2, 1],
        "hidden_sizes": [8, 12], "patch_sizes": [4, 2], "strides": [4, 2], "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
    }, lambda: image(32)),
    "levit": ("ForImageClassification", {
        "image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1],
        "key_dim": [4, 4, 4], "attention_ratio": [2, 2, 2], "mlp_ratio": [2, 2, 2],
        "down_ops": [["Subsample", 4, 4, 4, 2, 2], ["Subsample", 4, 6, 4, 2, 2]],
    }, lambda: image(64)),
    "poolformer": ("ForImageClassification", {
        "depths": [1, 1], "hidden_sizes": [8, 12], "patch_sizes": [7, 3], "strides": [4, 2], "padding": [2, 1],
        "num_encoder_blocks": 2,
    }, lambda: image(32)),
    "convnext": ("ForImageClassification", {
        "hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2,
    }, lambda: image(32)),
    "convnextv2": ("ForImageClassification", {
        "hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2,
    }, lambda: image(32)),
    "resnet": ("ForImageClassification", {
        "embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2], "layer_type": "bottleneck",
    }, lambda: image(32)),
    "regnet": ("ForImageClassification", {
        "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "groups_width": 4, "layer_type": "y",
    }, lambda: image(32)),
    "bit": ("ForImageClassification", {
        "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "num_groups": 2,
    }, lambda: image(32)),
    "mobilenet_v2": ("ForImageClassification", {"depth_multiplier": 0.25, "image_size": 32}, lambda: image(32)),
    "mobilevit": ("ForImageClassification", {
        "image_size": 32, "hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [4, 4, 8, 8, 12, 16, 20],
        "num_attention_heads": 2,
    }, lambda: image(64)),
    "videomae": ("ForVideoClassification", IMAGE | {"num_frames": 4}, lambda: {
        "pixel_values": torch.randn(2, 4, 3, 16, 16),
    }),
    "segformer": ("ForSemanticSegmentation", {
        "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 12],
        "num_attention_heads": [1, 2], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2],
        "decoder_hidden_size": 12,
    }, lambda: image(32)),
    "dpt": ("ForDepthEstimation", IMAGE | {
        "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [4, 4, 8, 8],
        "fusion_hidden_size": 8, "image_size": 32, "is_hybrid": False,
    }, lambda: image(32)),
    "yolos": ("ForObjectDetection", IMAGE | {"image_size": [16, 16], "num_detection_tokens": 5}, image),
    "detr": ("ForObjectDetection", {
        "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone_config": BACKBONE, "d_model": 16,
        "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_queries": 5,
    }, lambda: image(64)),
    "mask2former": ("ForUniversalSegmentation", {
        "backbone_config": {
            "model_type": "swin", "image_size": 64, "patch_size": 2, "embed_dim": 8, "depths": [1, 1, 1, 1],
            "num_heads": [2, 2, 2, 2], "window_size": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 24,
        "dim_feedforward": 24, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 4, "num_queries": 5,
    }, lambda: image(64)),
    "perceiver": ("ForMaskedLM", {
        "vocab_size": WORDS, "num_latents": 6, "d_latents": 16, "d_model": 16, "num_blocks": 1,
        "num_self_attends_per_block": 1, "num_self_attention_heads": 4, "num_cross_attention_heads": 4,
        "qk_channels": 8, "v_channels": 16, "max_position_embeddings": 7,
    }, lambda: {"inputs": words(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}),
}  # fmt: skip

EAGER = (
    "bert",
    "gpt2",
    "llama",
    "gpt_neox",
    "gemma2",
    "bart",
    "t5",
    "vit",
    "clip",
    "whisper",
    "wav2vec2",
    "modernbert",
)
"""Types built once more with attention written out instead of fused."""


def networks() -> dict[str, Callable[[], tuple[nn.Module, Inputs]]]:
    """Name -> what builds the network in eval mode and gives the inputs of a call."""
    made = {name: partial(build, name) for name in TYPES}
    return made | {f"{name} (eager attention)": partial(build, name, "eager") for name in EAGER}


def build(name: str, attention: str | None = None) -> tuple[nn.Module, Inputs]:
    """The network of one model type; ``attention`` names an implementation other than the type's default."""
    head, options, inputs = TYPES[name]
    config = transformers.AutoConfig.for_model(name, **options)
    config.architectures = []  # which some types look into
    made = getattr(transformers, f"AutoModel{head}").from_config(config, attn_implementation=attention)
    return made.eval(), inputs()
