//! Llama and what its code was copied for: Mistral, Qwen2, Qwen3, Granite, Gemma, StableLM, StarCoder2 and Phi.
//!
//! The same places with other contents: norms with or without mean and bias, gated or plain MLPs, biases here or there.

use crate::engine::EngineError;
use crate::engine::architecture::Architecture;
use crate::engine::config::fields::{
    Fields, Heads, MAX_HEADS, MAX_LAYERS, MAX_POSITIONS, MAX_VOCAB, MAX_WIDTH, RotaryFields,
};
use crate::engine::config::{Activation, Biases, ModelConfig, NormKind, Residual, Scales};
use crate::engine::layout::{BlockLayout, Layout, LinearLayout, NormLayout, Part, mlp_norm};

/// Width of a head where a family does not derive it from the others, and nothing is said.
fn head_dim(architecture: Architecture) -> Option<usize> {
    match architecture {
        Architecture::Qwen3 => Some(128),
        Architecture::Gemma => Some(256),
        _ => None,
    }
}

/// The window that configurations mean where they say nothing of it (StarCoder2's mean none); `null` says that there is none.
const WINDOW: usize = 4096;
/// From which block on Qwen's configurations mean a window where they say nothing of it.
const WINDOWED_FROM: usize = 28;

pub(super) fn config(architecture: Architecture, fields: &Fields<'_>) -> Result<ModelConfig, EngineError> {
    use Architecture::{Gemma, Granite, Llama, Phi, Qwen2, Qwen3, StableLm, Starcoder2};
    let hidden = fields.required(&["hidden_size"], MAX_WIDTH)?;
    let kv_heads = fields.size("num_key_value_heads", MAX_HEADS)?;
    // The modules of these two have heads of the width that follows.
    let own_width = !matches!(architecture, StableLm | Phi);
    let width = if own_width { fields.size("head_dim", 1024)?.or(head_dim(architecture)) } else { None };
    let Heads { heads, kv_heads, head_dim } =
        fields.heads(["hidden_size", "num_attention_heads"], hidden, kv_heads, width)?;
    let layers = fields.required(&["num_hidden_layers"], MAX_LAYERS)?;
    let norm = if matches!(architecture, StableLm | Starcoder2 | Phi) { NormKind::Layer } else { NormKind::Rms };
    let norm_eps = match architecture {
        StableLm | Phi => fields.positive("layer_norm_eps")?.unwrap_or(1e-5),
        Starcoder2 => fields.positive("norm_epsilon")?.unwrap_or(1e-5),
        _ => fields.positive("rms_norm_eps")?.unwrap_or(1e-6),
    };
    let share = match architecture {
        StableLm => Some(("partial_rotary_factor", 0.25)),
        Phi => Some(("partial_rotary_factor", 0.5)),
        _ => None,
    };
    if matches!(architecture, StableLm | Phi) {
        fields.refuse("qk_layernorm", "; take another engine, or a model without it")?;
    }
    if architecture == Gemma {
        fields.refuse("use_bidirectional_attention", "; causal attention only")?;
    }
    let residual = match architecture {
        Phi => Residual::ParallelOneNorm,
        StableLm if fields.flag("use_parallel_residual", false)? => Residual::ParallelOneNorm,
        _ => Residual::Serial,
    };
    let tied = matches!(architecture, Gemma | Starcoder2);
    let mut scales = Scales::plain(head_dim);
    if architecture == Gemma {
        scales.embedding = (hidden as f64).sqrt() as f32;
    }
    if architecture == Granite {
        scales.embedding = fields.positive("embedding_multiplier")?.unwrap_or(1.0);
        scales.residual = fields.positive("residual_multiplier")?.unwrap_or(1.0);
        scales.attention = fields.positive("attention_multiplier")?.unwrap_or(1.0);
        scales.logits = 1.0 / fields.positive("logits_scaling")?.unwrap_or(1.0);
    }
    let attention_bias = match architecture {
        Llama | Qwen3 | Granite | Gemma => fields.flag("attention_bias", false)?,
        Starcoder2 => fields.flag("use_bias", true)?,
        Phi => true,
        _ => false,
    };
    let biases = Biases {
        qkv: match architecture {
            Qwen2 => true,
            StableLm => fields.flag("use_qkv_bias", false)?,
            _ => attention_bias,
        },
        o: attention_bias,
        mlp: match architecture {
            Llama | Granite => fields.flag("mlp_bias", false)?,
            Starcoder2 | Phi => attention_bias,
            _ => false,
        },
        output: architecture == Phi,
    };
    Ok(ModelConfig {
        architecture,
        hidden,
        intermediate: fields.required(&["intermediate_size"], MAX_WIDTH)?,
        layers,
        heads,
        kv_heads,
        head_dim,
        vocab: fields.required(&["vocab_size"], MAX_VOCAB)?,
        max_positions: max_positions(architecture, fields, layers)?,
        positions: fields.rotary(RotaryFields { theta: "rope_theta", share }, head_dim)?,
        norm,
        norm_eps,
        norm_offset: if architecture == Gemma { 1.0 } else { 0.0 },
        qk_norm: architecture == Qwen3,
        embedding_norm: false,
        activation: activation(architecture, fields)?,
        gated: !matches!(architecture, Starcoder2 | Phi),
        residual,
        scales,
        biases,
        tied: fields.flag("tie_word_embeddings", tied)?,
    })
}

