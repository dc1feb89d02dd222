//! Where a GGUF file has the weights. The format is neutral itself: all families have the same names, matrices as they are
//! multiplied, and norms whole.

use super::Gguf;
use crate::engine::config::{ModelConfig, Positions};
use crate::engine::layout::{BlockLayout, Layout, LinearLayout, NormLayout, Part, mlp_norm};

impl Gguf {
    /// The names of a model's tensors in this file.
    pub(super) fn layout(&self, config: &ModelConfig) -> Layout {
        let &ModelConfig { hidden, intermediate, biases, .. } = config;
        let (q, kv) = (config.q_width(), config.kv_width());
        let block = |i: usize| {
            let name = |part: &str| format!("blk.{i}.{part}");
            let qkv = if self.tensors.contains_key(&name("attn_qkv.weight")) {
                vec![Part::whole(name("attn_qkv"), q + 2 * kv)]
            } else {
                [("attn_q", q), ("attn_k", kv), ("attn_v", kv)].map(|(n, rows)| Part::whole(name(n), rows)).into()
            };
            let up: &[&str] = if config.gated { &["ffn_gate", "ffn_up"] } else { &["ffn_up"] };
            let up = up.iter().map(|n| Part::whole(name(n), intermediate)).collect();
            let head_norm = |n: &str| Part::whole(name(n), config.head_dim);
            BlockLayout {
                attention_norm: NormLayout::new(&name("attn_norm"), config),
                qkv: LinearLayout::of(qkv, hidden, biases.qkv),
                head_norms: config.qk_norm.then(|| (head_norm("attn_q_norm.weight"), head_norm("attn_k_norm.weight"))),
                o: LinearLayout::one(&name("attn_output"), hidden, q, biases.o),
                mlp_norm: mlp_norm(&name("ffn_norm"), config),
                up: LinearLayout::of(up, hidden, biases.mlp),
                down: LinearLayout::one(&name("ffn_down"), hidden, intermediate, biases.mlp),
            }
        };
        let table = || LinearLayout::one("position_embd", config.max_positions, hidden, false);
        Layout {
            positions: (config.positions == Positions::Learned).then(table),
            embedding_norm: config.embedding_norm.then(|| NormLayout::new("token_embd_norm", config)),
            blocks: (0..config.layers).map(block).collect(),
            ..Layout::ends("", ["token_embd", "output_norm"], "output", config)
        }
    }
}
