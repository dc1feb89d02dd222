//! GPUs: the agent's own code over the fake NVML library, loaded as the driver's is. Time stands where a test puts it.
#![allow(missing_docs)]

mod agent;
mod fake_gpus;
mod fake_kubelet;
mod metering;
mod slots;
