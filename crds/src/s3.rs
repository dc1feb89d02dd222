//! Objects in buckets of S3-compatible servers, as inputs and outputs name them.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// An object in a bucket of an S3-compatible server.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!self.key.split('/').exists(part, part == '' || part == '.' || part == '..')").message("key: give the key of an object, without '/' at either end and without empty, '.' or '..' parts"))]
pub struct S3Object {
    /// Name of the bucket.
    #[schemars(length(min = 3, max = 63))]
    #[x_kube(validation = Rule::new(r"self.matches('^[a-z0-9][a-z0-9.-]*[a-z0-9]$')").message("give the name of a bucket: lower-case letters, digits, '.' and '-'"))]
    pub bucket: String,
    /// Key of the object.
    #[schemars(length(min = 1, max = 512))]
    #[x_kube(validation = Rule::new(r"self.matches('^[A-Za-z0-9_.=+@/-]+$')").message("give the key of an object made of letters, digits and the characters _ . = + @ - /"))]
    pub key: String,
    /// Region that requests are signed for.
    #[serde(default = "default_region")]
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = Rule::new(r"self.matches('^[a-z0-9-]+$')").message("give the name of a region, for example \"eu-central-1\""))]
    pub region: String,
    /// The server, for example https://minio.example:9000; that of Amazon's region if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 261))]
    #[x_kube(validation = Rule::new(r"self.matches('^https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?$')").message("give the server alone, without a path, for example \"https://minio.example:9000\""))]
    pub endpoint: Option<String>,
    /// Whether requests name the bucket in their path; with false in front of the host name.
    #[serde(default = "default_path_style")]
    pub path_style: bool,
    /// A Secret of this namespace with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_SESSION_TOKEN where the access key is of a session. Without it requests are not signed, as for a bucket that is open to all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials_secret: Option<SecretReference>,
}

/// A Secret of the same namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretReference {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

impl S3Object {
    /// Whether both name the same object.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        (&self.endpoint, &self.bucket, &self.key) == (&other.endpoint, &other.bucket, &other.key)
    }
}

impl std::fmt::Display for S3Object {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "s3://{}/{}", self.bucket, self.key)
    }
}

fn default_region() -> String {
    "us-east-1".into()
}

fn default_path_style() -> bool {
    true
}
