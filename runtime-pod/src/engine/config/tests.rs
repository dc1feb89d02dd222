use super::*;
use serde_json::{Value, json};

fn read(change: impl Fn(&mut Value)) -> Result<ModelConfig, String> {
    let mut json = json!({
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 8192, "tie_word_embeddings": true, "hidden_act": "silu"
    });
    change(&mut json);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), json.to_string()).unwrap();
    ModelConfig::read(dir.path()).map_err(|e| e.to_string())
}

#[test]
fn a_true_configuration() {
    let config = read(|_| ()).unwrap();
    assert_eq!(config.parameters(), 134_515_008);
    assert_eq!((config.head_dim, config.kv_heads, config.biases), (64, 3, Biases::default()));
    let new_style = read(|c| {
        c["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 5e5});
        c.as_object_mut().unwrap().remove("rope_theta");
    });
    let Positions::Rotary { dim, theta, .. } = new_style.unwrap().positions else { panic!("no rotary positions") };
    assert_eq!((dim, theta), (64, 5e5));
    let qwen = read(|c| c["model_type"] = json!("qwen2")).unwrap();
    assert_eq!(qwen.biases, Biases { qkv: true, ..Biases::default() });
}

#[test]
fn linear_scaling_divides_every_frequency() {
    let plain = read(|_| ()).unwrap().rope_frequencies();
    let scaled = read(|c| c["rope_scaling"] = json!({"type": "linear", "factor": 4.0})).unwrap().rope_frequencies();
    assert_eq!(plain[0], 1.0);
    assert!(plain.iter().zip(&scaled).all(|(p, s)| p / 4.0 == *s));
}

#[test]
fn absurd_configurations_are_refused_by_field() {
    type Change = fn(&mut Value);
    let cases: &[(Change, &str)] = &[
        (|c| c["model_type"] = json!("mamba"), "model_type: \"mamba\""),
        (|c| c["model_type"] = Value::Null, "model_type is missing"),
        (|c| c["hidden_size"] = json!(0), "hidden_size: 0"),
        (|c| c["hidden_size"] = json!(-5), "hidden_size: -5"),
        (|c| c["hidden_size"] = json!("576"), "hidden_size: \"576\""),
        (|c| c["hidden_size"] = json!(u64::MAX), "hidden_size: 18446744073709551615"),
        (|c| c["hidden_size"] = json!(577), "hidden_size: 577 is not a multiple"),
        (|c| c["num_hidden_layers"] = json!(1_000_000), "num_hidden_layers: 1000000"),
        (|c| c["num_key_value_heads"] = json!(2), "num_attention_heads: 9 is not a multiple"),
        (|c| c["head_dim"] = json!(63), "head_dim: 63"),
        (|c| c["vocab_size"] = Value::Null, "vocab_size is missing"),
        (|c| c["vocab_size"] = json!(1u64 << 40), "vocab_size: 1099511627776"),
        (|c| c["rms_norm_eps"] = json!(-1.0), "rms_norm_eps: -1.0"),
        (|c| c["rope_theta"] = json!(0), "rope_theta: 0"),
        (|c| c["rope_theta"] = json!(1e300), "rope_theta: 1e+300"),
        (|c| c["rope_scaling"] = json!({"rope_type": "yarn", "factor": 4.0}), "\"yarn\" is not implemented"),
        (|c| c["rope_scaling"] = json!({"rope_type": "linear"}), "factor is missing"),
        (|c| c["rope_scaling"] = json!({"rope_type": "linear", "factor": -2}), "factor: -2"),
        (|c| c["rope_scaling"] = json!(4), "rope_scaling: 4 is not an object"),
        (
            |c| {
                c["rope_scaling"] = json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4,
                    "high_freq_factor": 4, "original_max_position_embeddings": 8192});
            },
            "high_freq_factor: 4 must be above",
        ),
        (|c| c["hidden_act"] = json!("mish"), "hidden_act: \"mish\""),
        (|c| c["tie_word_embeddings"] = json!("yes"), "tie_word_embeddings: \"yes\""),
        (|c| c["quantization_config"] = json!({"quant_method": "gptq"}), "quantization_config: gptq"),
        (|c| c["use_sliding_window"] = json!(true), "use_sliding_window"),
        (|c| c["partial_rotary_factor"] = json!(0.5), "partial_rotary_factor: 0.5"),
        (|c| *c = json!([]), "not a JSON object"),
    ];
    for (change, want) in cases {
        let error = read(change).unwrap_err();
        assert!(error.contains(want) && error.contains("config.json"), "wanted {want:?} in {error:?}");
    }
}

