//! The files in which Linux tells about this process and its machine, below a root that tests can replace.

use std::fs;
use std::path::{Path, PathBuf};

/// Where `/proc` and the cgroup mounts are looked for.
#[derive(Debug, Clone)]
pub struct Host {
    root: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Self::below("/")
    }
}

/// A cgroup hierarchy that this process is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    /// Directory of this process's own cgroup.
    pub dir: PathBuf,
    /// Whether the hierarchy is version 2.
    pub unified: bool,
}

impl Host {
    /// The files below a root directory.
    #[must_use]
    pub fn below(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// An absolute path of the machine, below this root.
    #[must_use]
    pub fn path(&self, absolute: &str) -> PathBuf {
        self.root.join(absolute.trim_start_matches('/'))
    }

    /// Text of a file, or `None` if it cannot be read.
    #[must_use]
    pub fn text(&self, absolute: &str) -> Option<String> {
        fs::read_to_string(self.path(absolute)).ok()
    }

    /// A line `Name:<blanks>value` of a file such as `/proc/self/status` or `/proc/cpuinfo`.
    #[must_use]
    pub fn field(&self, absolute: &str, name: &str) -> Option<String> {
        let text = self.text(absolute)?;
        let value = |line: &str| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == name).then(|| value.trim().to_owned())
        };
        text.lines().find_map(value)
    }

    /// Highest resident memory of this process so far, in bytes (`VmHWM`).
    #[must_use]
    pub fn memory_peak_bytes(&self) -> Option<u64> {
        let value = self.field("/proc/self/status", "VmHWM")?;
        value.strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    }

    /// Model name of the first processor.
    #[must_use]
    pub fn cpu_model(&self) -> Option<String> {
        self.field("/proc/cpuinfo", "model name")
    }

    /// This process's cgroup in the hierarchy of a v1 controller, or in the unified hierarchy if that one has none.
    #[must_use]
    pub fn cgroup(&self, controller: &str) -> Option<Cgroup> {
        let mounts = self.text("/proc/self/mountinfo")?;
        let paths = self.text("/proc/self/cgroup")?;
        let v1 = mounts.lines().filter_map(Mount::parse).find(|mount| mount.has_controller(controller));
        let (mount, path) = match v1 {
            Some(mount) => {
                (mount, path_in(&paths, |controllers| controllers.split(',').any(|name| name == controller))?)
            }
            None => {
                let mount = mounts.lines().filter_map(Mount::parse).find(|mount| mount.kind == "cgroup2")?;
                (mount, path_in(&paths, str::is_empty)?)
            }
        };
        let own = Path::new(path).strip_prefix(mount.root).ok()?;
        let dir = self.path(mount.point).join(own);
        dir.is_dir().then_some(Cgroup { dir, unified: mount.kind == "cgroup2" })
    }

    /// CPUs that this process may use, in thousandths: its CPU set, and the quota of its own cgroup if that is less.
    #[must_use]
    pub fn cpus_given_millis(&self) -> Option<u64> {
        let list = self.field("/proc/self/status", "Cpus_allowed_list")?;
        let set = count_list(&list)?.checked_mul(1000)?;
        Some(self.quota_millis().map_or(set, |quota| quota.min(set)))
    }

    fn quota_millis(&self) -> Option<u64> {
        let cgroup = self.cgroup("cpu")?;
        let read = |name| fs::read_to_string(cgroup.dir.join(name)).ok();
        let (quota, period) = if cgroup.unified {
            let text = read("cpu.max")?;
            let (quota, period) = text.trim().split_once(' ')?;
            (quota.parse::<u64>().ok()?, period.parse::<u64>().ok()?)
        } else {
            (read("cpu.cfs_quota_us")?.trim().parse().ok()?, read("cpu.cfs_period_us")?.trim().parse().ok()?)
        };
        quota.checked_mul(1000)?.checked_div(period).filter(|&millis| millis > 0)
    }
}

