//! How much memory this process may still use: the machine's, and that of its cgroup.

use std::fs;
use std::path::{Path, PathBuf};

/// Bytes that can be allocated without swapping or being killed: the least of the kernel's `MemAvailable` and what the
/// limits of this process's cgroup and its parents (v1 or v2) leave over. `None` when neither can be read.
///
/// `root` is the file system to read `proc` and `sys` from: `/`, but for tests.
pub fn available_bytes(root: &Path) -> Option<u64> {
    let machine = fs::read_to_string(root.join("proc/meminfo")).ok().and_then(|text| {
        let kib = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
        kib.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    });
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let cgroup = groups.lines().filter_map(|line| left_in_group(root, line)).min();
    machine.into_iter().chain(cgroup).min()
}

/// What one line of /proc/self/cgroup (`id:controllers:path`) leaves over.
fn left_in_group(root: &Path, line: &str) -> Option<u64> {
    let mut fields = line.splitn(3, ':');
    let (id, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
    let (mount, limit, usage, cache) = if id == "0" && controllers.is_empty() {
        (root.join("sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file ")
    } else if controllers.split(',').any(|c| c == "memory") {
        let mount = root.join("sys/fs/cgroup/memory");
        (mount, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
    } else {
        return None;
    };
    let number = |file: PathBuf| fs::read_to_string(file).ok()?.trim().parse::<u64>().ok();
    let mut left: Option<u64> = None;
    // Inside a container the path can be that of the host; then only the mount's own directory exists.
    let mut relative = PathBuf::from(path.trim_start_matches('/'));
    loop {
        let dir = mount.join(&relative);
        if let (Some(max), Some(used)) = (number(dir.join(limit)), number(dir.join(usage))) {
            // Page cache that nobody uses is given back before anyone is killed.
            let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
            let reclaimable = stat.lines().find_map(|l| l.strip_prefix(cache)?.trim().parse::<u64>().ok()).unwrap_or(0);
            let here = max.saturating_sub(used.saturating_sub(reclaimable));
            left = Some(left.map_or(here, |l| l.min(here)));
        }
        if !relative.pop() {
            return left;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    #[test]
    fn the_least_of_machine_and_groups_counts() {
        let mem = ("proc/meminfo", "MemTotal:  100 kB\nMemAvailable:      50 kB\n");
        let none = tree(&[]);
        assert_eq!(available_bytes(none.path()), None);
        assert_eq!(available_bytes(tree(&[mem]).path()), Some(51_200));

        let v2 = tree(&[
            mem,
            ("proc/self/cgroup", "0::/pods/a\n"),
            ("sys/fs/cgroup/pods/a/memory.max", "max\n"),
            ("sys/fs/cgroup/pods/a/memory.current", "1\n"),
            ("sys/fs/cgroup/pods/memory.max", "40000\n"),
            ("sys/fs/cgroup/pods/memory.current", "30000\n"),
            ("sys/fs/cgroup/pods/memory.stat", "anon 1\ninactive_file 5000\n"),
        ]);
        assert_eq!(available_bytes(v2.path()), Some(15_000));

        let v1 = tree(&[
            mem,
            ("proc/self/cgroup", "5:cpu:/x\n4:memory:/not/mounted/here\n0::/\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "7\n"),
        ]);
        assert_eq!(available_bytes(v1.path()), Some(51_200));
    }
}