/// `config.json` as its publisher wrote it, what is beside the point left out.
fn published(name: &str) -> Value {
    match name {
        "Mistral-7B-v0.1" => json!({"model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096,
            "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096,
            "tie_word_embeddings": false, "vocab_size": 32000}),
        "Qwen3-0.6B" => json!({"model_type": "qwen3", "attention_bias": false, "head_dim": 128, "hidden_act": "silu",
            "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
            "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
            "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true,
            "use_sliding_window": false, "vocab_size": 151936}),
        "granite-3.0-2b-base" => {
            json!({"model_type": "granite", "attention_bias": false, "attention_multiplier": 0.015625,
            "embedding_multiplier": 12.0, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
            "logits_scaling": 8.0, "max_position_embeddings": 4096, "mlp_bias": false, "num_attention_heads": 32,
            "num_hidden_layers": 40, "num_key_value_heads": 8, "residual_multiplier": 0.22, "rms_norm_eps": 1e-5,
            "rope_theta": 10000, "tie_word_embeddings": true, "vocab_size": 49155})
        }
        "codegemma-2b" => json!({"model_type": "gemma", "attention_bias": false, "head_dim": 256, "hidden_act": "gelu",
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2048, "intermediate_size": 16384,
            "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1,
            "rms_norm_eps": 1e-6, "rope_scaling": null, "rope_theta": 10000.0, "vocab_size": 256000}),
        "stable-code-3b" => json!({"model_type": "stablelm", "hidden_act": "silu", "hidden_size": 2560,
            "intermediate_size": 6912, "layer_norm_eps": 1e-5, "max_position_embeddings": 16384, "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 32, "partial_rotary_factor": 0.25, "rope_theta": 1000000,
            "tie_word_embeddings": false, "use_qkv_bias": false, "vocab_size": 50304}),
        "starcoder2-3b" => json!({"model_type": "starcoder2", "activation_function": "gelu_pytorch_tanh",
            "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3072, "intermediate_size": 12288,
            "layer_norm_epsilon": 1e-5, "max_position_embeddings": 16384, "mlp_type": "default", "norm_epsilon": 1e-5,
            "norm_type": "layer_norm", "num_attention_heads": 24, "num_hidden_layers": 30, "num_key_value_heads": 2,
            "rope_theta": 999999.4420358813, "sliding_window": 4096, "use_bias": true, "vocab_size": 49152}),
        "phi-2" => {
            json!({"model_type": "phi", "hidden_act": "gelu_new", "hidden_size": 2560, "intermediate_size": 10240,
            "layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 32, "partial_rotary_factor": 0.4, "qk_layernorm": false, "rope_scaling": null,
            "rope_theta": 10000.0, "tie_word_embeddings": false, "vocab_size": 51200})
        }
        "pythia-410m" => json!({"model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 1024,
            "intermediate_size": 4096, "layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "num_attention_heads": 16,
            "num_hidden_layers": 24, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": false,
            "use_parallel_residual": true, "vocab_size": 50304}),
        "gpt2" => json!({"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
            "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257}),
        "starcoderbase-1b" => json!({"model_type": "gpt_bigcode", "activation_function": "gelu_pytorch_tanh",
            "layer_norm_epsilon": 1e-5, "multi_query": true, "n_embd": 2048, "n_head": 16, "n_inner": 8192, "n_layer": 24,
            "n_positions": 8192, "scale_attn_weights": true, "vocab_size": 49152}),
        "bloom-560m" => json!({"model_type": "bloom", "apply_residual_connection_post_layernorm": false,
            "layer_norm_epsilon": 1e-5, "n_embed": 1024, "n_inner": null, "n_layer": 24, "num_attention_heads": 16,
            "offset_alibi": 100, "seq_length": 2048, "vocab_size": 250880}),
        other => panic!("no configuration of {other}"),
    }
}

#[test]
fn published_models_have_the_weights_that_their_publishers_count() {
    // Parameters of the model's card, tokens that the engine goes to, and turned values of a head.
    let known = [
        ("Mistral-7B-v0.1", 7_241_732_096, 4096, 128),
        ("Qwen3-0.6B", 596_049_920, 40_960, 128),
        ("granite-3.0-2b-base", 2_533_531_648, 4096, 64),
        ("codegemma-2b", 2_506_172_416, 8192, 256),
        ("stable-code-3b", 2_795_443_200, 16_384, 20),
        ("starcoder2-3b", 3_030_371_328, 4096, 128),
        ("phi-2", 2_779_683_840, 2048, 32),
        ("pythia-410m", 405_334_016, 2048, 16),
        ("gpt2", 124_439_808, 1024, 0),
        ("starcoderbase-1b", 1_137_207_296, 8192, 0),
        ("bloom-560m", 559_214_592, 2048, 0),
    ];
    for (name, parameters, positions, turned) in known {
        let config = read(|c| *c = published(name)).unwrap();
        assert_eq!((config.parameters(), config.max_positions), (parameters, positions), "{name}");
        assert_eq!(2 * config.rope_frequencies().len(), turned, "{name}");
    }
    let gemma = read(|c| *c = published("codegemma-2b")).unwrap();
    assert_eq!((gemma.activation, gemma.norm_offset, gemma.tied), (Activation::GeluTanh, 1.0, true));
    assert_eq!(gemma.scales.embedding, 45.254833);
    let pythia = read(|c| *c = published("pythia-410m")).unwrap();
    assert_eq!((pythia.activation, pythia.residual), (Activation::Gelu, Residual::Parallel));
    let starcoder = read(|c| *c = published("starcoderbase-1b")).unwrap();
    assert_eq!((starcoder.kv_heads, starcoder.head_dim, starcoder.tied), (1, 128, true));
}

#[test]
fn slopes_are_those_of_the_paper() {
    let slopes = |heads: usize| {
        let config = read(|c| {
            *c = published("bloom-560m");
            c["num_attention_heads"] = json!(heads);
            c["n_embed"] = json!(64 * heads);
        });
        config.unwrap().alibi_slopes().unwrap()
    };
    let eight: Vec<f32> = (1..=8).map(|i| 0.5f32.powi(i)).collect();
    assert_eq!(slopes(8), eight);
    // Six heads: those of four, then every other one of eight.
    assert_eq!(slopes(6), [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]);
}

/// Where a window, or another way of attending, would change what full attention computes.
#[test]
fn windows_end_the_context_and_other_variants_are_refused_by_field() {
    let positions = |name: &str, change: fn(&mut Value)| {
        read(|c| {
            *c = published(name);
            change(c);
        })
        .map(|config| config.max_positions)
    };
    assert_eq!(positions("Mistral-7B-v0.1", |c| c["sliding_window"] = Value::Null), Ok(32_768));
    let unsaid = |c: &mut Value| drop(c.as_object_mut().unwrap().remove("sliding_window"));
    assert_eq!(positions("Mistral-7B-v0.1", unsaid), Ok(4096));
    let qwen = |change| positions("Qwen3-0.6B", change);
    let all = |c: &mut Value| {
        c["use_sliding_window"] = json!(true);
        c["sliding_window"] = json!(1000);
    };
    assert_eq!(qwen(all), Ok(40_960), "no layer is above max_window_layers");
    let some: fn(&mut Value) = |c| {
        (c["use_sliding_window"], c["sliding_window"]) = (json!(true), json!(1000));
        c["max_window_layers"] = json!(0);
    };
    assert_eq!(qwen(some), Ok(1000));
    let kinds: fn(&mut Value) = |c| {
        c["layer_types"] = json!(["full_attention", "sliding_attention"]);
        c["sliding_window"] = json!(512);
    };
    assert_eq!(qwen(kinds), Ok(512));

    type Change = fn(&mut Value);
    let refused: &[(&str, Change, &str)] = &[
        ("Qwen3-0.6B", |c| c["layer_types"] = json!(["linear_attention"]), "layer_types: [\"linear_attention\"]"),
        ("Qwen3-0.6B", |c| c["sliding_window"] = json!(0), "sliding_window: 0"),
        ("phi-2", |c| c["qk_layernorm"] = json!(true), "qk_layernorm: true"),
        ("stable-code-3b", |c| c["qk_layernorm"] = json!(true), "qk_layernorm: true"),
        ("phi-2", |c| c["partial_rotary_factor"] = json!(1.5), "partial_rotary_factor: 1.5 is more than"),
        ("phi-2", |c| c["partial_rotary_factor"] = json!(0.01), "partial_rotary_factor: 0.01 of heads of 80"),
        ("pythia-410m", |c| c["rotary_pct"] = json!(0.27), "rotary_pct: 0.27 of heads of 64 values are 17"),
        ("pythia-410m", |c| c["hidden_size"] = json!(1000), "hidden_size: 1000 is not a multiple"),
        ("pythia-410m", |c| c["rope_parameters"] = json!({"full_attention": {}}), "rope_parameters: those of"),
        ("gpt2", |c| c["n_head"] = json!(7), "n_embd: 768 is not a multiple of n_head: 7"),
        ("gpt2", |c| c["n_positions"] = json!(1u64 << 40), "n_positions: 1099511627776"),
        ("gpt2", |c| c["n_embd"] = Value::Null, "n_embd is missing"),
        ("gpt2", |c| c["n_inner"] = json!("wide"), "n_inner: \"wide\""),
        ("gpt2", |c| c["add_cross_attention"] = json!(true), "add_cross_attention: true"),
        ("gpt2", |c| c["activation_function"] = json!("tanh"), "activation_function: \"tanh\""),
        ("starcoderbase-1b", |c| c["multi_query"] = json!(2), "multi_query: 2"),
        ("granite-3.0-2b-base", |c| c["logits_scaling"] = json!(0), "logits_scaling: 0"),
        ("codegemma-2b", |c| c["use_bidirectional_attention"] = json!(true), "use_bidirectional_attention: true"),
        (
            "bloom-560m",
            |c| c["apply_residual_connection_post_layernorm"] = json!(true),
            "apply_residual_connection_post_layernorm: true",
        ),
    ];
    for (name, change, want) in refused {
        let error = positions(name, *change).unwrap_err();
        assert!(error.contains(want) && error.contains("config.json"), "wanted {want:?} in {error:?}");
    }
}

/// codeparrot-small divides each layer's scores by the layer's number.
#[test]
fn scores_of_a_layer() {
    let config = read(|c| {
        *c = published("gpt2");
        c["scale_attn_by_inverse_layer_idx"] = json!(true);
    });
    let config = config.unwrap();
    assert_eq!([0, 1, 3].map(|layer| config.attention_scale(layer)), [0.125, 0.0625, 0.03125]);
}
