//! The kubelet's APIs, generated from `proto/` by the build script.
#![allow(missing_docs, clippy::all, clippy::pedantic)]

/// Device plugin API.
pub mod deviceplugin {
    tonic::include_proto!("v1beta1");
}

/// PodResources API.
pub mod podresources {
    tonic::include_proto!("v1");
}
