//! BLOOM: no positions but slopes, a norm behind the embedding, query, key and value joined head by head.

use super::gpt_neox::joined_by_heads;
use super::{Architecture, prefix};
use crate::engine::EngineError;
use crate::engine::config::fields::{Fields, Heads, MAX_LAYERS, MAX_POSITIONS, MAX_VOCAB, MAX_WIDTH};
use crate::engine::config::{Activation, Biases, ModelConfig, NormKind, Positions, Residual, Scales};
use crate::engine::layout::{BlockLayout, Layout, LinearLayout, NormLayout, mlp_norm};

/// Tokens that the published models were trained on at once: nothing in the model ends there, but nothing is known beyond.
const TRAINED_POSITIONS: usize = 2048;

pub(super) fn config(fields: &Fields<'_>) -> Result<ModelConfig, EngineError> {
    // The first of the two wins in transformers, too.
    let hidden = fields.required(&["n_embed", "hidden_size"], MAX_WIDTH)?;
    let Heads { heads, kv_heads, head_dim } = fields.heads(["hidden_size", "n_head"], hidden, None, None)?;
    fields.refuse("apply_residual_connection_post_layernorm", "; take another engine, or a model without it")?;
    Ok(ModelConfig {
        architecture: Architecture::Bloom,
        hidden,
        intermediate: 4 * hidden,
        layers: fields.required(&["n_layer", "num_hidden_layers"], MAX_LAYERS)?,
        heads,
        kv_heads,
        head_dim,
        vocab: fields.required(&["vocab_size"], MAX_VOCAB)?,
        max_positions: fields.size("seq_length", MAX_POSITIONS)?.unwrap_or(TRAINED_POSITIONS),
        positions: Positions::Alibi,
        norm: NormKind::Layer,
        norm_eps: fields.positive("layer_norm_epsilon")?.unwrap_or(1e-5),
        norm_offset: 0.0,
        qk_norm: false,
        embedding_norm: true,
        activation: Activation::GeluTanh,
        gated: false,
        residual: Residual::Serial,
        scales: Scales::plain(head_dim),
        biases: Biases { qkv: true, o: true, mlp: true, output: false },
        tied: fields.flag("tie_word_embeddings", true)?,
    })
}

pub(super) fn layout(config: &ModelConfig, has: &dyn Fn(&str) -> bool) -> Layout {
    let &ModelConfig { hidden, intermediate, .. } = config;
    let body = prefix("transformer.", "word_embeddings.weight", has);
    let block = |i: usize| {
        let name = |part: &str| format!("{body}h.{i}.{part}");
        BlockLayout {
            attention_norm: NormLayout::new(&name("input_layernorm"), config),
            qkv: joined_by_heads(&name("self_attention.query_key_value"), config),
            head_norms: None,
            o: LinearLayout::one(&name("self_attention.dense"), hidden, hidden, true),
            mlp_norm: mlp_norm(&name("post_attention_layernorm"), config),
            up: LinearLayout::one(&name("mlp.dense_h_to_4h"), intermediate, hidden, true),
            down: LinearLayout::one(&name("mlp.dense_4h_to_h"), hidden, intermediate, true),
        }
    };
    Layout {
        embedding_norm: Some(NormLayout::new(&format!("{body}word_embeddings_layernorm"), config)),
        blocks: (0..config.layers).map(block).collect(),
        ..Layout::ends(body, ["word_embeddings", "ln_f"], "lm_head", config)
    }
}
