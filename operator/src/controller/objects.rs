//! Inputs and outputs that are objects in buckets: what their pods need. Pure.
//!
//! The operator itself never reads a Secret: the kubelet puts its keys into the pod. They are marked optional, so that a
//! Secret that is missing is told by the run, with its reason, and not by a pod that waits for ever.

use crate::controller::validate::{InputFile, OutputFile, ValidJob};
use joulecast_crds::names::bucket_variables;
use joulecast_crds::run_spec::BucketObject;
use joulecast_crds::s3::S3Object;
use k8s_openapi::api::core::v1::{EmptyDirVolumeSource, EnvVar, EnvVarSource, SecretKeySelector, Volume, VolumeMount};
use k8s_openapi::api::networking::v1::{NetworkPolicyEgressRule, NetworkPolicyPort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// Where a pod works on copies of objects.
pub(super) const SCRATCH_DIR: &str = "/scratch";
const SCRATCH: &str = "scratch";

/// The object that holds the requests, if it is one.
pub(super) fn input(job: &ValidJob) -> Option<&S3Object> {
    match &job.input {
        InputFile::Object(object) => Some(object),
        InputFile::Claim(_) | InputFile::ConfigMap(_) => None,
    }
}

/// The object that is to hold the results, if it is one.
pub(super) fn output(job: &ValidJob) -> Option<&S3Object> {
    match &job.output {
        OutputFile::Object(object) => Some(object),
        OutputFile::Claim(_) => None,
    }
}

/// As a pod is told.
pub(super) fn told(object: &S3Object) -> BucketObject {
    let S3Object { bucket, key, region, endpoint, path_style, credentials_secret } = object;
    BucketObject {
        bucket: bucket.clone(),
        key: key.clone(),
        region: region.clone(),
        endpoint: endpoint.clone(),
        path_style: *path_style,
        signed: credentials_secret.is_some(),
    }
}

/// Another object of the same bucket.
pub(super) fn beside(object: &S3Object, rest: &str) -> S3Object {
    S3Object { key: format!("{}{rest}", object.key), ..object.clone() }
}

/// The keys of the job's buckets, as variables.
pub(super) fn variables(job: &ValidJob) -> Vec<EnvVar> {
    let both = [(input(job), bucket_variables::INPUT), (output(job), bucket_variables::OUTPUT)];
    let of = |(object, names): (Option<&S3Object>, [&'static str; 3])| {
        let secret = object.and_then(|object| object.credentials_secret.as_ref())?.name.clone();
        Some(names.into_iter().zip(bucket_variables::SECRET_KEYS).map(move |(name, key)| EnvVar {
            name: name.into(),
            value: None,
            value_from: Some(EnvVarSource {
                secret_key_ref: Some(SecretKeySelector { name: secret.clone(), key: key.into(), optional: Some(true) }),
                ..EnvVarSource::default()
            }),
        }))
    };
    both.into_iter().filter_map(of).flatten().collect()
}

/// The disk that copies of objects lie on, and where it is mounted.
pub(super) fn scratch(job: &ValidJob) -> Option<(Volume, VolumeMount)> {
    input(job).or(output(job))?;
    let volume = Volume { name: SCRATCH.into(), empty_dir: Some(EmptyDirVolumeSource::default()), ..Volume::default() };
    let mount = VolumeMount { name: SCRATCH.into(), mount_path: SCRATCH_DIR.into(), ..VolumeMount::default() };
    Some((volume, mount))
}

/// What a job of objects has to reach: its servers, by port, since a policy knows no host names; and the names of hosts.
pub(super) fn egress(job: &ValidJob) -> Option<Vec<NetworkPolicyEgressRule>> {
    let mut ports: Vec<i32> = [input(job), output(job)].into_iter().flatten().map(port).collect();
    if ports.is_empty() {
        return None;
    }
    ports.sort_unstable();
    ports.dedup();
    let port = |protocol: &str, port| NetworkPolicyPort {
        port: Some(IntOrString::Int(port)),
        protocol: Some(protocol.into()),
        end_port: None,
    };
    let dns = [port("UDP", 53), port("TCP", 53)];
    let ports = dns.into_iter().chain(ports.into_iter().map(|number| port("TCP", number))).collect();
    Some(vec![NetworkPolicyEgressRule { ports: Some(ports), to: None }])
}

fn port(object: &S3Object) -> i32 {
    let endpoint = object.endpoint.as_deref().unwrap_or("https://");
    let (scheme, host) = endpoint.split_once("://").unwrap_or(("https", endpoint));
    let given = host.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
    given.unwrap_or(if scheme == "http" { 80 } else { 443 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::samples;
    use crate::controller::validate::validate;
    use serde_json::json;

    fn job(input: Option<&str>) -> ValidJob {
        let mut job = samples::job();
        let object = |endpoint: Option<&str>, secret: &str| json!({"bucket": "batches", "key": "a/b", "endpoint": endpoint, "credentialsSecret": {"name": secret}});
        if let Some(endpoint) = input {
            job.spec.input = serde_json::from_value(json!({"s3": object(Some(endpoint), "reader")})).unwrap();
        }
        job.spec.output = serde_json::from_value(json!({"s3": object(None, "writer")})).unwrap();
        job.spec.output.s3.as_mut().unwrap().key.push_str(".out");
        validate(&job, &samples::models()).unwrap()
    }

    #[test]
    fn a_pod_gets_the_keys_of_its_buckets_and_nothing_else_of_a_secret() {
        let variables = variables(&job(Some("http://minio:9000")));
        let facts: Vec<_> = variables
            .iter()
            .map(|variable| {
                let from = variable.value_from.as_ref().unwrap().secret_key_ref.as_ref().unwrap();
                (variable.name.as_str(), from.name.as_str(), from.key.as_str(), from.optional)
            })
            .collect();
        assert_eq!(facts.len(), 6);
        assert_eq!(facts[0], ("JOULECAST_INPUT_ACCESS_KEY_ID", "reader", "AWS_ACCESS_KEY_ID", Some(true)));
        assert_eq!(facts[4], ("JOULECAST_OUTPUT_SECRET_ACCESS_KEY", "writer", "AWS_SECRET_ACCESS_KEY", Some(true)));
        assert!(super::variables(&validate(&samples::job(), &samples::models()).unwrap()).is_empty());
    }

    #[test]
    fn a_policy_opens_the_ports_of_the_servers_only() {
        let ports = |job: &ValidJob| -> Vec<i32> {
            let rules = egress(job).unwrap();
            let port = |port: &NetworkPolicyPort| match &port.port {
                Some(IntOrString::Int(number)) => *number,
                other => panic!("{other:?}"),
            };
            rules[0].ports.as_ref().unwrap().iter().map(port).collect()
        };
        assert_eq!(ports(&job(None)), [53, 53, 443]);
        assert_eq!(ports(&job(Some("http://minio.example:9000"))), [53, 53, 443, 9000]);
        assert_eq!(ports(&job(Some("http://minio.example"))), [53, 53, 80, 443]);
        assert_eq!(egress(&validate(&samples::job(), &samples::models()).unwrap()), None);
    }
}