fn activation(architecture: Architecture, fields: &Fields<'_>) -> Result<Activation, EngineError> {
    match architecture {
        Architecture::Gemma => {
            let name = if fields.get("hidden_activation").is_some() { "hidden_activation" } else { "hidden_act" };
            match fields.activation(name, Activation::GeluTanh)? {
                // Its first configurations said so and meant the other, which transformers takes.
                Activation::Gelu if name == "hidden_act" => Ok(Activation::GeluTanh),
                other => Ok(other),
            }
        }
        Architecture::Starcoder2 | Architecture::Phi => fields.activation("hidden_act", Activation::GeluTanh),
        _ => fields.activation("hidden_act", Activation::Silu),
    }
}

/// Full attention is what a model with a window computes as long as all of the sequence is in it: so far the engine goes.
fn max_positions(architecture: Architecture, fields: &Fields<'_>, layers: usize) -> Result<usize, EngineError> {
    let most = fields.required(&["max_position_embeddings"], MAX_POSITIONS)?;
    let mut windowed = match architecture {
        Architecture::Mistral | Architecture::Starcoder2 => true,
        Architecture::Qwen2 | Architecture::Qwen3 => {
            let from = fields.within("max_window_layers", 0, MAX_POSITIONS)?.unwrap_or(WINDOWED_FROM);
            fields.flag("use_sliding_window", false)? && from < layers
        }
        _ => {
            fields.refuse("use_sliding_window", "; full attention only")?;
            return Ok(most);
        }
    };
    if let Some(kinds) = fields.get("layer_types") {
        let names: Vec<_> = kinds.as_array().into_iter().flatten().map(|kind| kind.as_str()).collect();
        if names.is_empty() || names.iter().any(|n| !matches!(n, Some("full_attention" | "sliding_attention"))) {
            return fields.fail(format!(
                "layer_types: {kinds} is not implemented; a list of full_attention and sliding_attention is"
            ));
        }
        windowed = names.contains(&Some("sliding_attention"));
    }
    let unsaid = architecture != Architecture::Starcoder2 && !fields.has("sliding_window");
    match fields.size("sliding_window", MAX_POSITIONS)?.or(unsaid.then_some(WINDOW)) {
        Some(window) if windowed => Ok(most.min(window)),
        _ => Ok(most),
    }
}

pub(super) fn layout(config: &ModelConfig) -> Layout {
    let &ModelConfig { architecture, hidden, intermediate, biases, .. } = config;
    let (q, kv) = (config.q_width(), config.kv_width());
    let (o, [gate, up, down]) = match architecture {
        Architecture::Phi => ("dense", ["", "fc1", "fc2"]),
        Architecture::Starcoder2 => ("o_proj", ["", "c_fc", "c_proj"]),
        _ => ("o_proj", ["gate_proj", "up_proj", "down_proj"]),
    };
    let block = |i: usize| {
        let name = |part: &str| format!("model.layers.{i}.{part}");
        let heads = [("q", q), ("k", kv), ("v", kv)];
        let qkv = heads.map(|(n, rows)| Part::whole(name(&format!("self_attn.{n}_proj")), rows));
        let first = if config.gated { &[gate, up][..] } else { &[up] };
        let first = first.iter().map(|n| Part::whole(name(&format!("mlp.{n}")), intermediate));
        let head_norm = |n: &str| Part::whole(name(&format!("self_attn.{n}_norm.weight")), config.head_dim);
        BlockLayout {
            attention_norm: NormLayout::new(&name("input_layernorm"), config),
            qkv: LinearLayout::of(qkv.into(), hidden, biases.qkv),
            head_norms: config.qk_norm.then(|| (head_norm("q"), head_norm("k"))),
            o: LinearLayout::one(&name(&format!("self_attn.{o}")), hidden, q, biases.o),
            mlp_norm: mlp_norm(&name("post_attention_layernorm"), config),
            up: LinearLayout::of(first.collect(), hidden, biases.mlp),
            down: LinearLayout::one(&name(&format!("mlp.{down}")), hidden, intermediate, biases.mlp),
        }
    };
    let final_norm = if architecture == Architecture::Phi { "final_layernorm" } else { "norm" };
    Layout {
        blocks: (0..config.layers).map(block).collect(),
        ..Layout::ends("model.", ["embed_tokens", final_norm], "lm_head", config)
    }
}
