//! Model files that are graphs: each runs in the engine of its format, on the real cluster.

use anyhow::{Context, ensure};
use joulecast_crds::inference_job::conditions;
use joulecast_tests::cluster::repository;
use joulecast_tests::job::{apply_job, await_job, ensure_status_is_true, is_true, results};
use joulecast_tests::namespace::with_namespace;
use serde_json::{Value, json};

/// The golden model as a graph for each of the libraries that the runtime's image opens, and what transformers says with its weights.
#[tokio::test]
async fn graphs_run_in_the_engines_of_their_formats_and_give_the_golden_tokens() {
    with_namespace("graphs", |here| async move {
        let golden = repository().join("runtime-pod/tests/golden/tiny-llama");
        let cases: Value = serde_json::from_slice(&std::fs::read(golden.join("golden.json"))?)?;
        let cases = cases["cases"].as_array().context("cases")?;
        // Its tokenizer's words are t0, t1, ...
        let words = |case: &Value| -> String {
            let ids = case["generated_ids"].as_array().into_iter().flatten();
            ids.map(|id| format!("t{id}")).collect::<Vec<_>>().join(" ")
        };
        let request = |(number, case): (usize, &Value)| {
            let count = case["generated_ids"].as_array().map(Vec::len);
            let body = json!({"model": "graph", "prompt": case["prompt_ids"], "max_tokens": count, "temperature": 0, "ignore_eos": true});
            json!({"custom_id": format!("c-{number}"), "method": "POST", "url": "/v1/completions", "body": body}).to_string() + "\n"
        };
        let input: String = cases.iter().enumerate().map(request).collect();
        let engines: [(&str, &[&str]); 2] =
            [("onnx", &["model.onnx"]), ("openvino", &["model.xml", "model.bin", "joulecast.json"])];
        for (engine, files) in engines {
            let files: Vec<_> = files.iter().chain(&["config.json", "tokenizer.json"]).map(|file| golden.join(file)).collect();
            here.install_files(engine, &files.iter().map(|file| file.as_path()).collect::<Vec<_>>()).await?;
            let source = json!({"persistentVolumeClaim": {"claimName": "models", "path": engine}});
            let model = json!({"apiVersion": "joulecast.dev/v1alpha1", "kind": "InferenceModel", "metadata": {"name": engine},
                "spec": {"artifacts": [{"format": engine, "dtype": "f32", "source": source}]}});
            here.apply(&model.to_string()).await?;
            let models = json!({"models": [{"name": engine}], "constraints": {"engines": [engine]}});
            apply_job(&here, &format!("{engine}-job"), &input, models).await?;
        }
        for (engine, _) in engines {
            let name = format!("{engine}-job");
            let job = await_job(&here, &name, "Complete", |job| is_true(job, conditions::COMPLETE)).await?;
            let lines = results(&here, &name).await?;
            ensure_status_is_true(&job, &lines)?;
            let chosen = job.status.and_then(|status| status.plan).map(|plan| plan.chosen).unwrap_or_default();
            ensure!(chosen.len() == 1 && serde_json::to_value(chosen[0].engine)? == engine, "{chosen:?}");
            for (case, line) in cases.iter().zip(&lines) {
                let said = &line["response"]["body"]["choices"][0]["text"];
                ensure!(*said == words(case), "{engine} said {said}, not {}", words(case));
            }
        }
        Ok(())
    })
    .await;
}