struct Mount<'a> {
    root: &'a str,
    point: &'a str,
    kind: &'a str,
    options: &'a str,
}

impl<'a> Mount<'a> {
    /// A line of mountinfo: `id parent major:minor root point options optional... - type source superoptions`.
    fn parse(line: &'a str) -> Option<Self> {
        let (before, after) = line.split_once(" - ")?;
        let mut before = before.split(' ').skip(3);
        let mut after = after.split(' ');
        let (root, point, kind) = (before.next()?, before.next()?, after.next()?);
        kind.starts_with("cgroup").then(|| Self { root, point, kind, options: after.nth(1).unwrap_or("") })
    }

    fn has_controller(&self, name: &str) -> bool {
        self.kind == "cgroup" && self.options.split(',').any(|option| option == name)
    }
}

/// The path behind the first line `id:controllers:path` whose controllers fit.
fn path_in(cgroups: &str, fits: impl Fn(&str) -> bool) -> Option<&str> {
    cgroups.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        fits(controllers).then_some(path)
    })
}

/// Number of CPUs in a list such as `0-3,8`.
fn count_list(list: &str) -> Option<u64> {
    list.split(',').try_fold(0u64, |sum, part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.trim().parse::<u64>().ok()?, last.trim().parse::<u64>().ok()?);
        sum.checked_add(last.checked_sub(first)?.checked_add(1)?)
    })
}

#[cfg(test)]
pub(crate) mod fake {
    //! A fake root directory with the files that a case needs.

    use super::Host;
    use std::fs;
    use tempfile::TempDir;

    /// A fake machine.
    pub(crate) struct FakeHost(TempDir);

    impl FakeHost {
        pub(crate) fn new(files: &[(&str, &str)]) -> Self {
            let fake = Self(tempfile::tempdir().unwrap());
            files.iter().for_each(|(path, text)| fake.set(path, text));
            fake
        }

        pub(crate) fn set(&self, path: &str, text: &str) {
            let path = self.host().path(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        pub(crate) fn host(&self) -> Host {
            Host::below(self.0.path())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::fake::FakeHost;

    const V2: &str = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup rw,nsdelegate\n";
    const V1: &str = "33 31 0:30 /kubepods/pod1/c1 /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";

    #[test]
    fn given_cpus_are_the_set_or_the_quota() {
        let status = ("/proc/self/status", "Name:\tx\nCpus_allowed_list:\t0-3,8\nVmHWM:\t  2048 kB\n");
        let v2 = |max| {
            FakeHost::new(&[
                status,
                ("/proc/self/mountinfo", V2),
                ("/proc/self/cgroup", "0::/\n"),
                ("/sys/fs/cgroup/cpu.max", max),
            ])
        };
        let v1 = |quota| {
            FakeHost::new(&[
                status,
                ("/proc/self/mountinfo", V1),
                ("/proc/self/cgroup", "2:cpu,cpuacct:/kubepods/pod1/c1\n0::/\n"),
                ("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", quota),
                ("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n"),
            ])
        };
        let cases = [
            (FakeHost::new(&[status]), Some(5000)),
            (v2("max 100000\n"), Some(5000)),
            (v2("150000 100000\n"), Some(1500)),
            (v2("900000 100000\n"), Some(5000)),
            (v2("150000 0\n"), Some(5000)),
            (v1("-1\n"), Some(5000)),
            (v1("250000\n"), Some(2500)),
            (FakeHost::new(&[("/proc/self/status", "Cpus_allowed_list:\tx\n")]), None),
            (FakeHost::new(&[]), None),
        ];
        for (number, (fake, want)) in cases.iter().enumerate() {
            assert_eq!(fake.host().cpus_given_millis(), *want, "case {number}");
        }
        assert_eq!(cases[0].0.host().memory_peak_bytes(), Some(2 << 20));
        assert_eq!(cases[8].0.host().memory_peak_bytes(), None);
    }
}
