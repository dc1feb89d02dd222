//! NVML's functions, as `nvml.h` declares them. A handle of a GPU is its index plus one; that of a MIG instance has the
//! instance's index plus one in its upper bits.
#![allow(missing_docs, unreachable_pub, reason = "they are documented by NVIDIA, and found by name")]

use crate::state::{Gpu, Instance, State, current};
use nvml_wrapper_sys::bindings::*;
use std::ffi::{c_char, c_int, c_uint, c_ulonglong};
use std::sync::Arc;
use std::time::Duration;

const SUCCESS: nvmlReturn_t = nvmlReturn_enum_NVML_SUCCESS;
const INVALID: nvmlReturn_t = nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT;
const NOT_SUPPORTED: nvmlReturn_t = nvmlReturn_enum_NVML_ERROR_NOT_SUPPORTED;
const NOT_FOUND: nvmlReturn_t = nvmlReturn_enum_NVML_ERROR_NOT_FOUND;
const NO_DRIVER: nvmlReturn_t = nvmlReturn_enum_NVML_ERROR_DRIVER_NOT_LOADED;
const LOST: nvmlReturn_t = nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST;
const TIMEOUT: nvmlReturn_t = nvmlReturn_enum_NVML_ERROR_TIMEOUT;
const TOO_SMALL: nvmlReturn_t = nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_SIZE;

/// `nvmlEventTypeXidCriticalError` of nvml.h.
const XID_CRITICAL: c_ulonglong = 8;
/// How often the state is looked at while somebody waits.
const LOOK: Duration = Duration::from_millis(20);

/// Bits of a handle that hold the GPU.
const GPU_BITS: u32 = 8;

/// What a handle stands for.
struct Target {
    state: Arc<State>,
    gpu: usize,
    instance: Option<usize>,
}

impl Target {
    fn of(handle: nvmlDevice_t) -> Result<Self, nvmlReturn_t> {
        let state = current().ok_or(NO_DRIVER)?;
        let number = handle as usize;
        let gpu = (number & ((1 << GPU_BITS) - 1)).checked_sub(1).ok_or(INVALID)?;
        let known = state.gpus.get(gpu).ok_or(INVALID)?;
        if known.lost {
            return Err(LOST);
        }
        Ok(Self { gpu, instance: (number >> GPU_BITS).checked_sub(1), state })
    }

    fn gpu(&self) -> &Gpu {
        &self.state.gpus[self.gpu]
    }

    fn instance(&self) -> Result<&Instance, nvmlReturn_t> {
        let instances = self.gpu().instances.as_ref().ok_or(INVALID)?;
        self.instance.and_then(|index| instances.get(index)).ok_or(INVALID)
    }

    /// A whole GPU: MIG instances have no power, energy or utilisation of their own.
    fn whole(handle: nvmlDevice_t) -> Result<Self, nvmlReturn_t> {
        let target = Self::of(handle)?;
        if target.instance.is_some() { Err(NOT_SUPPORTED) } else { Ok(target) }
    }
}

fn handle(gpu: usize, instance: Option<usize>) -> nvmlDevice_t {
    (gpu + 1 + instance.map_or(0, |index| (index + 1) << GPU_BITS)) as nvmlDevice_t
}

fn told(outcome: Result<(), nvmlReturn_t>) -> nvmlReturn_t {
    outcome.err().unwrap_or(SUCCESS)
}

/// Stores a value where the caller wants it.
///
/// # Safety
/// `to` is null or points to a place for it.
unsafe fn put<T>(to: *mut T, value: T) -> Result<(), nvmlReturn_t> {
    if to.is_null() {
        return Err(INVALID);
    }
    // SAFETY: not null, and by the caller's contract a place for a `T`.
    unsafe { to.write(value) };
    Ok(())
}

/// Stores a text with its closing zero.
///
/// # Safety
/// `to` is null or points to `length` bytes.
unsafe fn put_text(to: *mut c_char, length: c_uint, text: &str) -> Result<(), nvmlReturn_t> {
    if to.is_null() {
        return Err(INVALID);
    }
    if text.len() >= length as usize {
        return Err(TOO_SMALL);
    }
    // SAFETY: there is room for the text and its zero.
    unsafe {
        to.cast::<u8>().copy_from_nonoverlapping(text.as_ptr(), text.len());
        to.add(text.len()).write(0);
    }
    Ok(())
}

