//! `joulecast-runtime quality`.

use super::OutputFormat;
use anyhow::Context;
use clap::Args;
use joulecast_crds::names::exit;
use joulecast_runtime::engine::{Dtype, EngineName, LoadOptions, Provider};
use joulecast_runtime::quality::{self, Prediction, Quality};
use std::io::{self, Write};
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(crate) struct QualityArgs {
    /// Directory of the artifact.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Engine that runs it.
    #[arg(long, value_enum)]
    engine: EngineName,
    /// Execution provider of both.
    #[arg(long, value_enum, default_value_t = Provider::Cpu)]
    provider: Provider,
    /// Type of the artifact's weights in memory [default: that of the files].
    #[arg(long, value_enum)]
    dtype: Option<Dtype>,
    /// Text to predict, of the kind that the model is for; UTF-8.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Directory of an artifact to compare with, such as the unrounded one.
    #[arg(long, value_name = "DIR")]
    reference: Option<PathBuf>,
    /// Engine that runs the reference [default: that of --engine].
    #[arg(long, value_enum, requires = "reference")]
    reference_engine: Option<EngineName>,
    /// Type of the reference's weights in memory [default: that of its files].
    #[arg(long, value_enum, requires = "reference")]
    reference_dtype: Option<Dtype>,
    /// Tokens of the text that count, from its beginning.
    #[arg(long, value_name = "N", default_value_t = 8192, value_parser = clap::value_parser!(u32).range(1..))]
    tokens: u32,
    /// Threads [default: the CPUs that this process may use].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// Form of the result on stdout.
    #[arg(long, value_enum, default_value_t = OutputFormat::Text)]
    output: OutputFormat,
}

/// Measures.
pub(crate) fn quality(args: QualityArgs) -> anyhow::Result<u8> {
    let text = std::fs::read_to_string(&args.text).with_context(|| format!("--text: {}", args.text.display()))?;
    let options = |directory: PathBuf, engine, dtype| LoadOptions {
        threads: args.threads.map(|threads| threads as usize),
        dtype,
        ..LoadOptions::new(directory, engine, args.provider)
    };
    let model = options(args.model, args.engine, args.dtype);
    let engine = args.reference_engine.unwrap_or(args.engine);
    let reference = args.reference.map(|directory| options(directory, engine, args.reference_dtype));
    let found = quality::measure(&model, reference.as_ref(), &text, args.tokens as usize)?;
    let mut stdout = io::stdout().lock();
    match args.output {
        OutputFormat::Json => writeln!(stdout, "{:#}", serde_json::to_value(&found).context("result as JSON")?)?,
        OutputFormat::Text => writeln!(stdout, "{}", sentence(&found))?,
    }
    Ok(exit::DONE)
}

fn sentence(found: &Quality) -> String {
    let Quality { own: Prediction { tokens, perplexity, top1_accuracy }, perplexity_ratio, top1_agreement, .. } = found;
    let mut text =
        format!("{tokens} tokens: perplexity {perplexity:.4}, {:.2} % of the tokens predicted", 100.0 * top1_accuracy);
    if let (Some(ratio), Some(agreement)) = (perplexity_ratio, top1_agreement) {
        text += &format!(
            "; against the reference: perplexity x {ratio:.4}, the same prediction for {:.2} %",
            100.0 * agreement
        );
    }
    text
}
