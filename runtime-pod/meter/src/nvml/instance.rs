//! MIG instances of a GPU.

use nvml_wrapper::Device;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper_sys::bindings::{nvmlDevice_t, nvmlReturn_t};
use std::ffi::c_uint;

/// One MIG instance: a compute instance in a GPU instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// `MIG-...`.
    pub uuid: String,
    /// Identity of its GPU instance, as in `/proc/driver/nvidia/capabilities`; absent where the driver does not tell it.
    pub gpu_instance: Option<u32>,
    /// Identity of its compute instance there.
    pub compute_instance: Option<u32>,
    /// Compute slices that it has.
    pub slices: u32,
}

/// The instances of a GPU in MIG mode; those that cannot be used become notes.
pub(super) fn of(index: u32, device: &Device<'static>, notes: &mut Vec<String>) -> Vec<Instance> {
    let most = device.mig_device_count().unwrap_or(0);
    let mut instances = Vec::new();
    for number in 0..most {
        // Instances that were taken away leave gaps.
        let Ok(instance) = device.mig_device_by_index(number) else { continue };
        match describe(&instance) {
            Ok(instance) if instance.uuid.contains('/') => {
                notes.push(format!("gpu-{index}: {} left out: a driver of 470 or newer is needed", instance.uuid));
            }
            Ok(instance) => instances.push(instance),
            Err(error) => notes.push(format!("gpu-{index}: MIG instance {number} left out: {error}")),
        }
    }
    instances
}

fn describe(instance: &Device<'static>) -> Result<Instance, NvmlError> {
    let lib = instance.nvml().lib();
    Ok(Instance {
        uuid: instance.uuid()?,
        slices: instance.attributes()?.compute_instance_slice_count,
        gpu_instance: lib.nvmlDeviceGetGpuInstanceId.as_ref().ok().and_then(|function| number(*function, instance)),
        compute_instance: lib
            .nvmlDeviceGetComputeInstanceId
            .as_ref()
            .ok()
            .and_then(|function| number(*function, instance)),
    })
}

/// A function of NVML that tells a number of a device, which the wrapper does not wrap.
type Number = unsafe extern "C" fn(nvmlDevice_t, *mut c_uint) -> nvmlReturn_t;

#[allow(unsafe_code)]
fn number(function: Number, device: &Device<'static>) -> Option<u32> {
    let mut value: c_uint = 0;
    // SAFETY: the function is NVML's own, the handle lives as long as the device, and the number has its place.
    let code = unsafe { function(device.handle(), &raw mut value) };
    (code == 0).then_some(value)
}
