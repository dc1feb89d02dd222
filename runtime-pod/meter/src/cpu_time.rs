//! CPU time that this run has used.
//!
//! The container's cgroup is read where this process is alone in it: it counts in nanoseconds. Where other processes
//! share the cgroup (a login session, a build machine) their work is not ours, and the process's own ticks count.

use crate::host::Host;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

/// Length of a tick of `/proc/self/stat`: `USER_HZ` is 100 on every architecture that this project builds for.
const TICK: Duration = Duration::from_millis(10);

/// Where CPU time is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CpuTime {
    /// `cpu.stat` of a v2 cgroup, in microseconds.
    CgroupV2(PathBuf),
    /// `cpuacct.usage` of a v1 cgroup, in nanoseconds.
    CgroupV1(PathBuf),
    /// `/proc/self/stat`, in ticks of 10 ms.
    Process(PathBuf),
}

impl CpuTime {
    /// The finest source that counts this run and nothing else.
    #[must_use]
    pub fn discover(host: &Host) -> Self {
        let process = Self::Process(host.path("/proc/self/stat"));
        let Some(cgroup) = host.cgroup("cpuacct") else { return process };
        let Some(stat) = host.text("/proc/self/stat") else { return process };
        let own = stat.split(' ').next().unwrap_or_default();
        let alone = fs::read_to_string(cgroup.dir.join("cgroup.procs")).is_ok_and(|procs| procs.trim() == own);
        let source = match cgroup.unified {
            true => Self::CgroupV2(cgroup.dir.join("cpu.stat")),
            false => Self::CgroupV1(cgroup.dir.join("cpuacct.usage")),
        };
        if alone && source.read().is_some() { source } else { process }
    }

    /// CPU time so far, user and system; `None` if it cannot be read.
    #[must_use]
    pub fn read(&self) -> Option<Duration> {
        let (Self::CgroupV2(path) | Self::CgroupV1(path) | Self::Process(path)) = self;
        let text = fs::read_to_string(path).ok()?;
        match self {
            Self::CgroupV2(_) => {
                let usage = text.lines().find_map(|line| line.strip_prefix("usage_usec "))?;
                Some(Duration::from_micros(usage.trim().parse().ok()?))
            }
            Self::CgroupV1(_) => Some(Duration::from_nanos(text.trim().parse().ok()?)),
            Self::Process(_) => {
                // The command name stands in parentheses and may hold blanks and parentheses itself.
                let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
                let user: u32 = fields.nth(11)?.parse().ok()?;
                let system: u32 = fields.next()?.parse().ok()?;
                Some(TICK * user + TICK * system)
            }
        }
    }

    /// One phrase for reports.
    #[must_use]
    pub fn describe(&self) -> &'static str {
        match self {
            Self::CgroupV2(_) => "CPU time of the cgroup (v2)",
            Self::CgroupV1(_) => "CPU time of the cgroup (v1)",
            Self::Process(_) => "CPU time of the process (10 ms ticks)",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::fake::FakeHost;

    const STAT: (&str, &str) = ("/proc/self/stat", "42 (a (b) c) S 1 1 1 0 -1 0 0 0 0 0 150 25 7 7 20 0 1 0 5 0 0\n");

    fn v2(procs: &str, stat: &str) -> FakeHost {
        FakeHost::new(&[
            STAT,
            ("/proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup rw\n"),
            ("/proc/self/cgroup", "0::/pod/c\n"),
            ("/sys/fs/cgroup/pod/c/cgroup.procs", procs),
            ("/sys/fs/cgroup/pod/c/cpu.stat", stat),
        ])
    }

    fn v1(procs: &str) -> FakeHost {
        FakeHost::new(&[
            STAT,
            ("/proc/self/mountinfo", "33 31 0:30 /kp/c /sys/fs/cgroup/cpuacct rw - cgroup cgroup rw,cpuacct\n"),
            ("/proc/self/cgroup", "2:cpuacct:/kp/c\n"),
            ("/sys/fs/cgroup/cpuacct/cgroup.procs", procs),
            ("/sys/fs/cgroup/cpuacct/cpuacct.usage", "1234567890\n"),
        ])
    }

    #[test]
    fn the_finest_source_that_is_ours_alone() {
        let ticks = Some(Duration::from_millis(1750));
        let cases = [
            (FakeHost::new(&[STAT]), "process", ticks),
            (v2("42\n", "usage_usec 5000001\nuser_usec 1\n"), "(v2)", Some(Duration::from_micros(5_000_001))),
            (v2("42\n43\n", "usage_usec 5000001\n"), "process", ticks),
            (v2("", "usage_usec 5000001\n"), "process", ticks),
            (v2("42\n", "garbage\n"), "process", ticks),
            (v1("42\n"), "(v1)", Some(Duration::from_nanos(1_234_567_890))),
            (v1("1\n42\n"), "process", ticks),
            (FakeHost::new(&[]), "process", None),
            (FakeHost::new(&[("/proc/self/stat", "42 (x) S 1\n")]), "process", None),
        ];
        for (number, (fake, name, want)) in cases.iter().enumerate() {
            let source = CpuTime::discover(&fake.host());
            assert!(source.describe().contains(name), "case {number}: {}", source.describe());
            assert_eq!(source.read(), *want, "case {number}");
        }
    }
}
