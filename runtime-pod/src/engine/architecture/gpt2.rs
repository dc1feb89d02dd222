//! GPT-2, whose matrices lie in the file with rows and columns changed over, and GPT-BigCode, whose heads share one key and
//! value. Both learn a table of positions.

use super::gpt_neox::joined_by_heads;
use super::{Architecture, prefix};
use crate::engine::EngineError;
use crate::engine::config::fields::{Fields, Heads, MAX_LAYERS, MAX_POSITIONS, MAX_VOCAB, MAX_WIDTH};
use crate::engine::config::{Activation, Biases, ModelConfig, NormKind, Positions, Residual, Scales};
use crate::engine::layout::{BlockLayout, Layout, LinearLayout, NormLayout, mlp_norm};

pub(super) fn config(architecture: Architecture, fields: &Fields<'_>) -> Result<ModelConfig, EngineError> {
    let bigcode = architecture == Architecture::GptBigcode;
    let hidden = fields.required(&["n_embd", "hidden_size"], MAX_WIDTH)?;
    let shared = bigcode && fields.flag("multi_query", true)?;
    let Heads { heads, kv_heads, head_dim } = fields.heads(["n_embd", "n_head"], hidden, shared.then_some(1), None)?;
    let mut scales = Scales::plain(head_dim);
    if !fields.flag("scale_attn_weights", true)? {
        scales.attention = 1.0;
    }
    scales.attention_by_layer = !bigcode && fields.flag("scale_attn_by_inverse_layer_idx", false)?;
    Ok(ModelConfig {
        architecture,
        hidden,
        intermediate: fields.size("n_inner", MAX_WIDTH)?.unwrap_or(4 * hidden),
        layers: fields.required(&["n_layer", "num_hidden_layers"], MAX_LAYERS)?,
        heads,
        kv_heads,
        head_dim,
        vocab: fields.required(&["vocab_size"], MAX_VOCAB)?,
        max_positions: fields.required(&["n_positions", "max_position_embeddings"], MAX_POSITIONS)?,
        positions: Positions::Learned,
        norm: NormKind::Layer,
        norm_eps: fields.positive("layer_norm_epsilon")?.unwrap_or(1e-5),
        norm_offset: 0.0,
        qk_norm: false,
        embedding_norm: false,
        activation: fields.activation("activation_function", Activation::GeluTanh)?,
        gated: false,
        residual: Residual::Serial,
        scales,
        biases: Biases { qkv: true, o: true, mlp: true, output: false },
        tied: fields.flag("tie_word_embeddings", true)?,
    })
}

pub(super) fn layout(config: &ModelConfig, has: &dyn Fn(&str) -> bool) -> Layout {
    let &ModelConfig { architecture, hidden, intermediate, .. } = config;
    let body = prefix("transformer.", "wte.weight", has);
    let stored = |linear: LinearLayout| match architecture {
        Architecture::GptBigcode => linear,
        _ => linear.transposed(),
    };
    let block = |i: usize| {
        let name = |part: &str| format!("{body}h.{i}.{part}");
        let one = |part: &str, rows: usize, columns: usize| stored(LinearLayout::one(&name(part), rows, columns, true));
        let qkv = name("attn.c_attn");
        BlockLayout {
            attention_norm: NormLayout::new(&name("ln_1"), config),
            qkv: match architecture {
                // With a key and value for each head they are joined by heads, else as the engine takes them.
                Architecture::GptBigcode if config.kv_heads > 1 => joined_by_heads(&qkv, config),
                _ => one("attn.c_attn", config.q_width() + 2 * config.kv_width(), hidden),
            },
            head_norms: None,
            o: one("attn.c_proj", hidden, hidden),
            mlp_norm: mlp_norm(&name("ln_2"), config),
            up: one("mlp.c_fc", intermediate, hidden),
            down: one("mlp.c_proj", hidden, intermediate),
        }
    };
    Layout {
        positions: Some(LinearLayout::one(&format!("{body}wpe"), config.max_positions, hidden, false)),
        blocks: (0..config.layers).map(block).collect(),
        ..Layout::ends(body, ["wte", "ln_f"], "lm_head", config)
    }
}
