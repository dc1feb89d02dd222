//! CPU times from fake cgroup trees of both versions.

use super::*;
use crate::host::fake::FakeHost;

const UID: &str = "0a1b-2c";
const TREE: &str = "/sys/fs/cgroup";

fn packages(cpus: &[&[u32]]) -> Vec<Package> {
    let package = |(id, cpus): (usize, &&[u32])| Package {
        id: u32::try_from(id).unwrap(),
        cpus: cpus.to_vec(),
        numa_nodes: vec![],
    };
    cpus.iter().enumerate().map(package).collect()
}

fn find(fake: &FakeHost, root: &str, cpus: &[&[u32]]) -> Cgroups {
    Cgroups::find(&fake.host().path(TREE), root, fake.host(), packages(cpus)).unwrap()
}

fn holders(cgroups: &Cgroups) -> BTreeMap<String, PathBuf> {
    BTreeMap::from([(UID.to_owned(), cgroups.pod(UID).expect("the pod's cgroup"))])
}

#[test]
fn v1_counts_each_package_exactly() {
    let fake = FakeHost::new(&[
        ("/sys/fs/cgroup/cpuacct/cpuacct.usage_percpu", "100 200 300 400 \n"),
        ("/sys/fs/cgroup/cpuacct/node-x/kubepods/cpuacct.usage_percpu", "10 20 30 40 \n"),
        ("/sys/fs/cgroup/cpuacct/node-x/kubepods/burstable/pod0a1b-2c/cpuacct.usage_percpu", "1 2 3 4 \n"),
    ]);
    let mut cgroups = find(&fake, "/node-x", &[&[0, 2], &[1, 3]]);
    let holders = holders(&cgroups);
    let times = cgroups.sample(&holders).unwrap();
    assert_eq!(times.node, [400, 600]);
    assert_eq!(times.pods, Some(vec![40, 60]));
    assert_eq!(times.holders[UID], [4, 6]);
    assert_eq!(cgroups.describe(), "cgroup v1");
    fake.set("/sys/fs/cgroup/cpuacct/cpuacct.usage_percpu", "garbage");
    assert_eq!(cgroups.sample(&holders), None, "absent, not 0");
}

#[test]
fn v2_divides_by_the_cpu_set_or_as_the_node_was_busy() {
    let pod = "/sys/fs/cgroup/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod0a1b_2c.slice";
    let fake = FakeHost::new(&[("/sys/fs/cgroup/cgroup.controllers", "cpu\n")]);
    let set = |node: u64, pods: u64, holder: u64, ticks: [u64; 2]| {
        for (dir, usage) in [(TREE, node), ("/sys/fs/cgroup/kubepods.slice", pods), (pod, holder)] {
            fake.set(&format!("{dir}/cpu.stat"), &format!("usage_usec {usage}\nuser_usec 0\n"));
        }
        let stat = format!("cpu  9 9\ncpu0 {} 0 0 999 9 0 0 5\ncpu1 0 0 {} 999 9 0 0 5\nintr 1\n", ticks[0], ticks[1]);
        fake.set("/proc/stat", &stat);
    };
    set(1000, 500, 100, [10, 10]);
    let mut cgroups = find(&fake, "/", &[&[0], &[1]]);
    let holders = holders(&cgroups);
    let first = cgroups.sample(&holders).unwrap();
    set(1400, 800, 200, [13, 11]);
    let second = cgroups.sample(&holders).unwrap();
    let used = |later: &PackageTimes, earlier: &PackageTimes| [later[0] - earlier[0], later[1] - earlier[1]];
    assert_eq!(used(&second.node, &first.node), [300_000, 100_000], "three to one, as the ticks went");
    assert_eq!(used(&second.holders[UID], &first.holders[UID]), [75_000, 25_000]);
    fake.set(&format!("{pod}/cpuset.cpus.effective"), "1\n");
    set(1500, 900, 300, [14, 11]);
    let third = cgroups.sample(&holders).unwrap();
    assert_eq!(used(&third.holders[UID], &second.holders[UID]), [0, 100_000], "its CPU set is in package 1");
    assert_eq!(cgroups.divided.len(), 3);
    cgroups.sample(&BTreeMap::new()).unwrap();
    assert_eq!(cgroups.divided.len(), 2, "what is no longer asked for is forgotten");
}

#[test]
fn v2_with_one_package_is_the_sum_and_an_old_root_counts_ticks() {
    let fake = FakeHost::new(&[
        ("/sys/fs/cgroup/cgroup.controllers", "cpu\n"),
        ("/sys/fs/cgroup/kubepods/pod0a1b-2c/cpu.stat", "usage_usec 7\n"),
        ("/proc/stat", "cpu 1 2 3\ncpu0 1 2 3 900 900 4 5 900 1 1\n"),
    ]);
    let mut cgroups = find(&fake, "/", &[&[0]]);
    let times = cgroups.sample(&holders(&cgroups)).unwrap();
    assert_eq!((times.node, times.pods), (vec![15 * TICK_NANOS], None));
    assert_eq!(times.holders[UID], [7000]);
}

#[test]
fn what_is_not_there_is_said() {
    let fake = FakeHost::new(&[("/sys/fs/cgroup/x", "")]);
    let find = |packages| Cgroups::find(&fake.host().path(TREE), "/", fake.host(), packages).unwrap_err().to_string();
    assert!(find(packages(&[&[0]])).contains("neither"));
    assert!(find(vec![]).contains("no CPU"));
    fake.set("/sys/fs/cgroup/cgroup.controllers", "");
    fake.set("/sys/fs/cgroup/kubepods/pod0a1b-2c/cpu.stat", "usage_usec 7\n");
    let cgroups = super::tests::find(&fake, "/", &[&[0]]);
    for uid in ["", "..", "../kubepods", "other"] {
        assert_eq!(cgroups.pod(uid), None, "{uid:?}");
    }
}
