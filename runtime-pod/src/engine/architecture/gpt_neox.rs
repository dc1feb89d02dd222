//! GPT-NeoX: attention and MLP side by side, heads partly turned, query, key and value joined head by head.

use super::{Architecture, prefix};
use crate::engine::EngineError;
use crate::engine::config::fields::{Fields, Heads, MAX_LAYERS, MAX_POSITIONS, MAX_VOCAB, MAX_WIDTH, RotaryFields};
use crate::engine::config::{Activation, Biases, ModelConfig, NormKind, Residual, Scales};
use crate::engine::layout::{BlockLayout, Layout, LinearLayout, NormLayout, Part, mlp_norm};

pub(super) fn config(fields: &Fields<'_>) -> Result<ModelConfig, EngineError> {
    let hidden = fields.required(&["hidden_size"], MAX_WIDTH)?;
    let Heads { heads, kv_heads, head_dim } =
        fields.heads(["hidden_size", "num_attention_heads"], hidden, None, None)?;
    let attention_bias = fields.flag("attention_bias", true)?;
    let parallel = fields.flag("use_parallel_residual", true)?;
    Ok(ModelConfig {
        architecture: Architecture::GptNeox,
        hidden,
        intermediate: fields.required(&["intermediate_size"], MAX_WIDTH)?,
        layers: fields.required(&["num_hidden_layers"], MAX_LAYERS)?,
        heads,
        kv_heads,
        head_dim,
        vocab: fields.required(&["vocab_size"], MAX_VOCAB)?,
        max_positions: fields.required(&["max_position_embeddings"], MAX_POSITIONS)?,
        positions: fields
            .rotary(RotaryFields { theta: "rotary_emb_base", share: Some(("rotary_pct", 0.25)) }, head_dim)?,
        norm: NormKind::Layer,
        norm_eps: fields.positive("layer_norm_eps")?.unwrap_or(1e-5),
        norm_offset: 0.0,
        qk_norm: false,
        embedding_norm: false,
        activation: fields.activation("hidden_act", Activation::Gelu)?,
        gated: false,
        residual: if parallel { Residual::Parallel } else { Residual::Serial },
        scales: Scales::plain(head_dim),
        biases: Biases { qkv: attention_bias, o: attention_bias, mlp: true, output: false },
        tied: fields.flag("tie_word_embeddings", false)?,
    })
}

pub(super) fn layout(config: &ModelConfig, has: &dyn Fn(&str) -> bool) -> Layout {
    let &ModelConfig { hidden, intermediate, biases, .. } = config;
    let body = prefix("gpt_neox.", "embed_in.weight", has);
    let block = |i: usize| {
        let name = |part: &str| format!("{body}layers.{i}.{part}");
        BlockLayout {
            attention_norm: NormLayout::new(&name("input_layernorm"), config),
            qkv: joined_by_heads(&name("attention.query_key_value"), config),
            head_norms: None,
            o: LinearLayout::one(&name("attention.dense"), hidden, hidden, biases.o),
            mlp_norm: mlp_norm(&name("post_attention_layernorm"), config),
            up: LinearLayout::one(&name("mlp.dense_h_to_4h"), intermediate, hidden, biases.mlp),
            down: LinearLayout::one(&name("mlp.dense_4h_to_h"), hidden, intermediate, biases.mlp),
        }
    };
    let output = if has("lm_head.weight") { "lm_head" } else { "embed_out" };
    let blocks = (0..config.layers).map(block).collect();
    Layout { blocks, ..Layout::ends(body, ["embed_in", "final_layer_norm"], output, config) }
}

/// Query, key and value out of a tensor that has them for one head after the other.
pub(super) fn joined_by_heads(name: &str, config: &ModelConfig) -> LinearLayout {
    let share = |which| Part::share(name, which, 3, config.head_dim, config.heads);
    LinearLayout::of([0, 1, 2].map(share).into(), config.hidden, config.biases.qkv)
}
