//! Slots of GPUs, and the files that belong to them.

use crate::fake_gpus::{FakeGpus, gpu, instance, uuid};
use joulecast_device_plugin::cdi;
use joulecast_device_plugin::gpus::{self, Via};
use joulecast_device_plugin::labels::facts;
use joulecast_device_plugin::slots::{Access, Slot};
use joulecast_meter::nvml::{LIBRARY, Nvml, OpenError};
use serde_json::json;
use std::fs;

fn nodes(slot: &Slot) -> &[String] {
    match &slot.device.as_ref().unwrap().access {
        Access::Nodes(nodes) => nodes,
        Access::Cdi(name) => panic!("{name}"),
    }
}

/// One whole GPU on NUMA node 1, and one with two instances.
fn machine() -> FakeGpus {
    let mut shared = gpu('b', 3);
    shared.instances = Some(vec![instance('c', 1, 3), instance('d', 2, 1)]);
    let fake = FakeGpus::new(vec![gpu('a', 0), shared]);
    fake.write("root/sys/bus/pci/devices/0000:10:00.0/numa_node", "1\n");
    fake.write("root/sys/bus/pci/devices/0000:13:00.0/numa_node", "-1\n");
    fake.write("root/dev/nvidia-uvm-tools", "");
    let capabilities = "root/proc/driver/nvidia/capabilities/gpu3/mig";
    for (path, minor) in [("gi1/access", 12), ("gi1/ci0/access", 13), ("gi2/access", 21), ("gi2/ci0/access", 22)] {
        fake.write(&format!("{capabilities}/{path}"), &format!("DeviceFileMinor: {minor}\nDeviceFileMode: 292\n"));
    }
    fake
}

#[test]
fn one_slot_for_each_gpu_or_instance_with_its_nodes() {
    let fake = machine();
    let (slots, notes) = gpus::slots(&fake.boards(), &fake.host(), Via::Nodes);
    assert!(notes.is_empty(), "{notes:?}");
    let ids: Vec<&str> = slots.iter().map(|slot| slot.id.as_str()).collect();
    assert_eq!(ids, [uuid("GPU", 'a'), uuid("MIG", 'c'), uuid("MIG", 'd')]);
    assert_eq!((slots[0].numa_nodes.as_slice(), slots[1].numa_nodes.as_slice()), (&[1][..], &[][..]));
    let common = ["/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools"];
    assert_eq!(nodes(&slots[0]), [&["/dev/nvidia0"], &common[..]].concat());
    let caps = ["/dev/nvidia-caps/nvidia-cap21", "/dev/nvidia-caps/nvidia-cap22"];
    assert_eq!(nodes(&slots[2]), [&["/dev/nvidia3"], &common[..], &caps].concat());
    // Both boards hang on one switch; instances of one board are nearer to each other.
    assert_eq!(slots[1].near, [(uuid("GPU", 'a'), 4), (uuid("MIG", 'd'), 6)].into());
}

#[test]
fn an_instance_whose_capabilities_are_not_told_is_named() {
    let fake = machine();
    fs::remove_file(fake.path("root/proc/driver/nvidia/capabilities/gpu3/mig/gi2/ci0/access")).unwrap();
    let (slots, notes) = gpus::slots(&fake.boards(), &fake.host(), Via::Nodes);
    assert_eq!((slots.len(), notes.len()), (3, 1));
    assert!(notes[0].contains(&uuid("MIG", 'd')) && notes[0].contains("NVIDIA runtime"), "{notes:?}");
}