/// One function of NVML: its body returns a result, and may write through the caller's pointers.
macro_rules! nvml {
    ($($name:ident($($argument:ident: $type:ty),*) $body:block)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($argument: $type),*) -> nvmlReturn_t {
            // SAFETY: the pointers are the caller's, as nvml.h wants them.
            #[allow(unused_unsafe, reason = "not every body writes through a pointer")]
            let call = || -> Result<(), nvmlReturn_t> { unsafe { $body } };
            told(call())
        }
    )*};
}

nvml! {
    nvmlInit_v2() { current().map(drop).ok_or(NO_DRIVER) }

    nvmlShutdown() { Ok(()) }

    nvmlSystemGetDriverVersion(version: *mut c_char, length: c_uint) { put_text(version, length, "570.00.00") }

    nvmlDeviceGetCount_v2(count: *mut c_uint) {
        put(count, current().ok_or(NO_DRIVER)?.gpus.len() as c_uint)
    }

    nvmlDeviceGetHandleByIndex_v2(index: c_uint, device: *mut nvmlDevice_t) {
        let found = handle(index as usize, None);
        Target::of(found)?;
        put(device, found)
    }

    nvmlDeviceGetUUID(device: nvmlDevice_t, uuid: *mut c_char, length: c_uint) {
        let target = Target::of(device)?;
        let text = if target.instance.is_some() { &target.instance()?.uuid } else { &target.gpu().uuid };
        put_text(uuid, length, text)
    }

    nvmlDeviceGetName(device: nvmlDevice_t, name: *mut c_char, length: c_uint) {
        put_text(name, length, &Target::of(device)?.gpu().name)
    }

    nvmlDeviceGetMinorNumber(device: nvmlDevice_t, minor: *mut c_uint) {
        put(minor, Target::whole(device)?.gpu().minor)
    }

    nvmlDeviceGetPciInfo_v3(device: nvmlDevice_t, pci: *mut nvmlPciInfo_t) {
        let target = Target::whole(device)?;
        let bus = target.gpu().bus;
        let mut info: nvmlPciInfo_t = std::mem::zeroed();
        info.bus = bus;
        put_text(info.busIdLegacy.as_mut_ptr(), 16, &format!("0000:{bus:02X}:00.0"))?;
        put_text(info.busId.as_mut_ptr(), 32, &format!("00000000:{bus:02X}:00.0"))?;
        put(pci, info)
    }

    nvmlDeviceGetTopologyCommonAncestor(
        one: nvmlDevice_t, other: nvmlDevice_t, level: *mut nvmlGpuTopologyLevel_t
    ) {
        let (one, other) = (Target::whole(one)?, Target::whole(other)?);
        let near = one.gpu().bus >> 4 == other.gpu().bus >> 4;
        let far = nvmlGpuLevel_enum_NVML_TOPOLOGY_SYSTEM;
        put(level, if near { nvmlGpuLevel_enum_NVML_TOPOLOGY_SINGLE } else { far })
    }

    nvmlDeviceGetPowerManagementLimitConstraints(device: nvmlDevice_t, least: *mut c_uint, most: *mut c_uint) {
        let target = Target::whole(device)?;
        put(least, 200_000)?;
        put(most, target.gpu().max_watts as c_uint * 1000)
    }

    nvmlDeviceGetPowerUsage(device: nvmlDevice_t, milliwatts: *mut c_uint) {
        put(milliwatts, told_milliwatts(&Target::whole(device)?))
    }

    nvmlDeviceGetFieldValues(device: nvmlDevice_t, count: c_int, values: *mut nvmlFieldValue_t) {
        let target = Target::whole(device)?;
        for index in 0..usize::try_from(count).map_err(|_| INVALID)? {
            let value = &mut *values.add(index);
            if value.fieldId == field_id::NVML_FI_DEV_POWER_INSTANT {
                value.valueType = nvmlValueType_enum_NVML_VALUE_TYPE_UNSIGNED_INT;
                value.value = nvmlValue_t { uiVal: told_milliwatts(&target) };
                value.nvmlReturn = SUCCESS;
            } else {
                value.nvmlReturn = NOT_SUPPORTED;
            }
        }
        Ok(())
    }

    nvmlDeviceGetTotalEnergyConsumption(device: nvmlDevice_t, millijoules: *mut c_ulonglong) {
        let target = Target::whole(device)?;
        if !target.gpu().has_energy {
            return Err(NOT_SUPPORTED);
        }
        put(millijoules, target.gpu().millijoules(target.state.now()))
    }

    nvmlDeviceGetUtilizationRates(device: nvmlDevice_t, rates: *mut nvmlUtilization_t) {
        let target = Target::whole(device)?;
        // Real GPUs in MIG mode do not tell it.
        if target.gpu().instances.is_some() {
            return Err(NOT_SUPPORTED);
        }
        put(rates, nvmlUtilization_t { gpu: target.gpu().utilization_percent, memory: 0 })
    }

    nvmlDeviceGetMemoryInfo_v2(device: nvmlDevice_t, memory: *mut nvmlMemory_v2_t) {
        let target = Target::whole(device)?;
        let (total, used) = (target.gpu().memory_bytes, target.gpu().memory_used_bytes);
        let version = if memory.is_null() { 0 } else { (*memory).version };
        put(memory, nvmlMemory_v2_t { version, total, reserved: 0, free: total - used, used })
    }

    nvmlDeviceGetMigMode(device: nvmlDevice_t, now: *mut c_uint, pending: *mut c_uint) {
        let on = c_uint::from(Target::whole(device)?.gpu().instances.is_some());
        put(now, on)?;
        put(pending, on)
    }

    nvmlDeviceGetMaxMigDeviceCount(device: nvmlDevice_t, count: *mut c_uint) {
        put(count, if Target::whole(device)?.gpu().instances.is_some() { 7 } else { 0 })
    }

    nvmlDeviceGetMigDeviceHandleByIndex(device: nvmlDevice_t, index: c_uint, instance: *mut nvmlDevice_t) {
        let target = Target::whole(device)?;
        let there = target.gpu().instances.as_ref().is_some_and(|instances| instances.len() > index as usize);
        if !there {
            return Err(NOT_FOUND);
        }
        put(instance, handle(target.gpu, Some(index as usize)))
    }

    nvmlDeviceGetGpuInstanceId(device: nvmlDevice_t, id: *mut c_uint) {
        put(id, Target::of(device)?.instance()?.gpu_instance)
    }

    nvmlDeviceGetComputeInstanceId(device: nvmlDevice_t, id: *mut c_uint) {
        put(id, Target::of(device)?.instance()?.compute_instance)
    }

    nvmlDeviceGetAttributes_v2(device: nvmlDevice_t, attributes: *mut nvmlDeviceAttributes_t) {
        let target = Target::of(device)?;
        let slices = target.instance()?.slices;
        let mut told: nvmlDeviceAttributes_t = std::mem::zeroed();
        told.gpuInstanceSliceCount = slices;
        told.computeInstanceSliceCount = slices;
        put(attributes, told)
    }

    nvmlDeviceGetSupportedEventTypes(device: nvmlDevice_t, types: *mut c_ulonglong) {
        Target::whole(device)?;
        put(types, XID_CRITICAL)
    }

    nvmlEventSetCreate(set: *mut nvmlEventSet_t) {
        // What happened before is not told.
        let seen = Box::new(current().ok_or(NO_DRIVER)?.xids.len());
        put(set, Box::into_raw(seen).cast())
    }

    nvmlDeviceRegisterEvents(device: nvmlDevice_t, types: c_ulonglong, set: nvmlEventSet_t) {
        Target::whole(device)?;
        if types & !XID_CRITICAL != 0 || set.is_null() { Err(NOT_SUPPORTED) } else { Ok(()) }
    }

    nvmlEventSetWait_v2(set: nvmlEventSet_t, event: *mut nvmlEventData_t, timeout_ms: c_uint) {
        if set.is_null() {
            return Err(INVALID);
        }
        let seen = &mut *set.cast::<usize>();
        for _ in 0..=u128::from(timeout_ms) / LOOK.as_millis() {
            let state = current().ok_or(NO_DRIVER)?;
            if let Some(xid) = state.xids.get(*seen) {
                *seen += 1;
                let gpu = state.gpus.iter().position(|gpu| gpu.uuid == xid.uuid).ok_or(INVALID)?;
                let mut told: nvmlEventData_t = std::mem::zeroed();
                told.device = handle(gpu, None);
                told.eventType = XID_CRITICAL;
                told.eventData = xid.number;
                return put(event, told);
            }
            if state.is_final {
                std::thread::sleep(Duration::from_millis(timeout_ms.into()));
                break;
            }
            std::thread::sleep(LOOK);
        }
        Err(TIMEOUT)
    }

    nvmlEventSetFree(set: nvmlEventSet_t) {
        if !set.is_null() {
            drop(Box::from_raw(set.cast::<usize>()));
        }
        Ok(())
    }
}

/// The power that is told, in milliwatts.
fn told_milliwatts(target: &Target) -> c_uint {
    let gpu = target.gpu();
    let watts = i64::try_from(gpu.watts(target.state.now())).unwrap_or(0);
    c_uint::try_from(watts * (100 + gpu.power_off_percent) * 10).unwrap_or(0)
}
