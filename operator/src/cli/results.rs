//! `joulecast results JOB`: prints a job's output file, wherever its volume lies.

use super::access::{Access, block_on};
use super::reading_pod::{Reading, image_of};
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use joulecast_crds::inference_job::Output;
use joulecast_crds::{InferenceJob, names};
use kube::Api;
use serde_json::Value;

/// Prints the results of a job.
#[derive(Debug, Args)]
pub struct Results {
    /// Name of the InferenceJob.
    job: String,
    #[command(flatten)]
    access: Access,
    /// Print the first N results only.
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    /// text for people; jsonl for the lines of the output file as they are.
    #[arg(short, long, default_value = "text")]
    output: Form,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Form {
    Text,
    Jsonl,
}

impl Results {
    /// Prints the results to `out`.
    ///
    /// # Errors
    /// If the job, its image or its output cannot be read.
    pub fn run(&self, out: &mut dyn std::io::Write) -> Result<()> {
        block_on(async {
            let client = self.access.client().await?;
            let jobs: Api<InferenceJob> = Api::default_namespaced(client.clone());
            let job = jobs.get(&self.job).await.with_context(|| format!("InferenceJob {} cannot be read", self.job))?;
            let file = match &job.spec.output {
                Output { persistent_volume_claim: Some(claim), s3: _ } => claim,
                Output { persistent_volume_claim: None, s3: Some(object) } => bail!(
                    "the results are the object {object}: read it with a client of its server, for example `aws s3 cp {object} -`"
                ),
                Output { persistent_volume_claim: None, s3: None } => bail!("{}: spec.output names nothing", self.job),
            };
            let label = format!("{}={}", names::LABEL_JOB, self.job);
            let image = image_of(&client, &label).await.with_context(|| format!("InferenceJob {}", self.job))?;
            let reading =
                Reading { of: &self.job, image: &image, file, overrides: &job.spec.pod_template, limit: self.limit };
            let mut print = |line: &str| -> Result<()> {
                match self.output {
                    Form::Jsonl => writeln!(out, "{line}")?,
                    Form::Text => out.write_all(text(line).as_bytes())?,
                }
                Ok(())
            };
            reading.lines(&client, &mut print).await.context("the output is written when the job is complete")
        })
    }
}

/// One result line for people: its id, the energy, and the text or the error.
fn text(line: &str) -> String {
    let Ok(result) = serde_json::from_str::<Value>(line) else { return format!("(not a result) {line}\n") };
    let id = result["custom_id"].as_str().or_else(|| result["id"].as_str()).unwrap_or("-");
    let energy = match result["energy"]["joules"].as_f64() {
        Some(joules) => format!("{joules:.3} J ({})", result["energy"]["source"].as_str().unwrap_or("?")),
        None => "energy not known".to_owned(),
    };
    if !result["error"].is_null() {
        let error = &result["error"];
        return format!(
            "--- {id}: error: {}\n",
            error["message"].as_str().map_or_else(|| error.to_string(), str::to_owned)
        );
    }
    let body = &result["response"]["body"];
    let choice = &body["choices"][0];
    let answer = choice["text"].as_str().or_else(|| choice["message"]["content"].as_str()).unwrap_or("");
    let tokens = &body["usage"]["completion_tokens"];
    format!("--- {id}: {tokens} tokens, {energy}\n{}\n", answer.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_read_as_text_with_energy_or_error() {
        let done = r#"{"custom_id":"a","response":{"body":{"choices":[{"text":"fn x() {}\n"}],"usage":{"completion_tokens":4}}},"error":null,"energy":{"joules":0.25,"source":"Modelled"}}"#;
        assert_eq!(text(done), "--- a: 4 tokens, 0.250 J (Modelled)\nfn x() {}\n");
        let chat = r#"{"custom_id":"c","response":{"body":{"choices":[{"message":{"content":"hi"}}],"usage":{"completion_tokens":1}}},"error":null,"energy":{"joules":null}}"#;
        assert_eq!(text(chat), "--- c: 1 tokens, energy not known\nhi\n");
        let failed = r#"{"custom_id":null,"id":"line-2","error":{"code":"invalid_json","message":"line 2: not JSON"}}"#;
        assert_eq!(text(failed), "--- line-2: error: line 2: not JSON\n");
    }
}