#[test]
fn where_nvidias_plugin_gives_gpus_a_slot_is_the_right_to_be_metered() {
    let fake = machine();
    let (slots, _) = gpus::slots(&fake.boards(), &fake.host(), Via::NvidiaPlugin);
    assert_eq!(slots.iter().map(|slot| slot.id.as_str()).collect::<Vec<_>>(), ["cuda-0", "cuda-1", "cuda-2"]);
    assert!(slots.iter().all(|slot| slot.device.is_none()));
    // Who holds a GPU is the kubelet's word on NVIDIA's resource, and the socket is that of our slot.
    let gpu = uuid("GPU", 'a');
    let mut metering = fake.metering(&[("cuda-1", "a"), (&gpu, "a")]);
    let (_, meter, _) = fake.open(&mut metering, "cuda-1");
    assert!(meter.contains("nvml (gpu-0)"), "{meter}");
}

#[test]
fn the_cdi_specification_is_there_whole_and_goes_with_its_agent() {
    let fake = machine();
    let (slots, _) = gpus::slots(&fake.boards(), &fake.host(), Via::Cdi);
    let name = format!("joulecast.dev/cuda={}", uuid("MIG", 'c'));
    assert_eq!(slots[1].device.as_ref().unwrap().access, Access::Cdi(name));
    let specification = cdi::specification(&fake.boards(), &fake.host());
    let directory = fake.path("cdi");
    let file = cdi::File::write(&directory, &specification).unwrap();
    let there: Vec<_> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(there, ["joulecast.dev-cuda.json"]);
    let read: serde_json::Value =
        serde_json::from_slice(&fs::read(directory.join("joulecast.dev-cuda.json")).unwrap()).unwrap();
    assert_eq!((&read["cdiVersion"], &read["kind"]), (&json!("0.3.0"), &json!("joulecast.dev/cuda")));
    assert_eq!(read["devices"][0]["name"], uuid("GPU", 'a'));
    assert_eq!(read["devices"][0]["containerEdits"]["deviceNodes"][0], json!({"path": "/dev/nvidia0"}));
    assert_eq!(read["devices"].as_array().unwrap().len(), 3);
    assert_eq!(read["containerEdits"]["env"], json!(["NVIDIA_VISIBLE_DEVICES=void"]));
    drop(file);
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
    fake.write("in-the-way", "");
    let error = cdi::File::write(&fake.path("in-the-way"), &specification).unwrap_err().to_string();
    assert!(error.contains("in-the-way/joulecast.dev-cuda.json"), "{error}");
}

#[test]
fn labels_tell_the_product_and_the_meter() {
    let fake = machine();
    let meter = fake.meter();
    let product = |name: &str| name.to_owned();
    let labels = |gpus: &[String]| facts(&fake.host(), &meter, gpus).labels;
    let same = labels(&[product("NVIDIA H200"), product("NVIDIA H200")]);
    assert_eq!(same["joulecast.dev/device-class"], "cuda");
    assert_eq!(
        (same["joulecast.dev/gpu-product"].as_str(), same["joulecast.dev/meter"].as_str()),
        ("NVIDIA-H200", "nvml")
    );
    let mixed = labels(&[product("NVIDIA H200"), product("NVIDIA L4")]);
    assert_eq!(mixed["joulecast.dev/device-class"], "cuda");
    assert!(!mixed.contains_key("joulecast.dev/gpu-product"), "{mixed:?}");
    let annotations = facts(&fake.host(), &meter, &[]).annotations;
    assert_eq!(annotations["joulecast.dev/max-milliwatts"], "1400000");
}

#[test]
fn a_machine_without_the_library_or_the_driver_says_so() {
    let missing = Nvml::open("/nonexistent/libnvidia-ml.so.1".as_ref()).unwrap_err();
    assert!(matches!(&missing, OpenError::Library { library, .. } if library.starts_with("/nonexistent")), "{missing}");
    let directory = tempfile::tempdir().unwrap();
    let library = joulecast_fake_nvml::install(directory.path()).unwrap();
    let no_driver = Nvml::open(library.as_os_str()).unwrap_err();
    assert!(matches!(&no_driver, OpenError::Driver(_)), "{no_driver}");
    assert_eq!(LIBRARY, "libnvidia-ml.so.1");
}
