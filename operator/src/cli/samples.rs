//! `joulecast samples PROFILERUN`: the samples of a campaign as CSV, as `joulecast fit` reads them.

use super::access::{Access, block_on};
use super::reading_pod::{Reading, image_of};
use anyhow::{Context, Result};
use clap::Args;
use joulecast_crds::{ProfileRun, names};
use kube::Api;

/// Prints the samples that a ProfileRun has measured so far, as CSV.
#[derive(Debug, Args)]
pub struct SamplesCommand {
    /// Name of the ProfileRun.
    profile_run: String,
    #[command(flatten)]
    access: Access,
}

impl SamplesCommand {
    /// Prints the samples to `out`.
    ///
    /// # Errors
    /// If the ProfileRun, its image or its samples cannot be read.
    pub fn run(&self, out: &mut dyn std::io::Write) -> Result<()> {
        block_on(async {
            let client = self.access.client().await?;
            let runs: Api<ProfileRun> = Api::default_namespaced(client.clone());
            let name = &self.profile_run;
            let run = runs.get(name).await.with_context(|| format!("ProfileRun {name} cannot be read"))?;
            let label = format!("{}={name}", names::LABEL_PROFILE_RUN);
            let image = image_of(&client, &label).await.with_context(|| format!("ProfileRun {name}"))?;
            let reading = Reading {
                of: name,
                image: &image,
                file: &run.spec.samples.persistent_volume_claim,
                overrides: &run.spec.pod_template,
                limit: None,
            };
            reading.lines(&client, &mut |line| Ok(writeln!(out, "{line}")?)).await
        })
    }
}
